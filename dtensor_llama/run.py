"""A run folder and the process that trains into it: claimed by one run, stopped in order, resumed as the same
run."""

import fcntl
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

LOOK_FOR_LAUNCHER_S = 1.0

# Names in what a checkpoint says about its run, beside the flags that must be the same.
CONTENT = "the content of --data.path"  # a hash of tokens and masks
GENERATION = "generation_config.json"  # its content; says nothing about the training
SETTINGS = "settings"  # {flag: value} of what a resumed run may have otherwise, and is told about


def refuse_below(low: float, flags: dict[str, float | None], *, exclusive: bool = False) -> None:
    """UsageError for the first {flag: value} under `low`, at it if exclusive, infinite or nan; None is not
    asked for."""
    for flag, value in flags.items():
        if value is not None and not (low < value < float("inf") or value == low and not exclusive):
            rule = f"a number above {low}" if exclusive else f"{low} or more"
            raise UsageError(f"{flag} {value} is not possible; use {rule}.")


def claim_run_dir(run_dir: Path, fresh: bool):
    """Make the folder ours: refused while another process trains in it and, if `fresh`, when it holds a run
    already.

    Returns the open lock file; the claim ends when it is closed, or with the process.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise UsageError(
            f"--run-dir {run_dir} cannot be written ({error.strerror}); choose another folder."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"--run-dir {run_dir} is in use by another running process; wait for it to end, or choose another "
            "folder."
        ) from None
    found = [name for name in ("metrics.jsonl", "checkpoints", "hf") if (run_dir / name).exists()]
    if fresh and found:
        raise UsageError(
            f"--run-dir {run_dir} is already in use: it holds a run ({', '.join(found)}), and "
            "--checkpoint.resume never would write over it; choose another folder, or --checkpoint.resume "
            "auto to go on with it."
        )
    return lock


class StopSignal:
    """`asked` becomes true on SIGTERM or Ctrl-C; the loop finishes its step, writes a checkpoint and ends. A
    second Ctrl-C ends at once. (torchrun turns one Ctrl-C into an interrupt and a termination, so those two
    count as one.) So it does when the terminal is closed, unless the run was started with nohup, which goes
    on then.

    launcher_pid: of the torchrun that started this process, if one did. A launcher that is killed (the kernel
        does it when memory runs out) cannot end its ranks, which would train on and keep the run folder
        locked. So `asked` becomes true within a second or two of its end, and `say` is told.
    """

    def __init__(self, launcher_pid: int | None = None, say: Callable[[str], None] = lambda text: None):
        self.asked = False
        if launcher_pid is not None:
            threading.Thread(target=self._watch, args=(launcher_pid, say), daemon=True).start()
        signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _watch(self, launcher_pid: int, say: Callable[[str], None]) -> None:
        while os.getppid() == launcher_pid:  # an orphan has another parent
            time.sleep(LOOK_FOR_LAUNCHER_S)
        say("the launcher is gone; the run stops as if it had been asked to")
        self.asked = True

    def _ask(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True


def refuse_other_run(checkpoint: Path, saved: dict, now: dict) -> None:
    """UsageError if a {flag: value} of `now` is not what the checkpoint was `saved` with: its position would
    mean nothing.

    A checkpoint from before there was a hash of the data has none, and is not refused for that."""
    for flag, value in now.items():
        unknown = flag == CONTENT and not (saved.get(flag) and value)
        if flag not in (SETTINGS, GENERATION) and not unknown and saved.get(flag) != value:
            raise UsageError(
                f"{flag} is not what checkpoint {checkpoint} was trained with "
                f"({_difference(saved.get(flag), value)}); use the same, or another --run-dir for a new run."
            )


def _difference(saved, value) -> str:
    if isinstance(saved, dict) and isinstance(value, dict):
        return ", ".join(
            f"{key} {saved.get(key)} -> {value.get(key)}" for key in value if saved.get(key) != value.get(key)
        )
    return f"{saved} -> {value}"


def changed_settings(saved: dict, now: dict, step: int, rate_of: Callable[[dict], float]) -> list[str]:
    """In words, which settings a resumed run has that the checkpoint was not trained with, and what that does
    to the learning rate of the next step. saved, now: what refuse_other_run compares. rate_of: settings ->
    that learning rate."""
    before, after = saved.get(SETTINGS, {}), now[SETTINGS]
    changed = [
        f"{flag} {before[flag]} -> {value}"
        for flag, value in after.items()
        if flag in before and before[flag] != value
    ]
    if not changed:
        return []
    said = [f"not as the checkpoint was trained: {', '.join(changed)}"]
    old_rate, new_rate = rate_of({**after, **before}), rate_of(after)
    if not math.isclose(old_rate, new_rate, rel_tol=1e-6):
        times = f" ({new_rate / old_rate:.3g} times)" if old_rate else ""
        said.append(
            f"the learning rate of step {step + 1} is {new_rate:.3g} and would have been {old_rate:.3g}{times}"
        )
    return said


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
    """Save it in RUN/tokenizer as training begins: a checkpoint can then be exported though the run never
    came to its end, and though what its flags named is gone. A tokenizer that lies there already is not
    written over itself."""
    home = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    if home.resolve() != (run_dir / "tokenizer").resolve():
        tokenizer.save(run_dir / "tokenizer", chat_template)


def made_with() -> dict:
    """What a run was made with, for its config.json; git_revision is None outside a checkout."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_revision": git.stdout.strip() or None,
    }


def say_where_things_are(
    run_dir: Path, rows: list[dict], step: int, steps: int, stopped: bool, chat: bool = False
) -> None:
    """The closing words of a run. rows: of metrics.jsonl; stopped: asked to, before all `steps` were done;
    chat: what it trained answers conversations."""
    if not rows:
        print(f"nothing to train: {step} steps are done already, and this run folder has no rows")
        return
    # none of a skipped step
    losses = [row["loss"] for row in rows if row["loss"] is not None] or [float("nan")]
    last = losses[-20:]
    print(
        f"\nstopped as asked after step {step} of {steps}; the same command goes on from there"
        if stopped
        else f"\ndone: {step} steps, loss {losses[0]:.3f} -> {sum(last) / len(last):.3f} "
        f"(mean of the last {len(last)})"
    )
    # to be typed as they are
    hf, logs = (shlex.quote(str(run_dir / name)) for name in ("hf", "tensorboard"))
    print(
        f"run folder    {run_dir}\ntensorboard   tensorboard --logdir {logs}\n"
        f"loss curve    {run_dir / 'loss.png'}"
    )
    if (run_dir / "hf").is_dir() and not stopped:
        asking = "--chat" if chat else "--prompt 'Once upon a time'"
        print(
            f"model         {run_dir / 'hf'}   (Hugging Face format)\n"
            f"try           python {_neighbour('generate.py')} --model {hf} {asking}",
            flush=True,
        )
    if chat and (run_dir / "hf").is_dir() and not stopped:
        print(
            f"serve         transformers serve {hf}   (pip install '.[serve]'), or\n"
            f"              vllm serve {hf}",
            flush=True,
        )


def _neighbour(name: str) -> str:
    """Another recipe beside the one that runs, as a shell takes it from the current folder."""
    beside = Path(sys.argv[0]).parent / name
    return shlex.quote(str(beside)) if beside.is_file() else f"recipes/{name}"
