"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar, the loss curve as PNG. One process
writes it."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from dtensor_llama.clock import moment, seconds_between
from dtensor_llama.errors import UsageError
from dtensor_llama.places import is_full, say_full

GIB = 2**30


class RunLog:
    """Writes one row per step to the run folder, and shows a bar with tokens/s and the time left.

    After a resume at `first_step` the rows of later steps, which a killed run may have left, are removed
    first: there is one row per step, whatever happened. Made and used on one rank only; it runs no
    collectives.

    A row that cannot be written, for example on a full disk, is kept and tried again with the next one:
    training goes on, and says so once. TensorBoard's events are left out from then on.
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
        self._to_tensorboard(lambda: self._open(SummaryWriter, run_dir / "tensorboard", first_step + 1))

    def _open(self, writer, folder: Path, purge_step: int) -> None:
        self.tensorboard = writer(folder, purge_step=purge_step)

    def step(self, row: dict) -> None:
        """`row` is a line of metrics.jsonl: step, loss, grad_norm, lr, tokens, ...; numbers, or None where
        unknown."""
        self.rows.append(row)
        self.waiting.append((json.dumps(row) + "\n").encode())
        self._write_rows()
        if self.tensorboard:
            self._to_tensorboard(lambda: self._add_scalars(row))
        self.bar.step(row)

    def _add_scalars(self, row: dict) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self.tensorboard.add_scalar(f"train/{name}", value, row["step"])

    def _write_rows(self) -> None:
        data, was_full = b"".join(self.waiting), len(self.waiting) > 1
        try:
            written = 0
            while written < len(data):  # without a buffer a write may take a part only
                written += self.file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):  # never half a row under a whole one
                os.ftruncate(self.file.fileno(), self.good_bytes)
            if not was_full:
                self.say(
                    f"note: a row of {self.path} cannot be written ({self._reason(error)}); training "
                    "goes on, and the rows are written when there is room"
                )
            return
        self.good_bytes += len(data)
        self.waiting.clear()

    def _to_tensorboard(self, do: Callable[[], None]) -> None:
        """Call `do`; when it fails, its thread or its file is gone, and there are no more events."""
        try:
            do()
        except OSError as error:
            self.tensorboard = None
            self.say(
                f"note: TensorBoard's events cannot be written ({self._reason(error)}); metrics.jsonl "
                "has the same numbers"
            )

    def _reason(self, error: OSError) -> str:
        return say_full(self.path.parent) if is_full(error) else str(error)

    def _on_thread_failure(self, failure) -> None:
        """TensorBoard writes in a thread. What fails there it raises here too, so its traceback need not be
        printed."""
        of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and issubclass(failure.exc_type, OSError)):
            self._threads_hook(failure)

    def text(self, name: str, step: int, answers: list[tuple[str, str]]) -> None:
        """(prompt, answer) pairs after `step`: printed shortened, whole in TensorBoard's text tab."""
        for prompt, answer in answers:
            self.say(f"    {' '.join(prompt.split())[-80:]!r} -> {' '.join(answer.split())[:160]!r}")
        rows = [f"**{prompt}**\n\n{answer}" for prompt, answer in answers]
        if self.tensorboard:
            self._to_tensorboard(lambda: self.tensorboard.add_text(name, "\n\n---\n\n".join(rows), step))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.say(text)

    def close(self) -> None:
        """UsageError if rows are left that could not be written."""
        self._write_rows()
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self._to_tensorboard(self.tensorboard.close)
        threading.excepthook = self._threads_hook
        if self.waiting:
            raise UsageError(
                f"{len(self.waiting)} rows of {self.path} were not written: "
                f"{say_full(self.path.parent)}. The checkpoints and the exported model, if "
                "there are any, are complete."
            )


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out. No file: no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """Loss over tokens as a PNG: each step faint, a running mean over it, validation as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    rows = [row for row in rows if row["loss"] is not None]  # of a skipped step there may be none
    tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 50)
    smooth = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
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
    except OSError as error:  # the picture shows what metrics.jsonl has
        path.unlink(missing_ok=True)
        reason = say_full(path.parent) if is_full(error) else error
        print(f"note: {path} cannot be drawn ({reason})", flush=True)
    pyplot.close(figure)


class LateReader:
    """Reads the loss and the gradient norm of a step while the device computes the next one.

    `.item()` right after a step would leave the device idle from the moment it has the loss until the next
    step has been
    launched: some milliseconds for the log, the data and the collectives. So their copy to the host is queued
        behind the step that makes them, and is read when the next step has been launched, or before, if
        somebody has to know.

        reading = LateReader(device)
        while ...:
            reading.begin()
            loss, grad_norm = train_step(...)
            reading.put(row, loss, grad_norm)
            for row in reading.take(all=saves or validates):      # without `all` the newest step is left for the next turn
                log.step(row)
    """

    def __init__(self, device: torch.device, late: bool | None = None):
        """late: None: on a GPU. A CPU has computed a step when it returns; its row need not wait for the next
        one."""
        self.device = device
        self.late = device.type == "cuda" if late is None else late
        self._waiting: deque[_Step] = deque()
        self._from = None  # the moment from which the step under way counts

    def begin(self) -> None:
        """A step begins. Its seconds count from the end of the step before, or, after `take(all=True)`, from
        here: what was done in between, a validation or a checkpoint, is not the step's."""
        if self._from is None:
            self._from = moment(self.device)

    def put(self, row: dict, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """loss and grad_norm are scalars on the device; the row gets them, and `step_seconds`, when they are
        read."""
        values = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        if self.device.type == "cuda":
            values = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
        end = moment(self.device)
        self._waiting.append(_Step(row, values, self._from, end))
        self._from = end

    def take(self, all: bool) -> list[dict]:
        """The rows of the steps that are over, oldest first; `all`: the newest too, for which the host then
        waits."""
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
    values: torch.Tensor  # (2,) float64 on the host, on a GPU still on its way until `end`
    begin: Any  # moments: events of the device, or seconds where the host is the device
    end: Any


class SkippedSteps:
    """Counts the steps whose gradient was not finite. Such a step changed nothing (parallel/clip.py), but
    under a chunk manager without clipping, where none may be left out.

    allowed: how many in a row a run may have (--train.skip-nonfinite).
    """

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.in_a_row = self.total = 0

    def judge(self, row: dict) -> dict:
        """The row of a step as it is to be written: what is not finite is None, which JSON has, and
        `skipped_steps` is the number of such steps so far. UsageError if there were more in a row than
        allowed; all ranks see the same."""
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
                f"the {name} of step {row['step']} is {value}{before}: nothing of that step was written, and the "
                "newest checkpoint is from before. Lower --train.lr, look at the data of "
                f"that step, or use --train.skip-nonfinite {self.allowed + 1} or more, which leaves out so many "
                "such steps in a row."
            )
        return row | dict.fromkeys(not_finite) | {"skipped_steps": self.total}


