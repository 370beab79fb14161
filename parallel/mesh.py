"""The process group and the one DeviceMesh. Axes, outermost first: dp_shard. (Others join here, outside and inside it.)"""

import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import ParallelConfig


def start_process_group(device: torch.device, world_size: int, timeout_s: float = 600) -> None:
    """Join the processes that torchrun started, or, for a single process without it, found a group of one.

    The group has gloo for CPU tensors, and NCCL beside it when the device is a GPU. A rank that does not arrive within
    `timeout_s` seconds, or a collective that lasts longer, is an error on all others.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    else:
        dist.init_process_group(backend, **options)


def stop_process_group() -> None:
    """Leave the group in order. Every rank calls it, after its last collective.

    The barrier keeps a fast rank from closing connections others still read from; the collection drops meshes and
    models that hold sub-groups, so that no gloo thread outlives them and aborts the interpreter at exit.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh of a resolved config. mesh["dp_shard"]: who reads which rows, and who shares parameters (ZeRO)."""
    return init_device_mesh(device_type, (config.dp_shard,), mesh_dim_names=("dp_shard",))
