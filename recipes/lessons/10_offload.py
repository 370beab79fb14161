"""Lesson 10: optimizer states are offloaded to where there is room, and the results stay the same.

Lesson 3 shared the states between ranks; here they leave the device.

    torchrun --nproc-per-node 2 recipes/lessons/10_offload.py

chunk     some consecutive parameters of this rank with their states, which are master, exp_avg and
          exp_avg_sq. All chunks are equally long. The drawing shows bytes per parameter in three placements:

             device                                    wire                host
  RESIDENT   grad 4, states 12 -> Adam -> weight 4
  STREAM     grad 4, [slot 12] -> Adam -> weight 4     <- states 12 ->     states 12
  CPU                                     weight 4     grad 4 ->, <- 4     grad 4, states 12 -> Adam

Clipping needs the norm of all gradients before the first update, which takes one all-reduce of the sums of
squares. The clip factor is an argument of Adam, so no gradient is scaled in place. In this lesson device and
host are only two counters for the same memory. Source: ZeRO-Offload, arXiv:2101.06840.
"""

from collections import Counter

import torch
import torch.distributed as dist
from common import print_once, run_lesson
from torch import Tensor, nn
from torch.testing import assert_close

L, D, SAMPLES = 3, 64, 8  # layers, width, samples per rank
# Parameters, steps, elements of a chunk, and the norm to which gradients are clipped.
N, STEPS, CHUNK, MAX_NORM = L * D * D, 10, 1024, 0.1
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-5, 0.1  # LLaMA-2's values, except for LR
PLANS = {"all resident": "R", "all streamed": "S", "all on the CPU": "C", "two of each": "RRSCSC"}
now, peak, sent = Counter(), Counter(), Counter()  # bytes on device and host: now, at most; bytes transferred


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reserve(where: str, n_bytes: int) -> None:
    """Count bytes as allocated on the "device" or the "host"."""
    now[where] += n_bytes
    peak[where] = max(peak[where], now[where])


def release(where: str, n_bytes: int) -> None:
    now[where] -= n_bytes


def send(tensor: Tensor, direction: str) -> Tensor:
    """Return a copy that has passed the link: "out" of the device or "in" to it."""
    sent[direction] += tensor.nbytes
    return tensor.clone()


