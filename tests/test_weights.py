"""Hugging Face weights in and out: bitwise, sharded, slice by slice, and never half a model on disk."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dtensor_llama.weights as weights
from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.model import init_weights
from dtensor_llama.weights import batches, hf_parameters, local_boxes, plan_files, writers

DATA = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
# 50 rows over 4 ranks are 13, 13, 13, 11; over 3: 17, 17, 16
SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def llama(seed=0, dtype=torch.float32, **changes) -> Llama:
    model = Llama(LlamaConfig(**{**SHAPE, **changes}))
    init_weights(model, seed)
    with torch.no_grad():  # norms too: init gives them all ones, which hides an exchange
        for i, param in enumerate(model.parameters()):
            if param.ndim == 1:
                param.copy_(torch.linspace(seed + i, seed + i + 1, param.numel()))
    return model.to(dtype)


def laid_out(model: Llama, layout: str) -> Llama:
    """plain, fsdp, hsdp (2 replicas), tp, fsdp+tp: the placements that training uses, on all ranks of the
    group."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    if "tp" in layout:
        mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.model.layers:
            parallelize_module(
                block,
                mesh["tp"],
                {
                    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
                    "self_attn.o_proj": RowwiseParallel(),
                    **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
                    "mlp.down_proj": RowwiseParallel(),
                },
            )
        mesh = mesh["dp"]
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "fsdp":
        mesh = init_device_mesh("cpu", (n,))
    if "fsdp" in layout or layout == "hsdp":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(model) -> dict[str, torch.Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in hf_parameters(model).items()
    }


def assert_same(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def read_by_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


# ---- one process ----


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise_for_one_file_or_many(tmp_path, tied, dtype, max_shard_bytes):
    model, other = (llama(seed, dtype, tie_word_embeddings=tied) for seed in (1, 2))
    save_hf(model, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    load_hf(other, tmp_path / "hf")
    assert_same(whole(other), whole(model))
    assert (tmp_path / "hf" / weights.INDEX).exists() == (max_shard_bytes < 10**9)
    assert_same(read_by_safetensors(tmp_path / "hf"), whole(model))


def test_dtype_of_the_file_is_chosen_and_config_says_it(tmp_path):
    model = llama(dtype=torch.float32)
    save_hf(model, tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), whole(model.to(torch.bfloat16)))
    with pytest.raises(UsageError, match="cannot be saved as torch.int8; dtype is one of"):
        save_hf(model, tmp_path / "other", dtype=torch.int8)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_loading_converts_dtype_as_copying_does(tmp_path, stored, held):
    model, other = llama(seed=1), llama(seed=2, dtype=held)
    save_hf(model, tmp_path / "hf", dtype=stored)
    load_hf(other, tmp_path / "hf")
    assert_same(whole(other), {name: value.to(stored).to(held) for name, value in whole(model).items()})


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "head_dim": 16}]
)
def test_transformers_opens_the_folder_and_gives_equal_logits(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model, tokens = llama(seed=3, **changes), torch.arange(24).view(2, 12)
    save_hf(model, tmp_path / "hf", max_shard_bytes=30_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()) and theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.bos_token_id == 1
    with torch.no_grad():
        # Different kernels sum in another order; logits are of order 1.
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_a_transformers_model_loads_and_saves_as_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    load_hf(ours, tmp_path / "theirs")
    assert_same(whole(ours), whole(theirs))
    save_hf(theirs, tmp_path / "ours")
    assert_same(whole(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), whole(theirs))


def test_the_generation_config_of_a_transformers_model_is_saved_as_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    theirs.generation_config.update(do_sample=True, temperature=0.6, eos_token_id=[2, 7])
    save_hf(theirs, tmp_path / "hf")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (again.do_sample, again.temperature, again.eos_token_id) == (True, 0.6, [2, 7])


def test_a_generation_config_that_is_given_is_saved_and_not_that_of_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).generation_config
    theirs.update(do_sample=True, temperature=0.6)
    model = llama()
    for number, given in enumerate((theirs, {"temperature": 0.5})):
        save_hf(model, tmp_path / str(number), generation=given)
        saved = transformers.GenerationConfig.from_pretrained(tmp_path / str(number))
        assert saved.temperature == (0.6, 0.5)[number]


