"""The house stands as its documents describe it: imports, budgets, words, formulas and tables."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import budgets
import pytest
from recipe import ROOT

from dtensor_llama import LlamaConfig
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token
from dtensor_llama.metrics import RunLog, draw_loss_curve, read_metrics
from dtensor_llama.schedule import cosine_lr
from parallel import ParallelConfig

PACKAGES = ("dtensor_llama", "memory", "parallel")
ALLOWED = {
    "dtensor_llama": {"dtensor_llama"},
    "parallel": {"parallel", "dtensor_llama"},
    "memory": {"memory", "dtensor_llama"},
}
COMPOSES = ("parallel/assemble.py", "parallel/booster.py")  # the only files of parallel/ that import memory
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))


# ---- What the tests below count ----------------------------------------------------------------------------


def source_files(*folders: str) -> list[str]:
    """Return the Python files below the folders, as paths from the root with slashes."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@cache
def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def lines_of(file: str) -> list[str]:
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


def docstrings(file: str) -> list[ast.Constant]:
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(parse(file)) if isinstance(node, with_docstring)]
    return [node.body[0].value for node in nodes if ast.get_docstring(node)]


def count_nodes(file: str) -> int:
    """Return the nodes of a file's syntax tree, the same number under every Python.

    A docstring is two nodes, an expression and a constant. Python 3.12.1 ends a format such as
    {cell:>{width}} with an empty constant, and 3.11 does not (python/cpython#110309)."""
    nodes = list(ast.walk(parse(file)))
    parts = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values]
    empty = [part for part in parts if isinstance(part, ast.Constant) and part.value == ""]
    return len(nodes) - len(empty) - 2 * len(docstrings(file))