def adamw(weight: Tensor, states: list[Tensor], grad: Tensor, clip: Tensor, step: int) -> None:
    """Update weight and states in place, all (CHUNK,).

    Device and host call the same code, so that all plans give the same bits on one machine.
    """
    master, exp_avg, exp_avg_sq = states
    grad = grad * clip
    exp_avg.lerp_(grad, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    root = (exp_avg_sq / (1 - BETA2**step)).sqrt() + EPS
    master.mul_(1 - LR * DECAY).addcdiv_(exp_avg, root, value=-LR / (1 - BETA1**step))
    weight.copy_(master)


class Chunk:
    """Holds one chunk's states where its placement puts them.

    placement: "R", "S" or "C". weight: (CHUNK,), a view of the weights that the layers compute with."""

    def __init__(self, placement: str, weight: Tensor):
        self.placement, self.weight = placement, weight
        self.states = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
        self.gradient_home = "host" if placement == "C" else "device"
        reserve("device" if placement == "R" else "host", 3 * weight.nbytes)

    def take_gradient(self, grad: Tensor) -> None:
        """Keep a gradient that backward made on the device. A CPU chunk sends it to the host at once."""
        reserve("device", grad.nbytes)
        self.grad = send(grad, "out") if self.placement == "C" else grad
        release("device", grad.nbytes)
        reserve(self.gradient_home, grad.nbytes)

    def update(self, clip: Tensor, step: int) -> None:
        if self.placement == "R":
            adamw(self.weight, self.states, self.grad, clip, step)
        elif self.placement == "S":
            reserve("device", 3 * self.weight.nbytes)  # the slot for the states
            states = [send(state, "in") for state in self.states]
            adamw(self.weight, states, self.grad, clip, step)
            self.states = [send(state, "out") for state in states]
            release("device", 3 * self.weight.nbytes)  # the slot is free for the next chunk
        else:
            new_weight = torch.empty_like(self.grad)
            adamw(new_weight, self.states, self.grad, clip, step)
            self.weight.copy_(send(new_weight, "in"))
        release(self.gradient_home, self.grad.nbytes)


def loss_of(weights: Tensor, x: Tensor) -> Tensor:
    """Return this rank's share of the loss: weights (N,), x (SAMPLES, D) -> a scalar."""
    for weight in weights.view(L, D, D):
        x = (x @ weight / D**0.5).tanh()
    return x.square().sum() / (2 * SAMPLES)


def train_with(plan: str) -> Tensor:
    """Do STEPS steps in which this rank updates its half of the weights, and return all weights, (N,)."""
    now.clear()
    peak.clear()
    rank, weights = dist.get_rank(), randn(N, seed=0).requires_grad_()  # (N,): of all layers
    shard = weights.detach().chunk(2)[rank]  # (N/2,): a view, cut into chunks
    reserve("device", shard.nbytes)
    chunks = [Chunk(plan[i % len(plan)], piece) for i, piece in enumerate(shard.split(CHUNK))]
    for step in range(1, STEPS + 1):
        sent.clear()
        samples = randn(2 * SAMPLES, D, seed=step).chunk(2)[rank]
        (grads,) = torch.autograd.grad(loss_of(weights, samples), weights)
        dist.all_reduce(grads)  # lesson 3 gets the same sum with a reduce-scatter
        own = grads.chunk(2)[rank]  # (N/2,)
        arrivals = list(zip(chunks, own.split(CHUNK), strict=True))
        for chunk, grad in reversed(arrivals):  # the gradients of the last layer come first
            chunk.take_gradient(grad)
        squares = own.square().sum()
        dist.all_reduce(squares)  # over the shards of all ranks, once
        clip = (MAX_NORM / (squares.sqrt() + 1e-6)).clamp(max=1)
        for chunk in chunks:  # forward needs the first layer first
            chunk.update(clip, step)
        dist.all_gather(list(weights.detach().chunk(2)), shard.clone())
    return weights.detach()


def train_on_one_process() -> Tensor:
    """Do the same steps with torch's AdamW and all states on the device."""
    plain = nn.Parameter(randn(N, seed=0))
    optimizer = torch.optim.AdamW([plain], LR, (BETA1, BETA2), EPS, DECAY)
    for step in range(1, STEPS + 1):
        plain.grad = torch.autograd.grad(loss_of(plain, randn(2 * SAMPLES, D, seed=step)), plain)[0]
        assert nn.utils.clip_grad_norm_([plain], MAX_NORM) > MAX_NORM, "every step shall be clipped"
        optimizer.step()
    return plain.detach()


def lesson() -> None:
    plain, results, n_own = train_on_one_process(), [], N // 2
    print_once("bytes per parameter of rank 0, and how far its weights are from those of torch's AdamW")
    print_once("plan            device    host   wire out   wire in   largest difference")
    for name, plan in PLANS.items():
        weights = train_with(plan)
        results.append(weights)
        difference = (weights - plain).abs().max().item()
        print_once(
            f"{name:16}{peak['device'] / n_own:6.2f}{peak['host'] / n_own:8.2f}"
            f"{sent['out'] / n_own:11.2f}{sent['in'] / n_own:10.2f}   {difference:.1e}"
        )
        assert_close(weights, plain, rtol=1e-5, atol=1e-6)  # fp32: only the order of summation differs
        assert torch.equal(weights, results[0]), "a plan changed the numbers"
    print_once(
        f"\nproven: {len(PLANS)} plans end with the same weights, bit for bit, "
        "and those of torch's AdamW on one process"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
