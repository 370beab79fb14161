"""LLaMA-shaped families: each equals transformers' own class in logits and gradients, comes back as the files
it came from, and gives one answer under every layout. The table of differences is printed at the end of
`pytest tests/test_families.py -m 'slow or not slow'`; docs/families.md has it.
"""

import functools
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import FAMILY_ROWS
from pool import run_on
from safetensors.torch import load_file
from test_memory_layouts import managed_steps
from test_one_answer import ROWS, SHAPES, T, five_steps
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.attention import WholeRows
from dtensor_llama.chat.lora import (
    LoraConfig,
    adapter_parameters,
    apply_lora,
    n_adapter_parameters,
)
from dtensor_llama.config import config_from_fields
from dtensor_llama.generate import generate
from parallel import ParallelConfig
from parallel.config import Job, check_parallel

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"sliding_window": 6}  # less than the documents of 12 and 14 tokens in the rows
USE_WINDOW = {**WINDOW, "use_sliding_window": True}
FAMILIES = {  # name -> (transformers calls its classes, fields of config.json beside SIZES)
    "llama3": ("Llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5, "tie_word_embeddings": True}),
    "codellama": ("Llama", {"rope_theta": 1e6}),
    "smollm2": ("Llama", {"rope_theta": 1e5, "tie_word_embeddings": True, "rope_interleaved": False}),
    "linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic": (
        "Llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": T // 2},
    ),
    "mistral": ("Mistral", WINDOW),
    "mistral, whole": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {"sliding_window": 4096, "max_window_layers": 3, "use_mrope": False}),
    "qwen2, window": ("Qwen2", {**USE_WINDOW, "max_window_layers": 3, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, window": ("Qwen3", {**USE_WINDOW, "head_dim": 16, "max_window_layers": 2}),
    "smollm3": ("SmolLM3", {"rope_theta": 5e6}),
    "smollm3, window": ("SmolLM3", {**USE_WINDOW, "no_rope_layer_interval": 2}),
}


def fields_of(family: str) -> dict:
    """Return a config.json as the older transformers wrote it."""
    name, own = FAMILIES[family]
    head = {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"], "torch_dtype": "float32"}
    return {**head, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, **SIZES, **own}


def config_of(family: str) -> LlamaConfig:
    return config_from_fields(fields_of(family), "config.json")


@functools.cache
def twin_of(family: str):
    """Return the model of transformers' own class, with norms and biases that are not what they start as."""
    import transformers

    name, fields = FAMILIES[family][0], fields_of(family)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config").from_dict(fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def ours_of(family: str) -> Llama:
    model = Llama(config_of(family))
    model.load_state_dict(twin_of(family).state_dict())
    return model


def tokens_of(n_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (2, n_tokens), generator=torch.Generator().manual_seed(seed))


# ---- transformers' own class -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_each_gradient_equal_transformers(family):
    twin, model, tokens = twin_of(family), ours_of(family), tokens_of(50)
    twin.zero_grad()
    with torch.no_grad():
        difference = (model(tokens) - twin(tokens).logits).abs().max().item()
    assert difference < 1e-4
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    (model(tokens, labels=labels) / (labels != -100).sum()).backward()
    twin(tokens, labels=tokens).loss.backward()
    theirs = dict(twin.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    gradients = {}
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        gradients[name] = ((parameter.grad - expected).norm() / expected.norm()).item()
    assert max(gradients.values()) < 1e-4, gradients
    FAMILY_ROWS[family] |= {"logits": difference, "gradients": max(gradients.values())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_as_transformers_opened_it(family, tmp_path):
    """Weights bit for bit, and every field of the config, from files of both generations."""
    import transformers

    twin_of(family).save_pretrained(tmp_path / "new")  # as transformers 5 writes it
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({**fields_of(family), "note": "carried on"}))
    (old / "model.safetensors").hardlink_to(tmp_path / "new" / "model.safetensors")
    for source in (tmp_path / "new", old):
        model = Llama(LlamaConfig.from_hf(source))
        load_hf(model, source)
        assert model.config == config_of(family)
        save_hf(model, tmp_path / "out")
        before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], weight) for name, weight in after.items())
        opened = []
        for folder in (source, tmp_path / "out"):
            settings = transformers.AutoConfig.from_pretrained(folder).to_dict()
            # The older word for rope_type stands beside it.
            settings["rope_parameters"].pop("type", None)
            opened.append({k: v for k, v in settings.items() if k not in ("_name_or_path", "dtype")})
        assert opened[0] == opened[1]
        assert LlamaConfig.from_hf(tmp_path / "out") == model.config
        assert opened[1].get("note") == ("carried on" if source == old else None)
    opened_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(opened_again) is type(twin_of(family))
    tokens = tokens_of(40)
    with torch.no_grad():
        assert_close(opened_again(tokens).logits, model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_that_know_rope_scaling_alone_find_it(family):
    """Transformers 4 knows rope_scaling and rope_theta, and would not look at rope_parameters."""
    written, config = config_of(family).to_hf(), config_of(family)
    assert written.get("rope_scaling") == config.rope_scaling
    assert written["rope_parameters"].pop("rope_theta") == written["rope_theta"] == config.rope_theta
    assert written["rope_parameters"] == (config.rope_scaling or {"rope_type": "default"})
    own = {"architectures": [f"{FAMILIES[family][0]}ForCausalLM"], "model_type": FAMILIES[family][0].lower()}
    assert own.items() <= written.items()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_they_are(family):
    model = ours_of(family)
    assert model.config.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    block = {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}
    assert model.config.block_weights() == block
    apply_lora(model, LoraConfig(rank=2))
    n_adapters = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert n_adapter_parameters(model.config, LoraConfig(rank=2)) == n_adapters


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2, window", "qwen3", "smollm3, window", "dynamic", "llama3"]
)
def test_a_cache_gives_the_tokens_of_transformers(family):
    """Greedy, past the window and past the context that dynamic RoPE was made for."""
    model, twin = ours_of(family), twin_of(family).eval()
    prompt = tokens_of(11)[0].tolist()
    ours = list(generate(model, prompt, max_new_tokens=20))
    theirs = twin.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "math"])
