"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar, the loss curve as PNG. One process writes it."""

import json
import sys
import time
from pathlib import Path

import torch

GIB = 2**30


class RunLog:
    """Writes one row per step to the run folder, and shows a bar with tokens/s and the time left.

    After a resume at `first_step` the rows of later steps, which a killed run may have left, are removed first: there is
    one row per step, whatever happened. Made and used on one rank only; it runs no collectives.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        staged = self.path.with_suffix(".partial")
        staged.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        staged.replace(self.path)                     # a kill here leaves the old rows or the new ones
        self.file = self.path.open("a", encoding="utf-8", buffering=1)      # each row reaches the disk's cache at once
        self.tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        self.bar = _Bar(first_step, steps)

    def step(self, row: dict) -> None:
        """`row` is a line of metrics.jsonl: step, loss, grad_norm, lr, tokens, ...; numbers, or None where unknown."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.tensorboard.add_scalar(f"train/{name}", value, row["step"])
        self.bar.step(row)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.say(text)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.tensorboard.close()


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
    tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 50)
    smooth = [sum(losses[max(0, i - window + 1):i + 1]) / len(losses[max(0, i - window + 1):i + 1])
              for i in range(len(losses))]
    axes.plot(tokens, losses, color="#9db8d9", linewidth=0.8, label="each step")
    axes.plot(tokens, smooth, color="#1f4e8c", linewidth=1.8, label=f"mean of {window} steps")
    held_out = [row for row in rows if row.get("validation_loss") is not None]
    if held_out:
        axes.plot([row["tokens"] / 1e6 for row in held_out], [row["validation_loss"] for row in held_out], "o-",
                  color="#d1651d", markersize=4, linewidth=1, label="held out")
    axes.set(xlabel="tokens seen, millions", ylabel="loss, nats per token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


class PeakMemory:
    """Highest memory use since the last call, in bytes: (device, host). The device is 0 where the host is the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.take()

    def take(self) -> tuple[int, int]:
        device_bytes = 0
        if self.device.type == "cuda":
            device_bytes = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
        high_water = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        if high_water:
            try:
                Path("/proc/self/clear_refs").write_text("5")      # Linux: start the high-water mark anew
            except OSError:
                pass                                               # a locked-down container: the peak of the run, then
            return device_bytes, int(high_water[0]) * 1024
        import psutil

        return device_bytes, psutil.Process().memory_info().rss


class _Bar:
    """A rich progress bar on a terminal, else a line now and then."""

    LINE_EVERY_S = 15.0

    def __init__(self, first_step: int, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.last_line, self.first_row = steps, time.monotonic(), True
        self.rich = None
        if sys.stdout.isatty():
            self.rich = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[row]}"),
                                 TimeRemainingColumn())
            self.task = self.rich.add_task("", total=steps, completed=first_step, row="")
            self.rich.start()

    def step(self, row: dict) -> None:
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self.rich:
            self.rich.update(self.task, completed=row["step"], row=text)
        elif self.first_row or row["step"] == self.steps or time.monotonic() - self.last_line > self.LINE_EVERY_S:
            left = (self.steps - row["step"]) * row["step_seconds"]
            print(f"step {row['step']}/{self.steps}  {text}  {_duration(left)} left", flush=True)
            self.last_line, self.first_row = time.monotonic(), False

    def say(self, text: str) -> None:
        self.rich.console.print(text, highlight=False) if self.rich else print(text, flush=True)

    def close(self) -> None:
        if self.rich:
            self.rich.stop()


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"
