"""Shapes with a name, as their config.json files have them; LlamaConfig.preset("llama2-7b") is one of them.

A field that is not here has the value of LLaMA-2-7B, which is the default of LlamaConfig.
"""

from typing import Any


def _llama1(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }


def _tiny(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


def _llama3_scaling(factor: float) -> dict[str, Any]:
    """Return what LLaMA-3.1 and 3.2 change in LLaMA-3: a context of 128k tokens, by slower RoPE."""
    return {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_LLAMA2_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_LLAMA3_8B = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA3_70B = {**_LLAMA3_8B, **_LLAMA2_70B}
_QWEN = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "bos_token_id": 151643}
_QWEN2 = {**_QWEN, "model_type": "qwen2", "max_position_embeddings": 32768, "eos_token_id": 151643}
_QWEN3 = {
    **_QWEN,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2307.09288 and the config.json files Meta published beside it; context 4096
    "llama2-7b": {},
    "llama2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama2-70b": _LLAMA2_70B,
    # arXiv:2302.13971, table 2; context 2048
    "llama1-7b": _llama1(4096, 11008, 32, 32),
    "llama1-13b": _llama1(5120, 13824, 40, 40),
    "llama1-33b": _llama1(6656, 17920, 60, 52),
    "llama1-65b": _llama1(8192, 22016, 80, 64),
    # arXiv:2308.12950
    "codellama-7b": {"vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1_000_000.0},
    # arXiv:2407.21783 and the config.json files Meta published beside it
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": {**_LLAMA3_8B, **_llama3_scaling(8.0)},
    "llama3.1-70b": {**_LLAMA3_70B, **_llama3_scaling(8.0)},
    "llama3.2-1b": {
        **_LLAMA3_8B,
        **_llama3_scaling(32.0),
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama3.2-3b": {
        **_LLAMA3_8B,
        **_llama3_scaling(32.0),
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    # arXiv:2401.02385
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    # arXiv:2502.02737
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,  # 1 / sqrt(576)
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    # huggingface.co/HuggingFaceTB/SmolLM3-3B-Base
    "smollm3-3b": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "bos_token_id": None,
        "eos_token_id": 128001,
    },
    # arXiv:2310.06825; the later 7b models of Mistral have no sliding window
    "mistral-7b-v0.1": {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    # arXiv:2412.15115
    "qwen2.5-0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
    # arXiv:2505.09388
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {**_QWEN3, "intermediate_size": 12288, "num_hidden_layers": 36},
    # for laptops and tests: the tied matrix is most of a small model, so the vocabulary is small too
    "tiny-1m": _tiny(1024, 128, 352, 4, 4, 2),
    "tiny-5m": _tiny(4096, 256, 704, 6, 8, 4),
    "tiny-10m": _tiny(4096, 320, 864, 8, 5, 5),
    "tiny-15m": _tiny(4096, 384, 1024, 8, 6, 2),
    "small-110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
