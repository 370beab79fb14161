"""**Ulysses: rows too long for one rank are cut by tokens, and attention trades tokens for heads.** A new
axis, cp.

    torchrun --nproc-per-node 2 recipes/lessons/06_ulysses.py

share       the T/cp tokens of a row that a rank holds. Everything but attention works token by token, so on shares
all-to-all  each rank cuts its tensor in cp parts and sends part r to rank r, and so gets one part from each

         before: all heads of some tokens       all-to-all        after: some heads of all tokens
                 t0 t1 t2 t3 | t4 t5 t6 t7                               t0 t1 t2 t3 t4 t5 t6 t7
         head 0    rank 0    |   rank 1                           head 0         rank 0
              1    rank 0    |   rank 1           ----->               1         rank 0
              2    rank 0    |   rank 1                                2         rank 1
              3    rank 0    |   rank 1                                3         rank 1

Attention needs all tokens and treats each head alone, so after the trade any kernel runs as on one process;
then the trade goes back. The gradient of an all-to-all is the all-to-all the other way. Unlike in lesson 4
the weights are whole on every rank, and ranks saw other tokens: gradients are summed over cp as over dp.
Source: Jacobs et al. 2023, arXiv:2309.14509.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import run_lesson, say, say_each
from torch import Tensor
from torch.testing import assert_close

B, T, D, H = 2, 8, 32, 4  # rows, tokens, model width, heads
E = D // H  # head width
TOKENS, HEADS = 1, 2  # dims of q, k, v and out: (B, T, H, E)


def trade(x: Tensor, split: int, join: int) -> Tensor:
    """Split dim `split` over the ranks and join dim `join`: (B, T/cp, H, E) -> (B, T, H/cp, E), or back."""
    # (cp, B, T/cp, H/cp, E): part r is for rank r
    parts = torch.stack(x.chunk(dist.get_world_size(), dim=split))
    received = torch.empty_like(parts)  # part r is from rank r
    dist.all_to_all_single(received, parts)
    return torch.cat(received.unbind(), dim=join)  # in order of ranks: tokens and heads stay in order


class Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, split: int, join: int) -> Tensor:
        ctx.split, ctx.join = split, join
        y = trade(x, split, join)
        say(f"    forward   all-to-all over cp: {tuple(x.shape)} -> {tuple(y.shape)}")
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        back = trade(grad, split=ctx.join, join=ctx.split)
        say(f"    backward  all-to-all over cp: {tuple(grad.shape)} -> {tuple(back.shape)}")
        return back, None, None


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as any library has it: (B, T, heads, E) of all tokens -> the same."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(
        1, 2
    )


def ulysses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for a share: (B, T/cp, H, E) -> (B, T/cp, H, E)."""
    q, k, v = (Trade.apply(x, HEADS, TOKENS) for x in (q, k, v))  # (B, T, H/cp, E)
    return Trade.apply(kernel(q, k, v), TOKENS, HEADS)  # (B, T/cp, H, E)


def layer(x: Tensor, qkv: Tensor, o: Tensor, attend) -> Tensor:
    """Attention with its projections, (B, t, D) -> (B, t, D); only `attend` knows whether t is T or T/cp."""
    # (B, t, H, E) each. RoPE, which turns q and k by
    q, k, v = (x @ qkv.T).unflatten(-1, (3, H, E)).unbind(2)
    return attend(q, k, v).flatten(2) @ o.T  # position, would need the true ones of the share


def lesson() -> None:
    cp_rank, cp = dist.get_rank(), dist.get_world_size()

    say(
        "Who holds what, as token.head, for the first two tokens and the last two, before and after the trade:"
    )
    names = torch.arange(T)[:, None] + torch.arange(H) / 10  # (T, H): 3.1 is head 1 of token 3
    share = names.chunk(cp)[cp_rank][None, :, :, None]  # (1, T/cp, H, 1)
    for x in (share, trade(share, HEADS, TOKENS)):
        rows = [" ".join(f"{name:.1f}" for name in token) for token in x[0, :, :, 0].tolist()]
        say_each(f"{tuple(x.shape[1:3])}  " + " | ".join([*rows[:2], "...", *rows[-2:]]))
    back = trade(trade(share, HEADS, TOKENS), TOKENS, HEADS)
    assert torch.equal(back, share), "there and back again must change nothing"

    torch.manual_seed(0)
    x, grad_y = torch.randn(2, B, T, D)
    weights = torch.randn(3 * D, D) * D**-0.5, torch.randn(D, D) * D**-0.5
    plain = [t.clone().requires_grad_() for t in (x, *weights)]
    plain_y = layer(*plain, attend=kernel)
    plain_y.backward(grad_y)

    say("\nOne attention layer on shares: q, k and v are traded, attended to, and the output is traded back:")
    ours = [t.clone().requires_grad_() for t in (x.chunk(cp, dim=1)[cp_rank], *weights)]
    y = layer(*ours, attend=ulysses)  # (B, T/cp, D)
    y.backward(grad_y.chunk(cp, dim=1)[cp_rank])
    assert_close(y, plain_y.chunk(cp, dim=1)[cp_rank])  # default fp32 tolerance: kernels sum in blocks
    assert_close(ours[0].grad, plain[0].grad.chunk(cp, dim=1)[cp_rank])
    for name, weight, plain_weight in zip(("qkv", "o"), ours[1:], plain[1:], strict=True):
        dist.all_reduce(weight.grad)  # sum:cp: each rank saw other tokens
        say(f"    all-reduce over cp: the gradient of {name} {tuple(weight.shape)}")
        assert_close(weight.grad, plain_weight.grad, rtol=1e-5, atol=1e-5)
    say(
        "\nproven: attention over rows cut in 2 gives one process's output and gradients, with all-to-alls of shares alone"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
