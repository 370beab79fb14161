"""**Tensor parallelism: each matrix is cut, and every rank computes with its slice on all tokens.** A new
axis, tp.

    torchrun --nproc-per-node 2 recipes/lessons/04_tensor_parallel.py

column-wise  the outputs of a layer are split: whole x in, a share of y out. Nothing is sent
row-wise     the inputs of a layer are split: a share of x in, an addend of y out, which must be summed (sum:tp)
enter        where whole x meets split weights: nothing in forward; in backward each rank has an addend of d x: all-reduce
leave        where addends become y: all-reduce in forward; nothing in backward, as d y is whole on every rank

                  up, column-wise            down, row-wise
              +-> (F/2, D) -> silu, F/2 --> (D, F/2) -> addend of y --+
        x ----+                                                       +-- leave: all-reduce -> y     A layer of each kind
      (B, T, D)-> (F/2, D) -> silu, F/2 --> (D, F/2) -> addend of y --+                  (B, T, D)   needs one sum for both
          enter

silu works on each number alone, so it works on a share too: that is why one sum, at the end, is enough.
Attention is the same picture: q, k, v column-wise (a rank gets whole heads), o row-wise. Source: Shoeybi et
al. 2019, arXiv:1909.08053.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import run_lesson, say, say_each
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close

B, T, D, WIDTH = 2, 8, 16, 64  # rows, tokens, model width, feed-forward width (F in the drawing)


def all_reduce(x: Tensor, why: str) -> Tensor:
    say(f"    all-reduce {tuple(x.shape)} over tp: {why}")
    x = x.clone()
    dist.all_reduce(x)
    return x


class Enter(torch.autograd.Function):
    """Forward: x as it is, whole on every rank. Backward: each rank knows the gradient through its slice
    only; sum them."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce(grad, "the addends of d x, from each slice of up")


class Leave(torch.autograd.Function):
    """Forward: the sum of the ranks' addends. Backward: an addend's gradient is the sum's: as it is."""

    @staticmethod
    def forward(ctx, addend: Tensor) -> Tensor:
        return all_reduce(addend, "the addends of y, from each slice of down")

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One process: x (B, T, D), up (F, D), down (D, F) -> (B, T, D)."""
    return F.silu(x @ up.T) @ down.T


def mlp_on_slices(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each rank: x (B, T, D), up (F/tp, D), down (D, F/tp) -> (B, T, D)."""
    h = F.silu(Enter.apply(x) @ up.T)  # (B, T, F/tp)
    return Leave.apply(h @ down.T)  # (B, T, D) sum:tp -> (B, T, D)


def lesson() -> None:
    tp_rank, tp = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, up, down = torch.randn(B, T, D), torch.randn(WIDTH, D) * D**-0.5, torch.randn(D, WIDTH) * WIDTH**-0.5
    grad_y = torch.randn(B, T, D)  # what the rest of the model would send back; whole on every rank
    plain = [t.clone().requires_grad_() for t in (x, up, down)]
    plain_y = mlp(*plain)
    plain_y.backward(grad_y)

    # ---- by hand ----
    say("By hand, with plain tensors:")
    sliced = [
        x.clone().requires_grad_(),
        up.chunk(tp, dim=0)[tp_rank].clone().requires_grad_(),
        down.chunk(tp, dim=1)[tp_rank].clone().requires_grad_(),
    ]
    say_each(
        f"up {tuple(sliced[1].shape)} of {tuple(up.shape)}, down {tuple(sliced[2].shape)} of {tuple(down.shape)}"
    )
    say("  forward")
    y = mlp_on_slices(*sliced)
    say("  backward")
    y.backward(grad_y)
    # fp32 tolerance of assert_close: a sum over F is now two sums over F/2, added.
    assert_close(y, plain_y)
    for ours, whole, dim in zip(sliced, plain, (None, 0, 1), strict=True):
        assert_close(ours.grad, whole.grad if dim is None else whole.grad.chunk(tp, dim)[tp_rank])

    # ---- the same as DTensors: say how the weights lie, and use the code of one process ----
    say("\nAs DTensors, through the function of one process:")
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    spread = [
        distribute_tensor(t, mesh, [placement]).requires_grad_()
        for t, placement in ((x, Replicate()), (up, Shard(0)), (down, Shard(1)))
    ]
    with CommDebugMode() as trace:
        hidden = F.silu(spread[0] @ spread[1].T)
        addend = hidden @ spread[2].T
        spread_y = addend.redistribute(placements=[Replicate()])
    say(
        f"  x {spread[0].placements}, up {spread[1].placements} -> {hidden.placements}; down {spread[2].placements} -> "
        f"{addend.placements} -> {spread_y.placements}"
    )
    say(
        f"  forward sent: {', '.join(str(op).rpartition('.')[2] for op in trace.get_comm_counts())}, as Leave did"
    )
    spread_y.backward(DTensor.from_local(grad_y, mesh, [Replicate()]))
    say(
        f"  gradients: x {spread[0].grad.placements}: the sum of Enter is still to do; up {spread[1].grad.placements}, down "
        f"{spread[2].grad.placements}"
    )
    assert_close(spread_y.full_tensor(), plain_y)
    for ours, whole in zip(spread, plain, strict=True):
        assert_close(ours.grad.full_tensor(), whole.grad)
    say(
        "\nproven: an MLP cut over 2 ranks gives one process's output and gradients, for one all-reduce each way"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
