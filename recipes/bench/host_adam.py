"""Measure whether the host's AdamW is as fast as its memory, and what the chunk manager costs by itself.

    OMP_NUM_THREADS=$(nproc) python recipes/bench/host_adam.py     # on a quiet machine; takes a minute

Prints one JSON line with four kinds of figures.

1. Parameters/s of one AdamW update from bfloat16 gradients to bfloat16 weights, with float32 states on the
   host: our compiled kernel and our fallback, torch's fused and foreach AdamW with the casts that they need,
   and DeepSpeed's CPUAdam if it is installed. They take turns, round after round, with a plain in-place
   stream over as many bytes; an update moves at least 28 bytes a parameter.
2. How many torch calls a second another thread makes while our kernel runs on one core less, and without it.
   The forward needs them to launch its work while the host steps.
3. A step of a small model with everything RESIDENT: the chunk manager and torch.optim.AdamW(fused=True), both
   clipped, take turns. The manager's cost grows with the number of parameters, not with their size, so its
   share is smaller in a larger model.
4. The time to plan 70B on 512 ranks and on 8.

Figures are medians of the rounds; `share_of_stream` is bytes/s over those of the stream in the same rounds.
"""

import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from memory_rates import dram_stream

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.cli import run_recipe
from memory import ChunkManager, Home, MemoryConfig
from memory.chunk import CHUNK_ELEMENTS, Chunk, Ledger
from memory.home import StateFormat
from memory.kernel import HyperParameters, Kernel
from memory.placement import GIB, ChunkSizes, auto_plan
from memory.tracer import HOST_ADAM_BYTES, MachineRates, StepTrace, machine_key

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    mi_elements: int = 64  # parameters that are stepped, in 2^20, of 14 bytes each for every contender
    rounds: int = 9
    threads: int = 0  # 0: as many as torch takes (OMP_NUM_THREADS)
    model: str = "tiny-10m"  # the model on which the manager's cost is measured
    rows: int = 4  # sequences of a step there
    tokens: int = 256  # tokens of a sequence there


