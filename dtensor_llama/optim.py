"""AdamW as LLaMA-2 was trained with it (arXiv:2307.09288, sec. 2.2), and exact norms of gradients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dtensor_llama.weights import StandIn

# What a checkpoint holds: nested dicts of tensors and plain values.
StateDict = dict[str, Any]
# Numbers that are squared at a time on a CPU: 512 KiB as float64, which stay in the second-level cache of a
# core. With 256 Ki of them tiny-15m's norm takes a fifth longer, and torch.linalg.vector_norm instead of the
# dot product takes a half longer.
NORM_BLOCK = 64 * 1024


@runtime_checkable
class KeepsMasters(Protocol):
    """Describes what an optimizer offers beside torch's methods if it keeps the float32 weights itself.

    The chunk manager's optimizer does: it has these masters and the moments, and the model's parameters are
    only the copies that compute.

    Checkpoints, exports and clipping ask `isinstance(optimizer, KeepsMasters)`.
    """

    def masters(self) -> "StandIn":
        """Return the masters as a model, to be initialized, loaded or saved one parameter at a time."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Return the norm of all gradients on all ranks, and make the next step clip to it."""

    def checkpoint_state(self) -> StateDict:
        """Return the sections "model" and "optimizer" of a checkpoint, and others if it needs them."""

    def restore(self, state: StateDict) -> None:
        """Put a loaded `checkpoint_state` into effect."""


def build_adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """Build a fused AdamW over the model's parameters, plain or DTensor; vectors (norms) are not decayed.

    Call it after parallelize, since the optimizer steps the shards that this rank holds.
    kind: AdamW or a subclass of it.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


@torch.no_grad()
def float64_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor, 0-dim float64 on the tensor's device, from squares summed in float64.

    In float32 a CPU adds millions of squares one after the other: torch's norm of 16.8 million normal numbers
    is 6.5e-4 too small, that of 131 million 1.4e-2, and both change when the numbers are split differently,
    as layouts and placements do. A GPU sums in blocks of 65,536, so float32 would be enough there, but
    float64 costs it nothing, since it waits for memory. A float64 also holds the squares of all float32
    values: in float32 those above 1.8e19 would become inf, those below 1e-23 zero.
    """
    if not tensors:
        return []
    if tensors[0].device.type != "cpu":
        # torch.nn.utils.get_total_norm also calls this, but without a dtype, which rounds the norms of
        # bfloat16 gradients to bfloat16. It takes a few launches for any number of tensors.
        # torch.linalg.vector_norm would first make a float64 copy of each.
        return list(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    block_size = min(NORM_BLOCK, max(tensor.numel() for tensor in tensors))
    block = torch.empty(block_size, dtype=torch.float64, device=tensors[0].device)
    return [_norm_by_blocks(tensor, block) for tensor in tensors]


def _norm_by_blocks(tensor: Tensor, block: Tensor) -> Tensor:
    """Return the norm on a CPU, where torch has no operation that reads float32 and sums in float64.

    The numbers are copied block by block into `block`, which is float64. The dot product of a block with
    itself is taken while it is still in the cache."""
    squares = []
    for numbers in tensor.reshape(-1).split(NORM_BLOCK):
        copied = block[: numbers.numel()].copy_(numbers)
        squares.append(torch.dot(copied, copied))
    return torch.stack(squares).sum().sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of this norm are multiplied by, a float32 scalar: at most 1, or nan if the norm
    is inf or nan, by which every kind of optimizer step knows that it must change nothing."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch: no division by zero
    return (factor + (norm - norm)).float()  # inf - inf is nan, x - x is 0
