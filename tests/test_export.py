"""A checkpoint of any layout becomes the folder that the run itself would have written, without the ranks
that wrote it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from recipe import ROOT, recipe
from recipe import pretrain_flags as flags
from safetensors.torch import load_file

from dtensor_llama import UsageError
from dtensor_llama.cli import run_recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same_folders(ours: Path, theirs: Path) -> bool:
    return contents(ours) == contents(theirs)


def test_export_equals_the_folder_the_run_wrote_byte_for_byte(reference, tmp_path):
    ended = recipe("export", reference / "checkpoints/step-00000008", tmp_path / "hf")
    assert ended.status == 0, ended
    assert same_folders(tmp_path / "hf", reference / "hf")
    # over the one before
    earlier = recipe("export", reference / "checkpoints/step-00000003", tmp_path / "hf")
    assert earlier.status == 0 and not same_folders(tmp_path / "hf", reference / "hf")


@pytest.mark.parametrize(
    "inside,named",
    [
        ("checkpoints", "step-00000008"),
        ("checkpoints/step-00000008", "."),
        ("hf", "../checkpoints/step-00000008"),
        (".", "checkpoints/step-00000008/"),
    ],
)
def test_a_checkpoint_is_exported_from_whatever_folder_it_is_named(
    reference, tmp_path, monkeypatch, inside, named
):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    monkeypatch.chdir(run_dir / inside)
    monkeypatch.setattr("sys.argv", ["export.py", named, str(tmp_path / "out")])
    sys.path.insert(0, str(ROOT / "recipes"))
    import export

    run_recipe(export.main, export.ExportConfig)
    assert same_folders(tmp_path / "out", reference / "hf")


def test_the_folder_of_a_checkpoint_may_lie_at_the_root_of_the_file_system(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "recipes"))
    import export

    def opened(path):
        raise UsageError(f"{path} was opened")

    monkeypatch.setattr(export, "SavedWeights", lambda path: None)
    monkeypatch.setattr(export, "read_run", opened)
    with pytest.raises(UsageError, match="^/ was opened"):
        export.main(export.ExportConfig("/step-00000008", str(tmp_path / "out")))


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallel.tp", 2, "--train.dtype", "bfloat16"],
        pytest.param(
            ["--parallel.pp", 2, "--parallel.tp", 2, "--train.dtype", "bfloat16"], marks=pytest.mark.slow
        ),
        pytest.param(["--parallel.dp-replicate", 2, "--parallel.dp-shard", 2], marks=pytest.mark.slow),
    ],
)
def test_what_many_ranks_wrote_one_process_exports(inputs, tmp_path, layout):
    ranks = 4 if "--parallel.pp" in layout or "--parallel.dp-shard" in layout else 2
    assert recipe("pretrain", *flags(inputs, tmp_path / "run", *layout, steps=2), ranks=ranks).status == 0
    ended = recipe("export", tmp_path / "run/checkpoints/step-00000002", tmp_path / "hf")
    assert ended.status == 0, ended
    assert same_folders(tmp_path / "hf", tmp_path / "run/hf")


def test_it_never_holds_more_than_one_file_and_writes_the_dtype_asked_for(reference, tmp_path):
    ended = recipe(
        "export",
        reference / "checkpoints/step-00000008",
        tmp_path / "hf",
        "--max-shard-gb",
        1e-4,
        "--dtype",
        "bfloat16",
    )
    assert ended.status == 0, ended
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(reference / "hf/model.safetensors")
    assert len(set(index.values())) > 2 and set(index) == set(whole)
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "hf" / file)[name], whole[name].bfloat16())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_alone_needs_only_a_tokenizer_and_a_dtype(inputs, reference, tmp_path):
    alone = shutil.copytree(reference / "checkpoints/step-00000008", tmp_path / "a/b/moved")
    for more, said in (((), "--dtype is missing"), (("--dtype", "float32"), "name it with --tokenizer")):
        ended = recipe("export", alone, tmp_path / "hf", *more)
        assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    ended = recipe(
        "export", alone, tmp_path / "hf", "--dtype", "float32", "--tokenizer", inputs / "tokenizer"
    )
    assert ended.status == 0 and same_folders(tmp_path / "hf", reference / "hf")
    assert f"step 8 of {alone}: " in ended.out, ended


def test_what_cannot_be_exported_is_said_in_a_line(reference, tmp_path):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    checkpoint, out = run_dir / "checkpoints/step-00000008", tmp_path / "out"
    damaged = next((run_dir / "checkpoints/step-00000006").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for arguments, said in (
        ((tmp_path / "none", out), "no such folder"),
        ((run_dir, out), "not a checkpoint; name one inside it, like checkpoints/step-00000008"),
        ((run_dir / "checkpoints", out), "name one inside it"),
        ((damaged.parent, out), "An older one: "),
        ((checkpoint, run_dir), "holds the checkpoint itself"),
        ((checkpoint, checkpoint / "hf"), "is a checkpoint, which its run may delete"),
        ((checkpoint, damaged.parent), "is a checkpoint, which its run may delete"),
        ((checkpoint, out, "--max-shard-gb", 0), "--max-shard-gb 0"),
        ((checkpoint, out, "--tokenizer", tmp_path / "none"), "there is no such file or folder"),
        ((checkpoint, out, "--tokenizer", large_tokenizer(tmp_path)), "has 5000 tokens"),
        ((checkpoint, out, "--base", tmp_path), "--base"),
        ((checkpoint, run_dir / "config.json" / "hf"), "Not a directory"),
    ):
        ended = recipe("export", *arguments)
        assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    for settings, said in (
        ({"train": None}, "train is None"),
        ({"data": []}, "data is []"),
        ({"train": {"dtype": "int8"}}, "train.dtype is 'int8'; name one with --dtype"),
    ):
        (run_dir / "config.json").write_text(json.dumps(settings))
        ended = recipe("export", checkpoint, out)
        assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert not out.exists()


def large_tokenizer(folder: Path) -> Path:
    """Write a tokenizer.json of more words than the model of the fixture has rows."""
    words = {f"word{i}": i for i in range(5000)}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    words_only.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_run_that_never_ended_is_exported_with_its_tokenizer_though_what_it_was_given_is_gone(
    inputs, reference, tmp_path
):
    given = shutil.copytree(inputs / "model", tmp_path / "model")
    own = flags(inputs, tmp_path / "run", "--data.document-mask", "--checkpoint.every", 1, steps=10_000)
    own[own.index("--model") + 1] = given
    assert recipe("pretrain", *own, stop_at_step=1).status == 0
    run_dir = (tmp_path / "run").rename(tmp_path / "kept")
    shutil.rmtree(given)
    assert not (run_dir / "hf").exists()
    ended = recipe("export", next((run_dir / "checkpoints").glob("step-*")), tmp_path / "hf")
    assert ended.status == 0, ended
    ours, theirs = contents(tmp_path / "hf"), contents(reference / "hf")
    assert ours.keys() == theirs.keys() and all(
        ours[name] == theirs[name] for name in ours if name.startswith("tokenizer")
    )


def test_a_tokenizer_in_the_run_folder_is_left_as_it_is(inputs, tmp_path):
    tokenizer = shutil.copytree(inputs / "tokenizer", tmp_path / "run/tokenizer")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tokenizer.iterdir()}
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", "--data.tokenizer", tokenizer, steps=1))
    assert ended.status == 0, ended
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tokenizer.iterdir()} == before


def chat_run(inputs, tmp_path, *more) -> Path:
    """A short run of sft.py on a few conversations."""
    pytest.importorskip("dtensor_llama.chat.lora")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"self.{i}"},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    ended = recipe(
        "sft",
        "--model",
        inputs / "model",
        "--data.path",
        tmp_path / "chat.jsonl",
        "--data.cache-dir",
        tmp_path / "cache",
        "--data.seq-len",
        64,
        "--train.steps",
        2,
        "--train.global-batch-size",
        2,
        "--train.micro-batch-size",
        1,
        "--train.lr",
        "1e-2",
        "--train.dtype",
        "bfloat16",
        "--train.validate-every",
        0,
        "--train.recompute",
        "none",
        "--checkpoint.every",
        1,
        "--run-dir",
        tmp_path / "run",
        *more,
        ranks=2,
    )
    assert ended.status == 0, ended
    return tmp_path / "run"


SAMPLING = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "max_length": 99,
    "suppress_tokens": [7],
    "pad_token_id": 3,
}


def model_with_sampling(inputs, tmp_path, content=None) -> Path:
    folder = shutil.copytree(inputs / "model", tmp_path / "base")
    content = (
        json.dumps({"_from_model_config": True, "eos_token_id": [5, 6], **SAMPLING})
        if content is None
        else content
    )
    (folder / "generation_config.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(
            ["--memory.placement", "static", "--memory.cpu", 1, "--memory.resident", 0, "--memory.stream", 0],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_generation_config_of_the_base_is_carried_on_with_every_end(inputs, tmp_path, more):
    from transformers import GenerationConfig

    own = [flag for flag in flags(inputs, tmp_path / "run", *more, steps=1) if flag != "--random-init"]
    base = model_with_sampling(inputs, tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"tag": {"kept": True}}
    (base / "config.json").write_text(json.dumps(config))
    own[own.index("--model") + 1] = base
    assert recipe("pretrain", *own).status == 0
    assert json.loads((tmp_path / "run/hf/config.json").read_text())["tag"] == {"kept": True}
    theirs = GenerationConfig.from_pretrained(tmp_path / "run/hf")
    assert {name: getattr(theirs, name) for name in SAMPLING} == SAMPLING
    assert theirs.eos_token_id == [5, 6, 1] and theirs.bos_token_id == 0
    ended = recipe("export", tmp_path / "run/checkpoints/step-00000001", tmp_path / "hf")
    assert ended.status == 0 and same_folders(tmp_path / "hf", tmp_path / "run/hf")


def test_with_another_tokenizer_only_settings_that_name_no_token_are_carried_on():
    from dtensor_llama import LlamaConfig
    from dtensor_llama.generation_config import generation_config

    base = {"eos_token_id": [5, 6], "max_new_tokens": 9, "bad_words_ids": [[3]], **SAMPLING}
    config = LlamaConfig(eos_token_id=2)
    made = generation_config(base, config, same_tokens=False)
    assert made == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_length": 99,
    }
    assert generation_config({}, config, same_tokens=True) == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert generation_config({"eos_token_id": 2}, config, same_tokens=True)["eos_token_id"] == 2


@pytest.mark.parametrize(
    "content,said", [("{", "not complete JSON"), ("[]", "list"), ('{"eos_token_id": "</s>"}', "eos_token_id")]
)
def test_a_damaged_generation_config_is_refused_before_training_and_generation(
    inputs, tmp_path, content, said
):
    folder = model_with_sampling(inputs, tmp_path, content)
    own = [flag for flag in flags(inputs, tmp_path / "run") if flag != "--random-init"]
    own[own.index("--model") + 1] = folder
    for ended in (recipe("pretrain", *own), recipe("generate", "--model", folder, "--prompt", "x")):
        assert ended.status == 2 and "generation_config.json" in ended.err and said in ended.err, ended
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--lora.rank", 4]])
def test_fine_tuned_and_merged_weights_are_exported_with_their_template(inputs, tmp_path, more):
    (tmp_path / "base").mkdir()
    base = model_with_sampling(inputs, tmp_path / "base")
    run_dir = chat_run(inputs, tmp_path, "--model", base, *more)
    generation = json.loads((run_dir / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == [5, 6, 1] and generation["temperature"] == 0.6
    for number in range(3):  # without hf/, as of a run that died; then the tokenizer is that of --model
        ended = recipe("export", run_dir / "checkpoints/step-00000002", tmp_path / f"hf-{number}")
        assert ended.status == 0, ended
        (run_dir / "hf").rename(tmp_path / "kept") if number == 0 else shutil.rmtree(
            run_dir / "tokenizer", number == 2
        )
        assert same_folders(tmp_path / f"hf-{number}", tmp_path / "kept")
    if more:
        asked = [run_dir / "checkpoints/step-00000002", tmp_path / "parts", "--max-shard-gb", "0.00003"]
        assert recipe("export", *asked).status == 0
        assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
        settings = json.loads((run_dir / "config.json").read_text()) | {"model": "gone"}
        (run_dir / "config.json").write_text(json.dumps(settings))
        ended = recipe(
            "export",
            run_dir / "checkpoints/step-00000002",
            tmp_path / "out",
            "--tokenizer",
            inputs / "tokenizer",
        )
        assert ended.status == 2 and "holds LoRA adapters" in ended.err and "--base" in ended.err
