"""A user's mistake gets one clear line and exit status 2: no traceback, no half-made run, nothing on disk
lost."""

import fcntl
import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from recipe import ROOT, recipe
from recipe import pretrain_flags as flags

from dtensor_llama import LlamaConfig
from dtensor_llama.cli import in_flags, run_recipe
from memory import MemoryConfig
from recipes.sft import SftConfig


def refused(*arguments, name: str = "pretrain", ranks: int = 1) -> str:
    ended = recipe(name, *arguments, ranks=ranks)
    assert ended.status == 2, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in ended.err, ended.err
    assert ended.out == ""
    return lines[0]


@pytest.mark.parametrize(
    "more,said",
    [
        (["--model", "llama9-7b"], ["--model llama9-7b", "llama2-7b"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--train.stps", 3], ["--train.stps", "--train.steps"]),
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--train.dtype", "float8"], ["--train.dtype", "bfloat16"]),
        (["--random-init", "--model", "tiny-1m"], ["--random-init", "tiny-1m"]),
        (["--train.steps", 0], ["--train.steps 0"]),
        (["--gpus", 8], ["--gpus 8 is for a dry run", "--dry-run"]),
        (["--train.lr", 0], ["--train.lr"]),
        (["--train.lr", "nan"], ["--train.lr nan"]),
        (["--train.lr", "-1e-3"], ["--train.lr"]),
        (["--train.min-lr", 1], ["--train.min-lr", "--train.lr"]),
        (["--train.max-grad-norm", 0], ["--train.max-grad-norm"]),
        (["--train.max-grad-norm", "nan"], ["--train.max-grad-norm"]),
        (["--train.weight-decay", -1], ["--train.weight-decay"]),
        (["--data.validation-share", 1.5], ["--data.validation-share"]),
        (["--data.seq-len", 0], ["--data.seq-len 0"]),
        (["--data.seq-len", 10_000_000], ["--data.seq-len", "tokens"]),
        (
            ["--train.global-batch-size", 5, "--train.micro-batch-size", 2],
            ["--train.global-batch-size 5", "4 or 6"],
        ),
        (["--train.attention", "flash"], ["--train.attention flash", "cpu", "sdpa"]),
        (
            ["--train.attention", "varlen"],
            ["--train.attention varlen", "--data.document-mask is off", "sdpa"],
        ),
        (["--parallel.dp-shard", 3], ["--parallel.dp-shard 3", "torchrun"]),
        (["--parallel.dp-shard", 0], ["--parallel.dp-shard 0"]),
        (["--data.path", "nothing/*.txt"], ["--data.path", "nothing/*.txt"]),
        (["--data.tokenizer", "nowhere"], ["nowhere"]),
        (["--checkpoint.resume", "no/such/checkpoint"], ["no/such/checkpoint"]),
    ],
)
def test_an_impossible_flag(inputs, tmp_path, more, said):
    line = refused(*[flag for flag in flags(inputs, tmp_path / "run") if flag != "--random-init"], *more)
    assert all(part in line for part in said), line


def test_a_batch_that_cannot_be_dealt_to_the_ranks(inputs, tmp_path):
    line = refused(*flags(inputs, tmp_path / "run", "--train.global-batch-size", 3), ranks=2)
    assert "--train.global-batch-size 3" in line and "2 data-parallel ranks" in line


def test_a_preset_without_a_tokenizer_and_one_with_too_large_a_tokenizer(inputs, tmp_path):
    line = refused("--model", "tiny-1m", "--data.path", inputs / "data.jsonl", "--run-dir", tmp_path / "run")
    assert "--data.tokenizer" in line
    fields = LlamaConfig.from_hf(inputs / "model").to_hf() | {"vocab_size": 399}
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(fields))
    line = refused(
        *flags(inputs, tmp_path / "run"), "--model", small, "--data.tokenizer", inputs / "tokenizer"
    )
    assert "400" in line and "399" in line


@pytest.mark.parametrize(
    "damage,said",
    [
        ("no config", ["config.json", "does not exist"]),
        ("cut config", ["config.json", "not complete JSON"]),
        ("family", ["model_type", "gemma"]),
        ("cut weights", ["model.safetensors"]),
        ("no weights", ["safetensors"]),
        ("pickle", ["pytorch_model.bin", "safetensors"]),
        ("shard", ["no such file"]),
        ("shape", ["q_proj", "[64, 64]"]),
    ],
)
def test_a_damaged_model_folder(inputs, tmp_path, damage, said):
    folder = shutil.copytree(inputs / "model", tmp_path / "model")
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "cut config":
        config.write_text(config.read_text()[:100])
    elif damage in ("family", "shape"):
        change = {"model_type": "gemma"} if damage == "family" else {"head_dim": 8}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "shard":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    else:
        weights.unlink()
        if damage == "pickle":
            (folder / "pytorch_model.bin").write_bytes(b"x")
    arguments = [a for a in flags(inputs, tmp_path / "run") if a != "--random-init"]
    line = refused(*arguments, "--model", folder)
    assert all(part in line for part in said), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("empty.txt", b"", ["empty.txt"]),
        ("binary.txt", b"abc\x00\xff\xfe\x01" * 50, ["binary.txt"]),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": "cut', ["broken.jsonl", "2"]),
        ("fieldless.jsonl", b'{"text": "fine"}\n{"body": "no"}\n', ["fieldless.jsonl", "2", "text"]),
        ("odd.doc", b"a,b", ["odd.doc", ".jsonl"]),
        ("odd.csv", b"a,b\n1,2\n", ["odd.csv", "line 2", "text"]),
    ],
)
def test_data_that_cannot_be_read_is_named_with_its_line(inputs, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    line = refused(*flags(inputs, tmp_path / "run"), "--data.path", tmp_path / name, ranks=2)
    assert all(part in line for part in said), line


def test_a_run_folder_in_use(inputs, reference, tmp_path):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert "already in use" in refused(*flags(inputs, run_dir, "--checkpoint.resume", "never"))
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another" in refused(*flags(inputs, run_dir, steps=20))
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("x")
    assert "--run-dir" in refused(*flags(inputs, tmp_path / "file"))
    blocked = tmp_path / "blocked" / "tokenizer"  # what a run cannot write in its folder is named
    blocked.parent.mkdir()
    blocked.write_text("x")
    assert f"{blocked} cannot be used (File exists)" in refused(*flags(inputs, blocked.parent))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_named_and_refused_and_nothing_is_lost(inputs, reference, tmp_path, ranks):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    newest = run_dir / "checkpoints" / "step-00000008"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert "step-00000008" in refused(*flags(inputs, run_dir, "--data.document-mask", steps=10), ranks=ranks)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    line = refused(*flags(inputs, tmp_path / "other", "--checkpoint.resume", inputs), ranks=ranks)
    assert "checkpoint" in line


@pytest.mark.parametrize(
    "change,said",
    [
        (["--data.seq-len", 32], "--data.seq-len"),
        (["--train.seed", 5], "--train.seed"),
        (["--data.validation-share", 0.1], "--data.validation-share"),
        (["--model", "tiny-1m", "--data.seq-len", 64], "--model is not what"),
    ],
)
def test_a_run_cannot_go_on_as_another_run(inputs, reference, tmp_path, change, said):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    arguments = [flag for flag in flags(inputs, run_dir, steps=10) if flag != "--random-init"]
    line = refused(*arguments, "--data.tokenizer", inputs / "tokenizer", *change)
    assert said in line and "step-00000008" in line


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--model", "llama2-7b", "--prompt", "x"], "--model llama2-7b"),
        (["--model", "MODEL", "--prompt", "x", "--temperature", -1], "--temperature"),
        (["--model", "MODEL", "--prompt", "x", "--top-p", 0], "--top-p"),
        (["--model", "MODEL", "--prompt", "x", "--max-new-tokens", 0], "--max-new-tokens"),
        (["--model", "MODEL"], "--prompt"),
        (["--model", "MODEL", "--parallel.tp", 0], "--parallel.tp 0 is not possible; use 1 or more."),
        (["--model", "BARE", "--prompt", "x"], "no tokenizer; copy a tokenizer.json"),
    ],
)
def test_generate_refuses_in_words(inputs, tmp_path, arguments, said):
    (tmp_path / "config.json").write_bytes((inputs / "model/config.json").read_bytes())
    folders = {"MODEL": inputs / "model", "BARE": tmp_path}
    line = refused(*[folders.get(argument, argument) for argument in arguments], name="generate")
    assert said in line and "tokenizer=" not in line