def test_a_window_holds_in_packed_documents_too(kernel):
    model = ours_of("qwen2, window")
    model.attention = WholeRows(kernel)
    lengths = [7, 1, 20, 4]
    rows = tokens_of(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = model(rows, positions=positions)
        alone = torch.cat([model(document) for document in rows.split(lengths, dim=1)], dim=1)
        assert_close(packed, alone, rtol=0, atol=1e-5)  # only the order of summation differs
        model.model.config = replace(model.config, sliding_window=None, layer_types=None)
        assert (model(rows, positions=positions) - alone).abs().max() > 1e-2


# ---- one answer --------------------------------------------------------------------------------------------

LAYOUTS = {  # name -> (ranks, layout, fields of the shape that differ)
    "tp 2": (2, {"tp": 2}, {}),
    "tp 2, no sequence parallelism": (2, {"tp": 2, "sequence_parallel": False}, {}),
    "tp 2, one K/V head": (2, {"tp": 2}, {"num_key_value_heads": 1}),
    "tp 4, two K/V heads": (4, {"tp": 4}, {"num_key_value_heads": 2}),
    "tp 2 x pp 2": (4, {"tp": 2, "pp": 2}, {}),
    "cp 2, ulysses": (2, {"cp": 2}, {}),
    "cp 2, ring": (2, {"cp": 2, "cp_method": "ring"}, {}),
    "ZeRO 3": (2, {"zero_stage": 3}, {}),
    "states on the host": (2, {"tp": 2}, {}),
}
FAST = [  # a layout or two for each thing that a family adds
    ("qwen3", "tp 2, one K/V head"),
    ("qwen2", "tp 2, one K/V head"),
    ("smollm3", "tp 2 x pp 2"),
    ("mistral", "cp 2, ulysses"),
    ("dynamic", "cp 2, ring"),
    ("qwen2", "ZeRO 3"),
    ("qwen3", "states on the host"),
]
ALL = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


def steps_of(family: str, changes: dict, on_host: bool, layout: ParallelConfig, micro: int) -> dict:
    """Run the five steps of test_one_answer.py for a model of this family, in a worker process."""
    shape, masked = replace(config_of(family), **changes), family != "dynamic"
    with mock.patch.dict(SHAPES, {family: shape}):
        if on_host:
            return managed_steps(family, layout, micro, None, {})
        return five_steps(family, layout, micro, masked)


@functools.cache
def one_process(family: str, n_kv_heads: int) -> dict:
    changes = {"num_key_value_heads": n_kv_heads}
    return run_on(1, steps_of, family, changes, False, ParallelConfig(), ROWS)[0]


def assert_one_answer(family: str, layout: str) -> None:
    ranks, fields, changes = LAYOUTS[layout]
    shape, parallel = replace(config_of(family), **changes), ParallelConfig(**fields)
    if layout == "cp 2, ring" and shape.sliding_window is not None:
        with pytest.raises(UsageError, match=r"cp_method=ring knows no sliding window.*sliding_window=6"):
            check_parallel(parallel.resolve(ranks), Job(shape, T, ROWS))
        return
    on_host = layout == "states on the host"
    if on_host and family == "dynamic":
        pytest.skip("the steps with a chunk manager have packed documents")
    ours = run_on(ranks, steps_of, family, changes, on_host, parallel, 2, timeout=240)[0]
    expected = one_process(family, shape.num_key_value_heads)
    loss = max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(ours["norms"], expected["norms"], strict=True))
    assert ours["final"].keys() == expected["final"].keys()
    weight = max((ours["final"][key] - one).abs().max().item() for key, one in expected["final"].items())
    assert all(torch.equal(ours["initial"][key], value) for key, value in expected["initial"].items())
    FAMILY_ROWS[family].setdefault("layouts", {})[layout] = (loss, norm, weight)
    assert loss < 2e-5 and norm < 1e-4 and weight < 1e-5, (loss, norm, weight)


@pytest.mark.parametrize("family,layout", FAST)
def test_one_answer(family, layout):
    assert_one_answer(family, layout)


@pytest.mark.slow
@pytest.mark.parametrize("family,layout", [case for case in ALL if case not in FAST])
def test_one_answer_everywhere(family, layout):
    assert_one_answer(family, layout)
