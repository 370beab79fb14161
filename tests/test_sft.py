"""sft.py, end to end: one loss under every layout, packed or not; LoRA merged equals unmerged; previews;
refusals."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from recipe import ROOT, metrics, recipe
from safetensors.torch import load_file
from test_bad_input import refused
from test_chat import CHATML, HELLO, TALK, write
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.chat.corpus import prepare_chat
from dtensor_llama.chat.neftune import lengths_of, uniform
from dtensor_llama.cli import parse_cli, read_launch
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.initial_weights import init_weights
from parallel import ParallelConfig, defaults
from parallel.cost import States, bytes_needed
from parallel.rules import Job

sys.path.append(str(ROOT / "recipes"))

import sft  # noqa: E402

QUESTIONS = ["add", "remove", "find the first of", "count", "sort", "reverse", "print"]


@pytest.fixture(scope="module")
def chat(inputs, tmp_path_factory) -> Path:
    """A folder with chat.jsonl, 42 conversations of one to three turns, of uneven lengths."""
    folder, records = tmp_path_factory.mktemp("chat"), []
    for i, what in enumerate(QUESTIONS * 6):
        turns = []
        for turn in range(1 + i % 3):
            turns += [
                {"role": "user", "content": f"How to {what} an item, {i}?"},
                {
                    "role": "assistant",
                    "content": f"self.{what.split()[0]}(item" + ", more" * (i * 7 % 5 + turn) + ")",
                },
            ]
        records.append({"messages": turns})
    write(folder / "chat.jsonl", records)
    return folder


def flags(inputs: Path, chat: Path, run_dir: Path, *more, steps: int = 4) -> list:
    return [
        "--model",
        inputs / "model",
        "--data.path",
        chat / "chat.jsonl",
        "--data.cache-dir",
        inputs / "cache",
        "--data.seq-len",
        256,
        "--train.steps",
        steps,
        "--train.global-batch-size",
        4,
        "--train.micro-batch-size",
        1,
        "--train.lr",
        "1e-2",
        "--train.dtype",
        "float32",
        "--train.recompute",
        "none",
        "--run-dir",
        run_dir,
        "--train.validate-every",
        2,
        "--train.answer-tokens",
        4,
        "--checkpoint.every",
        0,
        *more,
    ]


@pytest.fixture(scope="module")
def full(inputs, chat, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "full"
    ended = recipe("sft", *flags(inputs, chat, run_dir))
    assert ended.status == 0, ended
    assert (
        "42 of OpenAI messages; written with LLaMA-2's [INST] format" in ended.out
        and "validation loss" in ended.out
    )
    return run_dir


@pytest.fixture(scope="module")
def lora(inputs, chat, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    ended = recipe("sft", *flags(inputs, chat, run_dir, "--lora.rank", 4, "--checkpoint.every", 2))
    assert ended.status == 0, ended
    return run_dir


def assert_same_losses(ours: Path, expected: Path) -> None:
    for row, other in zip(metrics(ours), metrics(expected), strict=True):
        assert abs(row["loss"] - other["loss"]) < 2e-5
        assert abs(row["grad_norm"] / other["grad_norm"] - 1) < 1e-4
        assert abs(row.get("validation_loss", 0) - other.get("validation_loss", 0)) < 2e-5


LAYOUTS = [(2, []), (2, ["--parallel.tp", 2]), (2, ["--parallel.pp", 2])]
OFFLOAD = [
    "--memory.placement",
    "static",
    "--memory.resident",
    0.4,
    "--memory.stream",
    0.3,
    "--memory.cpu",
    0.3,
    "--memory.kernel",
    "blocks",
]


@pytest.mark.parametrize("ranks,more", [*LAYOUTS, (1, OFFLOAD)])
def test_full_fine_tuning_has_one_loss(inputs, chat, full, tmp_path, ranks, more):
    ended = recipe("sft", *flags(inputs, chat, tmp_path / "run", *more), ranks=ranks)
    assert ended.status == 0, ended
    assert_same_losses(tmp_path / "run", full)


@pytest.mark.parametrize(
    "ranks,more",
    [
        pytest.param(*one, marks=pytest.mark.slow)
        for one in [
            *LAYOUTS,
            (2, OFFLOAD),
            (1, ["--train.compile"]),
            (2, ["--train.compile", "--parallel.tp", 2]),
            (2, ["--train.compile", *OFFLOAD]),
        ]
    ],
)
def test_lora_has_one_loss(inputs, chat, lora, tmp_path, ranks, more):
    ended = recipe("sft", *flags(inputs, chat, tmp_path / "run", *more, "--lora.rank", 4), ranks=ranks)
    assert ended.status == 0, ended
    assert_same_losses(tmp_path / "run", lora)
    ours, expected = (
        load_file(run / "hf-adapter/adapter_model.safetensors") for run in (tmp_path / "run", lora)
    )
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("more", [[], pytest.param(["--lora.rank", 4], marks=pytest.mark.slow)])
def test_packing_does_not_change_the_loss(inputs, chat, tmp_path, more):
    """One batch is the whole data either way, so that both see the same examples in each step."""
    for name, n_sequences, how in (("packed", None, []), ("one-each", 42, ["--data.no-packing"])):
        preview = tmp_path / f"{name}.json"
        how = ["--data.validation-share", 0, *how]
        shown = recipe("sft", *flags(inputs, chat, tmp_path / "no", "--preview-json", preview, *how))
        assert shown.status == 0, shown
        sequences = json.loads(preview.read_text())
        assert n_sequences is None or len(sequences) == n_sequences
        ended = recipe(
            "sft",
            *flags(inputs, chat, tmp_path / name, "--train.global-batch-size", len(sequences), *how, *more),
        )
        assert ended.status == 0, ended
    assert_same_losses(tmp_path / "packed", tmp_path / "one-each")


def test_preview_shows_what_each_position_must_predict_and_trains_nothing(inputs, chat, tmp_path):
    ended = recipe(
        "sft",
        *flags(inputs, chat, tmp_path / "run", "--preview", 2, "--preview-json", tmp_path / "sequences.json"),
    )
    assert ended.status == 0 and not (tmp_path / "run").exists()
    assert "\x1b[1;92m self.add(item" in ended.out or "\x1b[1;92m self." in ended.out
    sequences = json.loads((tmp_path / "sequences.json").read_text())
    assert len(sequences) == 2
    for one in sequences:
        assert len(one["tokens"]) == len(one["labels"]) <= 256
        assert all(label in (-100, one["tokens"][i + 1]) for i, label in enumerate(one["labels"][:-1]))
        assert one["labels"][-1] == -100 and any(label != -100 for label in one["labels"])


def test_the_export_opens_in_transformers_with_its_template(full):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(full / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(full / "hf")
    asked = tokenizer.apply_chat_template(
        HELLO[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert (
        tokenizer.decode(asked["input_ids"][0]).endswith("[INST] Hi [/INST]")
        and model(**asked).logits.isfinite().all()
    )


def test_the_export_stops_where_the_template_ends_an_answer_too(inputs, chat, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")  # its config.json ends with 1, this template with 0
    (tmp_path / "model/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + bos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ended = recipe("sft", *flags(inputs, chat, tmp_path / "run", "--model", tmp_path / "model", steps=1))
    assert ended.status == 0, ended
    assert LlamaConfig.from_hf(tmp_path / "run/hf").eos_token_id == [1, 0]
    assert json.loads((tmp_path / "run/hf/generation_config.json").read_text())["eos_token_id"] == [1, 0]


def test_lora_merged_equals_base_and_adapter(inputs, lora):
    """Merged by hand, from the adapter's file; and by peft, where it is installed."""
    config = LlamaConfig.from_hf(inputs / "model")
    base, merged = Llama(config), Llama(config)
    load_hf(base, inputs / "model"), load_hf(merged, lora / "hf")
    adapter = load_file(lora / "hf-adapter/adapter_model.safetensors")
    settings = json.loads((lora / "hf-adapter/adapter_config.json").read_text())
    for name, weight in base.named_parameters():
        prefix = "base_model.model." + name.removesuffix(".weight")
        if prefix + ".lora_A.weight" in adapter:
            product = adapter.pop(prefix + ".lora_B.weight") @ adapter.pop(prefix + ".lora_A.weight")
            assert product.abs().max() > 1e-4  # it was trained
            weight.data += settings["lora_alpha"] / settings["r"] * product
        assert_close(merged.get_parameter(name), weight, rtol=0, atol=1e-6)
    assert not adapter  # every matrix had its place


