"""What the installed torch cannot do: the one place where tests are skipped by its version."""

import pytest
import torch

from parallel.pipeline import SCHEDULES

# The recipes refuse these schedules on torch 2.11; test_rules.py holds that refusal on every version.
needs_split_backward = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 cannot run backward in two halves through an autograd.Function, and our loss is one",
)


def marks_for(schedule: str | None) -> list[pytest.MarkDecorator]:
    """The marks of a test that runs a step with this --parallel.schedule."""
    return [needs_split_backward] if schedule in SCHEDULES and SCHEDULES[schedule].splits_backward else []
