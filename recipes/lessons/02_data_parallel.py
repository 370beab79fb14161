"""**Data parallelism: every rank has the whole model and reads other rows; gradients are summed.** The first
axis, dp.

    torchrun --nproc-per-node 2 recipes/lessons/02_data_parallel.py

replica       a rank's copy of the model; all start equal, get the same gradients, and so stay equal without being sent
all-reduce    everyone gives an addend, everyone gets the sum
bucket        many gradients laid end to end, so that one message carries them: a message has a price of its own
scored token  a token whose label counts; padding does not (label -100). Ranks have different numbers of them!

        rows 0 1 2 3          rank 0: rows 0 1 -> model -> loss sum, gradient addend ---+  all-reduce  +--> step
                              rank 1: rows 2 3 -> model -> loss sum, gradient addend ---+   (sum)      +--> step

The trap: each rank's mean loss, averaged over ranks, is another number than the mean over all tokens. So the
loss is the sum over scored tokens divided by their number in the whole batch, and that number is all-reduced
first.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import run_lesson, say, say_each
from torch import Tensor, nn
from torch.testing import assert_close

B, T, D, V = 4, 8, 16, 50  # rows and tokens of the whole batch, model width, vocabulary
STEPS = 3


def make_model() -> nn.Module:
    """The same initial weights wherever it is called: from the seed, never from the rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, V))


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, T); later rows are shorter, so the last rank has few scored tokens."""
    draw = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(V, (2, B, T), generator=draw)
    for row in range(B):
        labels[row, T - 2 * row :] = -100  # scored: 8, 6, 4, 2
    return tokens, labels


def nll_sum(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def train_alone() -> tuple[nn.Module, list[float]]:
    """One process that reads all rows: what must come out."""
    model, losses = make_model(), []
    for step in range(STEPS):
        tokens, labels = make_batch(step)
        loss = nll_sum(model, tokens, labels) / (labels != -100).sum()
        model.zero_grad()
        loss.backward()
        sgd_step(model)
        losses.append(loss.item())
    return model, losses


def train_together() -> tuple[nn.Module, list[float]]:
    """The same on the ranks there are; what is new are the three all-reduces."""
    rank, dp = dist.get_rank(), dist.get_world_size()
    model, losses = make_model(), []
    for step in range(STEPS):
        tokens, labels = (x.chunk(dp)[rank] for x in make_batch(step))  # (B/dp, T): this rank's rows
        own_scored = (labels != -100).sum()
        n_scored = own_scored.clone()
        dist.all_reduce(n_scored)  # labels that count in the whole batch
        loss = nll_sum(model, tokens, labels) / n_scored  # this rank's share of the loss, an addend
        model.zero_grad()
        loss.backward()  # .grad: addends too
        bucket = torch.cat([p.grad.flatten() for p in model.parameters()])  # (N,): all gradients, one message
        dist.all_reduce(bucket)
        for parameter, grad in zip(
            model.parameters(), bucket.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.grad.copy_(grad.view_as(parameter))
        sgd_step(model)
        whole_loss = loss.detach().clone()
        dist.all_reduce(whole_loss)  # for printing only
        losses.append(whole_loss.item())
        if step == 0:
            say(
                f"step 0: all-reduce of the count (), then of one bucket {tuple(bucket.shape)} with the gradients of "
                f"{len(list(model.parameters()))} parameters, then of the loss ()"
            )
            say_each(
                f"rows {rank * B // dp} .. {(rank + 1) * B // dp - 1}, {own_scored} of {n_scored} scored tokens, own mean "
                f"{(loss * n_scored / own_scored).item():.4f}, share of the loss {loss.item():.4f}"
            )
            mean_of_means = loss.detach() * n_scored / own_scored / dp
            dist.all_reduce(mean_of_means)
            say(
                f"  the shares add up to {losses[0]:.4f}; the mean of the means would be {mean_of_means.item():.4f}: wrong"
            )
    return model, losses


@torch.no_grad()
def sgd_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter -= 0.5 * parameter.grad


def lesson() -> None:
    alone, losses_alone = train_alone()
    together, losses = train_together()
    say("\nstep   one process   data parallel")
    for step, (one, many) in enumerate(zip(losses_alone, losses, strict=True)):
        say(f"{step:4}   {one:11.6f}   {many:13.6f}")
    assert_close(losses, losses_alone, rtol=0, atol=2e-6)  # fp32: only the order of summation differs
    for ours, plain in zip(together.parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)
        assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        from_rank_0 = ours.detach().clone()
        dist.broadcast(from_rank_0, src=0)
        assert torch.equal(ours, from_rank_0), "replicas drifted apart"  # bit for bit: all got the same sum
    say(
        f"\nproven: {STEPS} steps on 2 ranks give the losses, gradients and weights of one process, and equal replicas"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
