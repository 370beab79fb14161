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
    "MixtralForCausalLM": ROTARY | {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": ROTARY
    | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4}
    | {"num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": COMMON
    | {"intermediate_size": 48, "num_key_value_heads": 4, "max_position_embeddings": 64}
    | {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
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
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # it belongs to the weights
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.train()


# Models that the adapter takes, beside those above: one forward and backward of each is compared.
ADAPTED = """Afmoe Apertus Arcee AriaText AXK1 AXK2 Beam Cohere2 Cohere2Moe Cohere Cwm DeepseekV2 DeepseekV32
DeepseekV4 Dots1 Dots3Note Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe FlexOlmo Flint Gemma2 Gemma3 Gemma3n Gemma4
Gemma4Unified Glm4Moe Glm4MoeLite GlmMoeDsa GPTNeoX Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared
GraniteMoeSWA GraniteSWA Helium HunYuanMoEV1 HYV3 HYV4 HyperCLOVAX Jais2 Jamba Kolibri1 Laguna Lfm2Moe Llama4
Mellum MiniCPM3 MiniMax MiniMaxM2 MiniMaxM3VL Ministral3 Ministral NanoChat NemotronH Nemotron Olmo3
OlmoHybrid Olmoe Olmo Phimoe Phi Qwen2Moe Qwen3_5Moe Qwen3_5 Qwen3Next SeedOss SmolLM3 SolarOpen VaultGemma
Youtu""".split()
# Those of them that can be cut into pipeline stages.
STAGED = """
Afmoe Apertus Arcee AriaText AXK1 AXK2 Beam Cohere2 Cohere2Moe Cohere Cwm DeepseekV2 DeepseekV32 Dots1
Dots3Note Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe FlexOlmo Flint Gemma2 Gemma3 Gemma4Unified Glm4Moe
Glm4MoeLite Granite GraniteSWA Helium HYV3 HyperCLOVAX Jais2 Kolibri1 Laguna Mellum MiniCPM3 MiniMax
MiniMaxM2 MiniMaxM3VL Ministral3 Ministral Olmo3 OlmoHybrid Olmo Qwen2Moe Qwen3_5Moe Qwen3_5 Qwen3Next
SeedOss SmolLM3 SolarOpen VaultGemma Youtu""".split()
# What makes a model small, by the names that configs have for it. Each takes the names that it knows.
SIZES = {
    **ROTARY,
    **{"head_dim": 8, "num_hidden_layers": 2, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
    # experts
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2},
    **{"n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24},
    **{"first_k_dense_replace": 1, "n_shared_experts": 1, "moe_layer_freq": 1},
    # latent attention, and what chooses the keys that it reads
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    # Mamba and gated delta nets
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8},
}
LATENT = """AXK1 AXK2 DeepseekV2 DeepseekV32 Dots3Note Glm4MoeLite GlmMoeDsa MiniCPM3 Youtu""".split()
OTHER_SIZES = {  # of configs whose fields depend on each other
    "Gemma3n": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    | {"activation_sparsity_pattern": [0.0, 0.0]},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "NemotronH": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4},
    **{name: {"num_key_value_heads": 4} for name in LATENT},  # as many as heads
    # one layer of four has attention
    **{name: {"num_hidden_layers": 4} for name in ("OlmoHybrid", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe")},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"]},
}


def small_model(name: str):
    """Return a model of a family of which only the names of its settings are known."""
    import transformers

    kind = getattr(transformers, f"{name}ForCausalLM")
    known = kind.config_class().to_dict().keys() | {"num_hidden_layers"}
    settings = {key: value for key, value in SIZES.items() if key in known} | OTHER_SIZES.get(name, {})
    torch.manual_seed(3)
    model = kind(kind.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not parameter.isfinite().all() or not 1e-6 < parameter.abs().max() < 1e3:
                parameter.normal_(0, 0.05)  # transformers leaves what it loads as it was
    return model.eval()  # without dropout


def batches(name: str, n: int = 5, sequences: int = 8, tokens: int = 16) -> list[dict[str, torch.Tensor]]:
    """Return global batches padded on both sides; scored labels lie unevenly over sequences and tokens."""
    made = []
    for step in range(n):
        draw = torch.Generator().manual_seed(step)
        input_ids = torch.randint(4, VOCABULARY, (sequences, tokens), generator=draw)
        mask = torch.ones(sequences, tokens, dtype=torch.int64)
        mask[1, -5:] = mask[3, :4] = mask[6, -9:] = 0
        input_ids[mask == 0] = 1  # the padding token
        labels = input_ids.clone()
        if name.startswith("T5"):
            labels = torch.randint(4, VOCABULARY, (sequences, tokens - 4), generator=draw)
        if name.startswith("Bert"):
            labels = torch.randint(4, VOCABULARY, (sequences, tokens), generator=draw)
        ignored = torch.rand(labels.shape, generator=draw) < torch.linspace(0, 0.9, sequences)[:, None]
        labels[ignored] = -100
        if not name.startswith("T5"):
            labels[mask == 0] = -100
        labels[2, :10] = labels[5] = -100
        made.append({"input_ids": input_ids, "labels": labels, "attention_mask": mask})
    return made
