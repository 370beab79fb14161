"""Measure how much memory load_hf and save_hf add to the shards that a rank holds anyway.

    python recipes/bench/weights_memory.py --layers 11     # llama2-13b's shapes in bf16, about 7.6 GB on disk

Each phase has `ranks` fresh processes (gloo, fully_shard over all of them): the first ones fill a model and
save it, the second ones load it and check every bit. A rank touches all pages of its shards before a phase,
so that "over baseline" is what the phase itself adds. Prints one JSON object for each phase and rank, and
removes its files.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.weights import local_boxes


@dataclass(frozen=True)
class Config:
    model: str = "llama2-13b"  # the preset whose shapes are used
    layers: int = 0  # how many of its layers; 0: all of them (26 GB for 13b)
    ranks: int = 2
    held_dtype: str = "bfloat16"  # the dtype of parameters in memory; on disk it is always bfloat16
    folder: str = ""  # the folder to write to; empty: the system's temporary folder
    keep_free_gb: int = 30  # refuse if less disk than this would be left
    phase: str = ""  # internal: the phase of a started rank
    rank: int = 0  # internal: its number


def main(cfg: Config) -> None:
    shape = LlamaConfig.preset(cfg.model)
    shape = replace(shape, num_hidden_layers=cfg.layers or shape.num_hidden_layers)
    if cfg.phase:
        return measure(cfg, shape)
    folder = Path(tempfile.mkdtemp(prefix="weights_memory_", dir=cfg.folder or None))
    try:
        needed_gb, free_gb = 2 * shape.n_parameters / 1e9, shutil.disk_usage(folder).free / 1e9
        if free_gb - needed_gb < cfg.keep_free_gb:
            raise UsageError(
                f"--layers {cfg.layers}: needs {needed_gb:.0f} GB of {free_gb:.0f} GB free disk, and "
                f"--keep-free-gb {cfg.keep_free_gb} would not be left; use fewer layers"
            )
        for phase in ("save", "load"):
            ranks = []
            for rank in range(cfg.ranks):
                own = asdict(replace(cfg, phase=phase, folder=str(folder), rank=rank))
                flags = [f"--{key.replace('_', '-')}={value}" for key, value in own.items()]
                ranks.append(subprocess.Popen([sys.executable, __file__, *flags]))
            if any([rank.wait() for rank in ranks]):
                sys.exit(1)
    finally:
        shutil.rmtree(folder)


def measure(cfg: Config, shape: LlamaConfig) -> None:
    """Be one rank of one phase."""
    store = f"file://{cfg.folder}/{cfg.phase}.store"
    dist.init_process_group("gloo", init_method=store, rank=cfg.rank, world_size=cfg.ranks)
    mesh = init_device_mesh("cpu", (cfg.ranks,))
    with torch.device("meta"):
        model = Llama(shape).to(getattr(torch, cfg.held_dtype))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    locals_ = [local for param in model.parameters() for _, _, local in local_boxes(param)]
    for i, local in enumerate(locals_):
        fill(local, i * cfg.ranks + cfg.rank) if cfg.phase == "save" else local.zero_()
    held_bytes = sum(local.nbytes for local in locals_)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    baseline, began = psutil.Process().memory_info().rss, time.perf_counter()
    if cfg.phase == "save":
        save_hf(model, Path(cfg.folder) / "hf", dtype=torch.bfloat16)
    else:
        load_hf(model, Path(cfg.folder) / "hf")
    seconds = time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if cfg.phase == "load":
        for i, local in enumerate(locals_):
            expected = fill(torch.empty_like(local), i * cfg.ranks + cfg.rank)
            assert torch.equal(local, expected), "what was loaded is not what was saved"
    result = {
        "phase": cfg.phase,
        "rank": cfg.rank,
        "model": cfg.model,
        "layers": shape.num_hidden_layers,
        "model_on_disk_gib": round(2 * shape.n_parameters / 2**30, 2),
        "rank_holds_gib": round(held_bytes / 2**30, 2),
        "baseline_gib": round(baseline / 2**30, 2),
        "peak_over_baseline_mib": round((peak - baseline) / 2**20),
        "seconds": round(seconds, 1),
        "gib_per_second_all_ranks": round(2 * shape.n_parameters / 2**30 / seconds, 2),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def fill(local: torch.Tensor, seed: int) -> torch.Tensor:
    """Repeat a million random bf16 numbers of this seed. For a copy they are as good as fresh ones, and quick
    to make."""
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for part in local.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    return local


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
