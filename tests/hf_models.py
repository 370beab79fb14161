"""Small models of transformers' own classes, random and the same in every process, and batches for them."""

import torch

VOCABULARY = 61  # 31 + 30 over tp 2
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
ROTARY = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {  # name of the class -> settings of its config
    "GPT2LMHeadModel": {
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
        **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    },
    "OPTForCausalLM": COMMON
    | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
    "BloomForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 3},
    "BertForMaskedLM": COMMON
    | {"intermediate_size": 48, "max_position_embeddings": 64}
    | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "T5ForConditionalGeneration": {
        **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
        **{"num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    },
    "GlmForCausalLM": ROTARY | {"head_dim": 8, "attention_bias": True},
    "Glm4ForCausalLM": ROTARY | {"head_dim": 8},
    "MistralForCausalLM": ROTARY | {"sliding_window": 5},
    "Qwen2ForCausalLM": ROTARY,
    "Qwen3ForCausalLM": ROTARY | {"head_dim": 8},
    "GemmaForCausalLM": ROTARY | {"head_dim": 8},
    "Phi3ForCausalLM": ROTARY,
    "Starcoder2ForCausalLM": ROTARY,
    "Olmo2ForCausalLM": ROTARY,
}
NEW = {  # of the example of parallel/plans/README.md
    "GPTNeoForCausalLM": {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "window_size": 6},
        **{
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "intermediate_size": 48,
        },
    }
}
DECODERS = [name for name in MODELS if name not in ("BertForMaskedLM", "T5ForConditionalGeneration")]


def plain_model(name: str, **changed):
    """Return a model of transformers with random weights, biases included."""
    import transformers

    kind = getattr(transformers, name)
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = kind.config_class(**{**(MODELS | NEW)[name], **ids, **changed})
    torch.manual_seed(3)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers begins with ones and zeros, by which mistakes would hide
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


# Models that the adapter takes, beside those above: one forward and backward of each is compared.
ADAPTED = """Arcee Cohere2 Cohere Cwm Ernie4_5 Exaone4 Gemma2 Gemma3 GPTNeoX Granite Helium HyperCLOVAX Jais2
Ministral3 Ministral NanoChat Nemotron Olmo3 Olmo Phi SeedOss SmolLM3 VaultGemma""".split()


def small_model(name: str):
    """Return a model of a family of which only the names of its settings are known."""
    import transformers

    kind = getattr(transformers, name)
    wanted = ROTARY | {"num_hidden_layers": 2, "head_dim": 8, "pad_token_id": 1}
    wanted |= {"bos_token_id": 2, "eos_token_id": 3}
    standard = kind.config_class()
    torch.manual_seed(3)
    model = kind(kind.config_class(**{key: value for key, value in wanted.items() if hasattr(standard, key)}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()  # without dropout


def batches(name: str, n: int = 5, rows: int = 8, tokens: int = 16) -> list[dict[str, torch.Tensor]]:
    """Return global batches padded on both sides; scored labels lie unevenly over rows and tokens."""
    made = []
    for step in range(n):
        draw = torch.Generator().manual_seed(step)
        input_ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=draw)
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[1, -5:] = mask[3, :4] = mask[6, -9:] = 0
        input_ids[mask == 0] = 1  # the padding token
        labels = input_ids.clone()
        if name.startswith("T5"):
            labels = torch.randint(4, VOCABULARY, (rows, tokens - 4), generator=draw)
        if name.startswith("Bert"):
            labels = torch.randint(4, VOCABULARY, (rows, tokens), generator=draw)
        ignored = torch.rand(labels.shape, generator=draw) < torch.linspace(0, 0.9, rows)[:, None]
        labels[ignored] = -100
        if not name.startswith("T5"):
            labels[mask == 0] = -100
        labels[2, :10] = labels[5] = -100
        made.append({"input_ids": input_ids, "labels": labels, "attention_mask": mask})
    return made
