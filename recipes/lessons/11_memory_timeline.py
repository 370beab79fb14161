"""**The timeline of an offloaded step: what runs at once, and what waits for what.** Lesson 10 said where;
this one says when.

    torchrun --nproc-per-node 2 recipes/lessons/11_memory_timeline.py

C_f, C_b, U   seconds of forward, of backward, and of the update of all chunks
lane          what works in order: the computation, the wire out (d2h) and in (h2d), host Adam, device Adam

  serial     |-- forward --|---- backward ----|---- update ----|-- forward --|          step = C_f + C_b + U
  offload    |-- forward --|---- backward ----|-- f o r w a r d --|                     step = C_b + max(C_f, U)
                              gradients out   |---- update ----|

Clipping needs the whole norm, so the update waits for all of backward. But forward does not need all of the
update: it starts with layer 0. Chunks are stepped in forward order, residents (the first layers) at once, and
each layer waits for the chunks that cover it and for no other. So host Adam, which is slow, hides behind the
forward of the layers before.

This is the project's own manager on lesson 4's slices, measured and drawn. Without a GPU the device's lanes
are the calling thread, so that only host Adam runs beside it; the order is the same. Gaps are the machine's
other work."""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from common import run_lesson, say
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dtensor_llama.gantt import busy_seconds, text_row
from memory import ChunkManager, Home, MemoryConfig, Overrides
from memory.timeline import LANES, draw_timeline

L, D, ROWS, STEPS = 16, 1536, 16, 6  # layers, width, rows
N_CELLS = 64  # columns of the timeline in words
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
    """STEPS steps; serial: nothing starts before the update is over. Returns the manager with its events,
    when each layer's forward began (STEPS, L), and this rank's weights."""
    torch.manual_seed(0)
    model, began = Layers(), []
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(
        model, mesh, {f"layers.{i}": RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(L)}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    slices = Overrides(chunk_elements=D * D // 2)  # a chunk is a layer's slice
    manager = ChunkManager(model, optimizer, MIX, overrides=slices)
    for i, layer in enumerate(model.layers):  # after the manager's hook, which waits
        layer.register_forward_pre_hook(partial(lambda i, *_: began[-1].append(time.perf_counter()), i))
    manager.record = True
    for step in range(STEPS):
        began.append([])
        model(torch.randn(ROWS, D, generator=torch.Generator().manual_seed(step))).backward()
        manager.clip_grad_norm(1e-3)
        manager.optimizer.step()  # returns while host Adam works
        if serial:
            manager.wait()
    manager.wait()
    return manager, began, torch.cat([p.detach().to_local().flatten() for p in model.parameters()])


def draw_lanes(events: list, begin: float, end: float) -> None:
    for lane in LANES:
        own = [(what, start, stop) for what, its_lane, start, stop in events if its_lane == lane]
        spans = [(what[0].upper() if lane == "compute" else "#", start, stop) for what, start, stop in own]
        say(f"  {lane:12}|{text_row(spans, begin, end, N_CELLS)}|")


def lesson() -> None:
    *_, expected = train(serial=True)
    manager, began, weights = train(serial=False)
    events, n_early = manager.events, 0
    steps = [
        [
            e
            for e in events
            if e[1] == "host adam" and began[i][-1] < e[2] and (i + 2 > STEPS or e[2] < began[i + 1][-1])
        ]
        for i in range(STEPS)
    ]
    for host_adam, forward in zip(steps, began[1:], strict=False):
        # chunk, which is layer -> its end
        done = {int(what.split()[1]): end for what, _, _, end in host_adam}
        cpu = [chunk.index for chunk in manager.chunks if chunk.home is Home.CPU]
        assert sorted(done) == cpu
        assert all(done[layer] <= forward[layer] for layer in cpu), (
            "a layer computed with a weight of the step before"
        )
        n_early += forward[0] < max(done.values())
    assert n_early > 0, "no forward began before the update was over"
    assert torch.equal(weights, expected), "starting early changed the numbers"

    say(f"{L} layers, chunk i is layer i's slice: {' '.join(chunk.home.value for chunk in manager.chunks)}")
    begin, end = began[-2][0], began[-1][-1]
    say(f"from one forward to the end of the next, {1e3 * (end - begin):.0f} ms; F forward, B backward")
    draw_lanes(events, begin, end)
    host_adam_s = busy_seconds((start, stop) for _, lane, start, stop in events if lane == "host adam")
    say(
        f"host Adam worked {1e3 * host_adam_s / STEPS:.0f} ms a step; {n_early} of {STEPS - 1} forwards "
        "began before it was done"
    )
    if dist.get_rank() == 0:
        path = Path(tempfile.gettempdir(), "memory-timeline.png")
        shown = [(what, lane, max(begin, start), min(end, stop)) for what, lane, start, stop in events]
        draw_timeline(
            [event for event in shown if event[2] < event[3]],
            path,
            f"{L} layers, two forwards and a backward",
        )
        say(f"drawn in {path}")
    manager.close()
    say(
        f"\nproven: {STEPS} steps in which forward did not wait for the update end with the weights of steps in which it did"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
