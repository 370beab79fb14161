"""A picture of a pipeline step from measured times: who does what when, and the bubbles.

recorder = Recorder(mesh["pp"], device)          # on every rank
pipeline.step(micros, n_scored, scale, recorder) # after a warm-up step: the first one sets things up
events = recorder.gather()                       # all ranks of pp_mesh; a list on pp rank 0, None elsewhere
if events:
    draw_schedule(events, "schedule.png", "1f1b")
"""

import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

KINDS = {"F": "forward", "B": "backward", "I": "backward, input half", "W": "backward, weight half"}
COLORS = {"F": "#4c78a8", "B": "#54a24b", "I": "#2f9c95", "W": "#eeca3b"}
BUBBLE = "#f4b6b0"
EDGE = "white"


class Event(NamedTuple):
    """One piece of work: `kind` (F, B, I, W) of a microbatch in a stage, in seconds since all ranks began
    together."""

    pp_rank: int
    stage: int
    microbatch: int
    kind: str
    start_s: float
    end_s: float


class Recorder:
    """Notes when this rank works during one step. On a GPU the times are the device's own, not the host's."""

    def __init__(self, pp_mesh: DeviceMesh, device: torch.device):
        self.group, self.pp, self.pp_rank = pp_mesh.get_group(), pp_mesh.size(), pp_mesh.get_local_rank()
        self.device, self.notes, self.began = device, [], None

    def start(self) -> None:
        """Forget what was noted, and begin together with the other ranks: clocks of different machines
        differ."""
        self.notes = []
        dist.barrier(group=self.group)
        self.began = self._now()

    @contextmanager
    def note(self, stage: int, microbatch: int, kind: str):
        start = self._now()
        yield
        self.notes.append((stage, microbatch, kind, start, self._now()))

    def gather(self) -> list[Event] | None:
        """All ranks' events, sorted by rank and time, on pp rank 0; None elsewhere. Every rank calls it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        events = [
            Event(self.pp_rank, *what, self._since_start(start), self._since_start(end))
            for *what, start, end in self.notes
        ]
        everyone = [None] * self.pp if self.pp_rank == 0 else None
        dist.gather_object(events, everyone, group=self.group, group_dst=0)
        return everyone and sorted(
            (event for rank in everyone for event in rank), key=lambda e: (e.pp_rank, e.start_s)
        )

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since_start(self, moment) -> float:
        return self.began.elapsed_time(moment) / 1e3 if self.device.type == "cuda" else moment - self.began


def bubble_share(events: list[Event]) -> float:
    """Of the ranks' time from the first event to the last, the share in which they did nothing."""
    begin, end = min(e.start_s for e in events), max(e.end_s for e in events)
    n_ranks = len({e.pp_rank for e in events})
    return 1 - sum(e.end_s - e.start_s for e in events) / (n_ranks * (end - begin))


def draw_schedule(events: list[Event], path: str | Path, name: str = "") -> None:
    """Write a PNG: a row per pp rank, a box per event with its microbatch's number, bubbles in red.

    With several stages per rank a row has a lane for each; the rank works in one of them at a time.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    begin, end = min(e.start_s for e in events), max(e.end_s for e in events)
    stages = {
        rank: sorted({e.stage for e in events if e.pp_rank == rank})
        for rank in sorted({e.pp_rank for e in events})
    }
    lanes = max(map(len, stages.values()))
    n_micros = len({e.microbatch for e in events})
    width = min(28.0, max(9.0, 0.42 * len([e for e in events if e.pp_rank == 0]) + 2.5))
    height = (0.62 if lanes == 1 else 0.42 * lanes) * len(stages) + 1.7
    figure, axes = plt.subplots(figsize=(width, height), dpi=150)
    per_inch = 1e3 * (end - begin) / (0.86 * width)  # ms
    ticks, labels = [], []
    for row, (rank, own) in enumerate(stages.items()):
        # work is drawn over it
        axes.broken_barh([(0, 1e3 * (end - begin))], (row - 0.42, 0.84), color=BUBBLE, linewidth=0)
        for event in (e for e in events if e.pp_rank == rank):
            lane_height = 0.84 / len(own)
            bottom = row - 0.42 + own.index(event.stage) * lane_height
            left, length = 1e3 * (event.start_s - begin), 1e3 * (event.end_s - event.start_s)
            if len(own) > 1:  # the other lanes are not idle meanwhile: the rank is busy here
                axes.broken_barh([(left, length)], (row - 0.42, 0.84), color="#eeeeee", linewidth=0)
            axes.broken_barh(
                [(left, length)],
                (bottom, lane_height),
                color=COLORS[event.kind],
                edgecolor=EDGE,
                linewidth=0.6,
            )
            text = str(event.microbatch)
            if length > per_inch * 0.09 * len(text):
                axes.text(
                    left + length / 2,
                    bottom + lane_height / 2,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if event.kind == "W" else "white",
                )
        for lane, stage in enumerate(own):
            ticks.append(row - 0.42 + (lane + 0.5) * 0.84 / len(own))
            labels.append(f"rank {rank}, stage {stage}")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("milliseconds", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"{name + ': ' if name else ''}{len(stages)} ranks, {n_micros} microbatches, "
        f"{bubble_share(events):.0%} of the time bubbles",
        fontsize=10,
        loc="left",
    )
    shown = [kind for kind in KINDS if any(e.kind == kind for e in events)]
    handles = [Patch(color=COLORS[kind], label=KINDS[kind]) for kind in shown] + [
        Patch(color=BUBBLE, label="bubble")
    ]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.32 / height, 1, 1))
    figure.savefig(path)
    plt.close(figure)
