"""A picture of a pipeline step from measured times: which rank does what and when, and the bubbles.

recorder = Recorder(mesh["pp"], device)          # on every rank
pipeline.recorder = recorder                    # after a warm-up step: the first one sets things up
pipeline.step(microbatches, n_targets)
events = recorder.gather()                       # all ranks of pp_mesh; a list on pp rank 0, None elsewhere
if events:
    draw_schedule(events, "schedule.png", "1f1b")
"""

from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtensor_llama.clock import moment, seconds_between
from dtensor_llama.gantt import Bar, Row, draw_gantt

KINDS = {"F": "forward", "B": "backward", "I": "backward, input half", "W": "backward, weight half"}
COLORS = {"F": "#4c78a8", "B": "#54a24b", "I": "#2f9c95", "W": "#eeca3b"}
BUBBLE = "#f4b6b0"


class Event(NamedTuple):
    """One piece of work: the forward or backward (kind F, B, I or W) of a microbatch in a stage. Seconds
    count from the moment at which all ranks began together."""

    pp_rank: int
    stage: int
    microbatch: int
    kind: str
    start_s: float
    end_s: float


class Recorder:
    """Notes when this rank works during one step, on the device's own clock."""

    def __init__(self, pp_mesh: DeviceMesh, device: torch.device):
        self.group, self.pp, self.pp_rank = pp_mesh.get_group(), pp_mesh.size(), pp_mesh.get_local_rank()
        self.device, self.notes, self.began = device, [], None

    def start(self) -> None:
        """Drop earlier notes, and begin together with the other ranks: the clocks of machines differ."""
        self.notes = []
        dist.barrier(group=self.group)
        self.began = moment(self.device)

    @contextmanager
    def note(self, stage: int, microbatch: int, kind: str):
        start = moment(self.device)
        yield
        self.notes.append((stage, microbatch, kind, start, moment(self.device)))

    def gather(self) -> list[Event] | None:
        """Return the events of all ranks, sorted by rank and time, on pp rank 0, and None elsewhere. Every
        rank calls it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        events = [
            Event(self.pp_rank, *what, seconds_between(self.began, start), seconds_between(self.began, end))
            for *what, start, end in self.notes
        ]
        everyone = [None] * self.pp if self.pp_rank == 0 else None
        dist.gather_object(events, everyone, group=self.group, group_dst=0)
        return everyone and sorted(chain.from_iterable(everyone), key=lambda e: (e.pp_rank, e.start_s))


def bubble_share(events: list[Event]) -> float:
    """Return the share of the ranks' time, from the first event to the last, in which they did nothing."""
    begin, end = min(e.start_s for e in events), max(e.end_s for e in events)
    n_ranks = len({e.pp_rank for e in events})
    return 1 - sum(e.end_s - e.start_s for e in events) / (n_ranks * (end - begin))


def draw_schedule(events: list[Event], path: str | Path, name: str) -> None:
    """Write a PNG: a row per pp rank, a bar per event with the number of its microbatch, bubbles in red.

    With several stages per rank a row has a lane for each; the rank works in one of them at a time.
    """
    rows = []
    for rank in sorted({e.pp_rank for e in events}):
        own = [e for e in events if e.pp_rank == rank]
        stages = sorted({e.stage for e in own})
        bars = [
            Bar(e.start_s, e.end_s, COLORS[e.kind], (str(e.microbatch),), stages.index(e.stage)) for e in own
        ]
        rows.append(Row([f"rank {rank}, stage {stage}" for stage in stages], bars, len(stages)))
    n_microbatches = len({e.microbatch for e in events})
    title = (
        f"{len(rows)} ranks, {n_microbatches} microbatches, {bubble_share(events):.0%} of the time bubbles"
    )
    legend = {KINDS[kind]: COLORS[kind] for kind in KINDS if any(e.kind == kind for e in events)}
    width = min(28.0, max(9.0, 0.42 * len(rows[0].bars) + 2.5))
    draw_gantt(rows, path, f"{name}: {title}", width, BUBBLE, legend | {"bubble": BUBBLE})