def test_peft_opens_the_adapter(inputs, lora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(lora / "hf", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert_close(
            peft.PeftModel.from_pretrained(base, lora / "hf-adapter")(tokens).logits,
            merged(tokens).logits,
            rtol=0,
            atol=1e-4,
        )


def test_a_run_does_not_go_on_with_other_answers_in_as_many_tokens(inputs, tmp_path):
    def talks(*answers: str) -> None:
        write(tmp_path / "chat.jsonl", [{"question": "Which?", "answer": answer} for answer in answers] * 4)

    talks("the first", "the other")
    own = flags(
        inputs,
        tmp_path,
        tmp_path / "run",
        "--checkpoint.every",
        1,
        "--data.packing",
        "--data.seq-len",
        64,
        steps=1,
    )
    assert recipe("sft", *own).status == 0
    talks("the other", "the first")
    line = refused(*own, "--train.steps", 2, name="sft")
    assert "the content of --data.path is not what checkpoint" in line
    talks("the first", "the other")
    line = refused(*own, "--train.steps", 2, "--data.train-on", "all", name="sft")
    assert "the content of --data.path is not what checkpoint" in line
    assert "; --data.train-on answers -> all)" in line
    ended = recipe("sft", *own, "--train.steps", 2)
    assert ended.status == 0 and "not as the checkpoint was trained: --train.steps 1 -> 2" in ended.out, ended


def test_a_lora_run_resumes_where_it_stopped(inputs, chat, lora, tmp_path):
    shutil.copytree(lora / "checkpoints/step-00000002", tmp_path / "step-00000002")
    stored = dcp.FileSystemReader(tmp_path / "step-00000002").read_metadata().state_dict_metadata
    # no frozen weights in it
    assert all("_lora.lora_" in name for name in stored if name.startswith("model."))
    resume = ["--checkpoint.resume", tmp_path / "step-00000002"]
    ended = recipe("sft", *flags(inputs, chat, tmp_path / "run", "--lora.rank", 4, *resume))
    assert ended.status == 0 and "2 steps done" in ended.out, ended
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(lora)[2:]]
    line = refused(*flags(inputs, chat, tmp_path / "other", *resume), name="sft")
    assert "step-00000002: a LoRA checkpoint" in line and "--lora.rank" in line


def test_lora_beside_tied_embeddings_saves_adapters_only_and_knows_its_base(inputs, chat, tmp_path):
    config = replace(LlamaConfig.from_hf(inputs / "model"), tie_word_embeddings=True)
    for seed, name in enumerate(("base", "other")):
        model = Llama(config)
        init_weights(model, seed)
        save_hf(model, tmp_path / name)
        shutil.copytree(inputs / "tokenizer", tmp_path / name, dirs_exist_ok=True)

    def own(run_dir: str, *more) -> list:
        return [*flags(inputs, chat, tmp_path / run_dir), "--lora.rank", 4, "--checkpoint.every", 2, *more]

    ended = recipe("sft", *own("run", "--model", tmp_path / "base"))
    assert ended.status == 0, ended
    step, last = (tmp_path / "run/checkpoints" / name for name in ("step-00000002", "step-00000004"))
    stored = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    assert all("_lora.lora_" in name for name in stored if name.startswith("model."))
    ended = recipe("export", last, tmp_path / "out")
    assert ended.status == 0, ended
    merged = load_file(tmp_path / "run/hf/model.safetensors")
    assert_close(load_file(tmp_path / "out/model.safetensors"), merged, rtol=0, atol=0)
    line = refused(last, tmp_path / "no", "--base", tmp_path / "other", name="export")
    assert "does not hold the weights beside which the adapters" in line and not (tmp_path / "no").exists()
    for changed, said in (
        (["--model", tmp_path / "other"], "the content of --model is not"),
        (["--model", tmp_path / "base", "--random-init"], "the content of --model is not"),
        (["--model", tmp_path / "base", "--lora.rank", 8], "--lora is not"),
        (["--model", inputs / "model"], "(tie_word_embeddings True -> False)"),
    ):
        line = refused(*own("again", "--checkpoint.resume", step, *changed), name="sft")
        assert said in line and "step-00000002" in line


def test_noise_is_the_same_on_every_layout_and_changes_training(inputs, chat, full, tmp_path):
    for name, ranks, more in (("one", 1, []), ("tp", 2, ["--parallel.tp", 2])):
        ended = recipe(
            "sft",
            *flags(inputs, chat, tmp_path / name, "--train.neftune-alpha", 5, *more, steps=2),
            ranks=ranks,
        )
        assert ended.status == 0, ended
    assert_same_losses(tmp_path / "tp", tmp_path / "one")
    assert metrics(tmp_path / "one")[0]["loss"] != metrics(full)[0]["loss"]
    noise = uniform(torch.arange(200).view(2, 100), 64)
    assert (
        noise.min() >= -1 and noise.max() < 1 and abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 3) < 0.02
    )
    assert len(noise.unique()) > 12_700
    assert lengths_of(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist() == [[3, 3, 3, 2, 2, 1]]


def test_with_only_model_and_data_it_chooses_and_says_why(inputs, chat, tmp_path):
    ended = recipe(
        "sft",
        "--model",
        inputs / "model",
        "--data.path",
        chat / "chat.jsonl",
        "--data.cache-dir",
        inputs / "cache",
        "--data.overlong",
        "truncate",
        "--run-dir",
        tmp_path / "run",
        ranks=2,
    )
    assert ended.status == 0, ended
    for said in (
        "sequences of 64 tokens",
        "batch",
        "memory    tp 1 x dp 2, recompute none",
        "epochs    2",
        "CUT",
    ):
        assert said in ended.out, (said, ended.out)


def test_what_fits_only_with_its_states_on_the_host_is_not_refused_where_they_go_there(
    inputs, chat, monkeypatch
):
    """Between what weights take (4 bytes here) and what all states take (16) lies a memory that only offload
    fits."""
    tokenizer, config = load_tokenizer(inputs / "model"), LlamaConfig.from_hf(inputs / "model")
    corpus = prepare_chat([str(chat / "chat.jsonl")], tokenizer, inputs / "cache")
    layout = ParallelConfig().resolve(1)
    job = Job(config, seq_len=256)
    light, whole = (bytes_needed(job, layout, States(4, offloads=offloads)) for offloads in (True, False))
    available = int((light + whole) / 2 / 0.9)
    monkeypatch.setattr(defaults, "free_host_memory", lambda: available)

    def settle(*more):
        cfg = parse_cli(sft.SftConfig, list(map(str, flags(inputs, chat, "none", *more))))
        return sft.choose(cfg, config, corpus, tokenizer, read_launch())

    settle("--memory.placement", "auto")
    with pytest.raises(UsageError, match="placement=auto, or lora.rank=16"):
        settle()


def test_auto_keeps_the_recomputation_that_was_given_and_says_where_it_plans(inputs, chat):
    tokenizer, config = load_tokenizer(inputs / "model"), LlamaConfig.from_hf(inputs / "model")
    corpus = prepare_chat([str(chat / "chat.jsonl")], tokenizer, inputs / "cache")
    asked = flags(inputs, chat, "none", "--parallel.auto", "--train.recompute", "full")
    asked += ["--train.micro-batch-size", 1]
    _, chosen = sft.choose(
        parse_cli(sft.SftConfig, list(map(str, asked))), config, corpus, tokenizer, read_launch()
    )
    assert chosen.settings["recompute"] == "full" and not chosen.layout.auto
    assert "layouts on 1 x cpu (at the rates of" in chosen.reasons[-1]
    assert "keep micro_batch_size=1 recompute=full, as given" in chosen.reasons[-1]


def sequences_of(preview: Path) -> list[tuple[list[int], list[int]]]:
    """(tokens, those that are trained) of each sequence of a --preview-json."""
    sequences = json.loads(preview.read_text())
    return [(one["tokens"], [label for label in one["labels"] if label != -100]) for one in sequences]


def test_bad_records_are_left_out_and_listed_in_the_run_folder(inputs, chat, tmp_path):
    good = [json.loads(line) for line in (chat / "chat.jsonl").read_text().splitlines()]
    bad = [
        {"text": "no chat"},
        {"messages": [HELLO[0], HELLO[1] | {"tool_calls": [{"function": {"name": "f"}}]}], "id": 3},
    ]
    path = write(tmp_path / "chat.jsonl", [bad[0], *good, bad[1], good[0] | {"id": 1}])
    own = flags(inputs, tmp_path, tmp_path / "run", steps=1)
    assert f"{path}, line 1: unknown format" in refused(*own, name="sft")
    ended = recipe("sft", *own, "--data.bad-records", "skip")
    assert ended.status == 0, ended
    listed = tmp_path / "run/bad-records.jsonl"
    assert (
        "2 bad records: 1 unknown format, 1 a turn has 'tool_calls'" in ended.out and str(listed) in ended.out
    ), ended.out
    assert "not read" in ended.out and "id (1)" in ended.out
    assert [json.loads(line)["where"] for line in listed.read_text().splitlines()] == [
        f"{path}, line {number}" for number in (1, len(good) + 2)
    ]


def test_pretraining_leaves_out_and_lists_records_without_a_text(inputs, tmp_path):
    good = [json.loads(line) for line in (inputs / "data.jsonl").read_text().splitlines()]
    nested = [{"meta": {"id": i}, "content": {"text": record["text"]}} for i, record in enumerate(good)]
    path = write(tmp_path / "data.jsonl", [*nested, {"content": {"text": None}}, {"content": "x"}])
    own = [
        "--model",
        inputs / "model",
        "--data.path",
        path,
        "--data.cache-dir",
        tmp_path / "cache",
        "--data.seq-len",
        32,
        "--train.steps",
        1,
        "--train.global-batch-size",
        2,
        "--train.dtype",
        "float32",
        "--checkpoint.every",
        0,
        "--run-dir",
        tmp_path / "run",
        "--data.text-field",
        "content.text",
    ]
    assert f"line {len(good) + 1}: 'content.text' holds null" in refused(*own, name="pretrain")
    ended = recipe("pretrain", *own, "--data.bad-records", "skip")
    assert ended.status == 0 and "skipped   2 bad records: 1 " in ended.out, ended
    listed = [
        json.loads(line)["where"] for line in (tmp_path / "run/bad-records.jsonl").read_text().splitlines()
    ]
    assert listed == [f"{path}, line {len(good) + number}" for number in (1, 2)]


def test_all_of_an_example_can_be_trained_or_its_last_answer_only(inputs, tmp_path):
    write(
        tmp_path / "chat.jsonl", [{"messages": [*HELLO, {"role": "user", "content": "And?"}, HELLO[1]]}] * 2
    )
    trained = {}
    for train_on in ("answers", "last-answer", "all"):
        shown = recipe(
            "sft",
            *flags(
                inputs,
                tmp_path,
                tmp_path / "no",
                "--preview-json",
                tmp_path / f"{train_on}.json",
                "--data.train-on",
                train_on,
                "--data.no-packing",
                "--data.validation-share",
                0,
            ),
        )
        assert shown.status == 0, shown
        tokens, trained[train_on] = sequences_of(tmp_path / f"{train_on}.json")[0]
    assert trained["all"] == tokens[1:]
    assert trained["answers"] == 2 * trained["last-answer"] and len(trained["answers"]) < len(trained["all"])


def test_prompt_and_completion_are_trained_on_without_a_template(inputs, tmp_path):
    write(
        tmp_path / "chat.jsonl",
        [{"prompt": "def append(self", "completion": f", item{i}): pass"} for i in range(8)],
    )
    raw = ["--data.template", "none", "--data.no-packing", "--data.validation-share", 0]
    kept = ["--checkpoint.every", 1]
    ended = recipe("sft", *flags(inputs, tmp_path, tmp_path / "run", *raw, *kept, steps=1))
    assert ended.status == 0 and "written with no template" in ended.out and "--chat" not in ended.out, ended
    assert not (tmp_path / "run/hf/chat_template.jinja").exists()
    ended = recipe("export", tmp_path / "run/checkpoints/step-00000001", tmp_path / "out")
    assert ended.status == 0 and not (tmp_path / "out/chat_template.jinja").exists(), ended
    shown = recipe(
        "sft", *flags(inputs, tmp_path, tmp_path / "no", "--preview-json", tmp_path / "sequences.json", *raw)
    )
    assert shown.status == 0, shown
    tokenizer, prompt = load_tokenizer(inputs / "model"), "def append(self"
    shown = {
        tokenizer.decode(tokens)[len(prompt) :]: trained
        for tokens, trained in sequences_of(tmp_path / "sequences.json")
    }
    assert set(shown) == {f", item{i}): pass" for i in range(8)}
    assert all(
        tokenizer.decode(trained) == text and trained[-1] == tokenizer.eos_id
        for text, trained in shown.items()
    )
    write(tmp_path / "chat.jsonl", [{"messages": HELLO}])
    assert "--data.template none" in refused(
        *flags(inputs, tmp_path, tmp_path / "x", "--data.template", "none"), name="sft"
    )


# ---- refusals ----


@pytest.mark.parametrize(
    "records,said",
    [
        ([{"messages": HELLO}, {"text": "no chat"}], ["chat.jsonl, line 2", "unknown format", "messages"]),
        ([{"instruction": "Hi"}], ["chat.jsonl, line 1", "no field 'output'"]),
        ([{"messages": HELLO[::-1]}], ["line 1", "out of order"]),
        ([{"messages": HELLO[:1]}], ["line 1", "no assistant turn"]),
        ([{"prompt": "Hi", "completion": "x" * 2000}], ["--data.seq-len 256", "every example is longer"]),
        ([], ["no conversation"]),
    ],
)
def test_bad_records_are_refused(inputs, tmp_path, records, said):
    write(tmp_path / "chat.jsonl", records)
    line = refused(*flags(inputs, tmp_path, tmp_path / "run"), name="sft")
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    "more,said",
    [
        (
            ["--lora.rank", 4, "--lora.targets", "q_proj", "query"],
            ["--lora.targets query", "q_proj", "down_proj"],
        ),
        (["--lora.rank", -1], ["--lora.rank -1"]),
        (["--lora.rank", 4, "--lora.alpha", 0], ["--lora.alpha 0"]),
        (["--lora.alpha", 8], ["--lora.alpha 8.0", "--lora.rank 0", "Use --lora.rank 16"]),
        (["--lora.targets", "q_proj", "v_proj"], ["--lora.targets q_proj v_proj is for LoRA"]),
        (["--data.path", "nothing.json"], ["nothing.json"]),
        (["--train.epochs", 0], ["--train.epochs 0"]),
        (["--data.overlong", "keep"], ["--data.overlong", "truncate"]),
        (["--train.neftune-alpha", -1], ["--train.neftune-al"]),
    ],
)
def test_impossible_flags_are_refused(inputs, chat, tmp_path, more, said):
    line = refused(*flags(inputs, chat, tmp_path / "run"), *more, name="sft")
    assert all(part in line for part in said), line


def test_a_template_without_end_tokens_and_markers_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")
    # this tokenizer has no <|im_end|>: all is text
    (tmp_path / "model/chat_template.jinja").write_text(CHATML)
    write(tmp_path / "chat.jsonl", [{"messages": TALK}])
    line = refused(*flags(inputs, tmp_path, tmp_path / "run"), "--model", tmp_path / "model", name="sft")
    assert "{% generation %}" in line and "chat.jsonl, line 1" in line and "learn to stop" in line


@pytest.mark.parametrize("name", ["sft", "pretrain", "generate"])
def test_a_lora_adapter_opened_as_a_model_is_refused_in_words(inputs, chat, lora, tmp_path, name):
    more = {
        "generate": ["--prompt", "Hi"],
        "pretrain": ["--data.path", inputs / "data.jsonl", "--run-dir", tmp_path],
    }
    line = refused(
        "--model", lora / "hf-adapter", *more.get(name, flags(inputs, chat, tmp_path)[2:]), name=name
    )
    assert "a LoRA adapter, not a whole model" in line and str(inputs / "model") in line
