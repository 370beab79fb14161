"""Keep gloo worker processes alive across tests: importing torch takes seconds, and is done once.

    results = run_on(2, my_function, argument)    # my_function(argument) on ranks 0 and 1; a result per rank

Each call is a process group of its own. A rank that raises, dies or hangs fails the call within `timeout`
seconds with that rank's traceback, a hung one with where each of its threads stood; the workers are then
replaced, so the next test starts clean.
"""

import atexit
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

MORE_THREADS = 8  # than after the last collection of garbage: then a worker collects
# A worker that has more threads than this after it looked is replaced. torch 2.11 leaks a reference to the
# mesh of each matrix product of DTensors, and with it the mesh's groups and their threads.
WORN_THREADS = 400

# One process imports what takes long, and workers are forks of it: those that replace a failed one, too.
# A fork has none of its threads, so it must not start any: pyarrow, which starts one, is not among these.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "torch.distributed.tensor",
        "torch.utils.tensorboard",
        "matplotlib.backends.backend_agg",
        "transformers",
        "parallel.booster",
        "parallel.dry_run_report",
        "dtensor_llama.chat.corpus",
        "dtensor_llama.data.mix",
        "dtensor_llama.run",
    ]
)
_workers: list["_Worker"] = []


class RankFailed(AssertionError):
    """A worker raised, died or did not answer in time; the message begins with its rank."""


class _Worker:
    def __init__(self):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker is an end of file here
        self.n_threads = 0  # that were left of earlier calls, when the last one began


def run_on(ranks: int, function, *args, timeout: float = 120, group: bool = True):
    """Call `function(*args)` in `ranks` processes of one gloo group; returns their results, in rank order.

    The function must be importable (top level of its module) and its arguments and result picklable.
    group=False: the function makes its process group itself, as a recipe under torchrun does, from the
    environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    while len(_workers) < ranks:
        _workers.append(_Worker())
    with tempfile.TemporaryDirectory() as folder:
        for rank, worker in enumerate(_workers[:ranks]):
            worker.pipe.send((function, args, rank, ranks, folder, group, port))
        results, failures = _collect(_workers[:ranks], timeout, folder)
    if failures:
        _stop_all()
        raise RankFailed("\n".join(failures))
    for worker in [worker for worker in _workers[:ranks] if worker.n_threads > WORN_THREADS]:
        _workers.remove(worker)
        worker.process.kill()
    return results


def _collect(workers, timeout: float, folder: str):
    # after one failure the others get `grace` to fail by themselves
    deadline, grace = time.monotonic() + timeout, 2.0
    results, failures = [None] * len(workers), []
    pending = {worker.pipe: rank for rank, worker in enumerate(workers)}
    while pending:
        ready = wait(list(pending), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                for rank in pending.values():
                    # it begins with that: else the signal would end it
                    if _stack_file(folder, rank).exists():
                        # it writes down where each of its threads stands
                        os.kill(workers[rank].process.pid, signal.SIGUSR1)
                time.sleep(0.5)
                for rank in pending.values():
                    stack = _stack_file(folder, rank)
                    stood = stack.read_text() if stack.exists() else "it had not begun"
                    failures.append(f"rank {rank} did not answer in {timeout:.0f} s\n{stood}")
            break
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                ok, results[rank], workers[rank].n_threads = pipe.recv()
            except (EOFError, ConnectionError):
                ok, results[rank] = False, f"died with exit code {workers[rank].process.exitcode}"
            if not ok:
                failures.append(f"rank {rank}: {results[rank]}")
                deadline = min(deadline, time.monotonic() + grace)
    return results, failures


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack-{rank}")


def _stop_all() -> None:
    while _workers:
        _workers.pop().process.kill()


atexit.register(_stop_all)


def _serve(pipe) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # torch stays, so a collection need not look at it: 0.1 s and not 0.4
    n_threads = 0
    while True:
        try:
            function, args, rank, ranks, folder, group, port = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        stack_file = _stack_file(folder, rank).open("w")
        faulthandler.register(signal.SIGUSR1, stack_file)
        try:
            if group:
                dist.init_process_group(
                    "gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks
                )
            answer = (True, function(*args), n_threads)
            if group:
                dist.barrier()  # no rank leaves while another still talks to it
        except BaseException:  # whatever it was belongs to the test that asked
            answer = (False, traceback.format_exc(), n_threads)
        pipe.send(answer)
        if not answer[0]:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_calls()
        # Groups live on in reference cycles, each with two threads, and these do not sleep: they take half of
        # a processor's time from the calls that follow.
        if len(os.listdir("/proc/self/task")) > n_threads + MORE_THREADS:
            gc.collect()
            n_threads = len(os.listdir("/proc/self/task"))


def _forget_calls() -> None:
    """Empty what a worker remembers of earlier calls: the meshes of their groups, compiled blocks, and the
    shapes seen. A rank that compiled before, alone, would make a graph with dynamic shapes where its new
    peers make a static one, and each would wait in another collective."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if "torch.distributed.tensor" in sys.modules:  # importing it here would keep the next call waiting
        from parallel.mesh_caches import forget_meshes

        forget_meshes()
