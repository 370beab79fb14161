"""Measure whether 8 ranks with sequences 8 times longer need as much memory each as one rank with short ones.

    python recipes/bench/context_memory.py                # CPU, gloo, some seconds; --help lists the sizes

One step of a small model is made four times: with sequences of `tokens` on 1 rank, with sequences of ranks x
`tokens` on 1 rank, and with these long sequences on `ranks` ranks by each method of context parallelism. On
each rank the bytes that autograd keeps from forward for backward are counted, without parameters (by torch's
saved_tensors_hooks; a storage counts once), and so is the rise of the process's resident memory during the
step. Prints one JSON object for each run.
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
from dtensor_llama.attention import WholeSequences
from parallel.config import Job, ParallelConfig, check_parallel
from parallel.context import apply_context_parallel, shard_sequence


@dataclass(frozen=True)
class Config:
    ranks: int = 8
    tokens: int = 512  # tokens of a sequence, on each rank
    rows: int = 2  # sequences
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
            # A fork spares each rank the import of torch. This process has run nothing that a fork breaks.
            fork = multiprocessing.get_context("fork").Process
            arguments = [(run, method, rank, f"{folder}/store") for rank in range(run.ranks)]
            ranks = [fork(target=measure, args=each) for each in arguments]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            if any(rank.exitcode for rank in ranks):
                sys.exit(1)


def shape(cfg: Config) -> LlamaConfig:
    """Return the configuration of the small model."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=cfg.hidden,
        intermediate_size=cfg.hidden * 11 // 4,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
    )


def measure(cfg: Config, method: str, rank: int, store: str) -> None:
    """Be one rank of one run. Rank 0 prints the largest figures of all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, cfg.ranks), rank=rank, world_size=cfg.ranks)
    mesh = init_device_mesh("cpu", (cfg.ranks,), mesh_dim_names=("cp",))
    model, seq_len = Llama(shape(cfg)), cfg.ranks * cfg.tokens
    model.attention = WholeSequences(cfg.kernel)
    sequences = torch.randint(512, (cfg.rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    if method == "none":
        share = lambda x: x.contiguous()
    else:
        apply_context_parallel(model, mesh, method)
        share = lambda x: shard_sequence(x, mesh, method)
    tokens, labels = share(sequences[:, :-1]), share(sequences[:, 1:])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # gradients that exist already are no part of the rise
    few = 2 * cfg.ranks  # tokens of a first step, in which everything is made that is made only once
    model(share(sequences[:, :few]), share(sequences[:, 1 : few + 1])).backward()
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
    saved, rise = largest.tolist()
    result = {
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
    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
