"""Lesson 3: with ZeRO, data parallel ranks share the state that lesson 2 kept whole on every rank.

    torchrun --nproc-per-node 2 recipes/lessons/03_zero.py

masters, moments  the fp32 weights and Adam's two fp32 averages: 4 + 8 bytes per parameter, used once a step
copy              the bf16 weights that the layers compute with, 2 bytes; gradients are summed in fp32, 4
bytes shard             the rows of a weight that one rank owns and updates: 1/S of all rows, with S ranks

The drawing shows what rank 0 of S = 2 keeps of one weight. # is a part that it keeps, . one that it does not.

         masters moments gradients copy
stage 0    ####    ####    ####    ####   as in lesson 2: gradients are all-reduced
      1    ##..    ##..    ####    ####   a rank updates its shard, then all ranks gather the copies
      2    ##..    ##..    ##..    ####   gradients are reduce-scattered layer by layer, in every microbatch
      3    ##..    ##..    ##..    ##..   a layer's copy is gathered before it computes, and freed afterwards

The lesson does not use autograd, so that every byte in memory has a name in this file.
Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import gc

import torch
import torch.distributed as dist
from common import print_once, run_lesson
from torch import Tensor
from torch.testing import assert_close

N_LAYERS, D, B, M = 8, 256, 4, 2  # layers of D x D, samples per rank and microbatch, microbatches a step
sent: list[int] = []  # the bytes of each message: the size of the whole tensor that it moves


def bytes_in_memory() -> int:
    """Return the bytes of all tensors that Python knows."""
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
    by_address = {storage.data_ptr(): storage.nbytes() for storage in storages}  # views share one storage
    return sum(by_address.values())


def free(tensor: Tensor) -> None:
    """Free the memory at once, as FSDP does, even if gloo's thread still holds the tensor for a moment."""
    tensor.untyped_storage().resize_(0)


def all_gather(shard: Tensor) -> Tensor:
    whole = shard.new_empty(D, D)  # (D/S, D) -> (D, D)
    dist.all_gather(list(whole.split(shard.shape[0])), shard)
    sent.append(whole.nbytes)
    free(shard)
    return whole


def reduce_scatter(partial: Tensor, S: int) -> Tensor:
    shard = partial.new_empty(D // S, D)  # (D, D) Partial(dp) -> (D/S, D)
    dist.reduce_scatter(shard, list(partial.chunk(S)))
    sent.append(partial.nbytes)
    free(partial)
    return shard


def step(stage: int, batches: list[Tensor], S: int, rank: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Do one Adam step of y = relu(relu(x W0^T) W1^T) ..., with loss = sum(y^2) / 2.

    batches: the microbatches x, each (B, D). S: the number of ranks; 1 for one process without communication.
    Returns this rank's gradients and masters, and the largest number of bytes that were in memory.
    """
    torch.manual_seed(0)
    own = slice(rank * D // S, (rank + 1) * D // S) if stage >= 1 else slice(None)  # rows of each weight
    masters = [torch.randn(D, D).mul_(1.5 * D**-0.5)[own].clone() for _ in range(N_LAYERS)]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in masters]
    grads = [torch.zeros(D // S if stage >= 2 else D, D) for _ in range(N_LAYERS)]
    peak = 0

    def make_copy(layer: int) -> Tensor:
        copy = masters[layer].bfloat16()
        return all_gather(copy) if stage >= 1 else copy  # (D, D)

    copies = [make_copy(layer) for layer in range(N_LAYERS)] if stage < 3 else None  # for the whole step

    def multiply(x: Tensor, layer: int, transposed: bool) -> Tensor:
        nonlocal peak
        copy = copies[layer] if copies else make_copy(layer)  # stage 3: gathered in forward and in backward
        y = x @ (copy.T if transposed else copy)
        peak = max(peak, bytes_in_memory())  # memory is fullest while a layer's copy is there
        if stage == 3:
            free(copy)
        return y

    for x in batches:
        activations = [x]
        for layer in range(N_LAYERS):  # ---- forward ----
            activations.append(multiply(activations[-1], layer, transposed=True).relu())  # (B, D)
        grad = activations[-1]  # d loss / d y
        for layer in reversed(range(N_LAYERS)):  # ---- backward ----
            grad = grad * (activations[layer + 1] > 0)  # through relu
            grad_w = (grad.T @ activations[layer]).float()  # (D, D) Partial(dp): from this rank's samples
            grad = multiply(grad, layer, transposed=False)
            if stage >= 2:
                grad_w = reduce_scatter(grad_w, S)  # (D/S, D), in every microbatch
            grads[layer] += grad_w
            free(grad_w)
    for layer in range(N_LAYERS):  # ---- once a step ----
        if stage == 1:
            grads[layer] = reduce_scatter(grads[layer], S)
        elif stage == 0 and S > 1:
            dist.all_reduce(grads[layer])
            sent.append(2 * grads[layer].nbytes)  # an all-reduce is a reduce-scatter and an all-gather
        mean = moments[layer][0].lerp_(grads[layer], 0.1)
        square = moments[layer][1].lerp_(grads[layer] ** 2, 0.05)
        masters[layer] -= 1e-3 * (mean / 0.1) / ((square / 0.05).sqrt() + 1e-8)  # Adam's first step
    return grads, masters, peak


@torch.no_grad()
def lesson() -> None:
    S, rank, L = dist.get_world_size(), dist.get_rank(), N_LAYERS
    gc.freeze()  # so that bytes_in_memory does not look at torch's own objects each time
    batch = torch.randn(M, S, B, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    # One process, with the samples of all ranks.
    plain_grads, plain_masters, _ = step(0, list(batch.flatten(0, 1)), S=1, rank=0)
    formulas = [  # 4/L is the whole gradient of the layer that computes, 2/L is its copy
        ("4 + 8 + 4 + 2 + 4/L", 18 + 4 / L, 8),
        ("12/S + 4 + 2 + 4/L", 12 / S + 6 + 4 / L, 2 + 4),
        ("(12 + 4)/S + 2 + 4/L", 16 / S + 2 + 4 / L, 2 + 4 * M),
        ("(12 + 4)/S + 2/L + 4/L", 16 / S + 6 / L, 8 * M),
    ]
    n = L * D * D
    print_once(
        f"{n:,} parameters in L = {L} layers, S = {S} ranks, M = {M} microbatches; bytes per parameter"
    )
    print_once("stage  kept, formula                  measured    sent a step, formula  measured")
    for stage, (formula, kept, moved) in enumerate(formulas):
        before = bytes_in_memory()
        sent.clear()
        grads, masters, peak = step(stage, list(batch[:, rank]), S, rank)
        measured, measured_sent = (peak - before) / n, sum(sent) / n
        print_once(
            f"  {stage}    {formula:23} = {kept:5.2f}{measured:11.2f}"
            f"{moved:24}{measured_sent:10.2f}   in {len(sent)} messages"
        )
        assert abs(measured / kept - 1) < 0.03  # 3 %: the activations (B, D) and their gradients
        assert measured_sent == moved
        own = slice(rank * D // S, (rank + 1) * D // S) if stage >= 1 else slice(None)
        for ours, plain in zip(grads + masters, plain_grads + plain_masters, strict=True):
            # The tolerance is for fp32 sums of bf16 products in another order.
            assert_close(ours, plain[own], rtol=1e-5, atol=1e-5)
        del grads, masters, ours
    print_once(
        "\nproven: all four stages make the gradients and weights of one process, "
        "and keep and send what the formulas say"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
