"""The learning rate as a function of the step: linear warm-up, then a cosine down to a floor
(arXiv:2307.09288, sec. 2.2)."""

import math


def cosine_lr(step: int, steps: int, warmup_steps: int, peak_lr: float, min_lr: float) -> float:
    """Learning rate of step `step` in 0 .. steps - 1: rises to peak_lr over warmup_steps, ends at min_lr."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
