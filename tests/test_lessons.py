"""Each lesson runs as its reader would run it and proves its claim; with a bug put in, it does not."""

import contextlib
import gc
import io
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch.distributed as dist
from pool import run_on
from recipe import ROOT

FOLDER = ROOT / "recipes" / "lessons"
LESSONS = {  # name -> (ranks, a pattern that the output has besides the proof)
    "01_mesh": (4, r"P\(sum\) \(4, 4\) -> S\(0\) \(2, 4\):  1 reduce_scatter"),
    "02_data_parallel": (2, "the shares add up to .* the mean of the means would be .*: wrong"),
    "03_zero": (2, r"3    \(12 \+ 4\)/S \+ 2/L \+ 4/L  =  8\.75 "),
    "04_tensor_parallel": (2, r"down \(Shard\(dim=1\),\) -> \(Partial\(sum\),\) -> \(Replicate\(\),\)"),
    "05_sequence_parallel": (2, "sent 384 KiB: all-gather 192, reduce-scatter 192"),
    "06_ulysses": (2, r"all-to-all over cp: \(2, 4, 4, 8\) -> \(2, 8, 2, 8\)"),
    "07_ring_attention": (
        2,
        r"slices \[0, 3\]: 136 \+ 128 = 264\n  rank 1: slices \[1, 2\]: 136 \+ 128 = 264",
    ),
    "08_pipeline": (2, "F0 F1 B0 F2 B1 F3 B2 B3   kept 2 microbatches"),
    "09_everything": (4, "ring-attention over cp"),
    "10_offload": (
        2,
        r"all streamed     10\.00   12\.00      12\.00     12\.00   .*\nall on the CPU    4\.67   16\.00",
    ),
    "11_memory_timeline": (2, r"host adam   \|.*#.*\|"),
    "12_another_model": (2, r"in backward  sent 2 \+ 0: y agrees, not the gradients of x, ln_1, attn"),
}
# (lesson, a piece of its text, the text with a classic bug of this kind of parallelism)
WRONG = [
    ("02_data_parallel", "/ n_targets  # this", "/ own_targets / dp  # this"),  # the mean of the means
    ("03_zero", "grads[layer] += grad_w\n", "grads[layer].copy_(grad_w)\n"),  # the last microbatch only
    (
        "04_tensor_parallel",
        'return all_reduce(grad, "the partial sums of d x, one from each slice of up")',
        "return grad",
    ),
    # the gradient of the norm stays a partial sum
    ("05_sequence_parallel", "all_reduce(norm) if doors is SEQUENCE else norm", "norm"),
    ("06_ulysses", "dist.all_reduce(weight.grad)", "pass"),  # each rank saw other tokens
    ("07_ring_attention", "return hop(grad, -1)", "return grad"),  # gradients stay with the wrong rank
    ("08_pipeline", "targets.numel()  ", "targets[i].numel()  "),  # each microbatch has its own mean
    ("09_everything", "loss_i * training.layout.gradient_ranks", "loss_i"),  # FSDP averages gradients
    ("10_offload", "dist.all_reduce(squares)", "pass"),  # a norm per shard
    # the updated states never come home
    ("10_offload", 'self.states = [send(state, "out") for state in states]', "pass"),
    ("11_memory_timeline", "        if serial:\n", "        if True:\n"),  # no forward starts early
    # q, k and v are cut through
    ("12_another_model", 'if "c_attn" in name and packed:', 'if "c_attn" in name and not packed:'),
    (
        "12_another_model",
        'return all_reduce(grad, "backward")',
        "return grad",
    ),  # nothing before the split is right
]


def run_lesson(path: str) -> tuple[int, str, str]:
    """Run `python PATH` in a worker whose environment is that of torchrun.

    Returns the exit status, stdout, and stderr or what was raised.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [path]
    sys.path.insert(0, str(FOLDER))  # python puts a script's folder there
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    except Exception as error:
        status = 1
        print(f"{type(error).__name__}: {error}", file=err)
    finally:
        sys.argv = argv
        sys.path.remove(str(FOLDER))
        gc.unfreeze()  # lesson 3 freezes the objects that it finds
        gc.collect()
        if dist.is_initialized():  # an error: leave the group, so that a waiting peer fails too
            dist.destroy_process_group()
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_proves_what_it_says(name):
    ranks, shown = LESSONS[name]
    every = run_on(ranks, run_lesson, str(FOLDER / f"{name}.py"), group=False, timeout=180)
    assert [status for status, *_ in every] == [0] * ranks, every
    out = every[0][1]
    assert out.splitlines()[-1].startswith("proven: ")
    assert re.search(shown, out), out
    assert not any(other for _, other, _ in every[1:]), "only rank 0 prints"


@pytest.mark.parametrize("name,right,wrong", WRONG, ids=[name for name, *_ in WRONG])
def test_a_lesson_made_wrong_does_not_prove_it(tmp_path, name, right, wrong):
    text = (FOLDER / f"{name}.py").read_text()
    assert text.count(right) == 1
    (tmp_path / f"{name}.py").write_text(text.replace(right, wrong))
    every = run_on(LESSONS[name][0], run_lesson, str(tmp_path / f"{name}.py"), group=False, timeout=180)
    assert any("AssertionError" in err for _, _, err in every), every
    assert not any("proven: " in out for _, out, _ in every), every


@pytest.mark.parametrize("name", LESSONS)
def test_another_number_of_processes_is_refused_in_one_line(name):
    ((status, out, err),) = run_on(1, run_lesson, str(FOLDER / f"{name}.py"), group=False, timeout=180)
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"error: .* (2|4) processes and there is 1; launch it with torchrun --nproc-per-node (2|4) .*\n", err
    )


def test_torchrun_ends_with_status_0():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "recipes/lessons/04_tensor_parallel.py",
    ]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended
    assert "proven: an MLP cut over 2 ranks" in ended.stdout


def test_each_lesson_is_in_the_readme_and_its_launch_line_is_true():
    # tests/test_house.py holds how long a lesson may be.
    readme = (FOLDER / "README.md").read_text()
    assert sorted(path.stem for path in FOLDER.glob("[0-9]*.py")) == sorted(LESSONS)
    for name, (ranks, _) in LESSONS.items():
        text = (FOLDER / f"{name}.py").read_text()
        assert f"torchrun --nproc-per-node {ranks} recipes/lessons/{name}.py" in text
        assert f"{name}.py" in readme
    for target in re.findall(r"\]\(([\w./-]+)\)", readme):
        assert (FOLDER / target).exists(), target
