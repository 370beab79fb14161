"""FLOPs per token and peak rates: what MFU and HFU are made of. Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B."""

import time

import torch

from dtensor_llama.config import LlamaConfig

# Dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets (without sparsity). Longest matching name wins.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "L40S": 362e12}


def model_flops_per_token(config: LlamaConfig, seq_len: int, convention: str = "full") -> float:
    """FLOPs of forward and backward per token, never counting recomputation.

    full    6 (N - N_embed) + 12 L H E T: attention counted over all T keys, as PaLM and most papers do
    causal  the same with half the attention: what a causal kernel really computes
    6n      6 N, embedding included, no attention: the rule of thumb
    N_embed is the embedding that is looked up, not multiplied; a tied one is multiplied (as the head), so it counts.
    """
    if convention == "6n":
        return 6.0 * config.n_parameters
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6.0 * (config.n_parameters - lookup) + attention * {"full": 1.0, "causal": 0.5}[convention]


def hardware_flops_per_token(config: LlamaConfig, seq_len: int, recompute: str) -> float:
    """As `full` above, plus what is computed a second time: a forward of the blocks when `recompute` is full."""
    head = 6.0 * config.vocab_size * config.hidden_size
    model_flops = model_flops_per_token(config, seq_len)
    return model_flops + (model_flops - head) / 3 if recompute == "full" else model_flops


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak matmul FLOP/s of one device and where the number is from: a data sheet, else a matmul timed now (0.3 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if key in name]
        if known and dtype == torch.bfloat16:
            return PEAK_FLOPS[max(known, key=len)], f"data sheet of {name}"
    return matmul_flops(device, dtype), f"timed {str(dtype).removeprefix('torch.')} matmul on this {device.type}"


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product, measured: what this device can do, as a data sheet says what it could."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(n, n, device=device, dtype=dtype), torch.ones(n, n, device=device, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        (a @ b)[0, 0].item()                       # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best
