"""Gantt charts of measured or planned work, as a picture and as text: a row for each rank or lane, bars where
it works, and what is left over is idle time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

BUSY = "#eeeeee"  # behind a bar in a row of several lanes: the other lanes are not idle meanwhile
IDLE = "#f0f0f0"


class Bar(NamedTuple):
    """One piece of work. texts: the first that fits into the bar is written there."""

    start_s: float
    end_s: float
    color: str
    texts: tuple[str, ...] = ()
    lane: int = 0


class Row(NamedTuple):
    """The work of one rank, or of one part of a machine. labels: one per lane, or one for the whole row."""

    labels: Sequence[str]
    bars: Sequence[Bar]
    n_lanes: int = 1


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time in which at least one of the spans, each with its start and its end, is under way."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def text_row(
    spans: Sequence[tuple[str, float, float]], begin: float, end: float, n_cells: int, idle: str = "."
) -> str:
    """Return one row of a chart as text. Each cell shows the mark of the span (mark, start, end) that is
    under way in its middle, or `idle`."""
    cells = []
    for cell in range(n_cells):
        middle = begin + (cell + 0.5) * (end - begin) / n_cells
        cells.append(next((mark for mark, start, stop in spans if start <= middle < stop), idle))
    return "".join(cells)


def draw_gantt(
    rows: Sequence[Row],
    path: str | Path,
    title: str,
    width: float,
    idle: str = IDLE,
    legend: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG, `width` inches wide: the first row is at the top, and time begins with the first bar.

    idle: the colour of time without a bar. legend: colours by their meaning.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = list(chain.from_iterable(row.bars for row in rows))
    begin = min(bar.start_s for bar in bars)
    length_s = max(1e-9, max(bar.end_s for bar in bars) - begin)
    unit, per_s = ("milliseconds", 1e3) if length_s < 10 else ("seconds", 1.0)
    height = sum(max(0.72, 0.42 * row.n_lanes) for row in rows) + (1.7 if legend else 1.3)
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.subplots()
    per_inch = per_s * length_s / (0.82 * width)
    ticks, labels = [], []
    for at, row in enumerate(rows):
        top, lane_height = at - 0.4, 0.8 / row.n_lanes
        axes.broken_barh([(0, per_s * length_s)], (top, 0.8), color=idle, linewidth=0)
        for bar in row.bars:
            left, length = per_s * (bar.start_s - begin), per_s * (bar.end_s - bar.start_s)
            if row.n_lanes > 1:
                axes.broken_barh([(left, length)], (top, 0.8), color=BUSY, linewidth=0)
            lane_top = top + bar.lane * lane_height
            edge = 0.6 if length > 0.04 * per_inch else 0
            axes.broken_barh(
                [(left, length)], (lane_top, lane_height), color=bar.color, edgecolor="white", linewidth=edge
            )
            fitting = [text for text in bar.texts if length > per_inch * (0.075 * len(text) + 0.02)]
            if fitting and row.n_lanes <= 3:
                ink = "black" if sum(to_rgb(bar.color)) > 1.9 else "white"
                middle = left + length / 2, lane_top + lane_height / 2
                axes.text(*middle, fitting[0], ha="center", va="center", fontsize=8, color=ink)
        for i, label in enumerate(row.labels):
            ticks.append(top + (i + 0.5) * 0.8 / len(row.labels))
            labels.append(label)
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, per_s * length_s)
    axes.set_xlabel(unit, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    if legend:
        handles = [Patch(color=color, label=label) for label, color in legend.items()]
        figure.legend(handles=handles, loc="lower center", ncol=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.32 / height if legend else 0, 1, 1))
    figure.savefig(path)
