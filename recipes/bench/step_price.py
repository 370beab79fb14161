"""Compare our training step with the same model in the shortest loop that could train it.

    python recipes/bench/step_price.py                         # one process: our step and a plain loop
    torchrun --nproc-per-node 2 recipes/bench/step_price.py    # ZeRO 0 and DDP, ZeRO 3 and fully_shard, tp

All variants are built in the same processes and take turns, step by step, so that a slow minute slows all
alike; each ratio is that of the median step times. On two processes a step under tp 2 is also profiled on
rank 0: it shows where time goes beside the matrix products, whose time no step can do without. Prints one
JSON line.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pretrain.py, whose step this times
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from pretrain import train_step
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.cli import read_launch, run_recipe
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.optim import build_adamw
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import adamw, assemble
from parallel.config import Job, check_parallel
from parallel.mesh import Layout, start_process_group, stop_process_group


@dataclass(frozen=True)
class Config:
    """Price of the machinery: our step against bare loops, taking turns."""

    model: str = "tiny-15m"
    seq_len: int = 256
    rows: int = 8  # sequences of a step, in each process
    steps: int = 20  # timed steps of each variant
    warmup: int = 3  # steps of each variant before them; the first one compiles the loss on a GPU
    dtype: str = "float32"  # in which the forward computes


def main(cfg: Config) -> None:
    if min(cfg.rows, cfg.steps, cfg.warmup) < 1:
        raise UsageError("--rows, --steps and --warmup must be at least 1.")
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = LlamaConfig.preset(cfg.model)
    job = Job(config, cfg.seq_len, cfg.rows, cfg.rows)
    check_parallel(ParallelConfig(tp=world_size).resolve(world_size), job)
    start_process_group(device, world_size)
    variants = {"plain loop": bare(cfg, device), "ours": ours(cfg, device, ParallelConfig())}
    if world_size > 1:
        variants = {
            "DDP": bare(cfg, device, "ddp"),
            "ours, ZeRO 0": ours(cfg, device, ParallelConfig(zero_stage=0)),
            "bare fully_shard": bare(cfg, device, "fsdp"),
            "ours, ZeRO 3": ours(cfg, device, ParallelConfig()),
            "ours, tp": ours(cfg, device, ParallelConfig(tp=world_size)),
        }
    sequences = torch.randint(
        config.vocab_size, (cfg.rows, cfg.seq_len + 1), generator=torch.Generator().manual_seed(rank)
    )
    batch = Batch(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous(), None)
    step_s = defaultdict(list)
    for i in range(cfg.warmup + cfg.steps):
        for name, step in variants.items():
            dist.barrier()
            began = time.perf_counter()
            step(batch).item()  # this waits for the device
            if i >= cfg.warmup:
                step_s[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in step_s.items()}
    result = {
        **vars(cfg),
        "world_size": world_size,
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "step_seconds": medians,
    }
    pairs = (
        [("ours", "plain loop")]
        if world_size == 1
        else [("ours, ZeRO 0", "DDP"), ("ours, ZeRO 3", "bare fully_shard")]
    )
    result["ratios"] = {f"{a} / {b}": medians[a] / medians[b] for a, b in pairs}
    if world_size > 1:
        result["tp_profile_seconds"] = profile_step(variants["ours, tp"], batch)
    if rank == 0:
        print(json.dumps(result), flush=True)
    stop_process_group()


def bare(cfg: Config, device: torch.device, wrap: str | None = None):
    """Return a step in as few lines as possible: forward, backward, clip, fused AdamW. `wrap` (ddp or fsdp)
    averages gradients over the ranks."""
    dtype = getattr(torch, cfg.dtype)
    model = Llama(LlamaConfig.preset(cfg.model)).to(device)
    init_weights(model, 0)
    called = model
    if wrap == "ddp":
        called = DistributedDataParallel(model)
    elif wrap == "fsdp":
        precision = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.model.layers:
            fully_shard(block, mp_policy=precision)
        fully_shard(model, mp_policy=precision, reshard_after_forward=False)
    optimizer = build_adamw(model, 3e-4, 0.1)

    def step(batch: Batch) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=wrap != "fsdp" and dtype != torch.float32):
            loss = called(batch.tokens.to(device), labels=batch.labels.to(device)) / batch.labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(cfg: Config, device: torch.device, layout: ParallelConfig):
    """Return the step of recipes/pretrain.py. Under tp all ranks read the same sequences, and each has a
    share of their tokens."""
    dtype = getattr(torch, cfg.dtype)
    resolved = layout.resolve(dist.get_world_size())
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset(cfg.model))
    layout = Layout(resolved, build_mesh(resolved, device.type), n_microbatches=1)
    training = assemble(model, layout, Computation(device, dtype), adamw(3e-4, 0.1))
    init_weights(model, 0)

    def step(batch: Batch) -> torch.Tensor:
        n_targets = batch.labels.numel() * resolved.dp
        return train_step(training, [batch], n_targets, 3e-4, 1.0)[0]

    return step


def profile_step(step, batch: Batch) -> dict[str, float]:
    """Return this rank's seconds of one step by kind of work. No moment counts twice. All ranks enter."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(batch).item()
    total_s = time.perf_counter() - began
    own_s = defaultdict(float)
    for event in profiler.key_averages():
        own_s[kind_of_work(event.key)] += event.self_cpu_time_total / 1e6
    return {**own_s, "whole step, profiled": total_s}


def kind_of_work(operation: str) -> str:
    """Return the kind of work of an operation that the profiler names."""
    if operation in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "matrix products"
    if "attention" in operation:
        return "attention"
    if operation.startswith(("gloo:", "c10d::", "_c10d", "nccl:")):
        return "collectives and waiting"
    return "optimizer" if "adam" in operation.lower() else "other tensor operations"


if __name__ == "__main__":
    run_recipe(main, Config)
