"""Measurements of a run and where they go: metrics.jsonl, TensorBoard, a progress bar, the loss curve as PNG.

RunReport   what a training loop calls: it measures each step on every rank, and one rank writes the rows
RunLog      writes them: metrics.jsonl, TensorBoard and the progress bar
LateReader, SkippedSteps, PeakMemory   what RunReport measures with; a loop may also use them alone
"""

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from dtensor_llama.clock import moment, seconds_between
from dtensor_llama.errors import UsageError
from dtensor_llama.flops import Utilization
from dtensor_llama.places import say_full, say_unwritten

GIB = 2**30


def amount(n: int, word: str, plural: str = "s") -> str:
    """Return the number with its word, which gets the ending `plural` unless there is one."""
    return f"{n} {word}" + (plural if n != 1 else "")


class RunReport:
    """Measures the steps of a run on every rank, and writes rows of metrics.jsonl on the rank that logs.

        report = RunReport(log, utilization, device, skip_nonfinite)
        while ...:
            report.begin_step()
            loss, grad_norm = ...               # forward, backward, clip, step
            report.end_step(step, lr, tokens, loss, grad_norm)
            rows = report.finished(wait=saves or validates)
            report.write(rows, validation_losses)

    Every rank makes one and calls the same methods: peaks of memory are the highest over all ranks. Without a
    process group this process is the only rank. log: the RunLog of the rank that writes; None on all others.
    skip_nonfinite: how many steps in a row may be left out because their gradient is not finite.
    """

    def __init__(
        self, log: "RunLog | None", utilization: Utilization, device: torch.device, skip_nonfinite: int
    ):
        self.log, self.utilization = log, utilization
        self.reading, self.memory = LateReader(device), PeakMemory(device)
        # Only the rank that logs knows the rows from before a resumption, and all ranks must count alike.
        counts = torch.tensor(skipped_so_far(log.rows if log else []))
        highest_of_all_ranks(counts)
        self.skipped = SkippedSteps(skip_nonfinite, *counts.tolist())

    def begin_step(self) -> None:
        self.reading.begin()

    def end_step(
        self, step: int, lr: float, tokens: int, loss: torch.Tensor, grad_norm: torch.Tensor
    ) -> None:
        """Note a step that was launched.

        step: its number, from 1; tokens: read since the beginning of the run; loss, grad_norm: scalars on the
        device, the same on every rank"""
        # A step that was only launched has had its peak already, because the allocator runs on the host.
        peaks = torch.tensor(self.memory.take(), dtype=torch.float64)
        highest_of_all_ranks(peaks)
        device_gib, host_gib, reserved_gib, _ = (peaks / GIB).tolist()
        row = {
            "step": step,
            "lr": lr,
            "tokens": tokens,
            "device_memory_gib": device_gib,
            "device_reserved_gib": reserved_gib,
            "host_memory_gib": host_gib,
        }
        self.reading.put(row, loss, grad_norm)

    def finished(self, wait: bool) -> list[dict]:
        """Return the rows of the steps that are done, oldest first; `wait`: including the newest step.

        Without `wait` a GPU's newest step is left for the next call: its loss is read while the device
        computes the step after it. UsageError if too many steps in a row were not finite."""
        return [self.skipped.judge(row) for row in self.reading.take(all=wait)]

    def write(
        self,
        rows: list[dict],
        validation_losses: dict[str, float] | None = None,
        answers: list[tuple[str, str]] | None = None,
    ) -> None:
        """Write finished rows.

        validation_losses: after the newest of them; "" is the loss of all held-out sequences, other names are
            the sources of a mix
        answers: (prompt, answer) pairs that were sampled in a validation
        """
        if validation_losses:
            for name, loss in validation_losses.items():
                rows[-1][f"validation_loss/{name}" if name else "validation_loss"] = loss
            losses = ", ".join(f"{name} {loss:.4f}".lstrip() for name, loss in validation_losses.items())
            self.say(f"step {rows[-1]['step']}: validation loss {losses}")
        if self.log is None:
            return
        if answers:
            self.log.text("answers", rows[-1]["step"], answers)
        for row in rows:
            first = {name: row[name] for name in ("step", "loss", "grad_norm")}
            self.log.step(first | row | self.utilization.of_step(row["step_seconds"]))

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the rank that logs."""
        if self.log:
            self.log.say(text)


def highest_of_all_ranks(values: torch.Tensor) -> None:
    """Replace each value, on the host, by its maximum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)


