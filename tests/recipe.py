"""Run a recipe as a user would, flags and all, but in a worker of the pool that has paid for importing
torch."""

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from pool import run_on

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def recipe(
    name: str, *flags, ranks: int = 1, stop_at_step: int | None = None, typed: str = "", timeout: float = 180
) -> Ended:
    """`torchrun --nproc-per-node RANKS recipes/NAME.py FLAGS`; returns rank 0's exit status and output.

    stop_at_step: rank 0 gets a SIGTERM as soon as metrics.jsonl of --run-dir has that many rows. typed: what
        rank 0 reads from its standard input; nobody else has one.
    """
    flags = [str(flag) for flag in flags]
    every = run_on(ranks, run_here, name, flags, stop_at_step, typed, timeout=timeout, group=False)
    assert len({ended.status for ended in every}) == 1, every
    return every[0]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def pretrain_flags(inputs: Path, run_dir: Path, *more, steps: int = 8) -> list:
    """Flags of a short run on what the fixture `inputs` made (conftest.py)."""
    return [
        "--model",
        inputs / "model",
        "--random-init",
        "--data.path",
        inputs / "data.jsonl",
        "--data.cache-dir",
        inputs / "cache",
        "--train.steps",
        steps,
        "--train.global-batch-size",
        4,
        "--train.micro-batch-size",
        1,
        "--train.lr",
        "1e-2",
        "--train.dtype",
        "float32",
        "--train.validate-every",
        4,
        "--checkpoint.every",
        3,
        "--run-dir",
        run_dir,
        *more,
    ]


def module_of(name: str):
    """Import recipes/NAME.py."""
    if str(ROOT / "recipes") not in sys.path:
        sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module(name)


def run_here(name: str, flags: list[str], stop_at_step: int | None = None, typed: str = "") -> Ended:
    """Run a recipe as one rank, in this worker of the pool."""
    module = module_of(name)
    *_, config = (
        value
        for key, value in vars(module).items()
        if key.endswith("Config") and getattr(value, "__module__", "") == name
    )  # the last one has the others as fields
    from dtensor_llama.cli import run_recipe

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    argv, sys.argv = sys.argv, [f"recipes/{name}.py", *flags]
    stdin, sys.stdin = sys.stdin, io.StringIO(typed) if os.environ["RANK"] == "0" else None
    if stop_at_step is not None and os.environ["RANK"] == "0":
        folder = Path(flags[flags.index("--run-dir") + 1])
        threading.Thread(target=_stop_soon, args=(folder, stop_at_step), daemon=True).start()
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_recipe(module.main, config)
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.argv, sys.stdin = argv, stdin
        for number, handler in handlers.items():
            signal.signal(number, handler)
    gc.collect()  # as at the end of a process: locks and memory maps go
    return Ended(status, out.getvalue(), err.getvalue())


def _stop_soon(run_dir: Path, rows: int) -> None:
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= rows:
            return os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.005)
