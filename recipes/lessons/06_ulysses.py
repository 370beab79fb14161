"""Lesson 6: with Ulysses, long sequences are cut by tokens, and attention exchanges tokens for heads.

This is a new axis, cp.

    torchrun --nproc-per-node 2 recipes/lessons/06_ulysses.py

shard       the T/cp tokens of a sequence that a rank holds. Everything but attention works token by token.
all-to-all  each rank cuts its tensor into cp parts and sends part r to rank r, so it gets one part from each

         before: all heads of some tokens       all-to-all        after: some heads of all tokens
                 t0 t1 t2 t3 | t4 t5 t6 t7                               t0 t1 t2 t3 t4 t5 t6 t7
         head 0    rank 0    |   rank 1                           head 0         rank 0
              1    rank 0    |   rank 1           ----->               1         rank 0
              2    rank 0    |   rank 1                                2         rank 1
              3    rank 0    |   rank 1                                3         rank 1

Attention needs all tokens and treats each head alone, so after the exchange any kernel runs as in one
process. Then a second exchange restores the shards. The gradient of an all-to-all is the all-to-all in the
other direction. Unlike in lesson 4 every rank has the whole weights, and each rank has seen different tokens,
so gradients are summed over cp as over dp. Source: Jacobs et al. 2023, arXiv:2309.14509.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import print_each, print_once, run_lesson
from torch import Tensor
from torch.testing import assert_close

B, T, D, H = 2, 8, 32, 4  # sequences, tokens, model width, heads
E = D // H  # head width
TOKENS, HEADS = 1, 2  # dims of q, k, v and the output: (B, T, H, E)


def all_to_all(x: Tensor, split: int, join: int) -> Tensor:
    """Split dim `split` over the ranks and join dim `join`: (B, T/cp, H, E) -> (B, T, H/cp, E), or back."""
    parts = torch.stack(x.chunk(dist.get_world_size(), dim=split))  # part r is for rank r
    received = torch.empty_like(parts)  # part r is from rank r
    dist.all_to_all_single(received, parts)
    return torch.cat(received.unbind(), dim=join)  # ranks in order, so that tokens and heads stay in order


class AllToAll(torch.autograd.Function):
    """Exchanges tokens for heads or back; in backward the gradient takes the opposite way."""

    @staticmethod
    def forward(ctx, x: Tensor, split: int, join: int) -> Tensor:
        ctx.split, ctx.join = split, join
        y = all_to_all(x, split, join)
        print_once(f"    forward   all-to-all over cp: {tuple(x.shape)} -> {tuple(y.shape)}")
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        back = all_to_all(grad, split=ctx.join, join=ctx.split)
        print_once(f"    backward  all-to-all over cp: {tuple(grad.shape)} -> {tuple(back.shape)}")
        return back, None, None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ordinary causal attention over all tokens: (B, T, heads, E) -> the same shape."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def ulysses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same attention from a shard of the tokens: (B, T/cp, H, E) -> (B, T/cp, H, E)."""
    q, k, v = (AllToAll.apply(x, HEADS, TOKENS) for x in (q, k, v))  # (B, T, H/cp, E)
    return AllToAll.apply(attention(q, k, v), TOKENS, HEADS)  # (B, T/cp, H, E)


def layer(x: Tensor, qkv: Tensor, o: Tensor, attend) -> Tensor:
    """Project, attend and project back: (B, t, D) -> (B, t, D). Only `attend` knows if t is T or T/cp.

    RoPE, which rotates q and k by their positions, would need the true positions of the shard's tokens.
    """
    q, k, v = (x @ qkv.T).unflatten(-1, (3, H, E)).unbind(2)  # (B, t, H, E) each
    return attend(q, k, v).flatten(2) @ o.T


def show_who_holds_what() -> None:
    """Print the grid of token.head before and after the exchange, which transposes it."""
    print_once(
        "Who holds what, as token.head, for the first and the last two tokens, before and after the exchange:"
    )
    names = torch.arange(T)[:, None] + torch.arange(H) / 10  # (T, H): 3.1 is head 1 of token 3
    shard = names.chunk(dist.get_world_size())[dist.get_rank()][None, :, :, None]  # (1, T/cp, H, 1)
    exchanged = all_to_all(shard, HEADS, TOKENS)  # (1, T, H/cp, 1)
    for x in (shard, exchanged):
        lines = [" ".join(f"{name:.1f}" for name in token) for token in x[0, :, :, 0].tolist()]
        print_each(f"{tuple(x.shape[1:3])}  " + " | ".join([*lines[:2], "...", *lines[-2:]]))
    assert torch.equal(all_to_all(exchanged, TOKENS, HEADS), shard), "two exchanges must change nothing"


def lesson() -> None:
    cp_rank, cp = dist.get_rank(), dist.get_world_size()
    show_who_holds_what()

    torch.manual_seed(0)
    x, grad_y = torch.randn(2, B, T, D)
    weights = torch.randn(3 * D, D) * D**-0.5, torch.randn(D, D) * D**-0.5
    plain = [t.clone().requires_grad_() for t in (x, *weights)]
    plain_y = layer(*plain, attend=attention)
    plain_y.backward(grad_y)

    print_once("\nOne attention layer on shards: q, k and v are exchanged, and the output is exchanged back:")
    ours = [t.clone().requires_grad_() for t in (x.chunk(cp, dim=1)[cp_rank], *weights)]
    y = layer(*ours, attend=ulysses)  # (B, T/cp, D)
    y.backward(grad_y.chunk(cp, dim=1)[cp_rank])
    assert_close(y, plain_y.chunk(cp, dim=1)[cp_rank])  # fp32: kernels sum in blocks
    assert_close(ours[0].grad, plain[0].grad.chunk(cp, dim=1)[cp_rank])
    for name, weight, plain_weight in zip(("qkv", "o"), ours[1:], plain[1:], strict=True):
        dist.all_reduce(weight.grad)  # Partial(cp): each rank saw different tokens
        print_once(f"    all-reduce over cp: the gradient of {name} {tuple(weight.shape)}")
        assert_close(weight.grad, plain_weight.grad, rtol=1e-5, atol=1e-5)
    print_once(
        "\nproven: attention over sequences cut in 2 gives one process's output and gradients, "
        "with all-to-alls of shards alone"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
