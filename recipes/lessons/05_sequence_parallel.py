"""Lesson 5: with sequence parallelism the tp ranks also split the work between the matrices, by tokens.

The axis is still tp.

    torchrun --nproc-per-node 2 recipes/lessons/05_sequence_parallel.py

stream   the residual stream (B, T, D) from block to block; norms read it, and blocks add to it
gather   an all-gather of tokens before the split matrices; its backward is a reduce-scatter
scatter  a reduce-scatter of tokens after them, where lesson 4 has an all-reduce; its backward is a gather

    lesson 4: every rank norms all tokens
        x (B, T, D) --- norm ---------[ up -> down ]-- all-reduce ------ + x
    this one: a rank norms its own tokens
        x (B, T/2, D) - norm - gather [ up -> down ]-- reduce-scatter -- + x
                            (B, T, D)             (B, T, D) Partial(tp) -> (B, T/2, D)

An all-reduce is a reduce-scatter followed by an all-gather, so the same number of bytes is sent, and fewer
are kept for backward. The price is that a norm's weight sees only its rank's tokens, so its gradient is a
partial sum, and you have to sum it over tp. Forgetting that is the classic bug here.
Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2.
"""

from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import print_once, run_lesson
from torch import Tensor
from torch.testing import assert_close

B, T, D, WIDTH, N_BLOCKS = 2, 64, 128, 512, 3
sent_bytes = Counter()  # the bytes that this rank sent, by collective


def all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    sent_bytes["all-gather"] += x.nbytes * (len(parts) - 1)  # its own part goes to every other rank
    return torch.cat(parts, dim=1)  # (B, T/tp, D) -> (B, T, D)


def reduce_scatter(x: Tensor) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), dim=1)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts)
    sent_bytes["reduce-scatter"] += own.nbytes * (len(parts) - 1)  # each other rank gets its part
    return own  # (B, T, D) Partial(tp) -> (B, T/tp, D)


def all_reduce(x: Tensor) -> Tensor:
    x, tp = x.clone(), dist.get_world_size()
    dist.all_reduce(x)
    sent_bytes["all-reduce"] += 2 * x.nbytes * (tp - 1) // tp
    return x


def unchanged(x: Tensor) -> Tensor:
    return x.view_as(x)


class Door(NamedTuple):
    """Pairs the function for x in forward with the function for its gradient in backward."""

    forward: object
    backward: object


class PassDoor(torch.autograd.Function):
    """Applies one function of a door in forward, and the other one in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, door: Door) -> Tensor:
        ctx.door = door
        return door.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.door.backward(grad), None


# (enter, leave): the doors before and after the split matrices. The second mirrors the first.
ONE_PROCESS = Door(unchanged, unchanged), Door(unchanged, unchanged)
LESSON_4 = Door(unchanged, all_reduce), Door(all_reduce, unchanged)
SEQUENCE = Door(all_gather, reduce_scatter), Door(reduce_scatter, all_gather)


def blocks(x: Tensor, weights: list[list[Tensor]], enter: Door, leave: Door) -> Tensor:
    """Run the blocks. Except for the two doors this is the code for one process."""
    for norm, up, down in weights:  # (D,), (F/tp, D), (D, F/tp)
        h = PassDoor.apply(F.rms_norm(x, (D,), norm), enter)  # (B, T, D)
        h = F.silu(h @ up.T) @ down.T  # (B, T, D) Partial(tp)
        x = x + PassDoor.apply(h, leave)  # (B, T, D); SEQUENCE: (B, T/tp, D)
    return x


class Result(NamedTuple):
    """Holds what a run gives, and how much it kept for backward."""

    y: Tensor
    grad_x: Tensor
    grads: list[list[Tensor]]  # of norm, up and down of each block
    kept_bytes: int  # activations that autograd kept for backward


def run(x: Tensor, weights: list[list[Tensor]], grad_y: Tensor, doors: tuple[Door, Door]) -> Result:
    """Run forward and backward. x and grad_y are (B, T, D), or (B, T/tp, D) with the doors SEQUENCE."""
    x = x.clone().requires_grad_()
    weights = [[w.clone().requires_grad_() for w in block] for block in weights]
    kept = {}  # address of a storage -> its bytes

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, unchanged):
        y = blocks(x, weights, *doors)
    y.backward(grad_y)
    for block in weights:
        for weight in block:
            kept.pop(weight.untyped_storage().data_ptr(), None)  # weights are not activations
    return Result(y.detach(), x.grad, [[w.grad for w in block] for block in weights], sum(kept.values()))


def lesson() -> None:
    tp_rank, tp = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, B, T, D)
    whole, slices = [], []
    for _ in range(N_BLOCKS):
        norm, up, down = (
            torch.rand(D) + 0.5,
            torch.randn(WIDTH, D) / D**0.5,
            torch.randn(D, WIDTH) / WIDTH**0.5,
        )
        whole.append([norm, up, down])
        slices.append([norm, up.chunk(tp)[tp_rank], down.chunk(tp, dim=1)[tp_rank]])
    plain = run(x, whole, grad_y, ONE_PROCESS)

    def own_tokens(t: Tensor) -> Tensor:
        return t.chunk(tp, dim=1)[tp_rank]  # (B, T, D) -> (B, T/tp, D)

    for name, doors, part in (("lesson 4", LESSON_4, unchanged), ("sequence parallel", SEQUENCE, own_tokens)):
        sent_bytes.clear()
        ours = run(part(x), slices, part(grad_y), doors)
        by_collective = ", ".join(f"{op} {n // 1024}" for op, n in sent_bytes.items())
        print_once(
            f"{name}: stream {tuple(ours.y.shape)}; a rank kept {ours.kept_bytes / 1024:,.0f} KiB "
            f"for backward, and sent {sum(sent_bytes.values()) / 1024:,.0f} KiB: {by_collective}"
        )
        assert_close(ours.y, part(plain.y), rtol=1e-5, atol=1e-5)  # fp32: sums in another order
        assert_close(ours.grad_x, part(plain.grad_x), rtol=1e-5, atol=1e-4)
        for (norm, up, down), (plain_norm, plain_up, plain_down) in zip(ours.grads, plain.grads, strict=True):
            # (D,) Partial(tp) -> (D,): this is the sum that must not be forgotten.
            summed = all_reduce(norm) if doors is SEQUENCE else norm
            # Each gradient is a sum over B T = 128 tokens, hence 1e-4.
            assert_close(summed, plain_norm, rtol=1e-5, atol=1e-4)
            assert_close(up, plain_up.chunk(tp)[tp_rank], rtol=1e-5, atol=1e-4)
            assert_close(down, plain_down.chunk(tp, dim=1)[tp_rank], rtol=1e-5, atol=1e-4)
    error = (norm - plain_norm).abs().max() / plain_norm.abs().max()  # for the last block
    print_once(
        f"a norm's gradient before its all-reduce over tp is wrong by {error:.0%}: the sum not to forget"
    )
    print_once(
        "\nproven: with tokens split between the matrices, output and gradients are one process's, "
        "for the same bytes sent"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
