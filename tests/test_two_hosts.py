"""Two "hosts" on one machine, each a network namespace with one end of a virtual cable: a real rendezvous, a
real network.

They share the file system, as nodes of a cluster do. Needs root; skipped where namespaces are not allowed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pytest
from recipe import ROOT, metrics, recipe
from recipe import pretrain_flags as flags


class Host(NamedTuple):
    name: str  # of its namespace
    address: str

    def pids(self) -> list[int]:
        return list(map(int, ip("netns", "pids", self.name).split()))

    def ranks(self) -> list[psutil.Process]:
        """The training processes on this host."""
        found = [psutil.Process(pid) for pid in self.pids()]
        return [
            process
            for process in found
            if any("pretrain.py" in word for word in process.cmdline()) and "RANK" in process.environ()
        ]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two namespaces, eth0 of one wired to eth0 of the other; whatever happens, their processes and they are
    gone after."""
    both = [Host(f"dtensor-llama-{os.getpid()}-{i}", f"10.99.0.{i + 1}") for i in (0, 1)]
    try:
        for host in both:
            ip("netns", "add", host.name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            both[0].name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            both[1].name,
        )
        for host in both:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", host.name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(both)
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")
    yield both
    remove(both)


def remove(hosts: list[Host]) -> None:
    for host in hosts:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # it may not have come to exist
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip("netns", "delete", host.name)


def many_nodes(hosts: list[Host], arguments: list, restarts: int = 0) -> list[subprocess.Popen]:
    """recipes/launch/many_nodes.sh on each host, one process each. `is_host` and `local-addr` only because a
    namespace shares the machine's host name, by which torchrun would tell who it is."""
    jobs = []
    for host in hosts:
        command = [
            "ip",
            "netns",
            "exec",
            host.name,
            ROOT / "recipes/launch/many_nodes.sh",
            "pretrain",
            "own",
            "cpu",
            *arguments,
        ]
        settings = {
            "NNODES": 2,
            "GPUS_PER_NODE": 1,
            "HEAD": hosts[0].address,
            "MAX_RESTARTS": restarts,
            "PYTHON": sys.executable,
            "TORCHRUN_OPTIONS": f"--rdzv-conf is_host={int(host is hosts[0])} --local-addr {host.address}",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        jobs.append(
            subprocess.Popen(
                list(map(str, command)),
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return jobs


def wait_for_rows(run_dir, rows: int, jobs: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < rows:
        if time.monotonic() > deadline or any(job.poll() is not None for job in jobs):
            for job in jobs:
                job.kill()
            pytest.fail(f"no row {rows} in 90 s: {[job.communicate()[0] for job in jobs]}")
        time.sleep(0.02)


def losses(run_dir) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run_dir)]


def test_two_hosts_of_one_process_give_what_one_host_of_two_gives(hosts, inputs, tmp_path):
    assert recipe("pretrain", *flags(inputs, tmp_path / "one", steps=4), ranks=2).status == 0
    jobs = many_nodes(hosts, flags(inputs, tmp_path / "two", steps=4))
    said = [job.communicate(timeout=90)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_on_one_host_ends_the_job_on_both_within_30_seconds(hosts, inputs, tmp_path, victim):
    jobs = many_nodes(hosts, flags(inputs, tmp_path / "run", steps=100_000))
    wait_for_rows(tmp_path / "run", 3, jobs)
    hosts[victim].ranks()[0].kill()
    began = time.monotonic()
    said = [job.communicate(timeout=60)[0] for job in jobs]
    assert time.monotonic() - began < 30 and all(job.returncode != 0 for job in jobs), said
    assert "SIGKILL" in said[victim][-1500:]  # torchrun's summary on the host where it began


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_on_one_host_restarts_both_from_the_newest_checkpoint(
    hosts, inputs, reference, tmp_path, victim
):
    run_dir = tmp_path / "run"
    jobs = many_nodes(
        hosts, flags(inputs, run_dir, "--data.document-mask", "--checkpoint.every", 1), restarts=2
    )
    wait_for_rows(run_dir, 4, jobs)
    hosts[victim].ranks()[0].kill()
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and "resuming from" in said[0] + said[1], said
    for (step, loss, _), (its_step, its_loss, _) in zip(losses(run_dir), losses(reference), strict=True):
        assert step == its_step and abs(loss - its_loss) < 2e-5
