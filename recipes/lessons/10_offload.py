"""**Offload: optimizer states live where there is room, and no number changes.** Lesson 3 shared them; here
they move out.

    torchrun --nproc-per-node 2 recipes/lessons/10_offload.py

chunk     a run of this rank's parameters, all as long, with its states: master, exp_avg, exp_avg_sq. Bytes of a parameter:

             device                                    wire                host
  RESIDENT   grad 4, states 12 -> Adam -> weight 4
  STREAM     grad 4, [slot 12] -> Adam -> weight 4     <- states 12 ->     states 12
  CPU                                     weight 4     grad 4 ->, <- 4     grad 4, states 12 -> Adam

Clipping needs the norm of all gradients before the first update: one all-reduce of square sums. Its factor is
an argument of Adam, so gradients are not scaled. Device and host are two accounts of the same memory here.
(ZeRO-Offload: arXiv:2101.06840)"""

from collections import Counter

import torch
import torch.distributed as dist
from common import run_lesson, say
from torch import Tensor, nn
from torch.testing import assert_close

# layers, width, rows per rank; elements; of the gradient
L, D, ROWS, STEPS, CHUNK, MAX_NORM = 3, 64, 8, 10, 1024, 0.1
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-5, 0.1  # LLaMA-2's but for LR
PLANS = {"all resident": "R", "all streamed": "S", "all on the CPU": "C", "two of each": "RRSCSC"}
draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
now, peak, sent = Counter(), Counter(), Counter()  # bytes on device and host, now and at most; over the wire


def take(where: str, n_bytes: int) -> None:
    now[where] += n_bytes
    peak[where] = max(peak[where], now[where])


def copy(tensor: Tensor, direction: str) -> Tensor:
    sent[direction] += tensor.nbytes
    return tensor.clone()


def adamw(
    weight: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, clip: Tensor, step: int
) -> None:
    """All (CHUNK,), in place. One function for both engines: so all plans agree to the last bit, on one
    machine."""
    exp_avg.lerp_(grad := grad * clip, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    root = (exp_avg_sq / (1 - BETA2**step)).sqrt() + EPS
    weight.copy_(master.mul_(1 - LR * DECAY).addcdiv_(exp_avg, root, value=-LR / (1 - BETA1**step)))


class Chunk:
    def __init__(self, place: str, weight: Tensor):  # (CHUNK,): a view of what computes
        self.place, self.weight, self.home = place, weight, "host" if place == "C" else "device"
        self.states = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        self.slot_bytes = 3 * weight.nbytes * (place == "S")
        take("device" if place == "R" else "host", 3 * weight.nbytes)

    def gradient_arrives(self, grad: Tensor) -> None:
        take("device", grad.nbytes)  # backward has it now; of CPU chunks it leaves
        # at once: they never add up on the device
        self.grad = copy(grad, "out") if self.place == "C" else grad
        take("device", -grad.nbytes)
        take(self.home, grad.nbytes)

    def update(self, clip: Tensor, step: int) -> None:
        take("device", self.slot_bytes)
        states = [copy(state, "in") for state in self.states] if self.place == "S" else self.states
        new_weight = torch.empty_like(self.grad) if self.place == "C" else self.weight
        adamw(new_weight, *states, self.grad, clip, step)
        if self.place == "S":
            self.states = [copy(state, "out") for state in states]
        take("device", -self.slot_bytes)  # free for the next chunk
        if self.place == "C":
            self.weight.copy_(copy(new_weight, "in"))
        take(self.home, -self.grad.nbytes)


def loss_of(weights: Tensor, x: Tensor) -> Tensor:
    for weight in weights.view(L, D, D):
        x = (x @ weight / D**0.5).tanh()
    return x.square().sum() / (2 * ROWS)


def train_with(plan: str) -> Tensor:
    """STEPS steps, this rank updating its half of the weights. Returns all of them, (N,)."""
    now.clear(), peak.clear()
    rank, weights = dist.get_rank(), draw(L * D * D, seed=0).requires_grad_()  # (N,): of all layers
    shard = weights.detach().chunk(2)[rank]  # (N/2,): a view, cut into chunks
    take("device", shard.nbytes)
    chunks = [Chunk(plan[i % len(plan)], piece) for i, piece in enumerate(shard.split(CHUNK))]
    for step in range(1, STEPS + 1):
        sent.clear()
        (grads,) = torch.autograd.grad(loss_of(weights, draw(2 * ROWS, D, seed=step).chunk(2)[rank]), weights)
        dist.all_reduce(grads)  # lesson 3 reduce-scatters: the same sum
        own = grads.chunk(2)[rank]  # (N/2,)
        # the last layer's come first
        for chunk, grad in reversed(list(zip(chunks, own.split(CHUNK), strict=True))):
            chunk.gradient_arrives(grad)
        dist.all_reduce(squares := own.square().sum())  # over all shards, once
        for chunk in chunks:  # forward needs the first ones first
            chunk.update((MAX_NORM / (squares.sqrt() + 1e-6)).clamp(max=1), step)
        dist.all_gather(list(weights.detach().chunk(2)), shard.clone())
    return weights.detach()


def lesson() -> None:
    plain, n = nn.Parameter(draw(L * D * D, seed=0)), L * D * D // 2
    optimizer = torch.optim.AdamW([plain], LR, (BETA1, BETA2), EPS, DECAY)
    for step in range(1, STEPS + 1):  # one process, all resident
        plain.grad = torch.autograd.grad(loss_of(plain, draw(2 * ROWS, D, seed=step)), plain)[0]
        assert nn.utils.clip_grad_norm_([plain], MAX_NORM) > MAX_NORM, "every step shall be clipped"
        optimizer.step()
    say(
        "bytes per parameter of rank 0\nplan            device    host   wire out   wire in   from torch's AdamW, all clipped"
    )
    ends = []
    for name, plan in PLANS.items():
        ends.append(train_with(plan))
        say(
            f"{name:16}{peak['device'] / n:6.2f}{peak['host'] / n:8.2f}{sent['out'] / n:11.2f}{sent['in'] / n:10.2f}   "
            f"{(ends[-1] - plain).abs().max().item():.1e}"
        )
        # fp32: only the order of summation differs
        assert_close(ends[-1], plain.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ends[-1], ends[0]), "a plan changed the numbers"
    say(
        f"\nproven: {len(PLANS)} plans end with the same weights, bit for bit, and those of torch's AdamW on one process"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