def main(cfg: Config) -> None:
    if min(cfg.mi_elements, cfg.rounds, cfg.rows, cfg.tokens) < 1 or cfg.threads < 0:
        raise UsageError(
            "--mi-elements, --rounds, --rows and --tokens must be at least 1, --threads at least 0."
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    n = cfg.mi_elements * 2**20
    contenders = {
        "stream": stream(n),
        "ours_compiled": ours("compiled", n),
        "ours_blocks": ours("blocks", n),
        "torch_fused": torchs(n, fused=True),
        "torch_foreach": torchs(n, foreach=True),
        "deepspeed_cpu_adam": deepspeeds(n),
    }
    seconds = take_turns({name: step for name, step in contenders.items() if step}, cfg.rounds)
    result = {
        "machine": machine_key(CPU),
        "threads": torch.get_num_threads(),
        "parameters": n,
        "rounds": cfg.rounds,
        "stream_gb_s": round(HOST_ADAM_BYTES * n / statistics.median(seconds["stream"]) / 1e9, 2),
    }
    for name in list(contenders)[1:]:
        times = seconds.get(name)
        result[name] = times and {
            "g_parameters_s": round(n / statistics.median(times) / 1e9, 3),
            "gb_s": round(HOST_ADAM_BYTES * n / statistics.median(times) / 1e9, 2),
            "share_of_stream": round(median_ratio(seconds["stream"], times), 3),
        }
    result |= {"calls_per_second": calls_beside(n), "manager_all_resident": manager_overhead(cfg)}
    print(json.dumps(result | {"plan_70b_seconds": plan_seconds()}), flush=True)


def take_turns(steps: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each step took in each round. The order changes from round to round, so that
    whatever disturbs the machine disturbs all alike."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in list(steps.items())[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            step()
            if i:  # the first round touches pages and compiles
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


# ---- the update --------------------------------------------------------------------------------------------


def stream(n: int) -> Callable:
    """Return a step that reads and writes an array, and so moves as many bytes as an update."""
    return dram_stream(HOST_ADAM_BYTES // 2 * n)


def state(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a master, two moments, and a bfloat16 gradient."""
    return *(torch.full((n,), 0.01) for _ in range(3)), torch.full((n,), 0.01, dtype=torch.bfloat16)


def ours(kind: str, n: int) -> Callable:
    """Return an update by our kernel, with chunks laid out and stepped one by one as the engine does."""
    kernel, hyper, ledger = (
        Kernel(kind, CPU),
        HyperParameters(1e-3, 0.9, 0.95, 1e-8, 0.1, 1),
        Ledger(CPU, {"device": None, "host": None}),
    )
    chunks = []
    for start in range(0, n, CHUNK_ELEMENTS):
        chunks.append(Chunk(len(chunks), StateFormat()))
        chunks[-1].n = min(CHUNK_ELEMENTS, n - start)
        chunks[-1].allocate(ledger, Home.CPU)
        for tensor in chunks[-1].tensors.values():
            tensor.fill_(0.01)
    outbox = [ledger.zeros("host", chunks[0].n, torch.bfloat16, "outbox", nth=4 + i) for i in range(2)]

    def step():
        for i, chunk in enumerate(chunks):
            states = (chunk.tensors[name] for name in ("master", "exp_avg", "exp_avg_sq", "grad_buffer"))
            kernel.host_step(*states, outbox[i % 2][: chunk.n], None, hyper)

    return step


def torchs(n: int, **which) -> Callable:
    """Return an update by torch.optim.AdamW on float32 masters. It needs two more passes, which cast the
    gradient and the weight."""
    master, _, _, grad = state(n)
    weight, master = torch.empty_like(grad), nn.Parameter(master)
    master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW([master], lr=1e-3, **which)

    def step():
        master.grad.copy_(grad)
        optimizer.step()
        weight.copy_(master.detach())

    return step


def deepspeeds(n: int) -> Callable | None:
    """Return an update by DeepSpeed's vectorised CPUAdam, which takes a float32 gradient, or None where it is
    not installed or cannot be built."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        master, _, _, grad = state(n)
        weight, master = torch.empty_like(grad), nn.Parameter(master)
        master.grad = torch.empty_like(master)
        optimizer = DeepSpeedCPUAdam([master], lr=1e-3, adamw_mode=True)
    except Exception as error:  # it compiles itself on first use, and can fail in many ways
        print(f"DeepSpeed's CPUAdam is installed and does not run: {error}", file=sys.stderr)
        return None

    def step():
        master.grad.copy_(grad)
        optimizer.step()
        weight.copy_(master.detach())

    return step


def calls_beside(n: int, seconds: float = 1.0) -> dict[str, int]:
    """Count the calls that this thread makes in a second: alone, and while another thread runs our kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads := max(1, before - 1))
    step, calls, x = ours("compiled", n), {}, torch.ones(4)
    step()  # this compiles, for that many threads
    torch.set_num_threads(before)
    stop = threading.Event()

    def steps():
        torch.set_num_threads(n_threads)
        while not stop.is_set():
            step()

    for name, thread in (("alone", None), ("beside_host_adam", threading.Thread(target=steps))):
        if thread:
            thread.start()
        n_calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            x.add_(1)
            n_calls += 1
        calls[name] = round(n_calls / (time.perf_counter() - began))
        if thread:
            stop.set()
            thread.join()
    torch.set_num_threads(before)
    return calls


# ---- the manager with nothing to do ------------------------------------------------------------------------


def manager_overhead(cfg: Config) -> dict:
    """Time whole steps: forward, backward, update. `overhead`: how much longer they take with the manager."""
    tokens = torch.randint(1000, (cfg.rows, cfg.tokens))
    steps = {}
    for name in ("adamw_fused", "manager"):
        model = Llama(LlamaConfig.preset(cfg.model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()))
        if name == "manager":
            optimizer = ChunkManager(model, optimizer, MemoryConfig("static", 1.0, 0.0, 0.0)).optimizer
            clip = optimizer.clip_grad_norm

        def step(model=model, optimizer=optimizer, clip=clip):
            model(tokens, tokens).backward()
            clip(1.0)
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    seconds = take_turns(steps, 3 * cfg.rounds)
    overhead = median_ratio(seconds["manager"], seconds["adamw_fused"]) - 1
    medians = {f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in seconds.items()}
    return {"model": cfg.model, "overhead": round(overhead, 4), **medians}


def plan_seconds() -> dict[str, float]:
    """Time the planner on a rank of 512 with 4 GiB for states, and on a rank of 8 with 80 GiB."""
    n, seconds = LlamaConfig.preset("llama2-70b").n_parameters, {}
    rates = MachineRates(50e9, 50e9, 100e9, 200e9, 12.8e9, 170e9)
    for ranks, budget_gib in ((512, 4), (8, 80)):
        sizes = (CHUNK_ELEMENTS,) * (n // ranks // CHUNK_ELEMENTS) + (n // ranks % CHUNK_ELEMENTS,)
        budgets = {"device": budget_gib * GIB, "host": 200 * GIB}
        start = time.perf_counter()
        auto_plan(ChunkSizes(sizes), budgets, rates, StepTrace(2 * GIB, 0.5, 1.5))
        seconds[f"{ranks} ranks, {len(sizes)} chunks"] = round(time.perf_counter() - start, 4)
    return seconds


if __name__ == "__main__":
    run_recipe(main, Config)