def imported_names(file: str) -> list[str]:
    names = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def matches(pattern: str, *folders: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return file:line of each line below the folders that has the pattern."""
    found = []
    for file in source_files(*folders):
        if file not in leave_out:
            lines = enumerate(lines_of(file), 1)
            found += [
                f"{file}:{number}: {line.strip()}" for number, line in lines if re.search(pattern, line)
            ]
    return found


def hold(budget: budgets.Budget, n: int, what: str) -> None:
    """Fail where a number has grown above its budget, or has shrunk so far that the budget should follow."""
    assert n <= budget.now, f"{what}: {n:,}, and the budget is {budget.now:,} (the aim is {budget.aim:,})"
    slack = max(budget.now // 20, 5)
    assert budget.now <= budget.aim or n >= budget.now - slack, (
        f"{what}: {n:,} is well below the {budget.now:,} of tests/budgets.py; lower `now` there"
    )


# ---- Imports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    for file in source_files(package):
        allowed = ALLOWED[package] | ({"memory"} if file in COMPOSES else set())
        for name in imported_names(file):
            root = name.split(".")[0]
            assert root not in (*PACKAGES, "recipes") or root in allowed, f"{file} imports {name}"


def test_recipes_import_installed_packages_only():
    for recipe in RECIPES:
        file = f"recipes/{recipe}"
        neighbours = {name.removesuffix(".py") for name in RECIPES} | {"recipes"}
        found = [name for name in imported_names(file) if name.split(".")[0] in neighbours]
        assert not found, f"{file} imports {found}, which is not there when the file is copied"
        assert "sys.path" not in (ROOT / file).read_text(), f"{file} changes sys.path"


RUN_COPIES = """
import os, runpy, sys
import torch.distributed.tensor, tyro, dtensor_llama, memory, parallel     # imported once for all recipes
failed = []
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.chdir(os.path.dirname(path))
        sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
        sys.stdout = open(os.devnull, "w")
        runpy.run_path(path, run_name="__main__")
        os._exit(3)                                                        # --help raises SystemExit before
    failed += [path] * (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
sys.exit(f"no --help from {failed}" if failed else 0)
"""


def test_each_recipe_runs_from_an_empty_folder(tmp_path):
    copies = []
    for recipe in RECIPES:
        copy = tmp_path / recipe.removesuffix(".py") / recipe
        copy.parent.mkdir()
        copy.write_bytes((ROOT / "recipes" / recipe).read_bytes())
        copies.append(str(copy))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN_COPIES, *copies]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert ended.returncode == 0, ended.stderr


def test_the_backward_pass_is_in_the_recipes():
    """Only the Booster calls `.backward()` for its user; torch's pipeline schedules do it inside torch."""
    for file in source_files(*PACKAGES):
        calls = [
            node.lineno
            for node in ast.walk(parse(file))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "backward"
        ]
        assert not calls or file == "parallel/booster.py", f"{file} calls .backward() in lines {calls}"


# ---- Budgets: tests/budgets.py -----------------------------------------------------------------------------


@pytest.mark.parametrize("room", budgets.NODES)
def test_a_room_keeps_its_budget_of_syntax_nodes(room):
    if room == "the spine":
        n = sum(map(count_nodes, budgets.SPINE))
    elif room == "the spine and what is beside it":
        n = sum(map(count_nodes, budgets.SPINE + budgets.BESIDE_THE_SPINE))
    elif room == "dtensor_llama and parallel":
        files = source_files("dtensor_llama", "parallel")
        n = sum(count_nodes(file) for file in files if not file.startswith(budgets.NOT_COUNTED))
    elif room == "memory":
        n = sum(map(count_nodes, source_files("memory")))
    elif room == "a lesson":
        n = max(map(count_nodes, source_files("recipes/lessons")))
    else:
        n = count_nodes(room)
    hold(budgets.NODES[room], n, room)


def test_every_recipe_has_a_budget():
    assert {f"recipes/{name}" for name in RECIPES} <= set(budgets.NODES)
    assert all((ROOT / file).exists() for file in budgets.SPINE + budgets.BESIDE_THE_SPINE)


@pytest.mark.parametrize("folder", [*PACKAGES, "recipes"])
def test_code_is_not_squeezed(folder):
    files = source_files(folder)
    n_nodes, n_lines = sum(map(count_nodes, files)), sum(len(lines_of(file)) for file in files)
    assert n_nodes <= budgets.DENSITY * n_lines, f"{folder}: {n_nodes / n_lines:.1f} nodes a line"


def test_no_line_is_longer_than_a_screen_is_wide():
    long = matches(rf"^.{{{budgets.COLUMNS + 1},}}", *PACKAGES, "recipes", "docs")
    hold(budgets.LONG_LINES, len(long), "\n".join([*long, f"lines of more than {budgets.COLUMNS} columns"]))


def test_functions_have_few_parameters():
    found = set()
    for file in source_files(*PACKAGES, "recipes"):
        for node in ast.walk(parse(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [arg.arg for arg in [*own, node.args.vararg, node.args.kwarg] if arg]
                names = [name for name in names if name not in ("self", "cls", "ctx")]
                if len(names) > budgets.PARAMETERS:
                    found.add((file, node.name))
    assert found == budgets.KERNELS | budgets.MANY_PARAMETERS


@pytest.mark.parametrize("recipe", budgets.EXPLAINED)
def test_a_recipe_explains_itself(recipe):
    explained = set()
    for token in tokenize.generate_tokens(iter([f"{line}\n" for line in lines_of(recipe)] + [""]).__next__):
        if token.type == tokenize.COMMENT:
            explained.add(token.start[0])
    for docstring in docstrings(recipe):
        explained |= set(range(docstring.lineno, docstring.end_lineno + 1))
    assert len(explained) >= budgets.EXPLAINED[recipe] * len(lines_of(recipe))


# ---- Words -------------------------------------------------------------------------------------------------


def test_docstrings_are_sentences():
    found = []
    for file in source_files(*PACKAGES, "recipes", "docs"):
        for docstring in docstrings(file):
            if docstring.value.split()[0].strip(",.:;`*") in budgets.VERBLESS:
                found.append(f"{file}:{docstring.lineno}: {docstring.value.splitlines()[0]}")
    hold(budgets.VERBLESS_DOCSTRINGS, len(found), "\n".join([*found, "docstrings without a verb"]))


def test_packages_know_no_flags():
    """A package names the field, as in `tp=3`; run_recipe turns fields into the flags of its recipe."""
    flag = r"--(data|train|parallel|memory|checkpoint|lora)\.[a-z]|--model\b|--run-dir\b"
    found = matches(flag, *PACKAGES, leave_out=("dtensor_llama/cli.py",))
    hold(budgets.FLAGS_IN_PACKAGES, len(found), "\n".join([*found, "lines that name a flag"]))


def test_microbatch_is_one_word():
    """The flag --train.micro-batch-size and its field keep their names; everything else says microbatch."""
    other = r"micro-batch(?!-size)|micro_batch(?!_size)|\bn_?micro\b|\b(n_)?micros\b"
    found = matches(rf"(?i){other}", *PACKAGES, "recipes")
    hold(budgets.OTHER_MICROBATCHES, len(found), "\n".join([*found, "other spellings of microbatch"]))


# ---- Documents, formulas and tables ------------------------------------------------------------------------


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
        ({"dp_shard": 4}, 2, "dp_shard=4, which needs exactly 4"),
        ({"tp": 3}, 4, "tp=3, which needs a multiple of 3"),
        ({"tp": 0}, 1, "tp=0 is not possible"),
        ({"tp": -1}, 4, "several axes are -1: dp_shard, tp"),
        ({"dp_shard": 1}, 2, "a mesh of size 1, which needs exactly 1"),
    ],
)
def test_a_layout_that_does_not_fit_the_processes_is_refused(sizes, world, said):
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**sizes).resolve(world)


DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def test_the_map_is_of_this_source():
    written = runpy.run_path(str(ROOT / "docs" / "make_map.py"))["make_map"]()
    assert (ROOT / "docs" / "map.md").read_text(encoding="utf-8") == written, (
        "docs/map.md is stale: run make map"
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_link_only_to_files_that_exist(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([\w./-]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


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
