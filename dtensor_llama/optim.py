"""AdamW as LLaMA-2 was trained (arXiv:2307.09288, sec. 2.2), and gradient norms exact at any size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORM_BLOCK = 256 * 1024  # elements: as float64 2 MiB, which a core's cache holds while they are summed


def build_adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """Build a fused AdamW over the model's parameters, plain or DTensor; vectors (norms) are not decayed.

    Call it after parallelize, since the optimizer steps the shards this rank holds. kind: AdamW or a subclass.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def float64_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norm of each tensor, 0-dim, float64, on the tensor's device; all squares are summed in float64.

    In float32 a CPU adds millions of squares one after the other: torch's norm of 16.8 million normal numbers
    is 6.5e-4 too small, that of 131 million 1.4e-2, and both are others where the numbers are cut otherwise,
    as layouts and placements do. A GPU sums in blocks of 65,536, so that float32 would be enough there, but
    float64 costs it nothing: it waits for memory. A float64 also holds the squares of all float32: above
    1.8e19 a float32 would say inf, below 1e-23 zero.
    """
    if not tensors:
        return []
    if tensors[0].is_cuda:
        # torch.nn.utils.get_total_norm calls it too, but without a dtype, and then norms of bfloat16
        # gradients are rounded to that. It takes a few launches for any number of tensors.
        # torch.linalg.vector_norm would make a float64 copy of each first.
        return list(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    return [_norm_by_blocks(tensor) for tensor in tensors]


def _norm_by_blocks(tensor: Tensor) -> Tensor:
    """On a CPU, where torch makes a float64 copy of what it is given: a block's stays in the cache."""
    blocks = tensor.reshape(-1).split(NORM_BLOCK)
    norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are to be multiplied by, a float32 scalar: at most 1, or nan if the norm is
    inf or nan, which tells every kind of step to change nothing."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch: no division by zero
    return (factor + (norm - norm)).float()  # inf - inf is nan, x - x is 0
