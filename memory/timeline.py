"""A picture of one step from measured times: what the device computes, what travels, what each Adam steps,
and when."""

from collections.abc import Sequence
from pathlib import Path

Event = tuple[str, str, float, float]  # name, lane, start and end in seconds

LANES = {
    "compute": "#4c78a8",
    "d2h": "#b279a2",
    "h2d": "#f58518",
    "host adam": "#54a24b",
    "device adam": "#2f9c95",
}
LABELS = {
    "compute": "compute",
    "d2h": "to the host",
    "h2d": "to the device",
    "host adam": "host Adam",
    "device adam": "device Adam",
}
IDLE = "#f0f0f0"


def busy_seconds(events: Sequence[Event], lane: str) -> float:
    """Time in which at least one event of the lane runs; they may overlap."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((start, end) for _, its_lane, start, end in events if its_lane == lane):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def draw_timeline(events: Sequence[Event], path: str | Path, title: str = "one step") -> None:
    """Write a PNG: a row per lane in LANES' order, a box per event, its name in it where there is room, and
    how busy each was.

    Where the name has no room, its last word is tried. Events of one lane that overlap share its height.
    Raises ValueError if there are no events or a lane is unknown.
    """
    if not events or (unknown := {lane for _, lane, _, _ in events} - LANES.keys()):
        raise ValueError(f"lanes {unknown} are none of {list(LANES)}" if events else "no events to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    begin, end = min(start for _, _, start, _ in events), max(end for *_, end in events)
    length_s = max(end - begin, 1e-9)
    unit, per_s = ("milliseconds", 1e3) if length_s < 10 else ("seconds", 1.0)
    width, height = 14.0, 0.72 * len(LANES) + 1.3
    per_inch = per_s * length_s / (0.80 * width)
    figure, axes = plt.subplots(figsize=(width, height), dpi=150)
    labels = []
    for row, (lane, color) in enumerate(LANES.items()):
        # events are drawn over it
        axes.broken_barh([(0, per_s * length_s)], (row - 0.38, 0.76), color=IDLE, linewidth=0)
        own = sorted((event for event in events if event[1] == lane), key=lambda event: event[2])
        levels = _levels(own)
        n_levels = max(levels, default=0) + 1
        for (name, _, start, stop), level in zip(own, levels, strict=True):
            left, length = per_s * (start - begin), per_s * (stop - start)
            bottom = row - 0.38 + level * 0.76 / n_levels
            axes.broken_barh(
                [(left, length)],
                (bottom, 0.76 / n_levels),
                facecolor=color,
                edgecolor="white",
                linewidth=0.5 if length > 0.04 * per_inch else 0,
            )
            for text in (name, name.rpartition(" ")[2]):
                if length > per_inch * (0.075 * len(text) + 0.06) and n_levels <= 3:
                    axes.text(
                        left + length / 2,
                        bottom + 0.38 / n_levels,
                        text,
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="white",
                    )
                    break
        busy = busy_seconds(events, lane)
        amount = f"{per_s * busy:.0f}" if per_s * busy >= 100 else f"{per_s * busy:.2g}"
        labels.append(f"{LABELS[lane]}\n{amount} {'ms' if per_s > 1 else 's'}, {busy / length_s:.0%}")
    axes.set_yticks(range(len(LANES)), labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.set_xlim(0, per_s * length_s)
    axes.set_xlabel(unit, fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{title}: {per_s * length_s:.4g} {unit}", fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _levels(events: Sequence[Event]) -> list[int]:
    """For each event, sorted by start: the lowest level that is free then."""
    free_from: list[float] = []
    levels = []
    for _, _, start, end in events:
        level = next((i for i, free in enumerate(free_from) if free <= start + 1e-12), len(free_from))
        free_from[level : level + 1] = [end]
        levels.append(level)
    return levels
