"""What pretrain.py and sft.py share: rules, the report of each step, resuming, folders, descriptions."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pool import run_on

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama import cli as door
from dtensor_llama.checkpoint import Checkpointer, training_state
from dtensor_llama.cli import (
    CONTENT,
    FROZEN,
    AtLeast,
    Launch,
    check_numbers,
    in_flags,
    parse_cli,
    refuse_compile_without_compiler,
    values_by_flag,
)
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.errors import listed, mismatches
from dtensor_llama.flops import Utilization, hardware_flops_per_token, model_flops_per_token
from dtensor_llama.hf_folder import Base, export
from dtensor_llama.metrics import RunLog, RunReport, read_metrics, skipped_so_far
from dtensor_llama.run import RunFacts, RunRecord, describe_run, end_run, resume, say_where_things_are
from dtensor_llama.schedule import Schedule, cosine_lr, learning_rate
from parallel import ParallelConfig
from recipes.sft import SftConfig

CPU = torch.device("cpu")
SHAPE = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


# ---- numbers and the schedule ------------------------------------------------------------------------------


@dataclass
class Train:
    steps: int = 100
    lr: float = 1.0
    min_lr: float | None = None
    warmup_steps: int | None = None
    max_grad_norm: float = math.inf


@dataclass
class Config:
    train: Train = field(default_factory=Train)
    seed: int = 0
    share: float = 0.0


RULES = [
    AtLeast("train.steps", 1),
    AtLeast("train.lr", 0, exclusive=True),
    AtLeast("train.max_grad_norm", 0, exclusive=True, may_be_infinite=True),
    AtLeast("train.min_lr", 0),
    AtLeast("seed", 0),
    AtLeast("share", 0, below=1),
]


@pytest.mark.parametrize(
    "config,said",
    [
        (Config(), None),
        (Config(Train(steps=0)), "train.steps=0 is not possible; use 1 or more."),
        (Config(Train(lr=0)), "train.lr=0 is not possible; use a number above 0."),
        (Config(Train(lr=math.inf)), "train.lr=inf is not possible"),
        (Config(Train(max_grad_norm=math.nan)), "train.max_grad_norm=nan is not possible"),
        (Config(Train(min_lr=-1)), "train.min_lr=-1 is not possible; use 0 or more."),
        (Config(seed=-1), "seed=-1 is not possible"),
        (Config(share=1), "share=1 is not possible; use 0 or more, and less than 1."),
    ],
)
def test_numbers_are_checked_by_a_table_of_rules(config, said):
    if said is None:
        check_numbers(config, RULES)
    else:
        with pytest.raises(UsageError, match=said):
            check_numbers(config, RULES)


def test_the_schedule_has_defaults_and_is_found_among_settings_by_its_flags():
    assert learning_rate(Schedule(1000, 1.0), 19) == 1.0  # the end of a warm-up of 2 %
    assert learning_rate(Schedule(1000, 1.0), 999) == 0.1  # a tenth of the peak
    assert learning_rate(Schedule(200_000, 1.0), 999) == 0.5  # of 2,000 steps of warm-up at most
    assert learning_rate(Train(6, 1.0, 0.3, 2), 4) == cosine_lr(4, 6, 2, 1.0, 0.3)
    settings = values_by_flag(
        Config(), ("train.steps", "train.lr", "train.min_lr", "train.warmup_steps", "seed")
    )
    assert [*settings] == ["--train.steps", "--train.lr", "--train.min-lr", "--train.warmup-steps", "--seed"]
    assert Schedule.named(settings) == (100, 1.0, None, None)


def test_shapes_that_do_not_match_are_listed_in_one_phrase_each():
    found = {"a": (2, 3), "b": [4], "c": None, "e": (1,)}
    wanted = {"a": [2, 3], "b": (5,), "c": (9,), "d": (1,)}
    assert mismatches(found, wanted) == ["d: missing", "b: is [4], must be [5]", "e: unexpected"]
    assert listed(["x", "y", "z"], 2) == "x; y; and 1 more" and listed(["x"]) == "x"


# ---- the report of each step -------------------------------------------------------------------------------

UTILIZATION = Utilization(SHAPE, 16, "full", step_tokens=64, n_devices=2, peak=(1e9, "a data sheet"))


def report_steps(run_dir: Path, losses: list[float], allowed: int = 0, first_step: int = 0) -> list[dict]:
    """Report steps on every rank as a recipe does; the last is validated. Returns what this rank has seen."""
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    log = RunLog(run_dir, first_step, first_step + len(losses)) if is_main else None
    report = RunReport(log, UTILIZATION, CPU, allowed)
    seen = []
    for step, loss in enumerate(losses, first_step + 1):
        report.begin_step()
        report.end_step(step, 0.1, 64 * step, torch.tensor(loss), torch.tensor(1.0))
        last = step == first_step + len(losses)
        rows = report.finished(wait=last)
        seen += [dict(row) for row in rows]
        report.write(rows, {"": 2.5, "books": 2.25} if last else None)
    if log:
        log.close()
    return seen


def test_a_row_has_everything_that_was_measured_in_the_order_of_the_file(tmp_path, capsys):
    report_steps(tmp_path, [3.0, 2.0])
    first, last = read_metrics(tmp_path / "metrics.jsonl")
    measured = [
        *("step", "loss", "grad_norm", "lr", "tokens", "device_memory_gib", "device_reserved_gib"),
        *("host_memory_gib", "step_seconds", "tokens_per_second", "mfu", "hfu"),
    ]
    assert [*first] == measured
    assert [*last] == [*measured[:9], "validation_loss", "validation_loss/books", *measured[9:]]
    assert last["tokens_per_second"] == pytest.approx(64 / last["step_seconds"])
    assert last["mfu"] == pytest.approx(
        last["tokens_per_second"] / 2 / 1e9 * model_flops_per_token(SHAPE, 16)
    )
    assert last["hfu"] / last["mfu"] == pytest.approx(
        hardware_flops_per_token(SHAPE, 16, "full") / model_flops_per_token(SHAPE, 16)
    )
    assert "step 2: validation loss 2.5000, books 2.2500\n" in capsys.readouterr().out


def report_on_two_ranks(run_dir):
    """The first run ends after two skipped steps; the resumed one may have one more in a row, not two."""
    nan = float("nan")
    seen = report_steps(run_dir, [3.0, nan, nan], allowed=3)
    resumed = report_steps(run_dir, [nan, 2.0], allowed=3, first_step=3)
    try:
        report_steps(run_dir, [nan, nan], allowed=3, first_step=3)
        refused = ""
    except UsageError as error:
        refused = str(error)
    memory = [row["host_memory_gib"] for row in seen]
    return [row.get("skipped_steps") for row in seen + resumed], memory, refused


def test_skipped_steps_are_counted_over_a_resumption_alike_on_every_rank(tmp_path):
    one, other = run_on(2, report_on_two_ranks, tmp_path)
    assert one == other  # the memory too: it is the highest of both ranks
    counts, _, refused = one
    assert counts == [None, 1, 2, 3, None]
    assert "step 5 is nan after 3 others in a row" in refused and "skip_nonfinite=4" in refused
    assert skipped_so_far(read_metrics(tmp_path / "metrics.jsonl")) == (3, 3)


# ---- resuming ----------------------------------------------------------------------------------------------

FIXED = {"--model": {"hidden_size": 32}, "--train.seed": 0, CONTENT: "3f"}
SETTINGS = {
    "--train.steps": 8,
    "--train.lr": 1e-2,
    "--train.min-lr": None,
    "--train.warmup-steps": 0,
    "--train.weight-decay": 0.1,
}


def start():
    model = Llama(SHAPE)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)


def resumed_after(folder: Path, meta: dict, record: RunRecord, asked: str = "auto"):
    """Resume from a checkpoint of step 3 with this `meta`; returns what resume returns and prints."""
    checkpoints, said = Checkpointer(folder), []
    model, optimizer = start()
    checkpoints.save(3, training_state(model, optimizer, 3, 12, meta), wait=True)
    model, optimizer = start()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    try:
        progress = resume(asked, checkpoints, model, optimizer, record, said.append)
    finally:
        checkpoints.close()
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    return progress, said


def test_a_run_resumes_with_its_own_settings_and_prints_what_has_changed(tmp_path):
    record = RunRecord(FIXED, SETTINGS, {"eos_token_id": 2})
    progress, said = resumed_after(tmp_path, record.to_meta(), record)
    assert progress == (3, 12) and said == [f"resuming from {tmp_path}/step-00000003: 3 steps done"]
    longer = RunRecord(FIXED, SETTINGS | {"--train.steps": 16}, {})
    _, said = resumed_after(tmp_path, record.to_meta(), longer)
    old, new = cosine_lr(3, 8, 0, 1e-2, 1e-3), cosine_lr(3, 16, 0, 1e-2, 1e-3)
    assert said[1:] == [
        "resuming  not as the checkpoint was trained: --train.steps 8 -> 16",
        f"resuming  the learning rate of step 4 is {new:.3g} and would have been {old:.3g} "
        f"({new / old:.3g} times)",
    ]
    assert resumed_after(tmp_path, record.to_meta(), record, "never") == ((0, 0), [])
    checkpoints = Checkpointer(tmp_path / "empty")
    assert resume("auto", checkpoints, *start(), record, print) == (0, 0)
    checkpoints.close()


def test_a_checkpoint_of_another_run_is_refused_by_name_with_both_values(tmp_path):
    record = RunRecord(FIXED, SETTINGS, {})
    for change, said in (
        ({"--train.seed": 5}, r"--train.seed is not what checkpoint .*step-00000003 was .*\(5 -> 0\)"),
        ({"--model": {"hidden_size": 64}}, r"--model is not what .*\(hidden_size 64 -> 32\)"),
        ({CONTENT: "4f"}, r"the content of --data.path is not what .*\(4f -> 3f\).*another `run_dir`"),
    ):
        with pytest.raises(UsageError, match=said):
            resumed_after(tmp_path, record.to_meta() | change, record)


def test_other_data_are_refused_with_the_settings_of_the_data_that_changed(tmp_path):
    settings = SETTINGS | {"--data.train-on": "all", "--data.bad-records": "skip"}
    record = RunRecord(FIXED, settings, {})
    saved = record.to_meta() | {
        CONTENT: "4f",
        "settings": settings | {"--data.train-on": "answers", "--train.lr": 9},
    }
    with pytest.raises(UsageError, match=r"\(4f -> 3f; --data.train-on answers -> all\); use the same"):
        resumed_after(tmp_path, saved, record)
    del saved["settings"]["--data.train-on"]  # older checkpoints have none
    with pytest.raises(UsageError, match=r"\(4f -> 3f\); use the same"):
        resumed_after(tmp_path, saved, record)


def test_the_targets_of_adapters_are_a_set_and_an_open_alpha_has_a_value(tmp_path):
    lora = {"rank": 4, "alpha": None, "targets": ["q_proj", "v_proj"]}
    saved = RunRecord(FIXED | {"--lora": lora}, SETTINGS, {}).to_meta()
    same = {"rank": 4, "alpha": 8.0, "targets": ("v_proj", "q_proj", "v_proj")}
    record = RunRecord(FIXED | {"--lora": same}, SETTINGS, {})
    assert resumed_after(tmp_path, saved, record)[0] == (3, 12)
    for change, said in (({"alpha": 4.0}, "alpha 8 -> 4.0"), ({"targets": ("q_proj",)}, "targets")):
        record = RunRecord(FIXED | {"--lora": same | change}, SETTINGS, {})
        with pytest.raises(UsageError, match=rf"--lora is not what .*\({said}"):
            resumed_after(tmp_path, saved, record)


def test_other_settings_are_refused_before_anything_starts(tmp_path):
    record, folder = RunRecord(FIXED, SETTINGS, {}), tmp_path / "checkpoints"
    resumed_after(folder, record.to_meta(), record)
    other = RunRecord(FIXED | {"--train.seed": 5}, SETTINGS, {})
    newest, empty = folder / "step-00000003", folder / "step-00000004"
    for asked in ("auto", str(newest)):
        record.refuse_early(asked, tmp_path)
        with pytest.raises(UsageError, match="--train.seed is not what .*step-00000003"):
            other.refuse_early(asked, tmp_path)
    other.refuse_early("never", tmp_path)
    other.refuse_early("auto", tmp_path / "new")
    RunRecord(other.fixed | {FROZEN: "adapters"}, SETTINGS, {}).refuse_early("auto", tmp_path)
    for name in (".metadata", "__0_0.distcp"):  # `resume` names the damage
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:100])
        other.refuse_early("auto", tmp_path)
        (newest / name).write_bytes(content)
    empty.mkdir()
    with pytest.raises(UsageError, match="files are missing. An older one: .*step-00000003"):
        record.refuse_early("auto", tmp_path)


def test_a_start_says_where_it_begins_if_that_may_surprise(tmp_path):
    record = RunRecord(FIXED, SETTINGS, {})
    done = RunRecord(FIXED, SETTINGS | {"--train.steps": 3}, {})
    checkpoints = tmp_path / "checkpoints"
    _, said = resumed_after(checkpoints, done.to_meta(), done)
    assert "no step is left" in said[1]
    _, said = resumed_after(checkpoints, record.to_meta(), record, str(checkpoints / "step-00000003"))
    assert "begins there at every start" in said[1] and len(said) == 2
    (tmp_path / "metrics.jsonl").touch()
    lost, said = Checkpointer(tmp_path / "lost"), []
    assert resume("auto", lost, *start(), record, said.append) == (0, 0)
    lost.close()
    assert "the run starts anew" in said[0]


def test_fields_of_a_config_that_only_pass_through_are_not_compared(tmp_path):
    model = {"hidden_size": 32, "other_fields": {"tag": 1}}
    record = RunRecord(FIXED | {"--model": model}, SETTINGS, {})
    assert resumed_after(tmp_path, RunRecord(FIXED, SETTINGS, {}).to_meta(), record)[0] == (3, 12)


def test_a_checkpoint_from_before_the_hash_of_the_data_is_resumed_with_a_line_that_it_is_unchecked(tmp_path):
    record = RunRecord(FIXED, SETTINGS, {})
    old = {name: value for name, value in record.to_meta().items() if name != CONTENT}
    progress, said = resumed_after(tmp_path, old, record)
    assert progress == (3, 12)
    assert said[1] == (
        "resuming  unchecked: the checkpoint does not record the content of --data.path; it must be the same "
        "as before"
    )


# ---- what a run starts from, and what it leaves ------------------------------------------------------------


def test_a_base_names_the_flag_that_is_missing_or_does_not_fit(inputs, tmp_path):
    tokenizer = load_tokenizer(inputs / "tokenizer")
    small = tmp_path / "small"
    small.mkdir()
    fields = LlamaConfig.from_hf(inputs / "model").to_hf() | {"vocab_size": 399}
    (small / "config.json").write_text(json.dumps(fields))
    for ask, said in (
        (
            lambda: Base("tiny-1m").tokenizer_path,
            "--data.tokenizer is missing, and the preset --model tiny-1m",
        ),
        (lambda: Base("llama9").tokenizer_path, "--model llama9 is neither a preset nor a folder"),
        (
            lambda: Base("tiny-1m", None, True).check(),
            "--random-init takes the shape of a Hugging Face folder",
        ),
        (
            lambda: Base(str(small), str(inputs / "tokenizer")).read_config(tokenizer),
            f"--data.tokenizer has 400 tokens and --model {small} a vocabulary of 399",
        ),
    ):
        with pytest.raises(UsageError) as refused:
            ask()
        assert said in in_flags(str(refused.value), SftConfig)


def test_a_base_gives_the_weights_the_ends_and_the_generation_config_of_its_folder(inputs, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (inputs / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"eos_token_id": [1, 5], "tag": "mine", "sep_token_id": 7}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "bad_words_ids": [[3]]}')
    tokenizer, carried = load_tokenizer(folder), {"tag": "mine", "sep_token_id": 7, "use_cache": True}

    own = Base(str(folder))
    config = own.read_config(tokenizer)
    assert own.weights == folder and own.tokenizer_path == folder
    assert config.eos_token_id == [1, 5] and config.other_fields == carried
    assert own.generation_config(config)["bad_words_ids"] == [[3]]

    other = Base(str(folder), str(inputs / "tokenizer"))  # fields that name tokens mean nothing for it
    config = other.read_config(tokenizer)
    assert config.eos_token_id == tokenizer.eos_id and config.other_fields == {
        "tag": "mine",
        "use_cache": True,
    }
    assert other.generation_config(config) == {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "temperature": 0.6,
    }
    assert Base(str(folder), None, random_init=True).weights is None
    assert Base("tiny-1m", str(inputs / "tokenizer")).weights is None


def test_an_exported_folder_has_weights_tokenizer_template_and_generation_config(inputs, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    model, tokenizer = Llama(LlamaConfig.from_hf(inputs / "model")), load_tokenizer(inputs / "tokenizer")
    export(model, tmp_path / "hf", torch.bfloat16, tokenizer, "{{ messages }}", {"temperature": 0.6})
    assert GenerationConfig.from_pretrained(tmp_path / "hf").temperature == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


# ---- the launch, and what is printed -----------------------------------------------------------------------


def test_a_launch_gives_the_device_and_refuses_compiling_without_a_compiler(monkeypatch):
    launch = Launch(rank=1, local_rank=1, world_size=2, ranks_per_host=2, attempt=0, launcher_pid=None)
    if not torch.cuda.is_available():
        assert launch.take_device() == CPU and not launch.is_main
    refuse_compile_without_compiler(False, CPU)
    monkeypatch.setattr(door.shutil, "which", lambda name: None)
    refuse_compile_without_compiler(True, torch.device("cuda"))
    with pytest.raises(UsageError) as refused:
        refuse_compile_without_compiler(True, CPU)
    assert in_flags(str(refused.value), SftConfig).startswith("--train.compile needs a C++ compiler on a CPU")
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(door.shutil, "which", lambda name: name if name == "my-compiler" else None)
    refuse_compile_without_compiler(True, CPU)


def test_a_run_is_described_in_its_config_json_and_on_the_screen(tmp_path):
    lines = []
    settings = {"model": "tiny", "train": {"micro_batch_size": 2, "dtype": "float32"}, "run_dir": "x"}
    sequences = SimpleNamespace(n_train=90, n_validation=10, seq_len=8)
    layout = ParallelConfig(cp=2, tp=2, zero_stage=1)
    facts = RunFacts(SHAPE, sequences, "9 tokens", layout, ("pp", "cp", "tp"), 4, CPU, "sdpa (a reason)")
    peak = (2e12, "a data sheet")
    describe_run(tmp_path, settings, replace(facts, n_microbatches=1), peak, [], lines.append)
    assert "; 1 microbatch of 2 sequences per rank and step" in lines[1]
    lines.clear()
    describe_run(tmp_path, settings, facts, peak, ["data      9 tokens"], lines.append)
    assert lines == [
        f"model     tiny: {SHAPE.n_parameters / 1e6:.1f}M parameters, attention sdpa (a reason)",
        "data      9 tokens",
        "layout    cp 2 x tp 2 on cpu, ZeRO stage 1; 4 microbatches of 2 sequences per rank and step",
        "numbers   float32 compute, float32 masters; MFU against 2.00 TFLOP/s (a data sheet)",
        "loss      eager: on a CPU compiling takes longer than a short run gains",
    ]
    record = json.loads((tmp_path / "config.json").read_text())
    assert [*record] == [
        *("model", "train", "run_dir", "model_config", "layout", "device", "attention_kernel"),
        *("n_parameters", "versions", "git_revision", "peak_flops_per_device", "peak_flops_source"),
        *("n_training_rows", "n_validation_rows", "corpus"),
    ]
    assert record["n_training_rows"] == 90 and record["model_config"] == SHAPE.to_hf()


def test_a_run_that_was_stopped_says_whether_its_last_step_is_saved(tmp_path, capsys):
    say_where_things_are(tmp_path, [{"loss": 1.0}], 2, 9, stopped=True)
    assert "after step 2 of 9; no checkpoint has it" in capsys.readouterr().out
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    say_where_things_are(tmp_path, [{"loss": 1.0}], 2, 9, stopped=True)
    assert "after step 2 of 9; the same command goes on from there" in capsys.readouterr().out


def test_a_run_that_ends_closes_its_log_draws_its_loss_and_prints_where_things_are(tmp_path, capsys):
    report_steps(tmp_path, [3.0, 2.0])
    (tmp_path / "hf").mkdir()
    end_run(RunLog(tmp_path, 2, 2), tmp_path, 2, 2, stopped=False, chat=True)
    printed = capsys.readouterr().out
    assert "done: 2 steps, loss 3.000 -> 2.500 (mean of the last 2)" in printed
    assert f"--model {tmp_path}/hf --chat" in printed and f"vllm serve {tmp_path}/hf" in printed
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    "arguments,line",
    [
        (
            ["--model", "x", "--train.stps", "3"],
            r"Unrecognized options: --train\.stps, 3 Did you mean --train\.steps( or --[\w.-]+)*\? ",
        ),
        (
            ["--model", "x", "--train.steps", "many"],
            r"Error parsing --train\.steps: no type matching \S+ could be instantiated from \['many'\]\. ",
        ),
        (
            ["--model", "x", "--data.overlong", "cut"],
            r"invalid choice 'cut' for argument '--data\.overlong'\. Expected one of \([\w', ]+\)\. ",
        ),
        (["--model", "x", "y"], "Unrecognized options: y "),
        ([], r"Missing from .*: --model STR .*folder with config\.json.*\(required\) "),
    ],
)
def test_an_error_of_the_command_line_parser_is_one_line_without_its_frame(arguments, line):
    """The parser, tyro, draws a box. If this fails after an update of tyro, adapt cli._one_line."""
    with pytest.raises(UsageError) as refused:
        parse_cli(SftConfig, arguments)
    assert re.fullmatch(line + "See --help for all flags.", str(refused.value)), refused.value
