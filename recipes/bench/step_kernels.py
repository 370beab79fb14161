"""Sum the GPU's time in a training step by kind of work, beside the predictions of gpu_plan.py.

    python recipes/bench/step_kernels.py --model llama2-7b --data.seq-len 4096 --train.compile \
        --train.global-batch-size 8 --train.micro-batch-size 2 --train.steps 2

Flags are those of recipes/benchmark.py, whose step this runs. The last step runs under torch's profiler. One
JSON line a kind says how many milliseconds its kernels took and how many there were; *idle* is the time in
which no kernel ran, and *in all* is the time from the first kernel of the step to the end of its last one.
Then come the kernels that took longest, by name. The profiler slows the host, so the idle time is an upper
bound.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmark.py, whose step this profiles
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import benchmark
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError

# A kernel is of the first kind of which a part of its name is known. Kernels that run within clip_grad_norm()
# or step() are not looked up: they are "clip" and "optimizer". The chunk manager's update may run outside of
# them; it is compiled, and so is the loss, and their own names tell them from the blocks.
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitK"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "copies": ("Memcpy", "Memset"),
    "compiled": ("triton",),
}
N_NAMES = 25  # how many of the longest kernels are named


def main(cfg: benchmark.BenchmarkConfig) -> None:
    if not torch.cuda.is_available():
        raise UsageError("step_kernels.py sums the time of a GPU's kernels and there is no GPU here.")
    plain_step, n_steps, taken = benchmark.train_step, cfg.warmup + cfg.train.steps, 0

    def profiled_step(training, *rest):
        nonlocal taken
        taken += 1
        if taken < n_steps:
            return plain_step(training, *rest)
        optimizer = training.optimizer
        clip, step = optimizer.clip_grad_norm, optimizer.step
        optimizer.clip_grad_norm = named("clip", clip)
        optimizer.step = named("optimizer", step)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            result = plain_step(training, *rest)
            torch.cuda.synchronize()
        optimizer.clip_grad_norm, optimizer.step = clip, step
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            report(json.loads(path.read_text())["traceEvents"])
        return result

    benchmark.train_step = profiled_step
    benchmark.main(cfg)


def named(name, function):
    """Return the function so that the profiler shows which kernels it launched."""

    def wrapped(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def report(events: list[dict]) -> None:
    """Print a JSON line for each kind of kernel, and one for each of the longest kernels. Times are in
    microseconds in the trace and in milliseconds here."""
    spans = [
        event
        for event in events
        if event.get("cat") == "gpu_user_annotation" and event["name"] in ("clip", "optimizer")
    ]
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        raise UsageError("torch's profiler recorded no kernel on this GPU, so there is nothing to sum.")
    by_kind, by_name = defaultdict(list), defaultdict(list)
    for event in work:
        by_kind[kind_of(event, spans)].append(event["dur"])
        by_name[event["name"]].append(event["dur"])
    for kind, durations in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(json.dumps({"kind": kind, "ms": sum(durations) / 1e3, "kernels": len(durations)}), flush=True)
    busy, end = 0.0, 0.0
    for event in sorted(work, key=lambda event: event["ts"]):
        begins = max(event["ts"], end)
        end = max(end, event["ts"] + event["dur"])
        busy += max(0.0, end - begins)
    in_all = end - min(event["ts"] for event in work)
    print(json.dumps({"kind": "idle", "ms": (in_all - busy) / 1e3}), flush=True)
    print(json.dumps({"kind": "in all", "ms": in_all / 1e3, "kernels": len(work)}), flush=True)
    for name, durations in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:N_NAMES]:
        longest = {"kernel": name[:120], "ms": sum(durations) / 1e3, "kernels": len(durations)}
        print(json.dumps(longest), flush=True)


def kind_of(event: dict, spans: list[dict]) -> str:
    for span in spans:
        if span["ts"] <= event["ts"] < span["ts"] + span["dur"]:
            return span["name"]
    for kind, parts in KINDS.items():
        if any(part in event["name"] for part in parts):
            return kind
    return "other"


if __name__ == "__main__":
    run_recipe(main, benchmark.BenchmarkConfig)
