"""Lesson 2: in data parallelism every rank has the whole model, and each rank reads different sequences.

This is the first axis, dp. Gradients are summed over it.

    torchrun --nproc-per-node 2 recipes/lessons/02_data_parallel.py

replica       a rank's copy of the model; replicas start equal and get equal gradients, so they stay equal
all-reduce    every rank contributes a partial sum, and every rank gets the total
bucket        many gradients laid end to end and sent as one message, because each message has a fixed cost
target        a label that counts in the loss. Padding has label -100 and does not count, so ranks have
              different numbers of targets.

    sequences 0 1 2 3     rank 0: sequences 0 1 -> model -> loss, partial gradient --+  all-reduce +--> step
                          rank 1: sequences 2 3 -> model -> loss, partial gradient --+   (sum)     +--> step

The trap: the average of the ranks' mean losses is not the mean over all targets. So the loss is the sum over
targets divided by the number of targets in the whole batch, and that number is all-reduced first.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import print_each, print_once, run_lesson
from torch import Tensor, nn
from torch.testing import assert_close

B, T, D, V = 4, 8, 16, 50  # sequences of the whole batch, tokens in each, model width, vocabulary
STEPS = 3


def make_model() -> nn.Module:
    """Return a model whose initial weights depend on the seed alone, so that they are equal on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, V))


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels (B, T); later sequences are shorter, so the last rank has few targets."""
    tokens, labels = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(step))
    for i in range(B):
        labels[i, T - 2 * i :] = -100  # the sequences keep 8, 6, 4 and 2 targets
    return tokens, labels


def nll_sum(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses over all targets; tokens and labels are (b, T)."""
    logits = model(tokens)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def sgd_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter -= 0.5 * parameter.grad


def train_alone() -> tuple[nn.Module, list[float]]:
    """Train in one process on all sequences. Data parallelism must reproduce the result."""
    model, losses = make_model(), []
    for step in range(STEPS):
        tokens, labels = make_batch(step)
        loss = nll_sum(model, tokens, labels) / (labels != -100).sum()
        model.zero_grad()
        loss.backward()
        sgd_step(model)
        losses.append(loss.item())
    return model, losses


def sum_gradients(model: nn.Module) -> Tensor:
    """All-reduce the gradients of all parameters in one bucket, and return the bucket."""
    parameters = list(model.parameters())
    bucket = torch.cat([p.grad.flatten() for p in parameters])  # (N,): all gradients in one message
    dist.all_reduce(bucket)
    summed = bucket.split([p.numel() for p in parameters])
    for parameter, grad in zip(parameters, summed, strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
    return bucket


def train_together() -> tuple[nn.Module, list[float]]:
    """Train the same model on all ranks. Only the three all-reduces are new."""
    rank, dp = dist.get_rank(), dist.get_world_size()
    model, losses = make_model(), []
    for step in range(STEPS):
        tokens, labels = (x.chunk(dp)[rank] for x in make_batch(step))  # (B/dp, T): this rank's sequences
        own_targets = (labels != -100).sum()
        n_targets = own_targets.clone()
        dist.all_reduce(n_targets)  # targets in the whole batch
        loss = nll_sum(model, tokens, labels) / n_targets  # this rank's share of the loss
        model.zero_grad()
        loss.backward()  # .grad holds a partial sum too
        bucket = sum_gradients(model)
        sgd_step(model)
        whole_loss = loss.detach().clone()
        dist.all_reduce(whole_loss)  # for printing only
        losses.append(whole_loss.item())
        if step > 0:
            continue
        # ---- below here the first step is only printed ----
        print_once(
            f"step 0: all-reduce of the number of targets (), of one bucket {tuple(bucket.shape)} "
            "with all gradients, and of the loss ()"
        )
        own_mean = loss.detach() * n_targets / own_targets
        print_each(
            f"sequences {rank * B // dp} .. {(rank + 1) * B // dp - 1}, {own_targets} of {n_targets} "
            f"targets, own mean {own_mean.item():.4f}, share of the loss {loss.item():.4f}"
        )
        mean_of_means = own_mean / dp
        dist.all_reduce(mean_of_means)
        print_once(
            f"  the shares add up to {losses[0]:.4f}; "
            f"the mean of the means would be {mean_of_means.item():.4f}: wrong"
        )
    return model, losses


def lesson() -> None:
    alone, losses_alone = train_alone()
    together, losses = train_together()
    print_once("\nstep   one process   data parallel")
    for step, (one, many) in enumerate(zip(losses_alone, losses, strict=True)):
        print_once(f"{step:4}   {one:11.6f}   {many:13.6f}")
    assert_close(losses, losses_alone, rtol=0, atol=2e-6)  # fp32: only the order of summation differs
    for ours, plain in zip(together.parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)
        assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        from_rank_0 = ours.detach().clone()
        dist.broadcast(from_rank_0, src=0)
        assert torch.equal(ours, from_rank_0), "replicas drifted apart"  # all ranks got the same sum
    print_once(
        f"\nproven: {STEPS} steps on 2 ranks give the losses, gradients and weights of one process, "
        "and equal replicas"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