class RunLog:
    """Writes one row per step to the run folder, and shows a bar with tokens/s and the time left.

    After a resume at `first_step` the rows of later steps, which a killed run may have left, are removed
    first, so that there is always one row per step. Only one rank makes and uses a RunLog, so nothing in it
    is a collective.

    A row that cannot be written, for example on a full disk, is kept and tried again with the next one.
    Training goes on, and one line says so. TensorBoard's events are left out from then on.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        staged = self.path.with_suffix(".partial")
        staged.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        staged.replace(self.path)  # a kill here leaves the old rows or the new ones
        self.file = self.path.open("ab", buffering=0)  # each row reaches the disk's cache at once
        self.good_bytes = self.path.stat().st_size  # whole rows in the file
        self.waiting: list[bytes] = []  # rows that could not be written yet
        self.bar = _Bar(first_step, steps)
        self._threads_hook = threading.excepthook
        threading.excepthook = self._on_thread_failure
        self.tensorboard = None
        with self._tensorboard_may_fail():
            self.tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)

    def step(self, row: dict) -> None:
        """Write a line of metrics.jsonl: step, loss, grad_norm, lr, tokens, ...; None stands for unknown."""
        self.rows.append(row)
        self.waiting.append((json.dumps(row) + "\n").encode())
        self._write_rows()
        with self._tensorboard_may_fail():
            for name, value in row.items() if self.tensorboard else ():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(f"train/{name}", value, row["step"])
        self.bar.step(row)

    def _write_rows(self) -> None:
        data, was_full = b"".join(self.waiting), len(self.waiting) > 1
        try:
            written = 0
            while written < len(data):  # an unbuffered write may take only a part
                written += self.file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):  # remove a half-written row before another follows it
                os.ftruncate(self.file.fileno(), self.good_bytes)
            if not was_full:
                self.say(
                    f"note: a row of {self.path} cannot be written ({say_unwritten(self.path.parent, error)}"
                    "); training goes on, and the rows are written when there is room"
                )
            return
        self.good_bytes += len(data)
        self.waiting.clear()

    @contextlib.contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """Let the block fail: then TensorBoard's thread or file is gone, and no more events are written."""
        try:
            yield
        except OSError as error:
            self.tensorboard = None
            self.say(
                f"note: TensorBoard's events cannot be written ({say_unwritten(self.path.parent, error)}); "
                "metrics.jsonl has the same numbers"
            )

    def _on_thread_failure(self, failure) -> None:
        """Print no traceback of TensorBoard's writing thread: its error is raised in the main thread too."""
        of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and issubclass(failure.exc_type, OSError)):
            self._threads_hook(failure)

    def text(self, name: str, step: int, answers: list[tuple[str, str]]) -> None:
        """Print (prompt, answer) pairs shortened, and write them whole to TensorBoard's text tab."""
        for prompt, answer in answers:
            self.say(f"    {' '.join(prompt.split())[-80:]!r} -> {' '.join(answer.split())[:160]!r}")
        rows = [f"**{prompt}**\n\n{answer}" for prompt, answer in answers]
        if self.tensorboard:
            with self._tensorboard_may_fail():
                self.tensorboard.add_text(name, "\n\n---\n\n".join(rows), step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.say(text)

    def close(self) -> None:
        """Write what is left and end the bar. Raises UsageError if rows cannot be written."""
        self._write_rows()
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            with self._tensorboard_may_fail():
                self.tensorboard.close()
        threading.excepthook = self._threads_hook
        if self.waiting:
            raise UsageError(
                f"{len(self.waiting)} rows of {self.path} were not written: "
                f"{say_full(self.path.parent)}. The checkpoints and the exported model, if "
                "there are any, are complete."
            )


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of a metrics.jsonl, none if there is no file. A last line that was cut is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """Draw the loss over tokens as a PNG: each step faint, a running mean over it, validation as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if row["loss"] is not None]  # a skipped step may have no loss
    tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 50)
    smooth = [fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    if window > 1:
        axes.plot(tokens, losses, color="#9db8d9", linewidth=0.8, label="each step")
    mean = f"mean of {window} steps" if window > 1 else "each step"
    axes.plot(tokens, smooth, color="#1f4e8c", linewidth=1.8, label=mean)
    held_out = [row for row in rows if row.get("validation_loss") is not None]
    if held_out:
        axes.plot(
            [row["tokens"] / 1e6 for row in held_out],
            [row["validation_loss"] for row in held_out],
            "o-",
            color="#d1651d",
            markersize=4,
            linewidth=1,
            label="held out",
        )
    axes.set(xlabel="tokens seen, millions", ylabel="loss, nats per token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:  # not fatal: metrics.jsonl has the numbers
        path.unlink(missing_ok=True)
        print(f"note: {path} cannot be drawn ({say_unwritten(path.parent, error)})", flush=True)


class LateReader:
    """Reads the loss and the gradient norm of a step while the device computes the next one.

    `.item()` right after a step would leave the device idle from the moment it has the loss until the next
    step has been launched: some milliseconds for the log, the data and the collectives. So the copy of both
    numbers to the host is queued behind the step that makes them. It is read after the next step has been
    launched, or before, if a decision depends on it.

        reading = LateReader(device)
        while ...:
            reading.begin()
            loss, grad_norm = train_step(...)
            reading.put(row, loss, grad_norm)
            for row in reading.take(all=saves or validates):   # without `all` the newest step waits a turn
                log.step(row)
    """

    def __init__(self, device: torch.device, late: bool | None = None):
        """late: None reads late on a GPU only. A CPU has computed a step when it returns, so its row need not
        wait for the next one."""
        self.device = device
        self.late = device.type == "cuda" if late is None else late
        self._waiting: deque[_Step] = deque()
        self._from = None  # the moment from which the step under way counts

    def begin(self) -> None:
        """Begin a step. Its seconds count from the end of the step before or, after `take(all=True)`, from
        now, so that a validation or a checkpoint in between counts for no step."""
        if self._from is None:
            self._from = moment(self.device)

    def put(self, row: dict, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Note a launched step. Its row gets the two scalars and `step_seconds` when they are read."""
        values = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        if self.device.type == "cuda":
            values = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
        end = moment(self.device)
        self._waiting.append(_Step(row, values, self._from, end))
        self._from = end

    def take(self, all: bool) -> list[dict]:
        """Return the rows of the steps that are done, oldest first. `all`: wait for the newest."""
        rows = []
        while len(self._waiting) > (1 if self.late and not all else 0):
            step = self._waiting.popleft()
            seconds = seconds_between(step.begin, step.end)  # from here on the values are on the host
            loss, grad_norm = step.values.tolist()
            rows.append(step.row | {"loss": loss, "grad_norm": grad_norm, "step_seconds": seconds})
        if all:
            self._from = None
        return rows


class _Step(NamedTuple):
    row: dict
    values: torch.Tensor  # (2,) float64 on the host; a GPU's copy is complete at `end`
    begin: Any  # moments: events of a GPU, or seconds where the host computes
    end: Any


class SkippedSteps:
    """Counts the steps whose gradient was not finite, and refuses more than `allowed` in a row.

    Such a step changes nothing (parallel/clip.py), except under a chunk manager without clipping, which steps
    while gradients arrive and cannot leave a step out. total, in_a_row: the counts from before a resumption.
    """

    def __init__(self, allowed: int, total: int = 0, in_a_row: int = 0):
        self.allowed, self.total, self.in_a_row = allowed, total, in_a_row

    def judge(self, row: dict) -> dict:
        """Return the row of a step as it is to be written: values that are not finite become None, which JSON
        has, and `skipped_steps` is the number of such steps so far. Raises UsageError if there were more in a
        row than allowed, on every rank, since all ranks see the same values."""
        not_finite = [name for name in ("loss", "grad_norm") if not math.isfinite(row[name])]
        if not not_finite:
            self.in_a_row = 0
            return row
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > self.allowed:
            name, value = not_finite[-1].replace("grad_norm", "gradient norm"), row[not_finite[-1]]
            before = f" after {self.allowed} others in a row" if self.allowed else ""
            raise UsageError(
                f"the {name} of step {row['step']} is {value}{before}: nothing of that step was written, and "
                "the newest checkpoint is from before. Use a lower `lr`, look at the data of that step, or "
                f"allow more such steps in a row with skip_nonfinite={self.allowed + 1} or more."
            )
        return row | dict.fromkeys(not_finite) | {"skipped_steps": self.total}


def skipped_so_far(rows: list[dict]) -> tuple[int, int]:
    """Return how many steps of these rows were skipped, and how many of those are the last ones in a row."""
    total = max((row.get("skipped_steps") or 0 for row in rows), default=0)
    in_a_row = 0
    for row in reversed(rows):
        if "skipped_steps" not in row:
            break
        in_a_row += 1
    return total, in_a_row


class DevicePeak:
    """Tracks the highest bytes that torch's allocator had on a device since the last `reset` of this object.

    torch keeps a single peak for each device, which a reset clears for all readers. Here several readers can
    reset at different moments (PeakMemory once a step, the tracer of placement auto at each group of
    modules), because every reset first notes the peak for all the others.
    """

    _readers: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.allocated = self.reserved = 0
        DevicePeak._readers.add(self)
        self.reset()

    def read(self) -> tuple[int, int]:
        """Return the peaks of the allocated and of the reserved bytes. A device budget limits the latter."""
        stats = torch.cuda.memory_stats(self.index)
        self.allocated = max(self.allocated, stats.get("allocated_bytes.all.peak", 0))
        self.reserved = max(self.reserved, stats.get("reserved_bytes.all.peak", 0))
        return self.allocated, self.reserved

    def reset(self) -> None:
        for reader in list(DevicePeak._readers):
            if reader.index == self.index:
                reader.read()
        torch.cuda.reset_peak_memory_stats(self.index)
        self.allocated = self.reserved = 0


class MemoryPeaks(NamedTuple):
    """Peaks of one rank in bytes. `host` is a sum of two peaks, so a little high, where Linux does not count
    pinned memory as resident."""

    device: int  # allocated by torch; 0 where the host is the device
    host: int  # resident memory of the process, pinned memory included
    device_reserved: int  # held by torch's allocator, allocated or not
    host_pinned: int  # pinned for copies; torch rounds each block up to a power of two and keeps it


class PeakMemory:
    """Measures the highest memory use of this process between two calls of `take`."""

    def __init__(self, device: torch.device):
        self.on_device = DevicePeak(device) if device.type == "cuda" else None
        self.pinned_is_resident = self.on_device is None or pinned_memory_is_resident()
        self.take()

    def take(self) -> MemoryPeaks:
        allocated = reserved = pinned = 0
        if self.on_device:
            allocated, reserved = self.on_device.read()
            self.on_device.reset()
            pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
            torch.cuda.reset_peak_host_memory_stats()
        resident = _peak_resident_bytes()
        host = resident if self.pinned_is_resident else resident + pinned
        return MemoryPeaks(allocated, host, reserved, pinned)


def pinned_memory_is_resident() -> bool:
    """Return whether Linux counts pinned memory as resident memory of this process.

    The pages belong to the GPU's driver, and whether they count depends on how it maps them. So we pin a
    little memory, and look up the mapping that holds it in /proc/self/smaps. The answer is yes where that
    file cannot be read.
    """
    probe = torch.ones(2**21, dtype=torch.uint8, pin_memory=True)
    try:
        mappings = Path("/proc/self/smaps").read_text()
    except OSError:
        return True
    return resident_bytes_at(probe.data_ptr(), mappings) >= probe.nbytes


def resident_bytes_at(address: int, mappings: str) -> int:
    """Return the `Rss` in bytes of the mapping that holds `address`, from the text of /proc/self/smaps."""
    here = False
    for line in mappings.splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_resident_bytes() -> int:
    """Return the high-water mark since the last call, or since the start where Linux forbids a reset."""
    status = Path("/proc/self/status")
    high_water = re.search(r"^VmHWM:\s*(\d+)", status.read_text() if status.exists() else "", re.MULTILINE)
    if high_water:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
        except OSError:
            pass  # a locked-down container: the mark stays the peak of the whole run
        return int(high_water[1]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


class _Bar:
    """Shows a rich progress bar on a terminal, else prints a line every 15 seconds."""

    LINE_EVERY_S = 15.0

    def __init__(self, first_step: int, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.rich = steps, None
        self.last_line = -math.inf  # when a line was printed; the first row has one at once
        if sys.stdout is not None and sys.stdout.isatty():
            self.rich = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[row]}"),
                TimeRemainingColumn(),
            )
            self.task = self.rich.add_task("", total=steps, completed=first_step, row="")
            self.rich.start()

    def step(self, row: dict) -> None:
        loss = "not finite, skipped" if row["loss"] is None else f"{row['loss']:.3f}"
        text = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
        if self.rich:
            self.rich.update(self.task, completed=row["step"], row=text)
        elif row["step"] == self.steps or time.monotonic() - self.last_line > self.LINE_EVERY_S:
            left = (self.steps - row["step"]) * row["step_seconds"]
            print(f"step {row['step']}/{self.steps}  {text}  {_duration(left)} left", flush=True)
            self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        if self.rich:
            # an answer may have [brackets] in it
            self.rich.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.rich:
            self.rich.stop()


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"