class DevicePeak:
    """The highest bytes that torch's allocator had on a device since the last `reset` of this object.

    torch keeps a single peak for each device, so whoever resets it takes it from everybody else. Here several
    readers can reset at different moments (PeakMemory once a step, the tracer of placement auto at each group
    of modules), because every reset first notes the peak for all the others.
    """

    _readers: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.allocated = self.reserved = 0
        DevicePeak._readers.add(self)
        self.reset()

    def read(self) -> tuple[int, int]:
        """Peaks of the allocated and of the reserved bytes. A device budget binds what is reserved."""
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
    """Bytes of one rank. `host` is a little high where Linux leaves out pinned memory: a sum of two peaks."""

    device: int  # allocated by torch; 0 where the host is the device
    host: int  # resident memory of the process, pinned memory included
    device_reserved: int  # held by torch's allocator, allocated or not
    host_pinned: int  # pinned for copies; torch rounds each block up to a power of two and keeps it


class PeakMemory:
    """Highest memory use since the last call."""

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
    """Whether the resident memory that Linux states for this process holds its pinned memory too.

    The pages belong to the GPU's driver, and whether they count depends on how it maps them. So we pin a
    little, and look up what /proc/self/smaps says of the mapping that holds it. Where nobody may read that
    file the answer is yes.
    """
    probe = torch.ones(2**21, dtype=torch.uint8, pin_memory=True)
    try:
        mappings = Path("/proc/self/smaps").read_text()
    except OSError:
        return True
    return resident_bytes_at(probe.data_ptr(), mappings) >= probe.nbytes


def resident_bytes_at(address: int, mappings: str) -> int:
    """The `Rss` of the mapping that holds `address`, in bytes. mappings: the text of /proc/self/smaps."""
    here = False
    for line in mappings.splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_resident_bytes() -> int:
    """The high-water mark since the last call, or since the start where Linux lets nobody reset it."""
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    high_water = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    if high_water:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
        except OSError:
            pass  # a locked-down container: the peak of the run, then
        return int(high_water[0]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


class _Bar:
    """A rich progress bar on a terminal, else a line now and then."""

    LINE_EVERY_S = 15.0

    def __init__(self, first_step: int, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.last_line, self.first_row = steps, time.monotonic(), True
        self.rich = None
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
        elif (
            self.first_row
            or row["step"] == self.steps
            or time.monotonic() - self.last_line > self.LINE_EVERY_S
        ):
            left = (self.steps - row["step"]) * row["step_seconds"]
            print(f"step {row['step']}/{self.steps}  {text}  {_duration(left)} left", flush=True)
            self.last_line, self.first_row = time.monotonic(), False

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
