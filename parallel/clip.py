"""One gradient norm over every axis of the mesh, and clipping to it."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtensor_llama.shards import copies, local


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down, in place, so that their 2-norm over all parameters of all ranks is at most `max_norm`.

    Returns that norm before clipping, a float64 scalar, the same on every rank. A norm per stage or per tp rank is not the
    norm: each rank adds up the squares of its shards, counts what several ranks hold alike only once, and one all-reduce
    over the world makes the sum. parameters: this rank's, plain or DTensor, those of all its pipeline stages together; a
    parameter without gradient counts zero. (torch's clip_grad_norm_ cannot add norms of DTensors on different meshes.)
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    alike = defaultdict(list)                    # how many ranks hold the same numbers -> this rank's local gradients
    for grad in grads:
        alike[copies(grad)].append(local(grad))
    device = local(grads[0]).device if grads else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for n_copies, tensors in alike.items():
        norm = nn.utils.get_total_norm(tensors)  # a few fused launches, however many tensors
        squares += norm.double() ** 2 / n_copies
    if dist.is_initialized():
        dist.all_reduce(squares)
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()      # 1e-6 as in torch: no division by zero
    for grad in grads:
        local(grad).mul_(scale)                 # times exactly 1.0 when nothing is to clip: no host has to look
    return norm
