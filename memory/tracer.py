"""Measures what the machine can do (MachineRates, once and kept) and what the model needs (StepTrace,
measured in two or three warm-up steps).

A rate is the bytes per second that really moved, counted where they move: a copy within RAM costs its DRAM
twice, a copy over the link once. Without an accelerator the link is a copy between two accounts of the same
RAM, made by the thread that calls, as the engine makes them there.
"""

import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn

from dtensor_llama.clock import moment, seconds_between
from dtensor_llama.metrics import DevicePeak
from dtensor_llama.terminal import Say
from memory.kernel import Kernel, threads_of_torch
from memory.lanes import Lanes, host_threads

MIB = 2**20
# What AdamW moves for a parameter: gradient 2 and three states 12 are read, states 12 and weight 2 written.
HOST_ADAM_BYTES = 28


# ---- rates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineRates:
    """Holds what one device and its share of the host can do: bytes/s, and for Adam parameters/s."""

    h2d: float
    d2h: float
    duplex: float  # both directions at once, added up
    dram_in_update: float  # AdamW on the host and the link both ways, together: what an update does to DRAM
    host_adam: float
    device_adam: float

    def scaled(self, factor: float) -> "MachineRates":
        """Return these rates with all that an update on the host waits for multiplied by `factor`."""
        scaled = {name: factor * rate for name, rate in asdict(self).items() if name != "device_adam"}
        return replace(self, **scaled)

    def __post_init__(self) -> None:
        """Raise ValueError unless every rate is what a measurement can give."""
        for name, rate in asdict(self).items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
                raise ValueError(f"{name} is {rate!r}, not a number above 0")


