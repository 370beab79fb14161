"""**Ring attention: queries stay; keys and values go round all ranks.** Axis cp as in lesson 6, but any
number of heads.

    torchrun --nproc-per-node 2 recipes/lessons/07_ring_attention.py

hop            each rank sends the keys and values it holds to the next rank and gets those of the one before
log-sum-exp    lse = log of the sum of exp(score) over the keys seen so far. Outputs over two sets of keys merge exactly:
               out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse), with lse = log(exp(lse_1) + exp(lse_2))
zigzag         a rank holds a slice from the head of the row and its mirror from the tail. Under the causal mask an early
               query has few keys and a late one many, so shares of consecutive tokens would be unequal work:

        keys  0 1 2 3                keys  0 1 2 3        o  a query slice that sees a key slice (\\ half of it)
     query 0  \\ . . .  rank 0     query 0  \\ . . .  rank 0
           1  o \\ . .  rank 0           1  o \\ . .  rank 1     in order: rank 0 has 2 \\ and 1 o, rank 1 2 \\ and 5 o
           2  o o \\ .  rank 1           2  o o \\ .  rank 1     zigzag:   both have 2 \\ and 3 o, in each round the same
           3  o o o \\  rank 1           3  o o o \\  rank 0

Backward here is autograd's: a hop's gradient is a hop the other way, so the gradients of keys and values
travel home. It keeps every rank's keys; parallel/context.py sends them round again instead. Source: Liu et
al. 2023, arXiv:2310.01889.
"""

import torch
import torch.distributed as dist
from common import run_lesson, say, say_each
from torch import Tensor
from torch.testing import assert_close

B, T, H, E = 2, 32, 3, 8  # rows, tokens, heads (an odd number: Ulysses could not cut it in 2), head width


def hop(x: Tensor, step: int) -> Tensor:
    """Send x to the rank `step` further round the ring and return what comes from the other side."""
    rank, cp = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(x)
    sending = dist.isend(x.contiguous(), (rank + step) % cp)  # does not wait: all ranks send first
    dist.recv(received, (rank - step) % cp)
    sending.wait()
    return received


class Hop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: Tensor) -> Tensor:
        return hop(kv, +1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        say(f"    backward, hop back: gradients of k and v {tuple(grad.shape)} go one rank home")
        return hop(grad, -1)


def slices_of(rank: int, cp: int, order: str) -> list[int]:
    """Which 2 of a row's 2 cp slices a rank holds."""
    return [rank, 2 * cp - 1 - rank] if order == "zigzag" else [2 * rank, 2 * rank + 1]


def positions_of(rank: int, cp: int, order: str) -> Tensor:
    """(T/cp,): the true positions of a share's tokens."""
    return torch.cat([torch.arange(T).chunk(2 * cp)[i] for i in slices_of(rank, cp, order)])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, t, H, E) and lse (B, t, H, 1) over these keys alone; mask (t, s): True where a query sees a
    key."""
    scores = torch.einsum("bthe,bshe->bths", q, k) / E**0.5
    scores = scores.masked_fill(~mask[:, None], -1e30)  # not -inf, whose gradient is nan; exp gives 0 too
    lse = scores.logsumexp(-1, keepdim=True)  # no key seen: about -1e30, so it merges as nothing
    return torch.einsum("bths,bshe->bthe", (scores - lse).exp(), v), lse


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output over both sets of keys, from those over each."""
    total = torch.logaddexp(lse, new_lse)
    return out * (lse - total).exp() + new_out * (new_lse - total).exp(), total


def ring(q: Tensor, k: Tensor, v: Tensor, order: str) -> tuple[Tensor, list[int]]:
    """q, k, v (B, T/cp, H, E) of this share -> out, and how many pairs of query and key each round had to
    score."""
    rank, cp = dist.get_rank(), dist.get_world_size()
    queries, kv, work = positions_of(rank, cp, order), torch.stack([k, v]), []
    for turn in range(cp):
        source = (rank - turn) % cp  # whose keys are here now
        mask = queries[:, None] >= positions_of(source, cp, order)  # (T/cp, T/cp)
        work.append(int(mask.sum()))
        if turn == 0:
            out, lse = attend(q, *kv, mask)
        else:
            # a kernel would skip the slices that are masked
            out, lse = merge(out, lse, *attend(q, *kv, mask))
        if turn + 1 < cp:
            say(f"    forward, hop: k and v {tuple(kv.shape)} go to the next rank")
            kv = Hop.apply(kv)
    return out, work


def lesson() -> None:
    rank, cp = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = torch.randn(3, B, T, H, E)  # q, k, v of all tokens
    grad_out = torch.randn(B, T, H, E)
    plain = whole.clone().requires_grad_()
    plain_out, _ = attend(*plain, mask=torch.ones(T, T).tril().bool())
    plain_out.backward(grad_out)

    for order in ("in order", "zigzag"):
        own = positions_of(rank, cp, order)
        say(f"{order}: pairs of query and key that each rank scores, round by round")
        share = whole[:, :, own].clone().requires_grad_()  # (3, B, T/cp, H, E)
        out, work = ring(*share, order)
        out.backward(grad_out[:, own])
        say_each(f"slices {slices_of(rank, cp, order)}: " + " + ".join(map(str, work)) + f" = {sum(work)}")
        total = torch.tensor(work)
        dist.all_reduce(total, dist.ReduceOp.MAX)  # a round lasts as long as its busiest rank
        say(
            f"  the slowest rank of each round: {' + '.join(map(str, total.tolist()))} = {total.sum()} pairs of time\n"
        )
        if order == "zigzag":
            assert torch.equal(total, torch.tensor(work)), (
                "zigzag must give all ranks equal work in each round"
            )
        assert_close(out, plain_out[:, own])  # fp32: only the order of summation differs
        assert_close(share.grad, plain.grad[:, :, own])  # of q, k and v, back with their owner
    say(
        "proven: merging by log-sum-exp gives one process's output and gradients in any order; zigzag shares the work equally"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
