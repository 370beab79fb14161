"""**ZeRO: data parallel ranks share what they would otherwise all keep.** Lesson 2 kept everything on every
rank.

    torchrun --nproc-per-node 2 recipes/lessons/03_zero.py

masters, moments  fp32 weights, and Adam's two fp32 averages: 4 + 8 bytes a parameter, needed once a step
copy              the weights in bf16, 2 bytes, that compute; gradients are summed in fp32, 4 bytes
shard             the rows of a weight that a rank owns and steps: 1/S of them, with S ranks

         masters moments gradients copy     S = 2, what rank 0 keeps for one weight: # owned or whole, . not here
stage 0    ####    ####    ####    ####     as in lesson 2: all-reduce of gradients
      1    ##..    ##..    ####    ####     a rank steps its shard, then all gather the copies: no byte is sent twice
      2    ##..    ##..    ##..    ####     gradients are reduce-scattered layer by layer, in every microbatch
      3    ##..    ##..    ##..    ##..     the copy of a layer is gathered when it computes, forward and backward, and freed

Without autograd, so that every byte alive has a name in this file. Source: Rajbhandari et al. 2020,
arXiv:1910.02054."""

import gc

import torch
import torch.distributed as dist
from common import run_lesson, say
from torch import Tensor
from torch.testing import assert_close

N_LAYERS, D, B, M = 8, 256, 4, 2  # layers of D x D, rows per rank and microbatch, microbatches a step
sent: list[int] = []  # bytes of each message, as the whole tensor that it moves


def bytes_alive() -> int:
    # views share one: it counts once
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def free(tensor: Tensor) -> None:
    # as FSDP does: at once, though gloo's thread may hold the tensor a moment longer
    tensor.untyped_storage().resize_(0)


def all_gather(shard: Tensor) -> Tensor:
    whole = shard.new_empty(D, D)  # (D/S, D) -> (D, D)
    dist.all_gather(list(whole.split(shard.shape[0])), shard)
    sent.append(whole.nbytes)
    free(shard)
    return whole


def reduce_scatter(addend: Tensor, S: int) -> Tensor:
    shard = addend.new_empty(D // S, D)  # (D, D) sum:dp -> (D/S, D)
    dist.reduce_scatter(shard, list(addend.chunk(S)))
    sent.append(addend.nbytes)
    free(addend)
    return shard


def step(stage: int, rows: list[Tensor], S: int, rank: int) -> tuple[list[Tensor], list[Tensor], int]:
    """One Adam step of y = relu(relu(x W0^T) W1^T) ..., loss = sum(y^2) / 2, over the rows of M microbatches
    (B, D). Returns what this rank owns, gradients and masters, and the most bytes that were alive. S = 1: one
    process."""
    torch.manual_seed(0)
    own = slice(rank * D // S, (rank + 1) * D // S) if stage >= 1 else slice(None)  # rows of each weight
    masters = [torch.randn(D, D).mul_(1.5 * D**-0.5)[own].clone() for _ in range(N_LAYERS)]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in masters]
    # (D, D), all of it
    make_copy = lambda i: all_gather(masters[i].bfloat16()) if stage >= 1 else masters[i].bfloat16()
    done = free if stage == 3 else lambda copy: None
    # before the step, to keep; or never
    copies = [make_copy(i) if stage < 3 else None for i in range(N_LAYERS)]
    grads, peak = [torch.zeros(D // S if stage >= 2 else D, D) for _ in range(N_LAYERS)], 0
    for x in rows:
        activations = [x]
        for i in range(N_LAYERS):  # ---- forward ----
            copy = make_copy(i) if stage == 3 else copies[i]
            activations.append((activations[-1] @ copy.T).relu())  # (B, D)
            done(copy)
        grad = activations[-1]  # d loss / d y
        for i in reversed(range(N_LAYERS)):  # ---- backward ----
            copy = make_copy(i) if stage == 3 else copies[i]  # stage 3: gathered a second time
            grad = grad * (activations[i + 1] > 0)  # through relu
            grad_w = (grad.T @ activations[i]).float()  # (D, D) sum:dp, of these rows only
            grad = grad @ copy
            peak = max(peak, bytes_alive())  # now most is alive
            done(copy)
            if stage >= 2:
                grad_w = reduce_scatter(grad_w, S)  # (D/S, D), in every microbatch
            grads[i] += grad_w
            free(grad_w)
    for i in range(N_LAYERS):  # ---- once a step ----
        if stage == 1:
            grads[i] = reduce_scatter(grads[i], S)
        elif stage == 0 and S > 1:
            dist.all_reduce(grads[i])
            sent.append(2 * grads[i].nbytes)  # a reduce-scatter and an all-gather
        mean, square = moments[i][0].lerp_(grads[i], 0.1), moments[i][1].lerp_(grads[i] ** 2, 0.05)
        masters[i] -= 1e-3 * (mean / 0.1) / ((square / 0.05).sqrt() + 1e-8)  # Adam's first step
    return grads, masters, peak


@torch.no_grad()
def lesson() -> None:
    S, rank, L = dist.get_world_size(), dist.get_rank(), N_LAYERS
    gc.freeze()  # torch's own objects: bytes_alive need not look at them again
    batch = torch.randn(M, S, B, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    # all rows, alone
    plain_grads, plain_masters, _ = step(0, [rows for micro in batch for rows in micro], S=1, rank=0)
    formulas = [  # 4/L: a layer's gradient, whole, while it is made; 2/L: the copy of the layer at work
        ("4 + 8 + 4 + 2 + 4/L", 18 + 4 / L, 8),
        ("12/S + 4 + 2 + 4/L", 12 / S + 6 + 4 / L, 2 + 4),
        ("(12 + 4)/S + 2 + 4/L", 16 / S + 2 + 4 / L, 2 + 4 * M),
        ("(12 + 4)/S + 2/L + 4/L", 16 / S + 6 / L, 8 * M),
    ]
    say(
        f"{L * D * D:,} parameters in L = {L} layers, S = {S} ranks, M = {M} microbatches; all in bytes per parameter\n"
        f"stage  kept, formula                  measured    sent a step, formula  measured"
    )
    for stage, (formula, kept, moved) in enumerate(formulas):
        before = bytes_alive()
        sent.clear()
        grads, masters, peak = step(stage, list(batch[:, rank]), S, rank)
        measured, measured_sent = (peak - before) / (L * D * D), sum(sent) / (L * D * D)
        say(
            f"  {stage}    {formula:23} = {kept:5.2f}{measured:11.2f}{moved:24}{measured_sent:10.2f}   in {len(sent)} messages"
        )
        # 3 %: activations (B, D), and their gradients
        assert abs(measured / kept - 1) < 0.03 and measured_sent == moved
        own = slice(rank * D // S, (rank + 1) * D // S) if stage >= 1 else slice(None)
        for ours, plain in zip(grads + masters, plain_grads + plain_masters, strict=True):
            # fp32 sums of bf16 products, in another order
            assert_close(ours, plain[own], rtol=1e-5, atol=1e-5)
        del grads, masters, ours
    say(
        "\nproven: all four stages make the gradients and weights of one process, and keep and send what the formulas say"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
