"""The pool of workers keeps its promises: a dead, failing or hung rank fails its test in seconds, and the
next one runs."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import WORN_THREADS, RankFailed, run_on


def sum_of_ranks():
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    return os.getpid(), total.item()


def misbehave(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("it was me")
        os._exit(3) if how == "die" else time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    "how,said",
    [("raise", "rank 1.*it was me"), ("die", "rank 1: died"), ("hang", "rank 1 did not.*in misbehave")],
)
def test_a_bad_rank_fails_its_test_in_seconds_and_the_next_test_runs(how, said):
    run_on(2, sum_of_ranks)
    began = time.monotonic()
    with pytest.raises(RankFailed, match=f"(?s){said}"):
        run_on(2, misbehave, how, timeout=3)
    assert time.monotonic() - began < 8
    assert [total for _, total in run_on(2, sum_of_ranks)] == [3.0, 3.0]


def test_workers_are_reused():
    assert run_on(2, sum_of_ranks)[0][0] == run_on(2, sum_of_ranks)[0][0]


def graphs_made(length):
    """The sizes with which the compiler got the function's graph; a graph with dynamic shapes has a symbol
    there."""
    sizes = []

    def note(graph, inputs):
        sizes.append([str(size) for size in inputs if not isinstance(size, torch.Tensor)])
        return graph.forward

    torch.compile(plus_one, backend=note)(torch.zeros(length))
    return sizes


def plus_one(values):
    return values + 1


def test_a_rank_that_compiled_alone_compiles_as_its_peers_do():
    run_on(1, graphs_made, 3)
    assert run_on(2, graphs_made, 4) == [[[]], [[]]]


def redistribute_twice() -> None:
    # seconds: not for workers that other tests here time
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("one", "other"))
    for shard in (Shard(0), Shard(1)):
        DTensor.from_local(torch.ones(2, 4), mesh, [shard, Replicate()]).redistribute(
            placements=[Replicate(), Replicate()]
        )


def threads_of_groups() -> int:
    gc.collect()
    return sum(
        (task / "comm").read_text().startswith("pt_gloo") for task in Path("/proc/self/task").iterdir()
    )


def test_nothing_keeps_the_groups_of_earlier_calls():
    before = run_on(2, threads_of_groups)
    for _ in range(3):
        run_on(2, redistribute_twice)
    assert run_on(2, threads_of_groups) == before


def keep_threads(number: int) -> int:
    """Stands for what keeps process groups alive: on rank 1 it leaves so many threads behind."""
    if dist.get_rank() == 1:
        for _ in range(number):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


def test_a_worker_whose_groups_are_kept_is_replaced_and_the_others_stay():
    healthy, worn = run_on(2, keep_threads, WORN_THREADS + 10)
    run_on(2, keep_threads, 0)  # the answer to this call says what was left of the one before
    now = run_on(2, keep_threads, 0)
    assert worn not in now and healthy in now
