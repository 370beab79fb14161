"""Losses are read while the device computes the next step; what is stopped, saved and refused is what it was
before."""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pool import run_on
from recipe import Ended, metrics, pretrain_flags, recipe, run_here

from dtensor_llama import UsageError
from dtensor_llama import metrics as of_a_run
from dtensor_llama.metrics import LateReader, SkippedSteps

TIMES = ("step_seconds", "tokens_per_second", "mfu", "hfu", "device_memory_gib", "host_memory_gib")


def test_the_newest_step_is_left_for_the_next_turn_unless_somebody_has_to_know():
    reading = LateReader(torch.device("cpu"), late=True)
    taken = []
    for step, everything in ((1, False), (2, False), (3, True), (4, False), (5, True)):
        reading.begin()
        reading.put({"step": step}, torch.tensor(float(step)), torch.tensor(0.5))
        taken.append([(row["step"], row["loss"], row["grad_norm"]) for row in reading.take(all=everything)])
    rows = [[], [1], [2, 3], [], [4, 5]]
    assert taken == [[(step, float(step), 0.5) for step in steps] for steps in rows]


def test_what_comes_between_two_steps_counts_for_neither(monkeypatch):
    # begin, end; after a validation: begin, end, end of the step that follows
    clock = iter([0.0, 1.0, 7.0, 9.0, 12.0])
    monkeypatch.setattr(of_a_run.time, "perf_counter", lambda: next(clock))
    reading, seconds = LateReader(torch.device("cpu"), late=True), []
    for everything in (True, False, True):
        reading.begin()
        reading.put({}, torch.tensor(1.0), torch.tensor(1.0))
        seconds += [row["step_seconds"] for row in reading.take(all=everything)]
    assert seconds == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_or_norm_that_is_no_number_is_refused_by_name_and_step(name, value):
    row = {"step": 7, "loss": 1.0, "grad_norm": 1.0}
    assert SkippedSteps(0).judge(row) == row
    with pytest.raises(
        UsageError, match=f"{name.replace('grad_norm', 'gradient norm')} of step 7 is {value}"
    ):
        SkippedSteps(0).judge(row | {name: value})


def test_as_many_steps_in_a_row_as_allowed_are_left_out_and_the_rows_stay_json():
    steps, good = SkippedSteps(2), {"step": 1, "loss": 1.0, "grad_norm": 1.0}
    bad = good | {"loss": float("inf"), "grad_norm": float("nan")}
    rows = [steps.judge(row) for row in (bad, bad, good, bad, bad)]  # the good one begins a new count
    assert [row.get("skipped_steps") for row in rows] == [1, 2, None, 3, 4]
    assert json.loads(json.dumps(rows[0], allow_nan=False)) == {
        **good,
        "loss": None,
        "grad_norm": None,
        "skipped_steps": 1,
    }
    with pytest.raises(UsageError, match="after 2 others in a row.*skip_nonfinite=3"):
        steps.judge(bad)


def as_on_a_gpu(name: str, flags: list[str], stop_at_step: int | None = None) -> Ended:
    """A recipe that reads losses late, in a worker of the pool."""
    own = LateReader.__init__
    LateReader.__init__ = functools.partialmethod(own, late=True)
    try:
        return run_here(name, flags, stop_at_step, "")
    finally:
        LateReader.__init__ = own


def late(name: str, *flags, **how) -> Ended:
    return run_on(1, as_on_a_gpu, name, [str(flag) for flag in flags], *how.values(), group=False)[0]


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_rows_and_checkpoints_of_a_run_are_those_of_one_that_reads_at_once(inputs, reference, tmp_path):
    ended = late("pretrain", *pretrain_flags(inputs, tmp_path / "late", "--data.document-mask"))
    assert ended.status == 0, ended
    assert without_times(metrics(tmp_path / "late")) == without_times(metrics(reference))
    kept = [
        sorted(path.name for path in (run / "checkpoints").iterdir())
        for run in (tmp_path / "late", reference)
    ]
    assert kept[0] == kept[1]


def test_a_stopped_run_has_read_every_step_that_it_saved_and_goes_on_bit_for_bit(inputs, reference, tmp_path):
    flags = pretrain_flags(inputs, tmp_path / "late", "--data.document-mask", "--checkpoint.every", 100)
    assert late("pretrain", *flags, stop_at_step=3).status == 0
    (saved,) = (tmp_path / "late" / "checkpoints").iterdir()
    rows = metrics(tmp_path / "late")
    assert saved.name == f"step-{len(rows):08d}" and 3 <= len(rows) < 8
    assert late("pretrain", *flags).status == 0
    assert without_times(metrics(tmp_path / "late")) == without_times(metrics(reference))


def weights_without_a_norm(inputs: Path, folder: Path) -> Path:
    """A model whose weights are so small that its loss is a number and its gradient norm is none."""
    shutil.copytree(inputs / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"initializer_range": 1e-30, "rms_norm_eps": 1e-38}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MIXED = [
    "--memory.placement",
    "static",
    "--memory.resident",
    0.4,
    "--memory.stream",
    0.3,
    "--memory.cpu",
    0.3,
    "--memory.kernel",
    "blocks",
]


@pytest.mark.parametrize("reads_late", [False, True])
@pytest.mark.parametrize("memory", [[], MIXED], ids=["adamw", "manager"])
def test_a_run_whose_gradient_is_not_finite_ends_with_one_line_and_saves_nothing(
    inputs, tmp_path, reads_late, memory
):
    model = weights_without_a_norm(inputs, tmp_path / "model")
    flags = pretrain_flags(inputs, tmp_path / "run", "--model", model, "--checkpoint.every", 1, *memory)
    ended = (late if reads_late else recipe)("pretrain", *flags)
    assert ended.status == 2 and "the gradient norm of step 1 is nan" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(Path(tmp_path, "run", "checkpoints").iterdir()) and not (tmp_path / "run" / "hf").exists()
    assert metrics(tmp_path / "run") == []


def test_as_many_bad_steps_as_allowed_are_left_out_by_a_run(inputs, tmp_path):
    model = weights_without_a_norm(inputs, tmp_path / "model")
    flags = pretrain_flags(
        inputs, tmp_path / "run", "--model", model, "--train.skip-nonfinite", 3, "--checkpoint.every", 0
    )
    ended = recipe("pretrain", *flags)
    assert ended.status == 2 and "step 4 is nan after 3 others in a row" in ended.err
    rows = metrics(tmp_path / "run")
    assert [(row["step"], row["grad_norm"], row["skipped_steps"]) for row in rows] == [
        (1, None, 1),
        (2, None, 2),
        (3, None, 3),
    ]
    # of 400 tokens none is likelier: no step
    assert [row["loss"] for row in rows] == pytest.approx([math.log(400)] * 3)


def test_bad_steps_in_a_row_are_counted_over_a_resumption(inputs, tmp_path):
    model = weights_without_a_norm(inputs, tmp_path / "model")
    more = "--model", model, "--train.skip-nonfinite", 3, "--checkpoint.every", 1, "--train.min-lr", 0.01
    assert recipe("pretrain", *pretrain_flags(inputs, tmp_path / "run", *more, steps=2)).status == 0
    ended = recipe("pretrain", *pretrain_flags(inputs, tmp_path / "run", *more, steps=8), ranks=2)
    assert ended.status == 2 and "step 4 is nan after 3 others in a row" in ended.err, ended
    assert [row["skipped_steps"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