def machine_key(device: torch.device, ranks_per_host: int = 1) -> str:
    """Return in words what rates depend on; the threads are those that step on the host."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator"
    n_cores, n_threads = len(os.sched_getaffinity(0)), host_threads(device, ranks_per_host)
    threads = f"{n_cores} cores, {n_threads} threads of {ranks_per_host} ranks"
    return f"{name}; {_cpu_name()}, {threads}; torch {torch.__version__}"


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: *(.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def load_rates(
    path: Path,
    device: torch.device,
    kernel: str = "auto",
    ranks_per_host: int = 1,
    say: Say = lambda text: None,
) -> MachineRates:
    """Return the rates of this machine from the JSON file `path`. If they are not there, they are measured,
    which takes some seconds, and added to it.

    A file that cannot be read, or that holds something else, is replaced; one that cannot be written is done
    without. kernel: of AdamW, as MemoryConfig has it. ranks_per_host: ranks that share the host and measure
    at the same time. say: is called with what happened.
    """
    key = f"{machine_key(device, ranks_per_host)}; AdamW {Kernel(kernel, device).kind}"
    kept, rates = {}, None
    try:
        if path.exists():
            kept = dict(json.loads(path.read_bytes()))
        if key in kept:
            rates = MachineRates(**kept[key])
    except (OSError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        say(f"memory    {path} holds no rates that can be used ({reason}); they are measured again")
    if rates is None:
        say(f"memory    measuring once what this machine can move and step; {path} keeps it")
        rates = measure_rates(device, kernel, ranks_per_host)
        kept[key] = asdict(rates)
        staged = path.with_suffix(f".{os.getpid()}")  # ranks may measure at once: the last whole file stays
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(kept, indent=1) + "\n")
            staged.replace(path)
        except OSError as error:
            say(f"memory    {path} cannot be written ({error.strerror}), so the next run will measure again")
    return rates


def measure_rates(device: torch.device, kernel: str, ranks_per_host: int) -> MachineRates:
    """Measure every rate for half a second. A GPU must be idle meanwhile. Several ranks of a host measure at
    the same time, so that each gets its share."""
    link, n_threads = Link(device, 256 * MIB), host_threads(device, ranks_per_host)
    wires = {direction: link.rate(direction) for direction in ("h2d", "d2h", "duplex")}
    host_adam = device_adam = adam_rate(torch.device("cpu"), n_threads, 32 * MIB, kernel=kernel)
    if device.type == "cuda":
        device_adam = adam_rate(device, n_threads, 64 * MIB, kernel=kernel)
    return MachineRates(
        **wires,
        dram_in_update=dram_rate_in_update(link, n_threads, kernel=kernel),
        host_adam=host_adam,
        device_adam=device_adam,
    )


def per_second(work: Callable[[], float], seconds: float = 0.5) -> float:
    """Call work(), which does something and returns how much, until `seconds` are over, at least three times
    after one to warm up. Return the best rate: what disturbs a measurement only ever slows it down."""
    work()
    rates, began = [], time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        amount = work()
        rates.append(amount / (time.perf_counter() - start))
    return max(rates)


class Link:
    """The wires between host and device. Each direction has a pair of buffers and a lane."""

    def __init__(self, device: torch.device, n_bytes: int):
        on_gpu = device.type == "cuda"
        self.n_bytes, self.dram_bytes_per_byte = n_bytes, 1 if on_gpu else 2  # within RAM: read and written
        self.host = [torch.ones(n_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.on_device = [torch.ones(n_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        lanes = Lanes(device, n_threads=1)
        to_device = lanes.h2d, self.on_device[0], self.host[0]
        to_host = lanes.d2h, self.host[1], self.on_device[1]
        self.ways = {"h2d": [to_device], "d2h": [to_host], "duplex": [to_device, to_host]}

    def copy(self, direction: str, n_bytes: int | None = None) -> int:
        """Copy h2d, d2h or duplex and wait for the end. Return how many bytes moved."""
        n_bytes, copied = n_bytes or self.n_bytes, []
        for lane, target, source in self.ways[direction]:
            copy = partial(target[:n_bytes].copy_, source[:n_bytes], non_blocking=True)
            copied.append(lane.run(direction, copy))
        for event in copied:
            event.synchronize()
        return n_bytes * len(copied)

    def rate(self, direction: str, seconds: float = 0.5, n_bytes: int | None = None) -> float:
        return per_second(lambda: self.copy(direction, n_bytes), seconds)


def adam_rate(
    device: torch.device, n_threads: int, n_parameters: int, seconds: float = 0.5, kernel: str = "auto"
) -> float:
    """Return parameters/s of our AdamW kernel on a GPU, or on `n_threads` cores."""
    with threads_of_torch(n_threads):
        return per_second(_adam_step(device, n_parameters, kernel), seconds)


def dram_rate_in_update(
    link: Link, n_threads: int, n_parameters: int = 32 * MIB, seconds: float = 0.5, kernel: str = "auto"
) -> float:
    """Return all bytes/s in DRAM while our AdamW kernel steps on `n_threads` cores and the link is busy both
    ways.

    A plain stream in place of AdamW would give more: on a host of 16 cores it reached 134 GB/s, where an
    update of 3.5B parameters reached 97."""
    moved, over = [], threading.Event()

    def keep_busy() -> None:
        while not over.is_set():
            moved.append(link.copy("duplex") * link.dram_bytes_per_byte)

    with threads_of_torch(n_threads), ThreadPoolExecutor(1) as pool:
        step = _adam_step(torch.device("cpu"), n_parameters, kernel)
        moving = pool.submit(keep_busy)
        try:
            step()
            began, before, n_stepped = time.perf_counter(), sum(moved), 0.0
            while n_stepped == 0 or time.perf_counter() - began < seconds:
                n_stepped += step()
            rate = (HOST_ADAM_BYTES * n_stepped + sum(moved) - before) / (time.perf_counter() - began)
        finally:
            over.set()
        moving.result()  # raises what the copies have raised
        return rate


def _adam_step(device: torch.device, n_parameters: int, kind: str) -> Callable[[], float]:
    """Return a function that makes one update of bfloat16 weights with our kernel, as the engine on this
    device calls it, waits for its end, and returns how many parameters it stepped."""
    kernel, dtype = Kernel(kind, device), torch.bfloat16
    if device.type == "cpu":
        step = kernel.host_step_of_zeros(n_parameters, dtype, dtype)
    else:
        step = kernel.device_step_of_zeros(n_parameters, dtype)

    def once() -> float:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return n_parameters

    return once


# ---- what a model needs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTrace:
    """Holds what one step of this rank needs: the largest bytes, and the times of the quickest step, among
    those seen."""

    non_model_peak_bytes: int  # the device's peak, less what plans count themselves: weights and residents
    forward_seconds: float  # of all microbatches of a step
    backward_seconds: float
    host_bytes: int = 0  # what the host holds besides the chunks, for example offloaded activations


class Usage(NamedTuple):
    """Bytes on the device: the peak since the last reset, and what torch's allocator does not know: NCCL,
    kernels, other libraries."""

    peak: int = 0
    non_torch: int = 0


class Counters:
    """Reads the bytes in use, and lets a peak begin anew.

    On a GPU they are those of torch's allocator, which is read without waiting for anything, and whose other
    readers keep their peaks. On a CPU they are the process's resident memory, above that of the first
    reading, and there are no peaks."""

    def __init__(self, device: torch.device):
        self.device, self.process = device, psutil.Process()
        self.allocator = DevicePeak(device) if device.type == "cuda" else None
        self.baseline = 0

    def read(self) -> Usage:
        if self.allocator is None:
            now = self.process.memory_info().rss
            self.baseline = self.baseline or now
            return Usage(max(0, now - self.baseline))
        free, total = torch.cuda.mem_get_info(self.device)
        non_torch = total - free - torch.cuda.memory_reserved(self.device)
        return Usage(self.allocator.read()[0], max(0, non_torch))

    def reset(self) -> None:
        if self.allocator is not None:
            self.allocator.reset()


class Tracer:
    """Notes how long forward and backward of a step take and how many bytes they need, without waiting for
    the device.

        tracer = Tracer([embed, block, ...], device, Counters(device))  # after parallelize
        for _ in range(3):
            tracer.start_step(); ... forward and backward of all microbatches ...; tracer.end_step()
        traced = tracer.result(model_bytes); tracer.close()

    Bytes are read where a module's forward begins and ends, and where the gradient of its output arrives.
    Forward begins with the first module's and lasts until the first gradient of an output arrives, so the
    loss counts as forward. Memory of other programs on the GPU counts as non-torch memory.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, counters: Counters):
        self.device, self.counters = device, counters
        self.steps: list[list[tuple]] = []  # per step: (the phase that begins, the moment)
        self.usage = Usage()  # the most of each kind of bytes, at any moments
        self.tracing = False
        self.hooks = []
        for module in modules:
            self.hooks += [
                module.register_forward_pre_hook(lambda *_: self._note("forward")),
                module.register_forward_hook(self._after_forward),
            ]

    def start_step(self) -> None:
        self.steps.append([])
        self.tracing = True
        self._note("forward")

    def end_step(self) -> None:
        self._note("end")
        self.tracing = False

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _after_forward(self, module: nn.Module, args: tuple, output) -> None:
        self._note("forward")
        outputs = [output] if isinstance(output, Tensor) else output
        tensor = next((each for each in outputs if isinstance(each, Tensor)), None)
        if tensor is not None and tensor.requires_grad and self.tracing:
            tensor.register_hook(lambda gradient: self._note("backward"))

    def _note(self, phase: str) -> None:
        if not self.tracing:
            return
        self.usage = Usage(*map(max, self.usage, self.counters.read()))
        self.counters.reset()
        notes = self.steps[-1]
        if not notes or notes[-1][0] != phase:
            notes.append((phase, moment(self.device)))

    def result(self, model_bytes: int, host_bytes: int = 0) -> StepTrace:
        """Return what was traced; waits for the device. model_bytes: the part of the peak that plans count
        themselves, which is weights and resident states."""
        forward, backward = min(map(self._seconds, self.steps), key=sum)
        return StepTrace(max(0, sum(self.usage) - model_bytes), forward, backward, host_bytes)

    @staticmethod
    def _seconds(notes: list[tuple]) -> tuple[float, float]:
        seconds = {"forward": 0.0, "backward": 0.0}
        for (phase, begin), (_, end) in pairwise(notes):
            seconds[phase] += seconds_between(begin, end)
        return seconds["forward"], seconds["backward"]
