"""A picture of one step from measured times: what the device computes, what is moved, and what each Adam
steps."""

from collections.abc import Sequence
from pathlib import Path

from dtensor_llama.gantt import Bar, Row, busy_seconds, draw_gantt
from memory.lanes import Event

LANES = {  # lane: (colour, label)
    "compute": ("#4c78a8", "compute"),
    "d2h": ("#b279a2", "to the host"),
    "h2d": ("#f58518", "to the device"),
    "host adam": ("#54a24b", "host Adam"),
    "device adam": ("#2f9c95", "device Adam"),
}


def draw_timeline(events: Sequence[Event], path: str | Path, title: str = "one step") -> None:
    """Write a PNG with a row per lane in the order of LANES, a bar per event, and how busy each lane was.

    An event's name is written into its bar where there is room, or else its last word. Events of one lane
    that overlap share its height. ValueError if there are no events, KeyError if a lane is unknown.
    """
    length_s = max(end for *_, end in events) - min(start for _, _, start, _ in events)
    of_lane = {lane: [] for lane in LANES}
    for event in sorted(events, key=lambda event: event[2]):
        of_lane[event[1]].append(event)
    rows = []
    for lane, (color, label) in LANES.items():
        own = of_lane[lane]
        bars, free_from = [], []  # when each level of the row is free again
        for name, _, start, end in own:
            level = next((i for i, free in enumerate(free_from) if free <= start + 1e-12), len(free_from))
            free_from[level : level + 1] = [end]
            bars.append(Bar(start, end, color, (name, name.rpartition(" ")[2]), level))
        busy_s = busy_seconds((start, end) for _, _, start, end in own)
        share = busy_s / max(length_s, 1e-9)
        rows.append(Row([f"{label}\n{_in_words(busy_s)}, {share:.0%}"], bars, max(1, len(free_from))))
    draw_gantt(rows, path, f"{title}: {_in_words(length_s)}", width=14.0)


def _in_words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 10 else f"{1e3 * seconds:.3g} ms"
