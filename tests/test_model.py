"""The model equals transformers' in fp32, on every shape of the family, in logits and in each gradient."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf
from dtensor_llama.attention import WholeSequences, attention
from dtensor_llama.loss import token_loss_sum
from dtensor_llama.model import init_weights

SHARED = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORIES = SHARED / "stories260K"

MHA = LlamaConfig(
    vocab_size=307, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4
)
SHAPES = {
    "mha": MHA,
    "gqa": LlamaConfig(**{**vars(MHA), "num_key_value_heads": 2}),
    "mqa-tied": LlamaConfig(**{**vars(MHA), "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "head-dim": LlamaConfig(**{**vars(MHA), "head_dim": 32, "num_key_value_heads": 2, "rope_theta": 5e5}),
}


def transformers_twin(model: Llama):
    import transformers

    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{key: value for key, value in model.config.to_hf().items() if key != "rope_theta"}
        )
    )
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected
    return twin


def assert_equals_twin(model: Llama, twin, tokens: torch.Tensor):
    with torch.no_grad():
        assert_close(model(tokens), twin(tokens).logits, rtol=0, atol=1e-4)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    (model(tokens, labels=labels) / (labels != -100).sum()).backward()
    twin(tokens, labels=tokens).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        difference = (parameter.grad - expected).norm() / expected.norm()
        assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape, kernel):
    model = Llama(SHAPES[shape])
    model.attention = WholeSequences(kernel)
    tokens = torch.randint(SHAPES[shape].vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    assert_equals_twin(model, transformers_twin(model), tokens)


@pytest.mark.skipif(not STORIES.exists(), reason="the trained weights stories260K are not on this machine")
def test_trained_weights_give_the_published_loss_and_equal_transformers():
    import transformers

    model = Llama(LlamaConfig.from_hf(STORIES))
    load_hf(model, STORIES)
    from dtensor_llama.data.tokenizer import load_tokenizer

    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    tokens = torch.tensor([[1, *load_tokenizer(STORIES).encode(text)]])
    assert tokens.shape == (1, 27)
    with torch.no_grad():
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 26
    assert abs(loss.item() - 0.28031) < 1e-4  # measured with transformers
    assert_equals_twin(
        model, transformers.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32), tokens
    )


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "math"])
def test_a_packed_sequence_gives_what_its_documents_give_alone(kernel):
    model = Llama(SHAPES["gqa"])
    model.attention = WholeSequences(kernel)
    lengths = [7, 1, 20, 4]
    sequences = torch.randint(307, (2, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = model(sequences, positions=positions)
        alone = torch.cat([model(document) for document in sequences.split(lengths, dim=1)], dim=1)
        assert_close(packed, alone, rtol=0, atol=2e-6)  # only the order of summation differs
        assert (model(sequences) - alone).abs().max() > 1e-3  # without the mask they see each other


def test_attention_kernels_agree_with_and_without_a_cache():
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(2, 9, 2, 16, generator=generator) for _ in range(2))
    for n_new in (1, 4, 9):
        q = torch.randn(2, n_new, 6, 16, generator=generator)
        assert_close(attention(q, k, v, "sdpa"), attention(q, k, v, "math"), rtol=0, atol=1e-6)


def test_sdpa_reads_key_value_heads_unexpanded(monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kw: seen.append((q.shape[1], k.shape[1], v.shape[1])) or original(q, k, v, **kw),
    )
    attention(torch.randn(1, 8, 6, 16), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16), "sdpa")
    assert seen == [(6, 2, 2)]


def test_chunked_loss_equals_torch_and_skips_unscored_tokens(monkeypatch):
    monkeypatch.setattr("dtensor_llama.loss.CHUNK_ELEMENTS", 37 * 5)  # 5 tokens a chunk, the last one short
    hidden = torch.randn(3, 6, 8, requires_grad=True)
    weight = torch.randn(37, 8, requires_grad=True)
    labels = torch.randint(37, (3, 6))
    labels[0, :4] = -100
    ours = token_loss_sum(hidden, weight, labels)
    ours_grads = torch.autograd.grad(ours * 0.3, [hidden, weight])
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert_close(ours, expected)
    for mine, theirs in zip(ours_grads, torch.autograd.grad(expected * 0.3, [hidden, weight]), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_initial_weights_depend_on_seed_and_name_only():
    model, again, other = (Llama(SHAPES["gqa"]) for _ in range(3))
    init_weights(again, seed=0)
    init_weights(other, seed=1)
    ours, same, different = (dict(m.named_parameters()) for m in (model, again, other))
    for name, weight in ours.items():
        assert torch.equal(weight, same[name])
        assert weight.dim() == 1 or not torch.equal(weight, different[name])
    q, o = ours["model.layers.0.self_attn.q_proj.weight"], ours["model.layers.0.self_attn.o_proj.weight"]
    assert not torch.equal(q, o)  # same shape, other name
    everything = torch.cat([w.flatten() for n, w in ours.items() if w.dim() == 2])
    assert abs(everything.std().item() - 0.02) < 2e-4 and abs(everything.mean().item()) < 2e-4


def test_rope_stays_float32_in_a_bfloat16_model():
    model = Llama(SHAPES["mha"]).to(torch.bfloat16)
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1][0]))
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert seen[0].dtype == torch.float32


def test_parameter_names_and_count_are_those_of_transformers():
    for config in SHAPES.values():
        model = Llama(config)
        twin = transformers_twin(model)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in twin.named_parameters()
        }
        assert config.n_parameters == sum(p.numel() for p in model.parameters())
        block = {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}
        assert config.block_weights() == block


def test_presets_are_the_published_sizes():
    billions = {
        name: LlamaConfig.preset(name).n_parameters / 1e9
        for name in (
            "llama2-7b",
            "llama2-13b",
            "llama2-70b",
            "llama1-7b",
            "llama1-13b",
            "llama1-33b",
            "llama1-65b",
        )
    }
    assert {name: round(size, 1) for name, size in billions.items()} == {
        "llama2-7b": 6.7,
        "llama2-13b": 13.0,
        "llama2-70b": 69.0,
        "llama1-7b": 6.7,
        "llama1-13b": 13.0,
        "llama1-33b": 32.5,
        "llama1-65b": 65.3,
    }
    assert LlamaConfig.preset("llama2-70b").num_key_value_heads == 8
    exactly = {
        "codellama-7b": 6_738_546_688,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "tinyllama-1.1b": 1_100_048_384,
        "smollm2-135m": 134_515_008,
        "smollm3-3b": 3_075_098_624,
        "mistral-7b-v0.1": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-0.6b": 596_049_920,
        "qwen3-8b": 8_190_735_360,
    }
    assert {name: LlamaConfig.preset(name).n_parameters for name in exactly} == exactly


def test_transformers_makes_the_model_of_a_preset():
    import transformers

    for name in ("llama3.2-1b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "smollm3-3b"):
        config = LlamaConfig.preset(name)
        theirs = transformers.AutoConfig.for_model(**config.to_hf())
        with torch.device("meta"):
            twin = transformers.AutoModelForCausalLM.from_config(theirs)
            ours = Llama(config)
        shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (twin, ours)]
        assert shapes[0] == shapes[1], name


def test_meta_model_costs_nothing_and_stays_tied_when_materialised():
    with torch.device("meta"):
        model = Llama(SHAPES["mqa-tied"])
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, Llama(SHAPES["mqa-tied"]).lm_head.weight)


# ---- config.json ----


def config_json(tmp_path, **changes) -> Path:
    fields = {**MHA.to_hf(), **changes}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "absent"}))
    return tmp_path


def test_both_generations_of_config_json_are_read(tmp_path):
    old = {"rope_parameters": "absent", "rope_theta": 5e5, "torch_dtype": "float16", "rope_scaling": None}
    new = {
        "rope_theta": "absent",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "dtype": "bfloat16",
    }
    expected = LlamaConfig(**{**vars(MHA), "rope_theta": 5e5})
    assert LlamaConfig.from_hf(config_json(tmp_path, **old)) == expected
    assert LlamaConfig.from_hf(config_json(tmp_path, **new)) == expected


def test_a_config_written_by_transformers_reads_back(tmp_path):
    import transformers

    for config in SHAPES.values():
        fields = {k: v for k, v in config.to_hf().items() if k != "rope_theta"}
        transformers.LlamaConfig(**fields).save_pretrained(tmp_path)
        assert LlamaConfig.from_hf(tmp_path) == config


@pytest.mark.parametrize(
    "name,value",
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),  # rope_parameters of the same file say default
        ("sliding_window", 512),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("quantization_config", {"bits": 4}),
        ("model_type", "gemma"),
        ("architectures", ["LlamaForSequenceClassification"]),
    ],
)
def test_a_field_that_changes_the_arithmetic_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        LlamaConfig.from_hf(config_json(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    "text,said",
    [
        (None, "does not exist"),
        ('{"model_type": "llama", "hidden', "not complete JSON"),
        ("[]", "list"),
        ('{"model_type": "llama", "hidden_size": 8}', "vocab_size, intermediate_size"),
        ('{"vocab_size": 5}', "model_type is None"),
    ],
)
def test_a_missing_or_cut_config_is_refused_in_words(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        LlamaConfig.from_hf(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name,value,rule",
    [
        ("tie_word_embeddings", "false", "true or false"),
        ("tie_word_embeddings", 0, "true or false"),
        ("head_dim", 16.0, "whole number"),
        ("head_dim", "16", "whole number"),
        ("num_key_value_heads", True, "whole number"),
        ("num_hidden_layers", 2.0, "whole number"),
        ("max_position_embeddings", "64", "whole number"),
        ("max_position_embeddings", 0, "whole number"),
        ("rms_norm_eps", "1e-05", "number from 0 to 1"),
        ("rms_norm_eps", -1e-5, "number from 0 to 1"),
        ("rms_norm_eps", float("nan"), "number from 0 to 1"),
        ("rope_theta", 0, "above 0"),
        ("rope_theta", float("nan"), "above 0"),
        ("rope_theta", float("inf"), "above 0"),
        ("rope_theta", "10000", "above 0"),
        ("initializer_range", -0.02, "number from 0 to 1"),
        ("initializer_range", 2, "number from 0 to 1"),
        ("bos_token_id", "1", "ids 0 to"),
        ("bos_token_id", -1, "ids 0 to"),
        ("eos_token_id", [2, 10**6], "list of them"),
        ("eos_token_id", [], "list of them"),
        ("eos_token_id", True, "list of them"),
        ("pad_token_id", 10**6, "ids 0 to"),
        ("architectures", [["LlamaForCausalLM"]], "architectures"),
    ],
)
def test_a_field_of_the_wrong_type_or_out_of_range_is_refused_by_name(tmp_path, name, value, rule):
    changes = {name: value} | ({"rope_parameters": "absent"} if name == "rope_theta" else {})
    with pytest.raises(UsageError, match=name) as error:
        LlamaConfig.from_hf(config_json(tmp_path, **changes))
    assert rule in str(error.value) and "config.json" in str(error.value)


def test_heads_that_do_not_divide_the_hidden_size_are_refused_as_transformers_would(tmp_path):
    import transformers

    shape = {"hidden_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20}
    with pytest.raises(UsageError, match="hidden_size 64 is not a multiple of num_attention_heads 3"):
        LlamaConfig.from_hf(config_json(tmp_path, **shape))
    with pytest.raises(Exception, match="multiple of the number of attention"):
        transformers.LlamaConfig(**shape)


def test_whole_numbers_for_floats_and_null_are_read_and_what_is_written_transformers_opens(tmp_path):
    import transformers

    changes = {
        "rms_norm_eps": None,
        "max_position_embeddings": None,
        "rope_parameters": None,
        "rope_theta": 500000,
        "initializer_range": 1,
        "tie_word_embeddings": None,
        "eos_token_id": [2, 3],
        "pad_token_id": -1,
    }
    config = LlamaConfig.from_hf(config_json(tmp_path, **changes))
    theirs = transformers.LlamaConfig.from_dict(config.to_hf())
    assert (config.rms_norm_eps, config.max_position_embeddings, config.rope_theta) == (1e-6, 2048, 500000.0)
    assert (theirs.rms_norm_eps, theirs.max_position_embeddings, theirs.initializer_range) == (
        1e-6,
        2048,
        1.0,
    )
    assert theirs.rope_parameters["rope_theta"] == 500000.0 and theirs.eos_token_id == [2, 3]
