"""Each change that docs/change.md describes costs as few files as it says, and works: it is made and trained.

The changes are patches in tests/patches, applied to a copy of the packages and recipes. To renew one after
the source around it has changed, apply it with `patch -p1`, mend what is rejected, and save the difference.
"""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import ROOT, metrics, pretrain_flags
from safetensors.torch import load_file
from torch.testing import assert_close

from parallel.config import AXES

PATCHES = ROOT / "tests" / "patches"
FILES = {  # patch -> the files that it may change
    "token_loss": ["recipes/pretrain.py"],
    "rope_scaling": ["dtensor_llama/families.py", "dtensor_llama/model.py"],
    "biases": ["dtensor_llama/config.py", "dtensor_llama/families.py", "dtensor_llama/model.py"],
}

# Runs scripts on several processes, which are forks of one that has paid for the imports of torch.
RUN_SCRIPTS = """
import json, os, runpy, socket, sys
import tokenizers, torch.distributed.checkpoint, torch.distributed.tensor, tyro
failed = []
for n_ranks, argv in json.loads(sys.argv[1]):
    children = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(n_ranks):
        children.append(os.fork())
        if children[-1] == 0:
            launch = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n_ranks, LOCAL_WORLD_SIZE=n_ranks)
            launch |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in launch.items()})
            sys.argv = argv
            torch.set_num_threads(1)
            runpy.run_path(argv[0], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
    failed += [argv[0] for child in children if os.waitpid(child, 0)[1] != 0]
sys.exit(f"failed: {failed}" if failed else 0)
"""


def patched(name: str, folder: Path) -> Path:
    """Return a copy of the source with a patch applied; the patch may change the files of FILES only."""
    patch = PATCHES / f"{name}.patch"
    changed = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), flags=re.M)
    assert sorted(changed) == FILES[name]
    for room in ("dtensor_llama", "memory", "parallel", "recipes"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(patch)]
    applied = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert applied.returncode == 0, f"{patch.name} does not apply any more:\n{applied.stderr}"
    return folder


def run_scripts(source: Path, *jobs: tuple[int, list]) -> str:
    """Run each (ranks, [script, flags ...]) against the packages in `source`; return what was printed."""
    jobs = [(ranks, [str(word) for word in argv]) for ranks, argv in jobs]
    path = os.pathsep.join([str(source), str(ROOT / "tests")])
    ended = subprocess.run(
        [sys.executable, "-c", RUN_SCRIPTS, json.dumps(jobs)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def train_two_steps(source: Path, inputs: Path, folder: Path, *more) -> list:
    """Return [script, flags ...] of two steps of pretraining in float32; the run folder is `folder`."""
    return [source / "recipes" / "pretrain.py", *pretrain_flags(inputs, folder, *more, steps=2)]


def model_folder(inputs: Path, folder: Path, **fields) -> Path:
    """Return a copy of the tiny model's folder with other fields in its config.json; only that is used."""
    shutil.copytree(inputs / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir)]


def test_another_token_loss_is_one_function(tmp_path, inputs):
    """The z-loss is 0.01 log(Z)^2 beside the cross-entropy: 0.36 for nearly uniform logits of 400 tokens."""
    added = re.findall(r"^\+ *(def|class) ", (PATCHES / "token_loss.patch").read_text(), flags=re.M)
    assert added == ["def"]
    source = patched("token_loss", tmp_path / "source")
    one, two = tmp_path / "one", tmp_path / "two"
    run_scripts(
        source,
        (1, train_two_steps(source, inputs, one)),
        (2, train_two_steps(source, inputs, two, "--parallel.tp", 2)),
    )
    assert losses_of(one)[0] == pytest.approx(math.log(400) + 0.01 * math.log(400) ** 2, abs=0.05)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=2e-5)


def test_another_rope_scaling_is_two_files(tmp_path, inputs):
    """YaRN trains two steps, and what is exported has the logits of transformers."""
    source = patched("rope_scaling", tmp_path / "source")
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
    }
    model = model_folder(inputs, tmp_path / "model", rope_parameters=yarn)
    run_scripts(
        source,
        (1, train_two_steps(source, inputs, tmp_path / "run", "--model", model)),
        (1, [PATCHES / "compare_with_transformers.py", tmp_path / "run" / "hf"]),
    )
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["rope_parameters"] == yarn


@pytest.mark.slow
def test_biases_on_all_of_attention_are_three_files(tmp_path, inputs):
    """Two ranks of tp end with the weights of one process, also where they share one key/value head."""
    source = patched("biases", tmp_path / "source")
    jobs, runs = [], {}
    for n_kv_heads in (2, 1):
        model = model_folder(
            inputs, tmp_path / f"model-{n_kv_heads}", attention_bias=True, num_key_value_heads=n_kv_heads
        )
        for tp in (1, 2):
            run = runs[n_kv_heads, tp] = tmp_path / f"run-{n_kv_heads}-{tp}"
            flags = train_two_steps(source, inputs, run, "--model", model, "--parallel.tp", tp)
            jobs.append((tp, flags))
    run_scripts(source, *jobs)
    for n_kv_heads in (2, 1):
        one, two = (load_file(runs[n_kv_heads, tp] / "hf" / "model.safetensors") for tp in (1, 2))
        biases = [name for name in one if name.endswith("_proj.bias")]
        assert len(biases) == 2 * 4
        assert all(one[name].abs().max() > 0 for name in biases), "a bias was not trained"
        for name, weight in one.items():
            assert_close(two[name], weight, rtol=0, atol=1e-5)


# ---- Another axis of the mesh ------------------------------------------------------------------------------

AXIS_FILES = 5  # that a new axis may change, the file of its own pass included
# Files that list mesh axes by hand, so that a new axis has to be added there. The aim is the first alone.
LISTS_AXES = {"parallel/config.py"}
# What an axis costs can be predicted and named once it exists: training needs no line of these.
PREDICTS_AXES = {"parallel/cost.py", "parallel/step_counter.py", "recipes/bench/published.py"}


def axes_named(node: ast.AST) -> set[str]:
    """Return the mesh axes that are named in an expression, as strings or as fields of a configuration."""
    names = {child.value for child in ast.walk(node) if isinstance(child, ast.Constant)}
    names |= {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    return {name for name in names if isinstance(name, str)} & set(AXES)


def lists_axes(file: Path) -> bool:
    """Whether a file has a tuple, list, set, dict or product in which three of the axes, or more, stand."""
    collections = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.BinOp)
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, collections)]
    return any(len(axes_named(node)) >= 3 for node in nodes)


def test_another_axis_is_five_files():
    """The lesson on all axes prints which files; no other file names the axes one by one."""
    lesson = (ROOT / "recipes" / "lessons" / "09_everything.py").read_text()
    places = re.findall(r'\("(\w+/\w+\.py)", "([^"]+)", "([^"]+)"\)', lesson)
    changed = {file for file, _, what in places if not what.startswith("nothing")}
    assert len(changed) + len({"its own pass"}) == AXIS_FILES
    for file, start, _ in places:
        assert any(line.startswith(start) for line in (ROOT / file).read_text().splitlines())
    found = set()
    for folder in ("dtensor_llama", "memory", "parallel", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            if "lessons" not in file.parts and lists_axes(file):
                found.add(file.relative_to(ROOT).as_posix())
    assert found - PREDICTS_AXES == LISTS_AXES
