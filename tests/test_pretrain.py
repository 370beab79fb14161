"""pretrain.py, end to end: one loss on any number of ranks, the same future after any stop, a folder
transformers opens."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from recipe import ROOT, Ended, metrics, module_of, recipe, run_here
from recipe import pretrain_flags as flags
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf
from dtensor_llama.cli import parse_cli
from dtensor_llama.run import CONTENT, SETTINGS, RunRecord, changed_settings, refuse_other_run

SHARED = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", ROOT.parent / "shared" / "data"))
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss")  # what must not depend on the clock


def exact(run_dir: Path) -> list[dict]:
    return [{name: row[name] for name in EXACT if name in row} for row in metrics(run_dir)]


def weights(run_dir: Path) -> dict:
    model = Llama(LlamaConfig.from_hf(run_dir / "hf"))
    load_hf(model, run_dir / "hf")
    return dict(model.named_parameters())


@pytest.mark.parametrize("ranks,micro", [(1, 4), (2, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_ranks_and_accumulation_do_not_change_the_answer(inputs, reference, tmp_path, ranks, micro):
    ended = recipe(
        "pretrain",
        *flags(inputs, tmp_path / "run", "--data.document-mask", "--train.micro-batch-size", micro),
        ranks=ranks,
    )
    assert ended.status == 0, ended
    for ours, one_process in zip(exact(tmp_path / "run"), exact(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5
        assert abs(ours["grad_norm"] / one_process["grad_norm"] - 1) < 1e-4
        assert abs(ours.get("validation_loss", 0) - one_process.get("validation_loss", 0)) < 2e-5
    for name, weight in weights(tmp_path / "run").items():
        # AdamW divides by the root of tiny second moments: where gradients all but vanish, summation order
        # shows.
        assert_close(weight, weights(reference)[name], rtol=0, atol=1e-5 if ranks == 1 else 1e-4)


def run_differing(name: str, shared: list, own: list[list]) -> Ended:
    """Run a recipe as one rank, whose node was started with flags of its own."""
    return run_here(name, [*map(str, shared), *map(str, own[int(os.environ["RANK"])])])


def test_nodes_that_were_started_differently_are_refused_on_all_ranks(inputs, tmp_path):
    shared = flags(inputs, tmp_path / "run")
    every = run_on(2, run_differing, "pretrain", shared, [[], ["--train.lr", "2e-2"]], group=False)
    assert [ended.status for ended in every] == [2, 2], every
    for ended in every:
        (line,) = ended.err.splitlines()
        assert line.startswith(
            "error: --train.lr is not the same on rank 1 as on rank 0 (0.01 -> 0.02); start all nodes with"
        )


def test_nodes_may_find_the_same_data_in_other_places(inputs, tmp_path):
    copy = tmp_path / "copy" / "data.jsonl"
    copy.parent.mkdir()
    shutil.copy(inputs / "data.jsonl", copy)
    own = [[], ["--data.path", copy, "--data.cache-dir", tmp_path / "cache"]]
    every = run_on(2, run_differing, "pretrain", flags(inputs, tmp_path / "run", steps=1), own, group=False)
    assert [ended.status for ended in every] == [0, 0], every


DIFFERENCES = [  # (flags of rank 1, its data, what all ranks are told)
    ([], "text", ""),
    (["--model", "elsewhere", "--data.path", "elsewhere"], "text", ""),
    (
        ["--train.micro-batch-size", "2"],
        "text",
        "train is not the same on rank 1 .* (micro_batch_size 1 -> 2)",
    ),
    (["--memory.placement", "auto"], "text", "memory is not the same on rank 1 .* (placement None -> auto)"),
    (["--parallel.tp", "2"], "text", "parallel is not the same on rank 1 .* (tp 1 -> 2)"),
    (["--run-dir", "elsewhere"], "text", "run_dir is not the same on rank 1 .* (run -> elsewhere)"),
    ([], "other text", f"{CONTENT} is not the same on rank 1 .* (text -> other text)"),
]


def told_about_differences() -> list[str]:
    told, rank = [], dist.get_rank()
    for own_flags, own_data, _ in DIFFERENCES:
        given = ["--model", "m", "--data.path", "d", "--run-dir", "run", *(own_flags if rank else [])]
        config = parse_cli(module_of("pretrain").PretrainConfig, given)
        record = RunRecord({CONTENT: own_data if rank else "text"}, {}, {})
        try:
            record.refuse_other_ranks(config, config.parallel)
            told.append("")
        except UsageError as refused:
            told.append(str(refused))
    return told


def test_whatever_differs_between_ranks_is_named_with_both_values():
    for told in run_on(2, told_about_differences):
        for line, (*_, said) in zip(told, DIFFERENCES, strict=True):
            expected = ".*".join(map(re.escape, said.split(".*")))
            assert bool(line) == bool(said) and re.match(expected, line), (line, said)


def test_a_run_folder_holds_what_the_readme_says(reference):
    assert {path.name for path in reference.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "hf",
        "loss.png",
    }
    rows = metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert set(rows[0]) >= set(
        "step loss grad_norm lr tokens tokens_per_second mfu hfu step_seconds device_memory_gib "
        "host_memory_gib".split()
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and rows[-1]["tokens"] == 8 * 4 * 64
    config = json.loads((reference / "config.json").read_text())
    assert config["train"]["lr"] == 0.01 and config["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(inputs, tmp_path, ranks):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert recipe("pretrain", *flags(inputs, whole), ranks=ranks).status == 0
    ended = recipe("pretrain", *flags(inputs, stopped), ranks=ranks, stop_at_step=4)
    assert ended.status == 0 and "stopped as asked" in ended.out and len(metrics(stopped)) < 8
    # as a kill in the middle of a line leaves it
    (stopped / "metrics.jsonl").open("a").write('{"step": 99, "lo')
    ended = recipe("pretrain", *flags(inputs, stopped), ranks=ranks)
    assert ended.status == 0 and "resuming from" in ended.out
    assert exact(stopped) == exact(whole)
    for name, weight in weights(stopped).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_run_resumes_on_another_number_of_ranks(inputs, reference, tmp_path):
    run_dir = tmp_path / "run"
    ended = recipe("pretrain", *flags(inputs, run_dir, "--data.document-mask"), ranks=2, stop_at_step=3)
    assert ended.status == 0 and len(metrics(run_dir)) < 8
    assert recipe("pretrain", *flags(inputs, run_dir, "--data.document-mask"), ranks=1).status == 0
    for ours, one_process in zip(exact(run_dir), exact(reference), strict=True):
        assert ours["tokens"] == one_process["tokens"] and abs(ours["loss"] - one_process["loss"]) < 2e-5


def test_kill_9_loses_at_most_what_came_after_the_last_checkpoint(inputs, reference, tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        ROOT / "recipes/pretrain.py",
        *flags(inputs, run_dir, "--data.document-mask", steps=8),
    ]
    victim = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(run_dir.glob("checkpoints/step-00000003")) and time.monotonic() < deadline:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    ended = recipe("pretrain", *command[2:])
    assert ended.status == 0 and "resuming from" in ended.out
    assert exact(run_dir) == exact(reference)


def test_a_finished_run_is_left_alone_and_more_steps_go_on_with_it(inputs, reference, tmp_path):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    before = exact(run_dir)
    assert recipe("pretrain", *flags(inputs, run_dir, "--data.document-mask")).status == 0
    assert exact(run_dir) == before
    assert recipe("pretrain", *flags(inputs, run_dir, "--data.document-mask", steps=10)).status == 0
    assert exact(run_dir)[:8] == before and len(metrics(run_dir)) == 10


def files_swapped(first: Path, second: Path) -> None:
    texts = first.read_bytes(), second.read_bytes()
    second.write_bytes(texts[0])
    first.write_bytes(texts[1])


def lines_swapped(first: Path, second: Path) -> None:
    lines = first.read_text().splitlines(keepends=True)
    first.write_text("".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(
    "change,weight", [pytest.param(files_swapped, "", marks=pytest.mark.slow), (lines_swapped, ":0.5")]
)
def test_a_run_does_not_go_on_with_other_data_of_equal_counts(inputs, tmp_path, change, weight):
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = (inputs / "data.jsonl").read_text().splitlines(keepends=True)
    files[0].write_text("".join(lines[:300]))
    files[1].write_text("".join(lines[300:]))

    def run(steps: int):
        own = flags(inputs, tmp_path / "run", "--checkpoint.every", 1, steps=steps)
        at = own.index("--data.path")
        return recipe(
            "pretrain", *own[:at], "--data.path", *(f"{file}{weight}" for file in files), *own[at + 2 :]
        )

    assert run(steps=1).status == 0
    change(*files)
    ended = run(steps=2)
    assert ended.status == 2 and "error: the content of --data.path is not what checkpoint" in ended.err, (
        ended
    )
    change(*files)  # tokenized again, to the same tokens
    ended = run(steps=2)
    assert ended.status == 0 and "resuming from" in ended.out, ended


def test_resuming_with_another_schedule_says_what_becomes_of_the_learning_rate(inputs, reference, tmp_path):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    own = flags(inputs, run_dir, "--data.document-mask", steps=10)
    ended = recipe("pretrain", *own, "--checkpoint.resume", run_dir / "checkpoints/step-00000006")
    assert ended.status == 0, ended
    said = [
        line.removeprefix("resuming  ") for line in ended.out.splitlines() if line.startswith("resuming  ")
    ]
    old, new = metrics(reference)[6]["lr"], metrics(run_dir)[6]["lr"]
    assert "begins there at every start" in said[0] and said[1:] == [
        "not as the checkpoint was trained: --train.steps 8 -> 10",
        f"the learning rate of step 7 is {new:.3g} and would have been {old:.3g} ({new / old:.3g} times)",
    ]
    ended = recipe(
        "pretrain", *flags(inputs, run_dir, steps=11), "--train.lr", 2e-2, "--train.weight-decay", 0.2
    )
    assert ended.status == 0, ended
    for part in (
        "--train.steps 10 -> 11",
        "--train.lr 0.01 -> 0.02",
        "--train.weight-decay 0.1 -> 0.2",
        "--data.document-mask True -> False",
        "learning rate of step 11 is",
    ):
        assert part in ended.out, ended
    again = recipe(
        "pretrain", *flags(inputs, run_dir, steps=11), "--train.lr", 2e-2, "--train.weight-decay", 0.2
    )
    assert again.status == 0 and "not as the checkpoint was trained" not in again.out


def test_a_checkpoint_from_before_the_hash_of_the_data_can_still_be_resumed(tmp_path):
    saved = {"--train.seed": 0, "--data.path and --data.tokenizer": "9 tokens in 1 documents"}
    now = {**saved, CONTENT: "3f", SETTINGS: {"--train.steps": 3}}
    refuse_other_run(tmp_path, saved, now)
    assert changed_settings(saved, now, 1, lambda settings: 0.1) == []
    with pytest.raises(UsageError, match="the content of --data.path is not what checkpoint .*4f -> 3f"):
        refuse_other_run(tmp_path, {**saved, CONTENT: "4f"}, now)
    with pytest.raises(UsageError, match="--data.path and --data.tokenizer are not what checkpoint "):
        refuse_other_run(tmp_path, {**saved, "--data.path and --data.tokenizer": "8 tokens"}, now)


def test_a_checkpoint_of_another_run_can_be_the_start(inputs, reference, tmp_path):
    ended = recipe(
        "pretrain",
        *flags(
            inputs,
            tmp_path / "run",
            "--data.document-mask",
            "--checkpoint.resume",
            reference / "checkpoints/step-00000006",
        ),
    )
    assert ended.status == 0 and exact(tmp_path / "run") == exact(reference)[6:]


@pytest.mark.parametrize(
    "more",
    [
        ["--train.recompute", "full"],
        ["--train.recompute", "selective"],
        pytest.param(["--train.attention", "math"], marks=pytest.mark.slow),
        ["--train.attention", "varlen"],
    ],
)
def test_recompute_and_attention_kernel_do_not_change_the_answer(inputs, reference, tmp_path, more):
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", "--data.document-mask", *more), ranks=2)
    assert ended.status == 0, ended
    for ours, one_process in zip(exact(tmp_path / "run"), exact(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_do_not_change_the_answer(inputs, reference, tmp_path, recompute):
    ended = recipe(
        "pretrain",
        *flags(
            inputs,
            tmp_path / "run",
            "--data.document-mask",
            "--train.compile",
            "--train.recompute",
            recompute,
        ),
        timeout=240,
    )
    assert ended.status == 0, ended
    for ours, one_process in zip(exact(tmp_path / "run"), exact(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5


def test_bfloat16_keeps_float32_masters_and_learns_alike(inputs, reference, tmp_path):
    ended = recipe(
        "pretrain",
        *flags(inputs, tmp_path / "run", "--data.document-mask", "--train.dtype", "bfloat16"),
        ranks=2,
    )
    assert ended.status == 0, ended
    last, expected = metrics(tmp_path / "run")[-1]["loss"], metrics(reference)[-1]["loss"]
    assert 0 < abs(last - expected) < 0.02
    # a fresh model's own
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}
    from safetensors import safe_open

    with safe_open(tmp_path / "run/hf/model.safetensors", "pt") as exported:
        assert exported.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_transformers_opens_the_export_and_both_say_the_same_greedily(reference):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(reference / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference / "hf")
    prompt = "    def add_argument(self"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    ended = recipe("generate", "--model", reference / "hf", "--prompt", prompt, "--max-new-tokens", 40)
    assert ended.status == 0 and ended.out.rstrip("\n") == tokenizer.decode(
        expected[0], skip_special_tokens=True
    ).rstrip("\n")


def test_sampling_is_seeded_and_respects_top_p(inputs):
    from dtensor_llama.generate import sample

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, 1.0, 0.79, generator).item() for _ in range(300)]
    assert set(drawn) == {0, 1} and 0.55 < drawn.count(0) / 300 < 0.70  # 0.5 : 0.3 renormalised is 0.625
    assert all(sample(logits, 1.0, 1e-9, generator).item() == 0 for _ in range(20))
    texts = [
        recipe(
            "generate",
            "--model",
            inputs / "model",
            "--prompt",
            "a",
            "--temperature",
            1,
            "--seed",
            seed,
            "--max-new-tokens",
            12,
        ).out
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.skipif(
    not (SHARED / "stories260K").exists(), reason="the trained weights stories260K are not on this machine"
)
def test_continual_pretraining_starts_from_the_weights_and_learns_the_new_text(tmp_path):
    ended = recipe(
        "pretrain",
        "--model",
        SHARED / "stories260K",
        "--data.path",
        SHARED / "corpus/tinyshakespeare.txt",
        "--data.cache-dir",
        tmp_path / "cache",
        "--data.seq-len",
        128,
        "--train.steps",
        40,
        "--train.global-batch-size",
        16,
        "--train.micro-batch-size",
        16,
        "--train.lr",
        "2e-3",
        "--train.dtype",
        "float32",
        "--train.validate-every",
        40,
        "--run-dir",
        tmp_path / "run",
    )
    assert ended.status == 0, ended
    rows = metrics(tmp_path / "run")
    assert 4.4 < rows[0]["loss"] < 5.2  # trained weights on other text: 4.70 with transformers, random is 6.2
    assert rows[-1]["validation_loss"] < 3.7


def test_benchmark_prints_one_json_line_and_reading_data_is_timed_against_synthetic_sequences(inputs):
    ended = recipe(
        "benchmark",
        "--model",
        inputs / "model",
        "--data.path",
        inputs / "data.jsonl",
        "--data.cache-dir",
        inputs / "cache",
        "--train.steps",
        3,
        "--train.global-batch-size",
        4,
        "--train.dtype",
        "float32",
        ranks=2,
    )
    assert ended.status == 0, ended
    result = json.loads(ended.out.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and 0 < result["mfu_causal"] < result["mfu"] <= result["hfu"]
    assert result["real_over_synthetic"] > 0 and result["data_wait_seconds_per_step"] < result["step_seconds"]
