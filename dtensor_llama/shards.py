"""This rank's part of a tensor: all of a plain one, or its shard of a DTensor. `reshard` frees what FSDP has
gathered of the other parts."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()  # without autograd to_local is a mere look-up, and a step does hundreds of them
def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, or the plain tensor, in the same memory and outside of any autograd graph."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def copies(tensor: Tensor) -> int:
    """Return how many ranks hold the same elements as this one; every rank holds the same plain tensors."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    ranks = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        ranks *= size if placement.is_replicate() else 1
    return ranks


def reshard(models: Iterable[nn.Module]) -> None:
    """Free the weights that FSDP has gathered for forwards that no backward follows. Left gathered, they
    would be stale after the next optimizer step."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
