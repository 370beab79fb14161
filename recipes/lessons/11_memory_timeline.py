"""Lesson 11: with offload, the update of a step runs at the same time as the forward of the next one.

Lesson 10 was about where things are; this one is about when things happen.

    torchrun --nproc-per-node 2 recipes/lessons/11_memory_timeline.py

C_f, C_b, U   the seconds of forward, of backward, and of the update of all chunks
lane          a worker that does one thing after another: the computation, the link out of the device (d2h),
              the link into it (h2d), Adam on the host, Adam on the device

  serial     |-- forward --|---- backward ----|---- update ----|-- forward --|      step = C_f + C_b + U
  offload    |-- forward --|---- backward ----|-- f o r w a r d --|                 step = C_b + max(C_f, U)
                              gradients out   |---- update ----|

Clipping needs the norm of all gradients, so the update cannot start before backward is done. But forward does
not have to wait for the whole update, because it starts with layer 0. Chunks are updated in forward order,
the resident ones (the first layers) at once. Each layer waits only for the chunks that contain its weights.
So Adam on the host, which is slow, is hidden behind the forward of the earlier layers.

The lesson measures and draws the project's own chunk manager on the slices of lesson 4. Without a GPU the
device's lanes all run in the calling thread, so that only Adam on the host runs beside it; the order is the
same. Gaps in the drawing are other work of the machine.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import print_once, run_lesson
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dtensor_llama.gantt import busy_seconds, text_row
from memory import ChunkManager, Home, MemoryConfig, Overrides
from memory.timeline import LANES, draw_timeline

L, D, SAMPLES, STEPS = 16, 1536, 16, 6  # layers, width, samples
N_CELLS = 64  # columns of the timeline in letters
MIX = MemoryConfig("static", resident=0.125, stream=0.125, cpu=0.75, kernel="blocks")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def train(serial: bool) -> tuple[ChunkManager, list[list[float]], Tensor]:
    """Do STEPS steps. With `serial`, nothing starts before the update is over.

    Returns the manager with its events, the times at which each layer's forward began (STEPS, L), in seconds,
    and this rank's weights, (L D^2 / 2,).
    """
    torch.manual_seed(0)
    model, began = Layers(), []
    mesh = init_device_mesh("cpu", (2,))
    slices = {f"layers.{i}": RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(L)}
    parallelize_module(model, mesh, slices)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    slices = Overrides(chunk_elements=D * D // 2)  # a chunk is a layer's slice
    manager = ChunkManager(model, optimizer, MIX, overrides=slices)

    def note_begin(layer: nn.Module, args: tuple) -> None:
        began[-1].append(time.perf_counter())

    for layer in model.layers:
        layer.register_forward_pre_hook(note_begin)  # runs after the manager's hook, which waits
    manager.record = True
    for step in range(STEPS):
        began.append([])
        samples = torch.randn(SAMPLES, D, generator=torch.Generator().manual_seed(step))
        model(samples).backward()
        manager.clip_grad_norm(1e-3)
        manager.optimizer.step()  # returns while Adam works on the host
        if serial:
            manager.wait()
    manager.wait()
    return manager, began, torch.cat([p.detach().to_local().flatten() for p in model.parameters()])


def print_timeline(events: list, begin: float, end: float) -> None:
    """Print the time from `begin` to `end`, in seconds, as one line of N_CELLS letters for each lane."""
    for lane in LANES:
        spans = []
        for what, its_lane, start, stop in events:
            if its_lane == lane:
                spans.append((what[0].upper() if lane == "compute" else "#", start, stop))
        print_once(f"  {lane:12}|{text_row(spans, begin, end, N_CELLS)}|")


def updates_of_each_step(events: list, began: list[list[float]]) -> list[dict[int, float]]:
    """Return for each step {layer: the time at which Adam on the host was done with its chunk}."""
    done = [{} for _ in range(STEPS)]
    for what, lane, start, end in events:
        if lane == "host adam":
            step = sum(start > forward[-1] for forward in began) - 1  # the last step whose forward was over
            done[step][int(what.split()[1])] = end  # chunk i is layer i's slice
    return done


def lesson() -> None:
    *_, expected = train(serial=True)
    manager, began, weights = train(serial=False)
    events, n_early = manager.events, 0
    on_cpu = [chunk.index for chunk in manager.chunks if chunk.home is Home.CPU]
    for done, forward in zip(updates_of_each_step(events, began)[:-1], began[1:], strict=True):
        assert sorted(done) == on_cpu
        for layer in on_cpu:
            assert done[layer] <= forward[layer], "a layer computed with a weight of the step before"
        n_early += forward[0] < max(done.values())
    assert n_early > 0, "no forward began before the update was over"
    assert torch.equal(weights, expected), "starting early changed the numbers"

    homes = " ".join(chunk.home.value for chunk in manager.chunks)
    print_once(f"{L} layers, chunk i is layer i's slice: {homes}")
    begin, end = began[-2][0], began[-1][-1]
    print_once(f"one forward to the end of the next: {1e3 * (end - begin):.0f} ms; F forward, B backward")
    print_timeline(events, begin, end)
    host_adam = [(start, stop) for _, lane, start, stop in events if lane == "host adam"]
    host_adam_ms = 1e3 * busy_seconds(host_adam) / STEPS
    print_once(f"Adam on the host worked {host_adam_ms:.0f} ms a step")
    print_once(f"{n_early} of {STEPS - 1} forwards began before it was done")
    if dist.get_rank() == 0:
        path = Path(tempfile.gettempdir(), "memory-timeline.png")
        shown = [(what, lane, max(begin, start), min(end, stop)) for what, lane, start, stop in events]
        shown = [event for event in shown if event[2] < event[3]]
        draw_timeline(shown, path, f"{L} layers, two forwards and a backward")
        print_once(f"drawn in {path}")
    manager.close()
    print_once(
        f"\nproven: {STEPS} steps in which forward did not wait for the update "
        "end with the weights of steps in which it did"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
