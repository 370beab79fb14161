"""With --memory.* a recipe trains as without, and its states live elsewhere; impossible settings are
refused."""

import json

import pytest
from recipe import metrics, recipe
from recipe import pretrain_flags as flags
from test_bad_input import refused
from versions import needs_split_backward

STATIC = [
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


def assert_same_training(run_dir, reference):
    ours, theirs = metrics(run_dir), metrics(reference)
    for row, expected in zip(ours, theirs, strict=True):
        assert abs(row["loss"] - expected["loss"]) < 2e-5
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row.get("validation_loss") == pytest.approx(expected.get("validation_loss"), abs=2e-5)


@pytest.mark.parametrize(
    "ranks,more",
    [
        (1, []),
        (1, ["--parallel.zero-stage", 1]),
        pytest.param(2, [], marks=pytest.mark.slow),
        (2, ["--parallel.tp", 2, "--memory.activations"]),
        (2, ["--parallel.pp", 2, "--train.recompute", "full", "--memory.activations"]),
    ],
)
def test_placements_do_not_change_the_training(inputs, reference, tmp_path, ranks, more):
    ended = recipe(
        "pretrain", *flags(inputs, tmp_path / "run", "--data.document-mask", *STATIC, *more), ranks=ranks
    )
    assert ended.status == 0, ended
    assert_same_training(tmp_path / "run", reference)
    plan = ended.out[ended.out.index("memory plan, static") :]
    assert all(f"\n  {placement}" in plan for placement in ("resident", "stream", "cpu")), plan


@pytest.mark.parametrize(
    "more",
    [
        ["--parallel.zero-stage", 2],
        pytest.param(["--parallel.pp", 2, "--parallel.schedule", "zero-bubble"], marks=needs_split_backward),
    ],
)
def test_without_clipping_chunks_are_stepped_in_backward_and_the_training_is_the_same(inputs, tmp_path, more):
    unclipped = ["--train.max-grad-norm", "inf", "--train.micro-batch-size", 2]
    assert recipe("pretrain", *flags(inputs, tmp_path / "off", *unclipped)).status == 0
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", *unclipped, *STATIC, *more), ranks=2)
    assert ended.status == 0, ended
    assert_same_training(tmp_path / "run", tmp_path / "off")


def test_a_stopped_run_goes_on_bit_for_bit_and_then_without_the_manager(inputs, tmp_path):
    never = flags(inputs, tmp_path / "never", *STATIC)
    stopped = flags(inputs, tmp_path / "stopped", *STATIC)
    assert recipe("pretrain", *never, ranks=2).status == 0
    assert recipe("pretrain", *stopped, ranks=2, stop_at_step=4).status == 0
    first = len(metrics(tmp_path / "stopped"))
    assert 4 <= first < 8
    assert recipe("pretrain", *stopped, ranks=2).status == 0
    keys = ("step", "loss", "grad_norm", "validation_loss")
    assert [[row.get(key) for key in keys] for row in metrics(tmp_path / "stopped")] == [
        [row.get(key) for key in keys] for row in metrics(tmp_path / "never")
    ]
    # torch's AdamW takes over
    assert recipe("pretrain", *flags(inputs, tmp_path / "stopped", steps=10)).status == 0
    assert len(metrics(tmp_path / "stopped")) == 10


def test_auto_plans_after_the_warm_up_and_draws_a_step(inputs, reference, tmp_path):
    more = [
        "--data.document-mask",
        "--memory.placement",
        "auto",
        "--memory.kernel",
        "blocks",
        "--memory.draw",
    ]
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", *more), ranks=2)
    assert ended.status == 0, ended
    assert_same_training(tmp_path / "run", reference)
    assert "memory plan, auto: everything fits the device" in ended.out
    assert (tmp_path / "run" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_resumed_under_auto_has_the_plan_of_its_checkpoint_and_the_same_bits(inputs, tmp_path):
    more = ["--memory.placement", "auto", "--memory.kernel", "blocks", "--memory.device-budget-gib", 1]
    stopped = flags(inputs, tmp_path / "stopped", *more)
    assert recipe("pretrain", *stopped, ranks=2, stop_at_step=5).status == 0
    n_before = len(metrics(tmp_path / "stopped"))
    resumed = recipe("pretrain", *stopped, ranks=2)
    assert resumed.status == 0 and 5 <= n_before < 8, resumed
    assert (
        "with the plan of the checkpoint\nmemory plan, auto" in resumed.out
        and len(metrics(tmp_path / "stopped")) == 8
    )


@pytest.mark.parametrize(
    "more,said",
    [
        (
            ["--memory.placement", "static", "--memory.resident", 0.5],
            ["--memory.stream", "--memory.cpu", "sum to 1"],
        ),
        (
            [
                "--memory.placement",
                "static",
                "--memory.resident",
                0.5,
                "--memory.stream",
                0.2,
                "--memory.cpu",
                0.2,
            ],
            ["--memory.resident 0.5", "sum to 0.9", "--memory.cpu 0.3"],
        ),
        (["--memory.device-budget-gib", 40], ["--memory.device-budget-gib 40", "--memory.placement auto"]),
        (["--memory.placement", "auto", "--memory.device-budget-gib", 0], ["--memory.device-budget-gib 0"]),
        (["--memory.draw"], ["--memory.draw", "--memory.placement"]),
    ],
)
def test_impossible_settings(inputs, tmp_path, more, said):
    line = refused(*flags(inputs, tmp_path / "run"), *more)
    assert all(part in line for part in said), line


def test_a_budget_below_the_weights_is_refused_before_any_memory_is_taken(inputs, tmp_path):
    asked = ["--memory.placement", "auto", "--memory.device-budget-gib", 1e-6]
    ended = recipe("pretrain", *flags(inputs, tmp_path / "run", *asked))
    assert ended.status == 2 and "--memory.device-budget-gib" in ended.err and "Traceback" not in ended.err


def test_the_benchmark_draws_what_it_measured(tmp_path):
    ended = recipe(
        "benchmark",
        "--model",
        "tiny-1m",
        "--data.seq-len",
        32,
        "--train.global-batch-size",
        2,
        "--train.steps",
        4,
        "--train.dtype",
        "float32",
        *STATIC,
        "--memory.draw",
        "--run-dir",
        tmp_path / "run",
    )
    assert ended.status == 0, ended
    assert (tmp_path / "run" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "predicted step at least" in ended.out
        and json.loads(ended.out.splitlines()[-1])["memory"] == "static"
    )
