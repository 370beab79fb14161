"""One gradient norm over all axes of the mesh, and clipping with it.

Gradients that are not finite are never stepped.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from dtensor_llama.optim import KeepsMasters, clip_factor, float64_norms
from dtensor_llama.shards import copies, local


class ClippingAdamW(torch.optim.AdamW):
    """torch's AdamW with the one method more that the chunk manager's optimizer has, so that a training loop
    reads the same with either."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Let the next step scale the gradients down to `max_norm`. Return their norm, over every axis of the
        mesh; if it is inf or nan the next step changes nothing."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return clip_grad_norm(parameters, max_norm, self, in_step=True)


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    optimizer: Optimizer | None = None,
    in_step: bool = False,
) -> Tensor:
    """Clip the gradients so that their 2-norm over all parameters of all ranks is at most `max_norm`.

    Return the norm before clipping, a float64 scalar, the same on every rank; with inf for `max_norm` nothing
    is clipped. parameters: all that this rank has, plain or DTensor, of all its pipeline stages together; a
    parameter without a gradient counts as zero. All ranks enter.

    optimizer: the one that will step these parameters. If the norm is inf or nan, its next step changes
        nothing on any rank: no weight, no moment, no step count. None: the caller has to leave out that step.
    in_step: False: gradients are scaled in place, as torch.nn.utils.clip_grad_norm_ does. True: they stay as
        they are until the optimizer, which must be a fused AdamW, scales them as it reads them; this saves a
        pass over them. The optimizer of a chunk manager always clips in its step, because not all gradients
        are in `parameter.grad`.

    Nothing here waits for the device, with one exception. An optimizer that is not fused cannot be told on
    the device that it must change nothing. For such an optimizer the norm is read on the host, and gradients
    that are not finite are deleted.
    """
    if isinstance(optimizer, KeepsMasters):
        return optimizer.clip_grad_norm(max_norm)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    grads = [parameter.grad for parameter in parameters]
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)
    can_skip = optimizer is not None and _is_fused(optimizer)
    if in_step and not can_skip:
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} cannot clip in its step; give AdamW(..., fused=True), or leave out in_step=True."
        )
    if can_skip:
        scales = in_step and max_norm < float("inf")
        grad_scale = factor.reciprocal() if scales else None  # the step divides gradients by it
        _set_for_next_step(optimizer, grad_scale, found_inf=factor.isnan().float())
    elif optimizer is not None and not norm.isfinite():
        for parameter in parameters:
            parameter.grad = None
        return norm
    if not in_step:
        for grad in grads:
            # The factor is exactly 1.0 if nothing is to be clipped, so the host need not look at it.
            local(grad).mul_(factor)
    return norm


def global_norm(grads: list[Tensor]) -> Tensor:
    """Return the 2-norm over the gradients of all ranks, a float64 scalar. All ranks enter.

    A norm per stage or per tp rank is not the norm: each rank adds up the squares of its shards, divides
    those of numbers that several ranks hold by the number of those ranks, and one all-reduce over the world
    makes the sum. (torch's clip_grad_norm_ cannot add norms of DTensors on different meshes.)
    """
    alike = defaultdict(list)  # {how many ranks hold the same numbers: local gradients of this rank}
    for grad in grads:
        alike[copies(grad)].append(local(grad))
    device = local(grads[0]).device if grads else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for n_copies, tensors in alike.items():
        squares += torch.stack(float64_norms(tensors)).square().sum() / n_copies
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def _is_fused(optimizer: Optimizer) -> bool:
    """Return whether its step takes grad_scale and found_inf, as torch.amp.GradScaler hands them over."""
    return isinstance(optimizer, (Adam, SGD)) and all(group.get("fused") for group in optimizer.param_groups)


def _set_for_next_step(optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor) -> None:
    """Set what a fused optimizer looks for in each step: it divides gradients by grad_scale, and changes
    nothing if found_inf is 1. Both are removed after the step, so that they do not act on a later one."""
    if not getattr(optimizer, "_forgets_clip", False):
        optimizer.register_step_post_hook(_forget_clip)
        optimizer._forgets_clip = True
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf


def _forget_clip(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    optimizer.grad_scale = optimizer.found_inf = None