def test_fields_of_a_config_that_do_not_concern_the_arithmetic_are_carried_on(tmp_path):
    save_hf(llama(), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    carried = {"use_cache": False, "pretraining_tp": 2, "tag": {"deep": [1]}, "sep_token_id": None}
    contradicts = {
        "torch_dtype": "float16",
        "_name_or_path": "owner/base",
        "transformers_version": "4.31.0",
        "auto_map": {"AutoModelForCausalLM": "code.py"},
        "rope_scaling": None,
    }
    before = json.loads(config.read_text())
    config.write_text(json.dumps(before | carried | contradicts))
    model = Llama(LlamaConfig.from_hf(tmp_path / "base"))
    save_hf(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved == before | carried
    pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert LlamaConfig(**through_json(model.config)).to_hf() == model.config.to_hf()


def through_json(config: LlamaConfig) -> dict:
    """The fields of a config as a checkpoint has them: through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.skipif(not (DATA / "stories260K").exists(), reason="needs shared/data/stories260K")
def test_trained_stories260k_loads_and_gives_the_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    model, tokens = Llama(LlamaConfig.from_hf(DATA / "stories260K")), torch.tensor([[1, 403, 407, 261, 378]])
    load_hf(model, DATA / "stories260K")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DATA / "stories260K")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_names_do_not_show_compiling():
    model = llama()
    names = [*hf_parameters(model)]
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert [*hf_parameters(model)] == names


# ---- what is refused ----


def cut_file(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def remove_shards(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()


def edit_tensors(folder, change):
    path = next(folder.glob("model-00001-of-*"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGE = {
    "cut file": (cut_file, [r"00001-of-00003.safetensors: header says \d+ bytes, file has \d+"]),
    "cut header": (cut_header, ["00001-of-00003.safetensors: unreadable header"]),
    "garbage": (
        lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(os.urandom(999)),
        ["unreadable header"],
    ),
    "empty": (
        lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(b""),
        ["unreadable header.*0 bytes"],
    ),
    "lfs": (
        lambda f: (f / "model-00002-of-00003.safetensors").write_text("version https://git-lfs"),
        ["git lfs pull"],
    ),
    "shards missing": (
        remove_shards,
        ["00002-of-00003.safetensors: no such file", "00003-of-00003.safetensors: no"],
    ),
    "tensor lost": (
        lambda f: edit_tensors(f, lambda t: t.pop(NORM)),
        [f"{NORM}: in {weights.INDEX} but not in model"],
    ),
    "several at once": (
        lambda f: edit_tensors(
            f,
            lambda t: (
                t.pop(NORM),
                t.update(
                    {
                        UP: torch.zeros(7, 3),
                        "model.layers.0.mlp.down_proj.weight": torch.zeros(32, 48, dtype=torch.int8),
                        "model.layers.0.self_attn.q_proj.bias": torch.zeros(32),
                    }
                ),
            ),
        ),
        [
            f"{NORM}: in",
            rf"{UP}: is \[7, 3\], must be \[48, 32\]",
            "down_proj.weight: dtype I8, only F32, BF16, F16",
            "q_proj.bias: unexpected",
        ],
    ),
    "index": (lambda f: (f / weights.INDEX).write_text("{"), ["not an index"]),
    "empty index": (
        lambda f: (f / weights.INDEX).write_text('{"weight_map": {}}'),
        ["embed_tokens.weight: missing"],
    ),
    "index out of the folder": (
        lambda f: (f / weights.INDEX).write_text(
            json.dumps({"weight_map": {NORM: "../model-00009-of-00003.safetensors"}})
        ),
        ["model-00009-of-00003.safetensors: no such file"],
    ),
    "index without map": (lambda f: (f / weights.INDEX).write_text("[]"), ["not an index"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_listed_in_one_line_and_nothing_is_loaded(tmp_path, case):
    harm, said = DAMAGE[case]
    save_hf(llama(seed=1), tmp_path / "hf", max_shard_bytes=32_000)
    harm(tmp_path / "hf")
    model = llama(seed=2)
    before = whole(model)
    with pytest.raises(UsageError) as refused:
        load_hf(model, tmp_path / "hf")
    assert "\n" not in str(refused.value) and str(tmp_path / "hf") in str(refused.value)
    for part in said:
        refused.match(part)
    assert_same(whole(model), before)


def test_weights_of_a_larger_or_smaller_model_are_listed_up_to_twenty(tmp_path):
    save_hf(llama(num_hidden_layers=6), tmp_path / "six")
    save_hf(llama(num_hidden_layers=1), tmp_path / "one")
    with pytest.raises(UsageError, match=r"model.layers.2.*: unexpected.*and 16 more") as refused:
        load_hf(llama(), tmp_path / "six")
    assert str(refused.value).count("unexpected") == 20
    with pytest.raises(UsageError, match="model.layers.1.self_attn.q_proj.weight: missing"):
        load_hf(llama(), tmp_path / "one")


def test_derived_tensors_of_old_files_and_the_head_of_a_tied_model_are_skipped(tmp_path):
    model, other = (llama(seed, tie_word_embeddings=True) for seed in (1, 2))
    save_hf(model, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    load_hf(other, tmp_path / "hf")
    assert_same(whole(other), whole(model))


@pytest.mark.parametrize(
    "files,said",
    [
        ([], "it has no weights at all"),
        (["pytorch_model.bin"], "it has pytorch_model.bin. Only safetensors"),
        (["consolidated.00.pth"], "consolidated.00.pth"),
        (["model.gguf"], "model.gguf"),
        (["x.pt"], "x.pt"),
        (
            ["model-00001-of-00002.safetensors"],
            "no model.safetensors.index.json; it has model-00001-of-00002",
        ),
    ],
)
def test_only_safetensors_are_opened(tmp_path, files, said):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        load_hf(llama(), tmp_path)


def test_no_folder_and_parameters_on_meta_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_hf(llama(), tmp_path / "nowhere")
    save_hf(llama(), tmp_path / "hf")
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SHAPE))
    with pytest.raises(UsageError, match=r"embed_tokens.weight is on the meta device.*to_empty"):
        load_hf(model, tmp_path / "hf")
    with pytest.raises(UsageError, match=r"embed_tokens.weight is on the meta device, without values"):
        save_hf(model, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


def test_weights_of_other_types_and_of_another_module_are_refused(tmp_path):
    save_hf(llama(), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    with pytest.raises(UsageError, match=r"weight: missing; bias: missing;.*config.json"):
        load_hf(torch.nn.Linear(2, 2), tmp_path / "hf")
    doubles = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(doubles, file)
    with pytest.raises(UsageError, match="dtype F64, only F32, BF16, F16 are read.*in one of the types"):
        load_hf(llama(), tmp_path / "hf")


def test_a_target_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for target in ("file", "here", "here/deeper"):
        with pytest.raises(UsageError, match="cannot be replaced"):
            save_hf(llama(), tmp_path / target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UsageError, match="about .* MB are needed and 0.0 MB are free, beside what is there"):
        save_hf(llama(), tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]


# ---- the folder is replaced as a whole ----


def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path):
    folder = tmp_path / "hf"
    save_hf(llama(seed=1), folder, max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.md").write_text("mine")
    save_hf(llama(seed=2), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sub",
        "tokenizer.json",
    ]
    assert (folder / "sub" / "notes.md").read_text() == "mine"
    assert_same(load_file(folder / "model.safetensors"), whole(llama(seed=2)))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def die_at_file_operation(number: int):
    """Kill -9 this process just before it opens, renames, links, removes ... for the number-th time from
    now."""
    left = iter(range(number))

    def die(event, args):
        if event.startswith(("os.", "open", "shutil.")) and event != "os.kill" and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)


def save_and_die_everywhere(folder):
    """Save model 2 over model 1 again and again, killed at the 1st, 2nd, ... file operation, until a save
    survives."""
    folder, one, two = Path(folder), llama(seed=1), llama(seed=2)
    rounds = 0
    save_hf(one, folder)
    (folder / "tokenizer.json").write_text("tokens")  # must outlive all of it
    while True:
        save_hf(one, folder, max_shard_bytes=30_000)
        child = os.fork()
        if child == 0:
            die_at_file_operation(rounds)
            save_hf(two, folder, max_shard_bytes=30_000)
            os.kill(os.getpid(), signal.SIGTERM)
        status = os.waitpid(child, 0)[1]
        if folder.exists():
            assert (folder / "tokenizer.json").read_text() == "tokens"
            held = read_by_safetensors(folder)
            assert held.keys() == json.loads((folder / weights.INDEX).read_text())["weight_map"].keys()
            assert any(
                all(torch.equal(held[name], value) for name, value in whole(model).items())
                for model in (one, two)
            )
        else:
            assert (folder.parent / f".{folder.name}.replaced").exists()
        if os.WTERMSIG(status) == signal.SIGTERM:
            print(f"survived after {rounds} kills")
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        rounds += 1


def test_kill_at_any_file_operation_of_a_save_leaves_a_whole_model(tmp_path):
    script = "import sys, test_weights as t; t.save_and_die_everywhere(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "hf"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) > 30


# ---- sharded ----


def load_save_and_count(layout, source, target, dtype):
    """Load into a differently filled model, save it again: (bitwise equal?, bytes read, bytes held, bytes
    written)."""
    model = laid_out(llama(seed=2, dtype=dtype), layout)
    moved = {"read": 0, "written": 0}
    preadv, pwrite = os.preadv, os.pwrite

    def counting_preadv(*args):
        moved["read"] += (got := preadv(*args))
        return got

    def counting_pwrite(*args):
        moved["written"] += (done := pwrite(*args))
        return done

    try:
        # runs are cut too
        os.preadv, os.pwrite, weights.STAGING_BYTES = counting_preadv, counting_pwrite, 1000
        load_hf(model, source)
        save_hf(model, target, max_shard_bytes=20_000)
    finally:
        os.preadv, os.pwrite, weights.STAGING_BYTES = preadv, pwrite, 32 << 20
    expected = whole(llama(seed=1, dtype=dtype))
    equal = all(torch.equal(value, expected[name]) for name, value in whole(model).items())
    held = sum(
        local.numel() * local.itemsize for param in model.parameters() for _, _, local in local_boxes(param)
    )
    return equal, moved["read"], held, moved["written"]


@pytest.mark.parametrize(
    "ranks,layout,dtype",
    [
        (2, "plain", torch.float32),
        (2, "fsdp", torch.float32),
        (2, "fsdp", torch.bfloat16),
        (3, "fsdp", torch.float32),
        (2, "tp", torch.float32),
        (4, "fsdp+tp", torch.float32),
        (4, "hsdp", torch.float32),
    ],
)
def test_any_layout_reads_only_its_slices_and_writes_the_bytes_of_one_process(tmp_path, ranks, layout, dtype):
    save_hf(llama(seed=1, dtype=dtype), tmp_path / "one", max_shard_bytes=20_000)
    results = run_on(ranks, load_save_and_count, layout, tmp_path / "one", tmp_path / "many", dtype)
    for equal, read, held, _ in results:
        assert equal and read == held
    total = sum(value.numel() * value.itemsize for value in whole(llama(dtype=dtype)).values())
    assert sum(written for *_, written in results) == total  # of replicas one is written
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")


def boxes_match_the_whole():
    """For layouts with uneven shards and several mesh axes: each box is where the whole tensor has those
    values."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    count = 0
    for shape in [(8, 6), (7, 5), (3, 2), (1, 9), (10,), (2, 3, 5)]:
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for first in kinds:
            for second in kinds:
                for offsets, sizes, local in local_boxes(distribute_tensor(tensor, mesh, [first, second])):
                    assert tuple(local.shape) == sizes and local.numel()
                    there = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                    assert torch.equal(local, there)
                    count += 1
    model = laid_out(llama(seed=1), "fsdp+tp")
    assert any("_Strided" in repr(param.placements) for param in model.parameters())
    for name, value in whole(llama(seed=1)).items():
        for offsets, sizes, local in local_boxes(hf_parameters(model)[name]):
            assert torch.equal(
                local, value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            ), name
            count += 1
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    apart = DTensor.from_local(
        torch.zeros(16, 32), mesh, [q_proj.placements[0], Replicate()], run_check=False
    )
    with pytest.raises(ValueError, match="not one box a rank"):
        local_boxes(apart)
    meta = distribute_tensor(torch.empty(8, 4, device="meta"), mesh["tp"], [Shard(0)])
    assert local_boxes(meta)[0][2].is_meta
    return count


def test_local_boxes_are_where_the_values_of_the_whole_tensor_are():
    assert min(run_on(4, boxes_match_the_whole)) > 60
    plain = torch.zeros(3, 4, requires_grad=True)
    ((offsets, sizes, view),) = local_boxes(plain)
    assert (
        (offsets, sizes) == ((0, 0), (3, 4))
        and view.data_ptr() == plain.data_ptr()
        and not view.requires_grad
    )
    assert local_boxes(torch.zeros(0, 4)) == []


def refusals(folder, target):
    model, said = laid_out(llama(seed=2), "fsdp"), []
    for attempt in (lambda: load_hf(model, folder), lambda: save_hf(model, target)):
        if dist.get_rank() == 1:
            os.pwrite = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        try:
            attempt()
        except UsageError as refused:
            said.append(str(refused))
        finally:
            import posix

            os.pwrite = posix.pwrite
    return said


def test_what_one_rank_finds_is_raised_on_all(tmp_path):
    save_hf(llama(seed=1), tmp_path / "hf", max_shard_bytes=32_000)
    cut_file(tmp_path / "hf")
    for loading, saving in run_on(2, refusals, tmp_path / "hf", tmp_path / "out"):
        assert "header says" in loading
        assert f"{tmp_path / 'out'} is not written: no space is left on the disk of" in saving
        assert "about 0.1 MB are needed" in saving and "MB are free, beside what is there" in saving
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # the half-written folder is gone


# ---- the plans, as tables ----


@pytest.mark.parametrize(
    "shape,offsets,sizes,most,expected",
    [
        ((4, 3), (0, 0), (4, 3), 99, [[(0, 0, 12)]]),  # whole
        ((4, 3), (2, 0), (2, 3), 99, [[(6, 0, 6)]]),  # rows: one run
        ((4, 3), (0, 1), (4, 2), 99, [[(1, 0, 2), (4, 2, 2), (7, 4, 2), (10, 6, 2)]]),  # columns: a run a row
        ((4, 3), (0, 1), (4, 2), 5, [[(1, 0, 2), (4, 2, 2)], [(7, 4, 2), (10, 6, 2)]]),
        ((4, 3), (2, 0), (2, 3), 4, [[(6, 0, 4)], [(10, 4, 2)]]),  # a long run is cut
        ((2, 2, 3), (0, 1, 0), (2, 1, 3), 99, [[(3, 0, 3), (9, 3, 3)]]),
        ((5,), (3,), (2,), 99, [[(3, 0, 2)]]),
        ((), (), (), 99, [[(0, 0, 1)]]),
    ],
)
def test_runs_of_a_box(shape, offsets, sizes, most, expected):
    assert [*batches(shape, offsets, sizes, most)] == expected


def test_tensors_are_dealt_to_files_in_natural_order():
    tensors = {f"model.layers.{i}.w": ("BF16", (4,)) for i in (10, 2, 1)} | {"lm_head": ("F32", (4, 4))}
    headers, stored = plan_files(tensors, max_bytes=20)
    assert {name: place.file for name, place in stored.items()} == {
        "lm_head": "model-00001-of-00003.safetensors",  # larger than the limit: alone
        "model.layers.1.w": "model-00002-of-00003.safetensors",
        "model.layers.2.w": "model-00002-of-00003.safetensors",
        "model.layers.10.w": "model-00003-of-00003.safetensors",
    }
    assert all(len(header) % 8 == 0 for header in headers.values())


def test_of_equal_boxes_the_lowest_rank_writes_and_a_hole_is_our_bug():
    half = lambda at: {"w": ("F32", (4,), [((at,), (2,))])}
    assert writers([half(0), half(2), half(0)]) == {("w", (0,), (2,)): 0, ("w", (2,), (2,)): 1}
    with pytest.raises(AssertionError, match="do not hold"):
        writers([half(0), half(0)])