def test_a_typed_command_ends_with_status_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, ROOT / "recipes/pretrain.py", "--model", "llama9"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1, ended


CUDA_IS_FULL = torch.OutOfMemoryError(
    "CUDA out of memory.\nAsked for 2 GiB. If reserved but unallocated memory"
)
CPU_IS_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "name, flags, error, where, remedies",
    [
        ("pretrain", ["--model", "x"], CUDA_IS_FULL, "device", ["--train.micro-batch-size", "--parallel.tp"]),
        ("sft", ["--model", "x"], CPU_IS_FULL, "host", ["--memory.activations", "--train.recompute full"]),
        ("generate", ["--model", "x"], CPU_IS_FULL, "host", ["--batch-size or --max-new-tokens"]),
        ("export", ["x", "y"], MemoryError("x"), "host", ["--max-shard-gb"]),
    ],
)
def test_no_more_memory_is_one_line_with_what_this_recipe_can_do(
    monkeypatch, capsys, name, flags, error, where, remedies
):
    def main(cfg):
        raise error

    module = importlib.import_module(f"recipes.{name}")
    monkeypatch.setattr("sys.argv", ["recipe.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_recipe(main, getattr(module, f"{name.title()}Config"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: rank 0 has no more memory on its {where}")
    assert all(remedy in said for remedy in remedies) and "`" not in said, said
    assert "If reserved" not in said and ("--train" in said) == (name in ("pretrain", "sft"))


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    def main(cfg: MemoryConfig):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_recipe(main, MemoryConfig)


@pytest.mark.parametrize(
    "message, said",
    [
        ("tp=3 does not divide 4 heads", "--parallel.tp 3 does not divide 4 heads"),
        ("sequence_parallel=False, compile=True", "--parallel.no-sequence-parallel, --train.compile"),
        ("leave `virtual_stages` out", "leave --parallel.virtual-stages out"),
        ("lora.rank=8, `lora.rank`, rank=8", "--lora.rank 8, --lora.rank, --lora.rank 8"),
        ("model=llama and data.seq_len=5", "--model llama and --data.seq-len 5"),
        (
            "RANK=3, x.tp=3, x_tp=3, unheard_of=1, `unheard_of`",
            "RANK=3, x.tp=3, x_tp=3, unheard_of=1, `unheard_of`",
        ),
        ("/runs/seed=1/x.jsonl, line 3: no turn", "/runs/seed=1/x.jsonl, line 3: no turn"),
    ],
)
def test_a_packages_fields_are_the_recipes_flags_in_what_a_user_reads(message, said):
    assert in_flags(message, SftConfig) == said


def test_a_field_that_two_groups_have_needs_its_group():
    @dataclass
    class Group:
        rank: int = 0

    @dataclass
    class Config:
        lora: Group = field(default_factory=Group)
        other: Group = field(default_factory=Group)

    assert in_flags("rank=1, lora.rank=1", Config) == "rank=1, --lora.rank 1"
