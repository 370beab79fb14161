"""Does a row 8 times longer on 8 ranks need the memory that it needed on one?

    python recipes/bench/context_memory.py                    # CPU, gloo, some seconds; --help lists the sizes

One step of a small model four times: rows of `tokens` on 1 rank, rows of ranks x `tokens` on 1 rank, and
those long rows on `ranks` ranks with each method of context parallelism. Counts the bytes that autograd keeps
from forward for backward, parameters apart (torch.autograd.graph.saved_tensors_hooks; a storage counts once),
on each rank, and how far the resident memory of the process rises above what it was before the step. Prints
one JSON object per run.
"""

import gc
import json
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import tyro
from torch.distributed.device_mesh import init_device_mesh

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.attention import WholeRows
from parallel.config import Job, ParallelConfig, check_parallel
from parallel.context import apply_context_parallel, shard_sequence


@dataclass(frozen=True)
class Config:
    ranks: int = 8
    tokens: int = 512  # of a row, per rank
    rows: int = 2
    layers: int = 4
    hidden: int = 128
    heads: int = 8
    kv_heads: int = 2
    kernel: str = "sdpa"


def main(cfg: Config) -> None:
    for method in ("ring", "ulysses"):
        layout = ParallelConfig(cp=cfg.ranks, dp_shard=1, cp_method=method)
        check_parallel(layout, Job(shape(cfg), cfg.ranks * cfg.tokens, attention=cfg.kernel))
    alone = replace(cfg, ranks=1)
    runs = (
        ("none", alone),
        ("none", replace(alone, tokens=cfg.ranks * cfg.tokens)),
        ("ulysses", cfg),
        ("ring", cfg),
    )
    for method, run in runs:
        with tempfile.TemporaryDirectory() as folder:
            # Forked, not started anew: torch is imported once. This process has run nothing that a fork would
            # upset.
            ranks = [
                multiprocessing.get_context("fork").Process(
                    target=measure, args=(run, method, rank, f"{folder}/store")
                )
                for rank in range(run.ranks)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            if any(rank.exitcode for rank in ranks):
                sys.exit(1)


def shape(cfg: Config) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=cfg.hidden,
        intermediate_size=cfg.hidden * 11 // 4,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
    )


def measure(cfg: Config, method: str, rank: int, store: str) -> None:
    """One rank of one run; rank 0 prints the largest of all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, cfg.ranks), rank=rank, world_size=cfg.ranks)
    mesh = init_device_mesh("cpu", (cfg.ranks,), mesh_dim_names=("cp",))
    model, seq_len = Llama(shape(cfg)), cfg.ranks * cfg.tokens
    model.attention = WholeRows(cfg.kernel)
    rows = torch.randint(512, (cfg.rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    if method == "none":
        share = lambda x: x.contiguous()
    else:
        apply_context_parallel(model, mesh, method)
        share = lambda x: shard_sequence(x, mesh, method)
    tokens, labels = share(rows[:, :-1]), share(rows[:, 1:])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that they are not in the rise
    few = 2 * cfg.ranks  # tokens of a first step, for what is made once
    model(share(rows[:, :few]), share(rows[:, 1 : few + 1])).backward()
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    baseline = psutil.Process().memory_info().rss

    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens, labels)
    loss.backward()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    largest = torch.tensor([sum(kept.values()), peak - baseline])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(loss := loss.detach())
    if rank == 0:
        saved, rise = largest.tolist()
        print(
            json.dumps(
                {
                    "method": method,
                    "ranks": cfg.ranks,
                    "row_tokens": seq_len,
                    "tokens_per_rank": tokens.shape[1],
                    "kept_for_backward_mib_per_rank": round(saved / 2**20, 2),
                    "peak_rise_mib_per_rank": round(rise / 2**20, 1),
                    "loss_per_token": round(loss.item() / labels.numel() / cfg.ranks, 5),
                    "rows": cfg.rows,
                    "layers": cfg.layers,
                    "hidden": cfg.hidden,
                }
            ),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
