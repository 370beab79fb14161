"""The house stands as the README draws it: import arrows, numbers in docs' formulas, schedule and log as
tables."""

import ast
import json
from pathlib import Path

import pytest
from recipe import ROOT

from dtensor_llama import LlamaConfig
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token
from dtensor_llama.metrics import RunLog, draw_loss_curve, read_metrics
from dtensor_llama.schedule import cosine_lr
from parallel import ParallelConfig

ALLOWED = {
    "dtensor_llama": {"dtensor_llama"},
    "parallel": {"parallel", "dtensor_llama"},
    "memory": {"memory", "dtensor_llama"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    ours = {"dtensor_llama", "parallel", "memory", "recipes"}
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                root = name.split(".")[0]
                assert root not in ours or root in ALLOWED[package], (
                    f"{file.relative_to(ROOT)} imports {name}"
                )


def test_the_library_reads_no_environment_and_asks_for_no_accelerator_by_name():
    for file in [*(ROOT / "dtensor_llama").glob("*.py"), *(ROOT / "parallel").glob("*.py")]:
        if file.name not in ("cli.py",):  # the door of a recipe
            assert "os.environ" not in file.read_text(), file


def test_cosine_schedule_as_a_table():
    rates = [cosine_lr(step, steps=6, warmup_steps=2, peak_lr=1.0, min_lr=0.1) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.775, 0.325, 0.1])
    assert cosine_lr(0, steps=1, warmup_steps=0, peak_lr=1.0, min_lr=0.1) == 1.0


def test_flops_of_llama2_7b():
    config = LlamaConfig.preset("llama2-7b")
    n = 6_738_415_616  # published size
    assert config.n_parameters == n
    assert model_flops_per_token(config, 4096, "6n") == 6 * n
    full = 6 * (n - 32000 * 4096) + 12 * 32 * 4096 * 4096
    assert model_flops_per_token(config, 4096) == full
    assert model_flops_per_token(config, 4096, "causal") == full - 6 * 32 * 4096 * 4096
    assert hardware_flops_per_token(config, 4096, "none") == full
    assert hardware_flops_per_token(config, 4096, "full") == pytest.approx(full * 4 / 3, rel=0.01)
    tied = LlamaConfig.preset("tiny-5m")  # its one matrix is multiplied once, as the head
    assert model_flops_per_token(tied, 1) == pytest.approx(6 * tied.n_parameters, rel=0.01)


def test_a_resumed_log_has_one_row_per_step_and_draws_its_curve(tmp_path):
    def row(step):
        return {
            "step": step,
            "loss": 3.0 / step,
            "tokens": step * 10,
            "tokens_per_second": 1.0,
            "step_seconds": 0.1,
        }

    log = RunLog(tmp_path, 0, 6)
    for step in (1, 2, 3, 4):
        log.step(row(step))
    log.close()
    again = RunLog(tmp_path, 2, 6)  # the checkpoint was of step 2
    again.step(row(3) | {"validation_loss": 1.5})
    again.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    draw_loss_curve(again.rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "sizes,world,resolved",
    [
        ({}, 6, (1, 1, 6, 1, 1)),
        ({"tp": 2}, 6, (1, 1, 3, 1, 2)),
        ({"dp_replicate": 2, "dp_shard": 2}, 4, (1, 2, 2, 1, 1)),
        ({"pp": 2, "cp": 2, "tp": 2, "dp_shard": 1, "dp_replicate": -1}, 16, (2, 2, 1, 2, 2)),
    ],
)
def test_one_axis_may_be_what_is_left_over(sizes, world, resolved):
    layout = ParallelConfig(**sizes).resolve(world)
    assert (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp) == resolved


@pytest.mark.parametrize(
    "sizes,world,said",
    [
        ({"dp_shard": 4}, 2, "dp_shard=4"),
        ({"tp": 3}, 4, "tp=3"),
        ({"tp": 0}, 1, "tp=0"),
        ({"tp": -1}, 4, "several axes are -1: dp_shard, tp"),
        ({"dp_shard": 1}, 2, "a mesh of size 1, which needs exactly 1"),
    ],
)
def test_a_layout_that_does_not_fit_the_processes_is_refused(sizes, world, said):
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**sizes).resolve(world)


def test_docs_name_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for target in __import__("re").findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / target).exists(), target


def test_constraints_pin_what_pyproject_asks_for():
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [
        d.split(">")[0].split("[")[0].strip()
        for d in wanted["dependencies"] + wanted["optional-dependencies"]["dev"]
    ]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.lower() for name in names} <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
    assert json.dumps(sorted(pinned)).count("/") == 0
    assert Path(ROOT / "LICENSE").read_text().strip().startswith("Apache License")
