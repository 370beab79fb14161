"""Describe this machine, and measure one matrix product, one attention, one update and one copy on its GPU.

    python recipes/bench/machine.py              # JSON lines, half a minute on a GPU; tiny sizes on a CPU
    python recipes/bench/machine.py --facts      # the first line only: names, sizes, versions

Every step of training is made of these, so when a step is slower than predicted, look here first. The factors
are random numbers: a GPU that multiplies ones draws less power and runs faster than in training. Each rate is
the mean over a stretch of work, not its best moment, because training runs for hours.
"""

import importlib.metadata
import importlib.util
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed
from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB, pinned_memory_is_resident
from memory.tracer import MIB, Link, adam_rate

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "psutil",
    "tyro",
    "pytest",
    "tensorboard",
    "rich",
    "sentencepiece",
    "pyarrow",
    "matplotlib",
    "hypothesis",
    "flash_attn",
    "deepspeed",
)


@dataclass(frozen=True)
class Config:
    """Facts about the machine, then the rates of its GPU."""

    facts: bool = False  # print only the first line
    pinning: bool = False  # measure only how fast memory is pinned
    seconds: float = 1.0  # each rate is measured for so long


def main(cfg: Config) -> None:
    if cfg.seconds <= 0:
        raise UsageError(f"--seconds {cfg.seconds:g} is not possible; use more than 0.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(json.dumps(facts(device)), flush=True)
    if cfg.facts:
        return
    small = device.type == "cpu"
    n_pinned = (1 if small else 4096) * MIB
    say("pinning 4 GiB", gb_s=pinning_rate(n_pinned) / 1e9)
    say("pinning 4 GiB of huge pages", gb_s=huge_pinning_rate(n_pinned) / 1e9)
    if cfg.pinning:
        return
    shapes = [(64, 64, 64)] if small else [(4096, 4096, 4096), (4096, 11008, 4096), (8192, 4096, 4096)]
    for m, n, k in shapes:
        say(f"matmul {m} x {n} x {k}", tflop_s=matmul(device, (m, n, k), cfg.seconds) / 1e12)
    forward_ms, both_ms = attention(device, 64 if small else 4096, cfg.seconds)
    say("attention", forward_ms=forward_ms, forward_backward_ms=both_ms)
    if device.type == "cuda":
        say("device AdamW", g_parameters_s=adam_rate(device, 1, 256 * MIB, cfg.seconds) / 1e9)
    link = Link(device, (1 if small else 256) * MIB)
    say(
        "copies of 256 MiB, pinned",
        **{f"{way}_gb_s": link.rate(way, cfg.seconds) / 1e9 for way in ("h2d", "d2h", "duplex")},
    )


def say(kernel: str, **figures: float) -> None:
    """Print one result line."""
    print(json.dumps({"kernel": kernel, **figures}), flush=True)


def facts(device: torch.device) -> dict:
    """Return names, sizes and versions of what training depends on."""
    on_gpu = device.type == "cuda"
    memory = psutil.virtual_memory()
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else "no GPU",
        "device_gib": torch.cuda.get_device_properties(device).total_memory / GIB if on_gpu else 0.0,
        "driver": nvidia_smi(),
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "host_gib": memory.total / GIB,
        "host_available_gib": memory.available / GIB,
        # without a compiler AdamW on the host is not compiled
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
        "pinned_memory_is_resident": pinned_memory_is_resident() if on_gpu else None,
        "python": sys.version.split()[0],
        "versions": versions(),
    }


def nvidia_smi() -> str | None:
    """Return driver, clock and power limit as nvidia-smi prints them, or None where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = "driver_version,clocks.max.sm,power.limit,clocks_throttle_reasons.active"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return asked.stdout.strip() or asked.stderr.strip()


def versions() -> dict[str, str | None]:
    """Return the version of each package, or None where it is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
        except importlib.metadata.PackageNotFoundError:
            found[name] = "of unknown version"
    return found | {"torch": torch.__version__}  # this one names the CUDA version too


def seconds_each(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the mean seconds of a call of work(), over at least `seconds` after some calls to warm up."""
    for _ in range(3):
        work()
    wait(device)
    n_calls, began = 0, time.perf_counter()
    while n_calls == 0 or time.perf_counter() - began < seconds:
        for _ in range(10):
            work()
        # We do not wait after each call: the next ones are launched while one runs, as in training.
        wait(device)
        n_calls += 10
    return (time.perf_counter() - began) / n_calls


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all work that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul(device: torch.device, shape: tuple[int, int, int], seconds: float) -> float:
    """Return the FLOP/s of an (m, k) by (k, n) product in bfloat16."""
    m, n, k = shape
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)  # a linear layer stores its weight so
    return 2.0 * m * n * k / seconds_each(lambda: a @ b.T, device, seconds)


def pinning_rate(n_bytes: int) -> float:
    """Return at how many bytes a second the host gives out pinned memory that nothing had touched; without a
    GPU, memory that is not pinned. With states on the host it is what a run waits for before it starts."""
    began = time.perf_counter()
    torch.empty(n_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).fill_(1)
    return n_bytes / (time.perf_counter() - began)


def huge_pinning_rate(n_bytes: int) -> float:
    """Return the same for huge pages that are touched by torch's threads and then registered with CUDA."""
    began = time.perf_counter()
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    if not torch.cuda.is_available():
        return n_bytes / (time.perf_counter() - began)
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(tensor.data_ptr(), n_bytes, 0))
    seconds = time.perf_counter() - began
    torch.cuda.check_error(cudart.cudaHostUnregister(tensor.data_ptr()))
    return n_bytes / seconds


def attention(device: torch.device, seq_len: int, seconds: float) -> tuple[float, float]:
    """Return milliseconds for a layer of 7B, causal, 32 heads of 128: forward, and forward with backward."""
    q, k, v = (
        torch.randn(1, 32, seq_len, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    upstream = torch.randn(1, 32, seq_len, 128, device=device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (q, k, v), upstream)

    return 1e3 * seconds_each(forward, device, seconds), 1e3 * seconds_each(both, device, seconds)


if __name__ == "__main__":
    run_recipe(main, Config)
