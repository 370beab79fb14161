"""**Pipeline: ranks hold different layers, and microbatches flow through them.** A new axis, pp; nothing else
is split.

    torchrun --nproc-per-node 2 recipes/lessons/08_pipeline.py

stage       consecutive layers on one rank; hidden states go to the next stage, their gradients to the one before
microbatch  a part of the batch. While stage 1 works on the first, stage 0 works on the second. F forward, B backward
bubble      time in which a rank has nothing to do, because its microbatch is still, or already, elsewhere
schedule    which F and B a rank does in which order; it changes no number, only time and memory. B takes twice as long:

        gpipe  0 |F0 F1 F2 F3 .. .. B0 B0 B1 B1 B2 B2 B3 B3     1f1b  0 |F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3 B3
               1 |.. F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .. ..        1 |.. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .. ..

1f1b, one forward, one backward: as soon as a backward can run it runs, and its activations are freed. So a
rank keeps at most pp microbatches where gpipe keeps all. The bubble is the same: (pp - 1) / (n_micro + pp -
1) of the time, so many microbatches make it small. Sources: Huang et al. 2018, arXiv:1811.06965; Narayanan et
al. 2021, arXiv:2104.04473.
"""

import time

import torch
import torch.distributed as dist
from common import run_lesson, say, say_each
from torch import Tensor, nn
from torch.testing import assert_close

from dtensor_llama.gantt import text_row

D, ROWS, N_LAYERS, N_MICRO = 512, 256, 4, 4  # width, rows per microbatch, layers in all, microbatches
N_CELLS = 40  # columns of the measured timeline


def gpipe(stage: int, n_stages: int, n_micro: int) -> list[str]:
    return [f"F{i}" for i in range(n_micro)] + [f"B{i}" for i in range(n_micro)]


def one_f_one_b(stage: int, n_stages: int, n_micro: int) -> list[str]:
    """E.g. F0 F1 B0 F2 B1 F3 B2 B3: as many forwards first as there are stages after this one, then one of
    each."""
    ahead = min(n_stages - 1 - stage, n_micro)
    steady = [work for i in range(n_micro - ahead) for work in (f"F{ahead + i}", f"B{i}")]
    return [f"F{i}" for i in range(ahead)] + steady + [f"B{i}" for i in range(n_micro - ahead, n_micro)]


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D)) for _ in range(N_LAYERS)]
    )


def run(
    part: nn.Module, micros: Tensor, targets: Tensor, schedule: list[str]
) -> tuple[float, float, list, int]:
    """Do what `schedule` says with this rank's layers. Returns the seconds until all ranks are done, the
    loss, [(work, start, end)] in seconds, and the most microbatches kept at a time."""
    stage, n_stages = dist.get_rank(), dist.get_world_size()
    first, last = stage == 0, stage == n_stages - 1
    kept, most_kept, sends, notes, loss = {}, 0, [], [], torch.zeros(())
    part.zero_grad()
    dist.barrier()  # all begin together
    began = time.perf_counter()
    for work in schedule:
        kind, i = work[0], int(work[1:])
        x = torch.empty(ROWS, D)  # hidden states, or their gradient
        if not (first if kind == "F" else last):
            dist.recv(x, stage - 1 if kind == "F" else stage + 1)  # waits: this is where bubbles come from
        start = time.perf_counter()
        if kind == "F":
            x = micros[i] if first else x.requires_grad_()
            y = part(x)  # (ROWS, D)
            if last:
                # this microbatch's share of the mean over all
                y = ((y - targets[i]) ** 2).sum() / targets.numel()
                loss += y.detach()
            kept[i] = x, y  # y drags along all that backward needs
            most_kept = max(most_kept, len(kept))
            leaving = None if last else (y.detach(), stage + 1)
        else:
            grad_y = None if last else x
            x, y = kept.pop(i)
            y.backward(grad_y)  # adds to .grad: microbatches accumulate
            leaving = None if first else (x.grad, stage - 1)
        notes.append((work, start - began, time.perf_counter() - began))
        if leaving:
            # Not send: stage 0 sends F1's output while stage 1 sends B0's gradient; each would wait for the
            # other to receive.
            sends.append((dist.isend(*leaving), leaving))
    for sending, _ in sends:
        sending.wait()
    total_s = torch.tensor(notes[-1][2])
    dist.all_reduce(total_s, dist.ReduceOp.MAX)
    return total_s.item(), loss.item(), notes, most_kept


def lesson() -> None:
    stage, n_stages = dist.get_rank(), dist.get_world_size()
    layers = make_layers()
    micros, targets = torch.randn(2, N_MICRO, ROWS, D, generator=torch.Generator().manual_seed(1))
    plain_loss = (
        (layers(micros.flatten(0, 1)) - targets.flatten(0, 1)) ** 2
    ).mean()  # one process, one batch
    plain_loss.backward()
    own = slice(stage * N_LAYERS // n_stages, (stage + 1) * N_LAYERS // n_stages)
    ideal = (n_stages - 1) / (N_MICRO + n_stages - 1)

    for schedule in (gpipe, one_f_one_b):
        works = schedule(stage, n_stages, N_MICRO)
        part = make_layers()[own]  # this rank's layers; the others are forgotten
        # the fastest of 4
        total_s, loss, notes, most_kept = min(run(part, micros, targets, works) for _ in range(4))
        busy_s = sum(end - start for _, start, end in notes)
        say(
            f"{schedule.__name__}: {total_s * 1e3:.0f} ms; bubbles of equal stages would be {ideal:.0%} of the time"
        )
        say_each(
            f"layers {own.start} .. {own.stop - 1}  {' '.join(works)}   kept {most_kept} microbatches, bubbles "
            f"{1 - busy_s / total_s:.0%}"
        )
        say(f"  measured, {total_s / N_CELLS * 1e3:.1f} ms a cell:")
        spans = [(f"{work} ", start, end) for work, start, end in notes]
        say_each("|" + text_row(spans, 0, total_s, N_CELLS, idle=".. ").rstrip())
        if schedule is one_f_one_b:
            assert most_kept == n_stages - stage, "1f1b keeps a microbatch per stage from here on"
        if stage == n_stages - 1:
            assert_close(loss, plain_loss.item(), rtol=1e-5, atol=0)  # fp32: a sum of four sums
        for ours, plain in zip(part.parameters(), layers[own].parameters(), strict=True):
            # of four microbatches added up, not one batch
            assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-8)
    say(
        "\nproven: 2 stages and 4 microbatches give one process's loss and gradients; 1f1b keeps 2 of them where gpipe keeps 4"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
