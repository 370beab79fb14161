"""Lesson 7: in ring attention the queries stay where they are, and keys and values travel round all ranks.

The axis is cp as in lesson 6, but the number of heads does not matter.

    torchrun --nproc-per-node 2 recipes/lessons/07_ring_attention.py

hop            each rank sends the keys and values that it holds to the next rank, and gets those of the rank
               before it
log-sum-exp    lse = log of the sum of exp(score) over the keys seen so far. Two outputs over two sets of keys
               merge exactly: out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse), with
               lse = log(exp(lse_1) + exp(lse_2))
zigzag         a rank holds a slice from the head of the sequence and its mirror from the tail. Under the
               causal mask an early query sees few keys and a late one sees many, so shards in order have
               unequal work:

      in order  keys  0 1 2 3           zigzag  keys  0 1 2 3
             query 0  \\ . . .  rank 0        query 0  \\ . . .  rank 0   o  the queries see these keys
                   1  o \\ . .  rank 0              1  o \\ . .  rank 1   \\  the queries see half of them
                   2  o o \\ .  rank 1              2  o o \\ .  rank 1
                   3  o o o \\  rank 1              3  o o o \\  rank 0

In order, rank 0 has 2 \\ and 1 o, and rank 1 has 2 \\ and 5 o. In zigzag order both have 2 \\ and 3 o, and in
each round both have the same work. Here autograd computes backward: the gradient of a hop is a hop in the
other direction, so the gradients of keys and values travel home. But autograd keeps the keys of all ranks;
parallel/context.py sends them round a second time instead.
Source: Liu et al. 2023, arXiv:2310.01889.
"""

import torch
import torch.distributed as dist
from common import print_each, print_once, run_lesson
from torch import Tensor
from torch.testing import assert_close

B, T, H, E = 2, 32, 3, 8  # sequences, tokens, heads (odd: Ulysses could not cut them in 2), head width


def hop(x: Tensor, step: int) -> Tensor:
    """Send x to the rank `step` further round the ring, and return what comes from the other side."""
    rank, cp = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(x)
    sending = dist.isend(x.contiguous(), (rank + step) % cp)  # returns at once, so that all ranks send first
    dist.recv(received, (rank - step) % cp)
    sending.wait()
    return received


class Hop(torch.autograd.Function):
    """Sends keys and values one rank on; in backward their gradients go one rank back."""

    @staticmethod
    def forward(ctx, kv: Tensor) -> Tensor:
        return hop(kv, +1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        print_once(f"    backward, hop back: gradients of k and v {tuple(grad.shape)} go one rank home")
        return hop(grad, -1)


def slices_of(rank: int, cp: int, order: str) -> list[int]:
    """Return the numbers of the 2 slices, of 2 cp in a sequence, that a rank holds."""
    return [rank, 2 * cp - 1 - rank] if order == "zigzag" else [2 * rank, 2 * rank + 1]


def positions_of(rank: int, cp: int, order: str) -> Tensor:
    """Return the true positions (T/cp,) of the tokens in a rank's shard."""
    slices = torch.arange(T).chunk(2 * cp)
    return torch.cat([slices[i] for i in slices_of(rank, cp, order)])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (B, t, H, E) and the lse (B, t, H, 1) over these keys alone.

    mask (t, s) is True where a query sees a key.
    """
    scores = torch.einsum("bthe,bshe->bths", q, k) / E**0.5
    scores = scores.masked_fill(~mask[:, None], -1e30)  # -inf would give a nan gradient; exp is 0 too
    lse = scores.logsumexp(-1, keepdim=True)  # about -1e30, a weight of 0, if a query saw no key
    return torch.einsum("bths,bshe->bthe", (scores - lse).exp(), v), lse


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and lse over two sets of keys, given output and lse over each of them."""
    total = torch.logaddexp(lse, new_lse)
    return out * (lse - total).exp() + new_out * (new_lse - total).exp(), total


def ring(q: Tensor, k: Tensor, v: Tensor, order: str) -> tuple[Tensor, list[int]]:
    """Attend from this rank's queries (B, T/cp, H, E) to the keys of all ranks, one rank's keys per round.

    Returns the output (B, T/cp, H, E), and the number of (query, key) pairs that each round had to score.
    """
    rank, cp = dist.get_rank(), dist.get_world_size()
    queries, kv, n_pairs = positions_of(rank, cp, order), torch.stack([k, v]), []
    for turn in range(cp):
        source = (rank - turn) % cp  # the rank whose keys are here now
        mask = queries[:, None] >= positions_of(source, cp, order)  # (T/cp, T/cp)
        n_pairs.append(int(mask.sum()))
        new_out, new_lse = attend(q, kv[0], kv[1], mask)  # a fused kernel would skip the masked slices
        if turn == 0:
            out, lse = new_out, new_lse
        else:
            out, lse = merge(out, lse, new_out, new_lse)
        if turn + 1 < cp:
            print_once(f"    forward, hop: k and v {tuple(kv.shape)} go to the next rank")
            kv = Hop.apply(kv)
    return out, n_pairs


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
        print_once(f"{order}: pairs of query and key that each rank scores, round by round")
        shard = whole[:, :, own].clone().requires_grad_()  # (3, B, T/cp, H, E)
        out, n_pairs = ring(*shard, order)
        out.backward(grad_out[:, own])
        print_each(f"slices {slices_of(rank, cp, order)}: {' + '.join(map(str, n_pairs))} = {sum(n_pairs)}")
        slowest = torch.tensor(n_pairs)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # a round lasts as long as its busiest rank
        rounds = " + ".join(map(str, slowest.tolist()))
        print_once(f"  the slowest rank of each round: {rounds} = {slowest.sum()} pairs of time\n")
        if order == "zigzag":
            assert n_pairs == slowest.tolist(), "zigzag must give all ranks equal work in each round"
        assert_close(out, plain_out[:, own])  # fp32: only the order of summation differs
        assert_close(shard.grad, plain.grad[:, :, own])  # q, k, v: back on the rank that owns them
    print_once(
        "proven: merging by log-sum-exp gives one process's output and gradients in any order; "
        "zigzag shares the work equally"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
