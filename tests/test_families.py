"""LLaMA-shaped families: each equals transformers' own class in logits and gradients, comes back as the files
it came from, and gives one answer under every layout. The table of differences is printed at the end of
`pytest tests/test_families.py -m 'slow or not slow'`; docs/families.md has it.
"""

import functools
import json
import shutil
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import FAMILY_ROWS
from pool import run_on
from recipe import metrics, pretrain_flags, recipe
from safetensors.torch import load_file
from test_compile import Run, graphs_after_each_phase
from test_memory_layouts import managed_steps
from test_one_answer import SEQUENCES, SHAPES, T, batch_of, five_steps
from test_tensor_parallel import count_collectives, planned
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.attention import WholeSequences
from dtensor_llama.chat.lora import (
    LoraConfig,
    adapter_parameters,
    apply_lora,
    init_lora,
    n_adapter_parameters,
)
from dtensor_llama.config import config_from_fields
from dtensor_llama.flops import model_flops_per_token
from dtensor_llama.generate import generate_batch
from dtensor_llama.model import init_weights
from dtensor_llama.run import refuse_other_run
from parallel import Booster, ParallelConfig, build_mesh, parallelize
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
WINDOW = {"sliding_window": 6}  # less than the documents of 12 and 14 tokens in the sequences
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
    ours = [token for (token,) in generate_batch(model, [prompt], max_new_tokens=20)]
    theirs = twin.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "math"])
def test_a_window_holds_in_packed_documents_too(kernel):
    model = ours_of("qwen2, window")
    model.attention = WholeSequences(kernel)
    lengths = [7, 1, 20, 4]
    sequences = tokens_of(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = model(sequences, positions=positions)
        alone = torch.cat([model(document) for document in sequences.split(lengths, dim=1)], dim=1)
        assert_close(packed, alone, rtol=0, atol=1e-5)  # only the order of summation differs
        model.model.config = replace(model.config, sliding_window=None, layer_types=None)
        assert (model(sequences, positions=positions) - alone).abs().max() > 1e-2


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
    return run_on(1, steps_of, family, changes, False, ParallelConfig(), SEQUENCES)[0]


def assert_one_answer(family: str, layout: str) -> None:
    ranks, fields, changes = LAYOUTS[layout]
    shape, parallel = replace(config_of(family), **changes), ParallelConfig(**fields)
    if layout == "cp 2, ring" and shape.sliding_window is not None:
        with pytest.raises(UsageError, match=r"cp_method=ring knows no sliding window.*sliding_window=6"):
            check_parallel(parallel.resolve(ranks), Job(shape, T, SEQUENCES))
        return
    on_host = layout == "states on the host"
    if on_host and family == "dynamic":
        pytest.skip("the steps with a chunk manager have packed documents")
    micro = 2 if parallel.pp > 1 else SEQUENCES // parallel.resolve(ranks).dp
    ours = run_on(ranks, steps_of, family, changes, on_host, parallel, micro, timeout=240)[0]
    expected = one_process(family, shape.num_key_value_heads)
    nats = max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(ours["norms"], expected["norms"], strict=True))
    assert ours["final"].keys() == expected["final"].keys()
    weight = max((ours["final"][key] - one).abs().max().item() for key, one in expected["final"].items())
    assert all(torch.equal(ours["initial"][key], value) for key, value in expected["initial"].items())
    FAMILY_ROWS[family].setdefault("layouts", {})[layout] = (nats, norm, weight)
    assert nats < 2e-5 and norm < 1e-4 and weight < 1e-5, (nats, norm, weight)


@pytest.mark.parametrize("family,layout", FAST)
def test_one_answer(family, layout):
    assert_one_answer(family, layout)


@pytest.mark.slow
@pytest.mark.parametrize("family,layout", [case for case in ALL if case not in FAST])
def test_one_answer_everywhere(family, layout):
    assert_one_answer(family, layout)


