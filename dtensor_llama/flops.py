"""FLOPs per token and peak rates, which give MFU and HFU.

Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.

MFU: the FLOP/s that the model needs at the measured speed, as a share of the device's peak
HFU: the same with recomputation counted, so the share of the peak that the device really computes
"""

import functools
import math
import time
from dataclasses import dataclass

import torch

from dtensor_llama.config import LlamaConfig

# Dense bf16 matrix products in FLOP/s, from NVIDIA's data sheets (without sparsity).
# The longest name that matches the device's is taken.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "L40S": 362e12}


@dataclass(frozen=True)
class Utilization:
    """Turns the seconds of a step into tokens per second, MFU and HFU."""

    config: LlamaConfig
    seq_len: int
    recompute: str
    step_tokens: int  # tokens of the global batch
    n_devices: int
    peak: tuple[float, str]  # peak_flops of one device

    def of_step(self, step_seconds: float) -> dict[str, float]:
        tokens_per_s = self.step_tokens / step_seconds
        per_device = tokens_per_s / self.n_devices / self.peak[0]
        return {
            "tokens_per_second": tokens_per_s,
            "mfu": per_device * model_flops_per_token(self.config, self.seq_len),
            "hfu": per_device * hardware_flops_per_token(self.config, self.seq_len, self.recompute),
        }


def model_flops_per_token(config: LlamaConfig, seq_len: int, convention: str = "full") -> float:
    """Return the FLOPs of forward and backward per token, without recomputation.

    full    6 (N - N_embed) + 12 L H E T: attention counted over all T keys, as PaLM and most papers do
    causal  the same with half the attention, which is what a causal kernel really computes
    A layer with a sliding window W below T counts W keys, and causal those before a token, W - W^2 / 2T.
    6n      6 N, embedding included, no attention: the rule of thumb
    N_embed: parameters of the embedding, which is looked up and not multiplied. It is 0 if the embedding is
        tied, since then it is multiplied as the head.
    """
    if convention == "6n":
        return 6.0 * config.n_parameters
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    n_keys = 0.0  # that a token attends to, over all layers
    for layer in range(config.num_hidden_layers):
        width = min(seq_len, config.window(layer) or seq_len)
        n_keys += {"full": width, "causal": width - width**2 / (2 * seq_len)}[convention]
    attention = 12.0 * config.num_attention_heads * config.head_dim * n_keys
    return 6.0 * (config.n_parameters - lookup) + attention


def hardware_flops_per_token(config: LlamaConfig, seq_len: int, recompute: str) -> float:
    """Return the FLOPs of convention `full` plus a second forward of the blocks, if `recompute` is full."""
    head = 6.0 * config.vocab_size * config.hidden_size
    model_flops = model_flops_per_token(config, seq_len)
    return model_flops + (model_flops - head) / 3 if recompute == "full" else model_flops


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak matmul FLOP/s of one device, and the source of the number.

    The source is a data sheet where the device is known, else a matmul that is timed once (0.3 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if key in name]
        if known and dtype == torch.bfloat16:
            return PEAK_FLOPS[max(known, key=len)], f"data sheet of {name}"
    source = f"timed {str(dtype).removeprefix('torch.')} matmul on this {device.type}"
    return matmul_flops(device, dtype), source


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of a large matrix product, which is what this device reaches in practice.

    The factors are random, because a GPU that multiplies ones draws less power and keeps a higher clock: 894
    TFLOP/s on an H100 where random factors give 788. A third of `seconds` warms up, and the best measurement
    of the rest counts.
    """
    on_gpu = device.type == "cuda"
    n, products_per_measurement = (8192, 8) if on_gpu else (1024, 1)
    stream = torch.Generator(device).manual_seed(0)  # its own: the run's random numbers stay as they were
    a, b = (torch.randn(n, n, generator=stream, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)

    def least_seconds(duration_s: float) -> float:
        """Measure for so long, at least once. Return the seconds of the quickest product."""
        best, ends = math.inf, time.perf_counter() + duration_s
        while best == math.inf or time.perf_counter() < ends:
            start = time.perf_counter()
            for _ in range(products_per_measurement):
                torch.mm(a, b, out=product)
            if on_gpu:
                torch.cuda.synchronize(device)
            best = min(best, (time.perf_counter() - start) / products_per_measurement)
        return best

    least_seconds(seconds / 3)
    return 2.0 * n**3 / least_seconds(seconds * 2 / 3)
