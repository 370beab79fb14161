"""Lesson 4: with tensor parallelism each matrix is cut, and a rank applies its slice to all tokens.

This is a new axis, tp.

    torchrun --nproc-per-node 2 recipes/lessons/04_tensor_parallel.py

column-wise  the outputs of a layer are split: the whole x goes in, a slice of y comes out, nothing is sent
row-wise     the inputs of a layer are split: a slice of x goes in, and a partial sum of y comes out
enter        the point where the whole x meets split weights. Forward sends nothing; in backward each rank has
             a partial sum of the gradient of x, d x, so there is an all-reduce.
leave        the point where partial sums become y. Forward is an all-reduce; backward sends nothing, because
             d y is whole on every rank.

                  up, column-wise            down, row-wise
              +-> (F/2, D) -> silu, F/2 --> (D, F/2) -> partial y --+
        x ----+                                                     +-- leave: all-reduce -> y
      (B, T, D)-> (F/2, D) -> silu, F/2 --> (D, F/2) -> partial y --+                  (B, T, D)
          enter

Two layers need only one sum, at the end, because silu treats each number alone, and so can be applied to a
slice. Attention has the same form: q, k and v are column-wise (a rank gets whole heads), and o is row-wise.
Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import print_each, print_once, run_lesson
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close

B, T, D, WIDTH = 2, 8, 16, 64  # sequences, tokens, model width, feed-forward width (F in the drawing)


def all_reduce(x: Tensor, why: str) -> Tensor:
    print_once(f"    all-reduce {tuple(x.shape)} over tp: {why}")
    x = x.clone()
    dist.all_reduce(x)
    return x


class Enter(torch.autograd.Function):
    """Pass x on unchanged; in backward, sum the gradients that came through each rank's slice."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce(grad, "the partial sums of d x, one from each slice of up")


class Leave(torch.autograd.Function):
    """Add up the ranks' partial sums; in backward, pass the gradient on to each rank unchanged."""

    @staticmethod
    def forward(ctx, partial: Tensor) -> Tensor:
        return all_reduce(partial, "the partial sums of y, one from each slice of down")

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute the MLP in one process: x (B, T, D), up (F, D), down (D, F) -> (B, T, D)."""
    return F.silu(x @ up.T) @ down.T


def mlp_on_slices(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute the MLP on each rank's slices: x (B, T, D), up (F/tp, D), down (D, F/tp) -> (B, T, D)."""
    h = F.silu(Enter.apply(x) @ up.T)  # (B, T, F/tp)
    return Leave.apply(h @ down.T)  # (B, T, D) Partial(tp) -> (B, T, D)


def check_by_hand(plain: list[Tensor], plain_y: Tensor, grad_y: Tensor) -> None:
    """Cut x, up and down by hand, and compare output and gradients with those of one process."""
    tp_rank, tp = dist.get_rank(), dist.get_world_size()
    cut = [
        plain[0],
        plain[1].chunk(tp, dim=0)[tp_rank],
        plain[2].chunk(tp, dim=1)[tp_rank],
    ]
    x, up, down = (t.detach().clone().requires_grad_() for t in cut)
    print_once("By hand, with plain tensors:")
    print_each(
        f"up {tuple(up.shape)} of {tuple(plain[1].shape)}, "
        f"down {tuple(down.shape)} of {tuple(plain[2].shape)}"
    )
    print_once("  forward")
    y = mlp_on_slices(x, up, down)
    print_once("  backward")
    y.backward(grad_y)
    # The tolerance is assert_close's default for fp32: one sum over F has become two sums over F/2, added.
    assert_close(y, plain_y)
    assert_close(x.grad, plain[0].grad)
    assert_close(up.grad, plain[1].grad.chunk(tp, dim=0)[tp_rank])
    assert_close(down.grad, plain[2].grad.chunk(tp, dim=1)[tp_rank])


def check_dtensors(plain: list[Tensor], plain_y: Tensor, grad_y: Tensor) -> None:
    """Pass DTensors to the code for one process, which then does the same, but stops at a partial sum."""
    print_once("\nAs DTensors, through the function of one process:")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    placements = (Replicate(), Shard(0), Shard(1))
    x, up, down = (
        distribute_tensor(t.detach(), mesh, [placement]).requires_grad_()
        for t, placement in zip(plain, placements, strict=True)
    )
    with CommDebugMode() as trace:
        hidden = F.silu(x @ up.T)
        partial = hidden @ down.T
        y = partial.redistribute(placements=[Replicate()])
    print_once(
        f"  x {x.placements}, up {up.placements} -> {hidden.placements}; "
        f"down {down.placements} -> {partial.placements} -> {y.placements}"
    )
    sent = [str(op).rpartition(".")[2] for op in trace.get_comm_counts()]
    print_once(f"  forward sent: {', '.join(sent)}, as Leave did")
    y.backward(DTensor.from_local(grad_y, mesh, [Replicate()]))
    print_once(
        f"  gradients: x {x.grad.placements}, on which the sum of Enter is still to do; "
        f"up {up.grad.placements}, down {down.grad.placements}"
    )
    assert_close(y.full_tensor(), plain_y)
    for ours, whole in zip((x, up, down), plain, strict=True):
        assert_close(ours.grad.full_tensor(), whole.grad)


def lesson() -> None:
    torch.manual_seed(0)
    whole = torch.randn(B, T, D), torch.randn(WIDTH, D) * D**-0.5, torch.randn(D, WIDTH) * WIDTH**-0.5
    plain = [t.requires_grad_() for t in whole]  # x, up, down
    grad_y = torch.randn(B, T, D)  # the gradient from the rest of the model, whole on every rank
    plain_y = mlp(*plain)
    plain_y.backward(grad_y)
    check_by_hand(plain, plain_y, grad_y)
    check_dtensors(plain, plain_y, grad_y)
    print_once(
        "\nproven: an MLP cut over 2 ranks gives one process's output and gradients, "
        "for one all-reduce each way"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