def adapters_of(family: str, layout: ParallelConfig) -> dict[str, torch.Tensor]:
    """Return the gradients of LoRA's matrices, whole, for a batch on the ranks of the default group."""
    config = replace(config_of(family), num_key_value_heads=1)
    layout = layout.resolve(dist.get_world_size())
    model = Llama(config)
    apply_lora(model, LoraConfig(rank=2))
    parallelize(model, build_mesh(layout, "cpu"), layout)
    init_weights(model, seed=0)
    init_lora(model, seed=0)
    adapters = adapter_parameters(model)
    for name, parameter in adapters.items():
        if "lora_B" in name:  # where it is zero, A has no gradient
            torch.nn.init.constant_(parameter, 0.02)
    batch = batch_of(0, masked=True)
    model(batch.tokens, labels=batch.labels, positions=batch.positions).backward()
    grads = {name: parameter.grad for name, parameter in adapters.items()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_adapters_have_the_gradients_of_one_process_where_ranks_share_a_head(family):
    ours = run_on(2, adapters_of, family, ParallelConfig(tp=2, dp_shard=1))[1]
    expected = run_on(1, adapters_of, family, ParallelConfig())[0]
    assert ours.keys() == expected.keys()
    for name, reference in expected.items():
        assert (ours[name] - reference).norm() < 1e-4 * reference.norm(), name


@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family,n_kv_heads,n_sums", [("qwen3", 2, 2), ("qwen3", 1, 4), ("qwen2", 1, 4)])
def test_a_block_costs_the_collectives_of_its_plan(family, n_kv_heads, n_sums, sequence_parallel):
    """Beside LLaMA's: sums of the gradients of head norms, and of the weights and biases of shared heads."""
    config = replace(config_of(family), num_key_value_heads=n_kv_heads)
    (_, backward), _ = block = run_on(2, count_collectives, config, sequence_parallel)[0]
    assert list(block[0]) == planned(config, sequence_parallel, {"model.layers*": 1})
    assert backward["all-reduce"] == n_sums + 2  # norms of the stream, or the sums that enter a block


def graphs_of(family: str) -> list[int]:
    return graphs_after_each_phase(Run(1, config=config_of(family)), documents=True)


@pytest.mark.parametrize("family,n_kinds", [pytest.param("qwen3", 1, marks=pytest.mark.slow), ("smollm3", 2)])
def test_a_graph_is_compiled_for_each_kind_of_layer_and_never_again(family, n_kinds):
    training, with_validation = n_kinds, 2 * n_kinds
    assert run_on(1, graphs_of, family) == [[training] * 3 + [with_validation] * 3]


def boosted_loss(family: str) -> float:
    model = twin_of(family)
    booster = Booster(ParallelConfig(tp=2))
    booster.boost(model, torch.optim.AdamW(model.parameters()))
    tokens = tokens_of(32)
    return booster.step({"input_ids": tokens, "labels": tokens}).item()


@pytest.mark.parametrize("family", ["qwen2, window", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_the_booster_takes_the_model_of_transformers(family):
    tokens = tokens_of(32)
    expected = twin_of(family)(tokens, labels=tokens).loss.item()
    for ours in run_on(2, boosted_loss, family):
        assert ours == pytest.approx(expected, abs=2e-5)


# ---- a run: continual training, another layout after a stop, export, text ----------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2, window", "qwen3", "smollm3", "llama3"])
def test_a_run_goes_on_in_another_layout_and_its_export_opens_in_transformers(family, inputs, tmp_path):
    import transformers

    model = shutil.copytree(inputs / "tokenizer", tmp_path / "model")
    config = replace(config_of(family), vocab_size=400, bos_token_id=0, eos_token_id=1)
    save_hf(Llama(config), model)
    flags = pretrain_flags(inputs, tmp_path / "run", "--model", model, "--data.seq-len", 32, steps=4)
    flags.remove("--random-init")
    one, two = tmp_path / "one", tmp_path / "run"
    ended = recipe("pretrain", *flags, "--run-dir", one)
    assert ended.status == 0, ended
    ended = recipe("pretrain", *flags, "--parallel.tp", 2, ranks=2)
    assert ended.status == 0, ended
    checkpoint = two / "checkpoints" / "step-00000003"
    again = ["--run-dir", tmp_path / "again", "--checkpoint.resume", checkpoint, "--parallel.pp", 2]
    ended = recipe("pretrain", *flags, *again, ranks=2)
    assert ended.status == 0, ended
    losses = [[row["loss"] for row in metrics(run)] for run in (one, two, tmp_path / "again")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2][-1] == pytest.approx(losses[0][-1], abs=2e-5)
    ended = recipe("export", two / "checkpoints" / "step-00000004", tmp_path / "out")
    assert ended.status == 0, ended
    assert (tmp_path / "out/config.json").read_text() == (two / "hf/config.json").read_text()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = Llama(LlamaConfig.from_hf(tmp_path / "out"))
    load_hf(ours, tmp_path / "out")
    tokens = torch.randint(400, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(ours(tokens), opened(tokens).logits, rtol=0, atol=1e-4)
    said = ["--prompt", "def read(self", "--max-new-tokens", 20]
    alone = recipe("generate", "--model", tmp_path / "out", *said)
    split = recipe("generate", "--model", tmp_path / "out", *said, "--parallel.tp", 2, ranks=2)
    assert alone.status == split.status == 0 and alone.out == split.out, (alone, split)


def test_a_checkpoint_from_before_the_families_is_resumed():
    config = asdict(LlamaConfig.preset("tiny-1m"))
    added = ("model_type", "rope_scaling", "sliding_window", "layer_types", "no_rope_layers")
    older = {name: value for name, value in config.items() if name not in added}
    refuse_other_run("step-1", {"--model": older}, {"--model": config})
    with pytest.raises(UsageError, match="--model is not what checkpoint .*rope_scaling None -> "):
        scaled = config | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        refuse_other_run("step-1", {"--model": older}, {"--model": scaled})


# ---- FLOPs -------------------------------------------------------------------------------------------------


def test_flops_count_the_keys_that_a_window_leaves():
    config = config_of("qwen2, window")  # two of five layers have the window of 6
    weights = 6 * (config.n_parameters - 0)  # tied: the one matrix is multiplied, as the head
    keys = {"full": 3 * 32 + 2 * 6, "causal": 3 * 16 + 2 * (6 - 36 / 64)}
    for convention, n_keys in keys.items():
        expected = weights + 12 * config.num_attention_heads * config.head_dim * n_keys
        assert model_flops_per_token(config, 32, convention) == pytest.approx(expected)
    assert model_flops_per_token(config, 5) == weights + 12 * 8 * config.head_dim * 5 * 5
    qwen3 = config_of("qwen3")  # heads of 16, where D / H is 4
    extra = model_flops_per_token(qwen3, 32) - 6 * (qwen3.n_parameters - 101 * 32)
    assert extra == 12 * 5 * 8 * 16 * 32


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,changes,said",
    [
        (
            "llama3",
            {"model_type": "gemma3_text"},
            "model_type is 'gemma3_text'.* llama, mistral, qwen2, qwen3",
        ),
        ("qwen3", {"model_type": None}, "model_type is None"),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, "architectures="),
        ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported.*llama3"),
        ("llama3", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ("llama3", {"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "factor is missing"),
        ("llama3", {"rope_scaling": {**LLAMA3_ROPE, "factor": "8"}}, "factor is '8'.*without quotes"),
        ("llama3", {"rope_scaling": {**LLAMA3_ROPE, "factor": 0.5}}, "factor is 0.5.*from 1"),
        ("llama3", {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4}}, "low_freq_factor must be below"),
        ("llama3", {"rope_scaling": {**LLAMA3_ROPE, "beta_fast": 32}}, "beta_fast is missing or not used"),
        (
            "linear",
            {"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial_",
        ),
        ("linear", {"rope_scaling": {"type": ["linear"]}}, "rope_type is .'linear'"),
        ("mistral", {"model_type": ["mistral"]}, "model_type is .'mistral'"),
        ("linear", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ("linear", {"rope_parameters": LLAMA3_ROPE}, "contradict each other"),
        (
            "mistral",
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0 and 1000000.0.* contradict",
        ),
        ("qwen3", {"num_experts": 64}, "num_experts=64"),
        ("qwen3", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "only rope_theta is known"),
        ("llama3", {"sliding_window": 512}, "sliding_window=512"),
        ("llama3", {"layer_types": ["sliding_attention"] * 5}, "layer_types=.*Llama does not have"),
        ("llama3", {"no_rope_layers": [1, 1, 1, 0, 1]}, "no_rope_layers="),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"layer_types": ["sliding_attention"] * 5}, "layer_types=.*Mistral does not have"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 5}, "there is no sliding_window that is used"),
        ("qwen2", {"layer_types": ["linear_attention"] * 5}, "layer_types is .*5 times"),
        ("qwen2, window", {"layer_types": ["full_attention"]}, "layer_types is .*5 times"),
        ("qwen2, window", {"max_window_layers": "3"}, "max_window_layers is '3'"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window is 'false'"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*5 times"),
        ("smollm3", {"no_rope_layers": 4}, "no_rope_layers is 4"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("smollm3", {"num_hidden_layers": "5"}, "num_hidden_layers is '5'"),
        ("smollm2", {"rope_interleaved": True}, "rope_interleaved=True"),
    ],
)
def test_what_a_config_asks_for_is_refused_in_a_line(family, changes, said, tmp_path):
    fields = fields_of(family) | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=said) as refusal:
        LlamaConfig.from_hf(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_a_field_that_the_family_lacks_is_not_exported_in_silence():
    with pytest.raises(UsageError, match="sliding_window is 8, and model_type=llama has no such field"):
        LlamaConfig(sliding_window=8)
    with pytest.raises(UsageError, match="model_type is 'bert'; it must be one of llama"):
        LlamaConfig(model_type="bert")


def test_dynamic_rope_is_refused_where_it_would_depend_on_how_a_batch_is_cut():
    model, tokens = ours_of("dynamic"), tokens_of(T)
    positions = torch.arange(T // 2).repeat(2).expand(2, -1)
    with pytest.raises(UsageError, match="seq_len of at most max_position_embeddings=16"):
        model(tokens, positions=positions)
    model(tokens[:, : T // 2], positions=positions[:, : T // 2])


def test_a_ring_is_refused_where_a_window_hides_tokens_and_not_where_it_hides_none():
    ring = ParallelConfig(cp=2, cp_method="ring").resolve(2)
    config = replace(config_of("mistral"), sliding_window=T)
    assert check_parallel(ring, Job(config, T, SEQUENCES)) == SEQUENCES
    with pytest.raises(UsageError, match="Use cp_method=ulysses, or use seq_len=16"):
        check_parallel(ring, Job(replace(config, sliding_window=16), T, SEQUENCES))
    no_layer = {"sliding_window": 16, "layer_types": ["full_attention"] * 5}
    check_parallel(ring, Job(replace(config_of("qwen2"), **no_layer), T, SEQUENCES))
    whole = ParallelConfig(cp=2).resolve(2)
    check_parallel(whole, Job(replace(config, sliding_window=16), T, SEQUENCES))


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to_is_refused(tmp_path):
    """transformers would keep both matrices, and dropping one would train another model."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    untied = Llama(config)
    save_hf(untied, tmp_path)
    tied = replace(config, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(tied.to_hf()))
    with pytest.raises(UsageError, match="lm_head.weight is there and differs"):
        load_hf(Llama(tied), tmp_path)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    save_hf(untied, tmp_path)
    load_hf(Llama(tied), tmp_path)


def test_flags_of_layers_without_rope_are_numbers_as_in_transformers():
    with pytest.raises(UsageError, match="no_rope_layers is"):
        replace(LlamaConfig.preset("tiny-1m"), model_type="smollm3", no_rope_layers=[True] * 8)
