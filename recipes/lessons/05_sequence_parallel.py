"""**Sequence parallelism: between the matrices, tp ranks split the tokens instead of all doing the same.**
Still axis tp.

    torchrun --nproc-per-node 2 recipes/lessons/05_sequence_parallel.py

stream   what runs from block to block, (B, T, D): norms read it, blocks add to it. In lesson 4 whole on every tp rank
gather   all-gather of tokens before the split matrices; in backward its mirror, a reduce-scatter
scatter  reduce-scatter of tokens after them, where lesson 4 had an all-reduce; in backward an all-gather

        lesson 4    x (B, T, D) --- norm ---------[ up -> down ]-- all-reduce ------ + x      on each rank the same norm

        this one    x (B, T/2, D) - norm - gather [ up -> down ]-- reduce-scatter -- + x      on each rank its tokens' norm
                                        (B, T, D)             (B, T, D) sum:tp -> (B, T/2, D)

An all-reduce is a reduce-scatter and then an all-gather, so the bytes on the wire are the same; what is kept
for backward is less. The price: a norm's weight sees only a rank's tokens, so its gradient is an addend and
must be summed over tp, by you. Forgetting it is the classic bug here. Source: Korthikanti et al. 2022,
arXiv:2205.05198, sec. 4.2.2.
"""

from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import run_lesson, say
from torch import Tensor
from torch.testing import assert_close

B, T, D, WIDTH, N_BLOCKS = 2, 64, 128, 512, 3
wire = Counter()  # bytes a rank sent, per collective


def all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    wire["all-gather"] += x.nbytes * (len(parts) - 1)  # a rank's own part, to all others
    return torch.cat(parts, dim=1)  # (B, T/tp, D) -> (B, T, D)


def reduce_scatter(x: Tensor) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), dim=1)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts)
    wire["reduce-scatter"] += own.nbytes * (len(parts) - 1)  # to each other rank, its part
    return own  # (B, T, D) sum:tp -> (B, T/tp, D)


def all_reduce(x: Tensor) -> Tensor:
    x, tp = x.clone(), dist.get_world_size()
    dist.all_reduce(x)
    wire["all-reduce"] += 2 * x.nbytes * (tp - 1) // tp
    return x


class Mirror(torch.autograd.Function):  # one function in forward, and another, its transpose, in backward
    @staticmethod
    def forward(ctx, x: Tensor, forward, backward) -> Tensor:
        ctx.backward_function = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.backward_function(grad), None, None


same = lambda x: x.view_as(x)
ALONE = (same, same), (same, same)  # enter (forward, backward), leave (the same)
LESSON_4 = (same, all_reduce), (all_reduce, same)
SEQUENCE = (all_gather, reduce_scatter), (reduce_scatter, all_gather)


# one process's code, but for the two doors
def blocks(x: Tensor, weights: list[list[Tensor]], enter, leave) -> Tensor:
    for norm, up, down in weights:  # (D,), (F/tp, D), (D, F/tp)
        h = Mirror.apply(F.rms_norm(x, (D,), norm), *enter)  # (B, T, D)
        h = F.silu(h @ up.T) @ down.T  # (B, T, D) sum:tp
        x = x + Mirror.apply(h, *leave)  # (B, T, D); SEQUENCE: (B, T/tp, D)
    return x


def run(
    x: Tensor, weights: list[list[Tensor]], grad_y: Tensor, doors
) -> tuple[Tensor, Tensor, list[list[Tensor]], int]:
    """Returns y, d x, the gradients of the weights, and the bytes of activations that autograd kept for
    backward."""
    x, weights = (
        x.clone().requires_grad_(),
        [[w.clone().requires_grad_() for w in block] for block in weights],
    )
    kept = {}  # address of a storage -> its bytes
    note = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with torch.autograd.graph.saved_tensors_hooks(note, same):
        y = blocks(x, weights, *doors)
    y.backward(grad_y)
    of_weights = {w.untyped_storage().data_ptr() for block in weights for w in block}
    kept_bytes = sum(n for address, n in kept.items() if address not in of_weights)
    return y.detach(), x.grad, [[w.grad for w in block] for block in weights], kept_bytes


def lesson() -> None:
    tp_rank, tp = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, B, T, D)
    whole = [
        [torch.rand(D) + 0.5, torch.randn(WIDTH, D) / D**0.5, torch.randn(D, WIDTH) / WIDTH**0.5]
        for _ in range(N_BLOCKS)
    ]
    slices = [[norm, up.chunk(tp)[tp_rank], down.chunk(tp, dim=1)[tp_rank]] for norm, up, down in whole]
    plain_y, plain_grad_x, plain_grads, _ = run(x, whole, grad_y, ALONE)
    own_tokens = lambda t: t.chunk(tp, dim=1)[tp_rank]  # (B, T, D) -> (B, T/tp, D)

    for name, doors, part in (("lesson 4", LESSON_4, same), ("sequence parallel", SEQUENCE, own_tokens)):
        wire.clear()
        y, grad_x, grads, kept_bytes = run(part(x), slices, part(grad_y), doors)
        say(
            f"{name}: stream {tuple(y.shape)}; a rank kept {kept_bytes / 1024:,.0f} KiB for backward, and sent "
            f"{sum(wire.values()) / 1024:,.0f} KiB: "
            + ", ".join(f"{op} {n // 1024}" for op, n in wire.items())
        )
        assert_close(y, part(plain_y), rtol=1e-5, atol=1e-5)  # fp32: sums in another order
        assert_close(grad_x, part(plain_grad_x), rtol=1e-5, atol=1e-4)
        for i, (addend, up, down) in enumerate(grads):
            plain_norm, plain_up, plain_down = plain_grads[i]
            norm = all_reduce(addend) if doors is SEQUENCE else addend  # (D,) sum:tp -> (D,): do not forget
            assert_close(norm, plain_norm, rtol=1e-5, atol=1e-4)  # 1e-4: each is a sum over B T = 128 tokens
            assert_close(up, plain_up.chunk(tp)[tp_rank], rtol=1e-5, atol=1e-4)
            assert_close(down, plain_down.chunk(tp, dim=1)[tp_rank], rtol=1e-5, atol=1e-4)
    wrong = (addend - plain_norm).abs().max() / plain_norm.abs().max()  # of the last block
    say(
        f"a norm's gradient before its all-reduce over tp is wrong by {wrong:.0%}; that is the sum one must not forget"
    )
    say(
        "\nproven: with tokens split between the matrices, output and gradients are one process's, for the same bytes sent"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
