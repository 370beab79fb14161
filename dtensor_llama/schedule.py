"""The learning rate as a function of the step: linear warm-up, then a cosine down to a floor
(arXiv:2307.09288, sec. 2.2)."""

import math
from typing import Any, NamedTuple

from dtensor_llama.errors import UsageError


class Schedule(NamedTuple):
    """Holds the settings of the learning rate. Any object with these four fields can take its place."""

    steps: int  # optimizer steps of the whole run
    lr: float  # the peak
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps, at most LLaMA-2's 2,000

    @classmethod
    def named(cls, settings: dict[str, Any]) -> "Schedule":
        """Take the four fields from settings by the end of their names: min_lr from "train.min-lr"."""
        by_field = {name.rpartition(".")[2].replace("-", "_"): value for name, value in settings.items()}
        return cls(*(by_field[field] for field in cls._fields))


def check_schedule(schedule: Schedule) -> None:
    """Raise UsageError if the cosine would end above its peak; takes what learning_rate takes."""
    min_lr, lr = schedule.min_lr, schedule.lr
    if min_lr is not None and lr is not None and min_lr > lr:
        raise UsageError(f"min_lr={min_lr} is above lr={lr}; the cosine ends at the lower.")


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the learning rate of step `step` in 0 .. steps - 1."""
    warmup_steps, min_lr = schedule.warmup_steps, schedule.min_lr
    if warmup_steps is None:
        warmup_steps = min(2000, schedule.steps // 50)
    if min_lr is None:
        min_lr = schedule.lr / 10
    return cosine_lr(step, schedule.steps, warmup_steps, schedule.lr, min_lr)


def cosine_lr(step: int, steps: int, warmup_steps: int, peak_lr: float, min_lr: float) -> float:
    """Return the rate of one step: it rises to peak_lr over warmup_steps, and ends at min_lr."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Return whether something that happens every so many steps, and after the last one, is due now.

    every: 0 means never."""
    return every > 0 and (step % every == 0 or is_last)
