"""A tensor as this rank holds it: plain, or a DTensor of which it has a shard."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()  # without autograd to_local is a mere look-up: a step asks for hundreds
def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the plain tensor, in the same memory; of no autograd graph."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def copies(tensor: Tensor) -> int:
    """Ranks that hold the same elements as this one; a plain tensor is held alike by every rank."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    ranks = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        ranks *= size if placement.is_replicate() else 1
    return ranks
