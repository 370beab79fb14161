"""A rank that dies or throws ends the whole job in seconds, its own error the last word; a run that trained
exits with 0."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from recipe import ROOT, metrics
from recipe import pretrain_flags as flags


def torchrun(arguments: list, ranks: int = 2, *options) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        *options,
        ROOT / "recipes/pretrain.py",
        *arguments,
    ]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, in rank order."""
    found = [
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if any("pretrain.py" in word for word in child.cmdline()) and "RANK" in child.environ()
    ]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def wait_for_rows(run_dir, rows: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < rows:
        if time.monotonic() > deadline or job.poll() is not None:
            job.kill()
            pytest.fail(f"no row {rows} in 90 s: {job.communicate()[0]}")
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_job_within_30_seconds(inputs, tmp_path, number):
    job = torchrun(flags(inputs, tmp_path / "run", steps=100_000))
    wait_for_rows(tmp_path / "run", 3, job)
    ranks_of(job)[1].send_signal(number)
    began = time.monotonic()
    said = job.communicate(timeout=40)[0]
    assert job.returncode != 0 and time.monotonic() - began < 30
    assert number.name in said[-1500:]  # torchrun's summary names the rank that failed first, and of what


@pytest.mark.slow
def test_elastic_restart_goes_on_from_the_newest_checkpoint(inputs, reference, tmp_path):
    run_dir = tmp_path / "run"
    job = torchrun(
        flags(inputs, run_dir, "--data.document-mask", "--checkpoint.every", 1, steps=8),
        2,
        "--max-restarts",
        2,
    )
    wait_for_rows(run_dir, 4, job)
    os.kill(ranks_of(job)[1].pid, signal.SIGKILL)
    said = job.communicate(timeout=90)[0]
    assert job.returncode == 0 and "resuming from" in said, said
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 9))
    for ours, one_process in zip(metrics(run_dir), metrics(reference), strict=True):
        assert abs(ours["loss"] - one_process["loss"]) < 2e-5


def test_ranks_whose_launcher_was_killed_write_a_checkpoint_and_leave_within_seconds(inputs, tmp_path):
    """As the kernel does when memory runs out. The folder is free again: the same command goes on."""
    run_dir = tmp_path / "run"
    job = torchrun(flags(inputs, run_dir, "--checkpoint.every", 100_000, steps=100_000))
    wait_for_rows(run_dir, 3, job)
    ranks = ranks_of(job)
    job.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    for rank in alive:
        rank.kill()
    assert len(gone) == 2 and not alive
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == f"step-{metrics(run_dir)[-1]['step']:08d}"
    said = job.communicate(timeout=30)[0]
    assert "the launcher is gone" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_run_that_trained_exits_with_0_every_time(inputs, tmp_path):
    for attempt in range(15):
        job = torchrun(flags(inputs, tmp_path / str(attempt), steps=2))
        said = job.communicate(timeout=90)[0]
        assert job.returncode == 0, said
