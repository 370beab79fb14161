"""What the machine can do (Rates, measured once and kept) and what the model needs (Traced, from two or three
warm-up steps).

Rates are bytes per second that really moved, counted where they move: a copy within RAM costs its DRAM twice,
a copy over the link once. Without an accelerator the link is a copy between two accounts of the same RAM,
made by a thread of its own.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn

from dtensor_llama.metrics import DevicePeak
from memory.kernel import Hyper, Kernel
from memory.lanes import host_threads

MIB = 2**20


# ---- rates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Of one device and its share of the host; bytes/s, for Adam parameters/s."""

    h2d: float
    d2h: float
    duplex: float  # both directions at once, summed
    dram: float  # the host's cores streaming in place (read and write), alone
    dram_under_dma: float  # the same while the link is busy both ways, the link's share of DRAM included
    host_adam: dict[int, float]  # by threads, up to those that step
    device_adam: float

    def scaled(self, factor: float) -> "Rates":
        """All that an update on the host waits for, times `factor`: the machine as it turned out to be."""
        slower = {
            name: factor * getattr(self, name) for name in ("h2d", "d2h", "duplex", "dram", "dram_under_dma")
        }
        return replace(self, **slower, host_adam={n: factor * rate for n, rate in self.host_adam.items()})

    def to_json(self) -> dict:
        return asdict(self)

    def check(self) -> None:
        """ValueError unless all of them are what a measurement can give."""
        for name, rate in self.to_json().items():
            for one in rate.values() if isinstance(rate, dict) else [rate]:
                if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one < float("inf"):
                    raise ValueError(f"{name} is {one!r}, not a number above 0")
        if not self.host_adam:
            raise ValueError("host_adam is empty")

    @classmethod
    def from_json(cls, stored: dict) -> "Rates":
        return cls(**stored | {"host_adam": {int(n): rate for n, rate in stored["host_adam"].items()}})


def machine_key(device: torch.device, ranks_per_host: int = 1) -> str:
    """What rates depend on, in words; the threads are those that step on the host."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator"
    n_cores, n_threads = len(os.sched_getaffinity(0)), host_threads(device, ranks_per_host)
    return f"{name}; {_cpu_name()}, {n_cores} cores, {n_threads} threads of {ranks_per_host} ranks; torch {torch.__version__}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    models = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return models[0] if models else platform.processor() or platform.machine()


def load_rates(
    path: Path,
    device: torch.device,
    kernel: str = "auto",
    ranks_per_host: int = 1,
    measure: Callable[..., Rates] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rates:
    """Of this machine as kept in the JSON file `path`; measured (some seconds) and added to it if they are
    not there.

    A file that cannot be read, or holds something else, is measured and written anew; one that cannot be
    written is done without. kernel: of AdamW, as --memory.kernel; ranks_per_host: that share the host, and
    all measure now; say: told of all this."""
    key = f"{machine_key(device, ranks_per_host)}; AdamW {Kernel(kernel, device).kind}"
    kept, rates = {}, None
    try:
        if path.exists():
            kept = dict(json.loads(path.read_bytes()))
        if key in kept:
            rates = Rates.from_json(kept[key])
            rates.check()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(
            f"memory    {path} holds no rates that can be used ({type(error).__name__}: {error}); they are "
            "measured anew"
        )
        kept.pop(key, None)
        rates = None
    if rates is None:
        say(f"memory    measuring what this machine can move and step, once, for {path}")
        rates = (measure or measure_rates)(device, kernel, ranks_per_host)
        kept[key] = rates.to_json()
        partial = path.with_suffix(f".{os.getpid()}")  # ranks may measure at once: the last whole file stands
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(kept, indent=1) + "\n")
            partial.replace(path)
        except OSError as error:
            say(f"memory    {path} cannot be written ({error.strerror}), so the next run will measure again")
    return rates


def measure_rates(
    device: torch.device,
    kernel: str = "auto",
    ranks_per_host: int = 1,
    n_bytes: int = 256 * MIB,
    seconds: float = 0.5,
) -> Rates:
    """All of it, `seconds` each. With a GPU it must be idle; several ranks of a host measure at the same
    time, so that each gets its share."""
    link, stream = Link(device, n_bytes), DramStream(4 * n_bytes)
    wires = {direction: link.rate(direction, seconds) for direction in ("h2d", "d2h", "duplex")}
    dram, under_dma = stream.rate(seconds), stream.rate_under(link, seconds)
    counts = thread_counts(host_threads(device, ranks_per_host))
    host_adam = {n: host_adam_rate(n, seconds=seconds, kernel=kernel) for n in counts}
    on_gpu = device.type == "cuda"
    device_adam = (
        device_adam_rate(device, seconds=seconds, kernel=kernel) if on_gpu else max(host_adam.values())
    )
    return Rates(**wires, dram=dram, dram_under_dma=under_dma, host_adam=host_adam, device_adam=device_adam)


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def per_second(work: Callable[[], float], seconds: float) -> float:
    """work() does something and returns how much; the best rate of what fits into `seconds`, at least three
    goes, after one to warm up. The best, as what disturbs a measurement only ever slows it."""
    work()
    best, n_goes, began = 0.0, 0, time.perf_counter()
    while n_goes < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - start))
        n_goes += 1
    return best


class Link:
    """The wires between host and device; each direction has a pair of buffers and a stream (without GPU: a
    thread)."""

    def __init__(self, device: torch.device, n_bytes: int):
        self.device, self.n_bytes = device, n_bytes
        on_gpu = device.type == "cuda"
        self.host = [torch.ones(n_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.on_device = [torch.ones(n_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else None
        self.dram_bytes_per_byte = 1 if on_gpu else 2  # a copy within RAM reads and writes it

    def copy(self, direction: str, n_bytes: int | None = None) -> int:
        """Copy h2d, d2h or duplex and wait for the end; returns the bytes moved."""
        jobs = {"h2d": [0], "d2h": [1], "duplex": [0, 1]}[direction]
        n_bytes = n_bytes or self.n_bytes
        if self.streams is None:
            threads = [threading.Thread(target=self._one, args=(job, n_bytes)) for job in jobs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for job in jobs:
                with torch.cuda.stream(self.streams[job]):
                    self._one(job, n_bytes)
            for job in jobs:
                self.streams[job].synchronize()
        return n_bytes * len(jobs)

    def _one(self, job: int, n_bytes: int) -> None:
        source, target = (self.host[0], self.on_device[0]) if job == 0 else (self.on_device[1], self.host[1])
        if self.streams is None:
            torch.set_num_threads(1)  # of this thread: one engine copies, as on a GPU
        target[:n_bytes].copy_(source[:n_bytes], non_blocking=True)

    def rate(self, direction: str, seconds: float = 0.5, n_bytes: int | None = None) -> float:
        return per_second(lambda: self.copy(direction, n_bytes), seconds)


class DramStream:
    """All cores adding to an array in place: the least that any update of states does to DRAM. Larger than
    caches."""

    def __init__(self, n_bytes: int):
        self.array = torch.zeros(n_bytes // 4)

    def once(self) -> int:
        self.array.add_(1)
        return 2 * self.array.nbytes

    def rate(self, seconds: float = 0.5) -> float:
        return per_second(self.once, seconds)

    def rate_under(self, link: Link, seconds: float = 0.5) -> float:
        """Total DRAM bytes/s with the link busy both ways."""
        moved, stop = [0], threading.Event()

        def keep_busy():
            while not stop.is_set():
                moved[0] += link.copy("duplex") * link.dram_bytes_per_byte

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            self.once()
            began, before, streamed = time.perf_counter(), moved[0], 0
            while streamed == 0 or time.perf_counter() - began < max(seconds, 0.2):
                streamed += self.once()
            return (streamed + moved[0] - before) / (time.perf_counter() - began)
        finally:
            stop.set()
            thread.join()


def host_adam_rate(
    n_threads: int, n_parameters: int = 32 * MIB, seconds: float = 0.5, kernel: str = "auto"
) -> float:
    """Parameters/s of our AdamW kernel on `n_threads` cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        return per_second(_adam_step(torch.device("cpu"), n_parameters, kernel), seconds)
    finally:
        torch.set_num_threads(before)


