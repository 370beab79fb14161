"""Lesson 8: in a pipeline the ranks hold different layers, and microbatches flow through them.

This is a new axis, pp; nothing else is split.

    torchrun --nproc-per-node 2 recipes/lessons/08_pipeline.py

stage       consecutive layers on one rank; hidden states go to the next stage, gradients to the one before
microbatch  a part of the batch; while stage 1 works on the first, stage 0 works on the second
bubble      the time in which a rank has nothing to do, because the microbatch it needs is on another rank
schedule    the order in which a rank does its forwards F and backwards B. It changes time and memory, but not
            the results. In this drawing B takes twice as long as F:

    gpipe  0 |F0 F1 F2 F3 .. .. B0 B0 B1 B1 B2 B2 B3 B3   1f1b  0 |F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3
           1 |.. F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 ..         1 |.. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 ..

1f1b means one forward, one backward: as soon as a backward can run, it runs, and its activations are freed.
So a rank keeps at most pp microbatches, where gpipe keeps all of them. The bubble is the same in both, a
share of (pp - 1) / (n_microbatches + pp - 1) of the time, so it is small if there are many microbatches.
Sources: Huang et al. 2018, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from common import print_each, print_once, run_lesson
from torch import Tensor, nn
from torch.testing import assert_close

from dtensor_llama.gantt import text_row

D, SAMPLES, N_LAYERS, N_MICROBATCHES = 512, 256, 4, 4  # width, samples per microbatch, layers of all stages
N_CELLS = 40  # columns of the measured timeline


def gpipe(stage: int, n_stages: int, n_microbatches: int) -> list[str]:
    """Return the order of work of a stage under gpipe: all forwards, then all backwards."""
    return [f"F{i}" for i in range(n_microbatches)] + [f"B{i}" for i in range(n_microbatches)]


def one_f_one_b(stage: int, n_stages: int, n_microbatches: int) -> list[str]:
    """Return the order of work of a stage under 1f1b, for example F0 F1 B0 F2 B1 F3 B2 B3.

    First come as many forwards as there are stages after this one, then forwards and backwards in turn.
    """
    ahead = min(n_stages - 1 - stage, n_microbatches)
    order = [f"F{i}" for i in range(ahead)]
    for i in range(n_microbatches - ahead):
        order += [f"F{ahead + i}", f"B{i}"]
    return order + [f"B{i}" for i in range(n_microbatches - ahead, n_microbatches)]


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D)) for _ in range(N_LAYERS)]
    return nn.Sequential(*layers)


class Span(NamedTuple):
    """Records one piece of work, such as F0, and its start and end, in seconds since the step began."""

    work: str
    start: float
    end: float


class Step(NamedTuple):
    """Holds what is known about a step afterwards."""

    seconds: float  # until all ranks were done
    loss: float
    spans: list[Span]
    most_kept: int  # the most microbatches that were kept for backward at one time


def run(layers: nn.Module, inputs: Tensor, targets: Tensor, schedule: list[str]) -> Step:
    """Do one step with this rank's layers, in the order that `schedule` gives."""
    stage, n_stages = dist.get_rank(), dist.get_world_size()
    first, last = stage == 0, stage == n_stages - 1
    kept, most_kept, sends, spans, loss = {}, 0, [], [], torch.zeros(())
    layers.zero_grad()
    dist.barrier()  # all ranks begin together
    began = time.perf_counter()
    for work in schedule:
        kind, i = work[0], int(work[1:])
        received = torch.empty(SAMPLES, D)  # hidden states in forward, their gradient in backward
        if kind == "F" and not first:
            dist.recv(received, stage - 1)  # waiting here for another rank makes the bubbles
        if kind == "B" and not last:
            dist.recv(received, stage + 1)
        start = time.perf_counter() - began
        if kind == "F":
            x = inputs[i] if first else received.requires_grad_()
            y = layers(x)  # (SAMPLES, D)
            if last:
                y = ((y - targets[i]) ** 2).sum() / targets.numel()  # its share of the mean over the batch
                loss += y.detach()
            kept[i] = x, y  # y holds all that backward needs
            most_kept = max(most_kept, len(kept))
            message = None if last else (y.detach(), stage + 1)
        else:
            x, y = kept.pop(i)
            y.backward(None if last else received)  # adds to .grad, so microbatches add up
            message = None if first else (x.grad, stage - 1)
        spans.append(Span(work, start, time.perf_counter() - began))
        if message:
            # A blocking send would deadlock: stage 0 sends the output of F1 while stage 1 sends the gradient
            # of B0, and each would wait until the other receives.
            sends.append((dist.isend(*message), message))
    for sending, _ in sends:
        sending.wait()
    seconds = torch.tensor(spans[-1].end)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return Step(seconds.item(), loss.item(), spans, most_kept)


def draw(step: Step) -> str:
    """Return the timeline: each cell shows the work that ran in its middle, or dots if there was none."""
    spans = [(f"{span.work} ", span.start, span.end) for span in step.spans]
    return text_row(spans, 0, step.seconds, N_CELLS, idle=".. ").rstrip()


def lesson() -> None:
    stage, n_stages = dist.get_rank(), dist.get_world_size()
    all_layers = make_layers()
    draws = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, N_MICROBATCHES, SAMPLES, D, generator=draws)
    plain_y = all_layers(inputs.flatten(0, 1))  # one process, one batch
    plain_loss = ((plain_y - targets.flatten(0, 1)) ** 2).mean()
    plain_loss.backward()
    own = slice(stage * N_LAYERS // n_stages, (stage + 1) * N_LAYERS // n_stages)
    bubble = (n_stages - 1) / (N_MICROBATCHES + n_stages - 1)

    for schedule in (gpipe, one_f_one_b):
        order = schedule(stage, n_stages, N_MICROBATCHES)
        layers = make_layers()[own]  # this rank's layers; the others are freed
        step = min(run(layers, inputs, targets, order) for _ in range(4))  # the fastest of four
        busy = sum(span.end - span.start for span in step.spans) / step.seconds
        print_once(
            f"{schedule.__name__}: {step.seconds * 1e3:.0f} ms; "
            f"bubbles of equal stages would be {bubble:.0%} of the time"
        )
        print_each(
            f"layers {own.start} .. {own.stop - 1}  {' '.join(order)}   "
            f"kept {step.most_kept} microbatches, bubbles {1 - busy:.0%}"
        )
        print_once(f"  measured, {step.seconds / N_CELLS * 1e3:.1f} ms a cell:")
        print_each("|" + draw(step))
        if schedule is one_f_one_b:
            assert step.most_kept == n_stages - stage, "1f1b keeps one microbatch per stage from here on"
        if stage == n_stages - 1:
            assert_close(step.loss, plain_loss.item(), rtol=1e-5, atol=0)  # fp32: this is a sum of four sums
        for ours, plain in zip(layers.parameters(), all_layers[own].parameters(), strict=True):
            assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-8)  # fp32: four sums added
    print_once(
        "\nproven: 2 stages and 4 microbatches give one process's loss and gradients; "
        "1f1b keeps 2 of them where gpipe keeps 4"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
