"""One answer: every layout trains like one process. Losses, gradient norms and weights, in fp32, through
pretrain.py."""

import pytest
from recipe import metrics, recipe
from recipe import pretrain_flags as flags
from torch.testing import assert_close

# name -> (ranks, flags); test_one_answer.py has many more, without files and checkpoints around them
LAYOUTS = {
    "zero-0": (2, ["--parallel.zero-stage", 0]),
    "zero-1": (2, ["--parallel.zero-stage", 1]),
    "hsdp-2x2": (4, ["--parallel.dp-replicate", 2, "--parallel.dp-shard", 2]),
    "tp-2": (2, ["--parallel.tp", 2]),
    "tp-2-dp-2": (4, ["--parallel.tp", 2]),
    "cp-2-dp-2": (4, ["--parallel.cp", 2, "--parallel.cp-method", "ring"]),
    "pp-2": (2, ["--parallel.pp", 2]),
    "pp-2-tp-2": (4, ["--parallel.pp", 2, "--parallel.tp", 2]),
    "pp-2-cp-2-tp-2": (8, ["--parallel.pp", 2, "--parallel.cp", 2, "--parallel.tp", 2]),
}

# Each axis is a part of another layout, too, and the last one takes eight processes.
SLOW = ("zero-0", "tp-2", "pp-2", "pp-2-cp-2-tp-2")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS],
)
def test_a_layout_gives_the_answer_of_one_process(inputs, reference, tmp_path, layout):
    from test_pretrain import weights

    ranks, more = LAYOUTS[layout]
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", "--data.document-mask", *more), ranks=ranks)
    assert ended.status == 0, ended
    for ours, one_process in zip(metrics(tmp_path / "run"), metrics(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5
        assert abs(ours["grad_norm"] / one_process["grad_norm"] - 1) < 1e-4
    for name, weight in weights(tmp_path / "run").items():
        assert_close(weight, weights(reference)[name], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cp-2-dp-2", "pp-2-cp-2-tp-2"])
def test_one_document_a_sequence_needs_no_positions_on_any_stage(inputs, tmp_path, layout):
    ranks, more = LAYOUTS[layout]
    for name, n, flags_of in (("one", 1, []), ("many", ranks, more)):
        assert recipe("pretrain", *flags(inputs, tmp_path / name, *flags_of, steps=2), ranks=n).status == 0
    for ours, one_process in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5


@pytest.mark.parametrize(
    "first,second",
    [
        ("pp-2-tp-2", None),
        pytest.param(None, "pp-2-tp-2", marks=pytest.mark.slow),
        ("cp-2-dp-2", "pp-2"),
        ("tp-2-dp-2", "hsdp-2x2"),
        pytest.param("zero-0", "tp-2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_any_layout_resumes_under_any_other(inputs, reference, tmp_path, first, second):
    run_dir = tmp_path / "run"
    for layout, stop in ((first, 4), (second, None)):
        ranks, more = LAYOUTS[layout] if layout else (1, [])
        ended = recipe(
            "pretrain", *flags(inputs, run_dir, "--data.document-mask", *more), ranks=ranks, stop_at_step=stop
        )
        assert ended.status == 0, ended
    assert "resuming from" in ended.out
    for ours, one_process in zip(metrics(run_dir), metrics(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5


def test_the_schedule_of_a_measured_step_is_drawn(inputs, tmp_path):
    more = ["--parallel.pp", 2, "--parallel.draw-schedule"]
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", *more, steps=3), ranks=2)
    assert ended.status == 0 and "bubbles" in ended.out, ended
    assert (tmp_path / "run" / "schedule.png").read_bytes().startswith(b"\x89PNG")