def device_adam_rate(
    device: torch.device, n_parameters: int = 64 * MIB, seconds: float = 0.5, kernel: str = "auto"
) -> float:
    step = _adam_step(device, n_parameters, kernel)

    def timed() -> float:
        done = step()
        torch.cuda.synchronize(device)
        return done

    return per_second(timed, seconds)


def _adam_step(device: torch.device, n_parameters: int, kind: str) -> Callable[[], float]:
    """One update of bfloat16 weights by our kernel as each engine calls it; returns how many parameters it
    stepped."""
    kernel, hyper = Kernel(kind, device), Hyper(1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
    zeros = lambda dtype=torch.float32: torch.zeros(n_parameters, dtype=dtype, device=device)
    if device.type == "cpu":
        tensors, step = (
            (zeros(), zeros(), zeros(), zeros(torch.bfloat16), zeros(torch.bfloat16)),
            kernel.host_step,
        )
    else:
        tensors, step = (
            (zeros(torch.bfloat16), zeros(torch.int16), zeros(), zeros(), zeros(torch.bfloat16)),
            kernel.device_step,
        )

    def once() -> float:
        step(*tensors, None, hyper)
        return n_parameters

    return once


# ---- what a model needs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One module group in one step, over all its microbatches."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    forward_peak_bytes: int = 0
    backward_peak_bytes: int = 0


@dataclass(frozen=True)
class Traced:
    """Of one step of this rank: the quickest of the steps seen for times, the largest for bytes."""

    non_model_peak_bytes: int  # the device's peak less the weights that the manager counts itself
    forward_seconds: float  # C_f and C_b: all microbatches of a step
    backward_seconds: float
    host_bytes: int = 0  # what the host must hold besides the chunks, e.g. offloaded activations
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    non_torch_bytes: int = 0  # on the device, but not from torch's allocator: NCCL, kernels, other libraries
    groups: dict[str, Group] = field(default_factory=dict)
    curve: tuple[tuple[str, int], ...] = ()  # (what began, bytes allocated then), one step in order


class Usage(NamedTuple):
    """Bytes on the device: allocated now, the peak of that and of what torch has reserved since the last
    reset, and what is not torch's: NCCL, kernels, other libraries."""

    allocated: int = 0
    peak: int = 0
    peak_reserved: int = 0
    non_torch: int = 0


@dataclass
class Counters:
    """How they are read, and how a peak begins anew."""

    read: Callable[[], Usage]
    reset: Callable[[], None]

    @classmethod
    def of(cls, device: torch.device) -> "Counters":
        """Of a GPU the allocator's own, which wait for nothing; of a CPU the process's resident memory, above
        that of the first reading."""
        if device.type != "cuda":
            process, baseline = psutil.Process(), []

            def resident() -> Usage:
                now = process.memory_info().rss
                baseline[:] = baseline or [now]
                return Usage(*[max(0, now - baseline[0])] * 3)

            return cls(resident, lambda: None)

        peak = DevicePeak(device)

        def allocators() -> Usage:
            stats, (free, total) = torch.cuda.memory_stats(device), torch.cuda.mem_get_info(device)
            allocated, reserved = peak.read()
            return Usage(
                stats["allocated_bytes.all.current"],
                allocated,
                reserved,
                max(0, total - free - stats["reserved_bytes.all.current"]),
            )

        return cls(allocators, peak.reset)  # others who read the same allocator keep their peaks


class Tracer:
    """Notes times and bytes where one module group ends and the next begins; nothing in it waits for the
    device.

        tracer = Tracer({"embed": embed, "layer 0": block, ...}, device)      # in forward order, after parallelize
        for _ in range(3):
            tracer.start_step(); ... all microbatches, forward and backward ...; tracer.end_step()      # before the update
        traced = tracer.result(model_bytes); tracer.close()

    A group's forward is between the module's forward hooks; its backward begins when the gradient of its
    output arrives and ends when the next one's begins. What lies between two groups (the loss) counts for the
    one before. On a GPU the allocator's peak starts anew at each note. Other GPU users count as non-torch
    memory.
    """

    def __init__(self, groups: dict[str, nn.Module], device: torch.device, counters: Counters | None = None):
        self.device, self.counters = device, counters or Counters.of(device)
        # per step: (name, phase, moment, bytes now, peak since the last note)
        self.steps: list[list[tuple]] = []
        self.peak_reserved = self.non_torch = 0
        self.tracing = False
        self.hooks = [
            handle
            for name, module in groups.items()
            for handle in (
                module.register_forward_pre_hook(lambda module, args, name=name: self._note(name, "forward")),
                module.register_forward_hook(
                    lambda module, args, output, name=name: self._after_forward(name, output)
                ),
            )
        ]

    def start_step(self) -> None:
        self.steps.append([])
        self.tracing = True
        self._note("", "between")

    def end_step(self) -> None:
        self._note("", "between")
        self.tracing = False

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _after_forward(self, name: str, output) -> None:
        self._note(name, "forward")
        tensor = (
            output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
        )
        if tensor is not None and tensor.requires_grad and self.tracing:
            tensor.register_hook(lambda gradient: self._note(name, "backward"))

    def _note(self, name: str, phase: str) -> None:
        if not self.tracing:
            return
        usage = self.counters.read()
        self.steps[-1].append((name, phase, self._now(), usage.allocated, usage.peak))
        self.peak_reserved, self.non_torch = (
            max(self.peak_reserved, usage.peak_reserved),
            max(self.non_torch, usage.non_torch),
        )
        self.counters.reset()

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def result(self, model_bytes: int, host_bytes: int = 0) -> Traced:
        """model_bytes: what of the peak the plan counts itself: weights, and what is resident; waits for the
        device."""
        steps = [self._of_step(notes) for notes in self.steps]
        best = min(steps, key=lambda step: sum(g.forward_seconds + g.backward_seconds for g in step.values()))
        forward, backward = (
            sum(getattr(g, f"{phase}_seconds") for g in best.values()) for phase in ("forward", "backward")
        )
        peak = max(note[4] for notes in self.steps for note in notes)
        curve = tuple((f"{name} {phase}".strip(), now) for name, phase, _, now, _ in self.steps[-1])
        return Traced(
            max(0, peak + self.non_torch - model_bytes),
            forward,
            backward,
            host_bytes,
            peak,
            self.peak_reserved,
            self.non_torch,
            best,
            curve,
        )

    def _of_step(self, notes: list[tuple]) -> dict[str, Group]:
        sums: dict[str, dict[str, float]] = {}
        for before, after in zip(notes, notes[1:], strict=False):
            # before the first group: the first group's
            name, phase = (after if before[1] == "between" else before)[:2]
            if phase == "between":
                continue
            group = sums.setdefault(name, {})
            group[f"{phase}_seconds"] = group.get(f"{phase}_seconds", 0.0) + self._seconds(
                before[2], after[2]
            )
            group[f"{phase}_peak_bytes"] = max(group.get(f"{phase}_peak_bytes", 0), after[4])
        return {name: Group(**values) for name, values in sums.items()}
