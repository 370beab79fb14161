"""A run folder and the process that trains into it: claimed by one run, stopped in order, resumed as the same
run, and described in config.json and on the screen."""

import fcntl
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtensor_llama.atomic import on_all_ranks
from dtensor_llama.checkpoint import (
    Checkpointer,
    newest,
    read_meta,
    restore_training_state,
    training_state,
)
from dtensor_llama.cli import CONTENT, FROZEN, Launch, commands_for
from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.flops import Utilization, peak_flops
from dtensor_llama.loss import choose_loss
from dtensor_llama.metrics import RunLog, RunReport, amount, draw_loss_curve
from dtensor_llama.schedule import Schedule, learning_rate
from dtensor_llama.terminal import Say

LOOK_FOR_LAUNCHER_S = 1.0

Values = dict[str, Any]  # by name, as JSON holds them

# Names in what a checkpoint records about its run, beside what must be the same.
GENERATION = "generation_config.json"  # its content, which does not concern the training
SETTINGS = "settings"  # {name: value} of settings that a resumed run may change


# ---- The run folder and the process ------------------------------------------------------------------------


def claim_run_dir(run_dir: Path, fresh: bool):
    """Reserve the folder for this process; refused while another process trains in it and, if `fresh`, when
    it holds a run already.

    Returns the open lock file. The claim ends when it is closed, or with the process.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise UsageError(
            f"run_dir={run_dir} cannot be written ({error.strerror}); choose another folder."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"run_dir={run_dir} is in use by another running process; wait for it to end, or choose another "
            "folder."
        ) from None
    found = [name for name in ("metrics.jsonl", "checkpoints", "hf") if (run_dir / name).exists()]
    if fresh and found:
        raise UsageError(
            f"run_dir={run_dir} is already in use: it holds a run ({', '.join(found)}), which resume=never "
            "would overwrite; choose another folder, or resume=auto to continue that run."
        )
    return lock


class StopSignal:
    """Sets `asked` on SIGTERM or Ctrl-C; the loop then finishes its step, writes a checkpoint and ends.

    A second Ctrl-C ends the process at once. (torchrun turns one Ctrl-C into an interrupt and a termination,
    which therefore count as one.) Closing the terminal also sets `asked`; under nohup it does not.

    launcher_pid: the torchrun that started this process, if there is one. A launcher that is killed (the
        kernel does it when memory runs out) cannot end its ranks, which would train on and keep the run
        folder locked. So `asked` is set within a second or two of its end, and `say` prints a line.
    """

    def __init__(self, launcher_pid: int | None, say: Say):
        self.asked = False
        if launcher_pid is not None:
            threading.Thread(target=self._watch, args=(launcher_pid, say), daemon=True).start()
        signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _watch(self, launcher_pid: int, say: Say) -> None:
        while os.getppid() == launcher_pid:  # an orphan has another parent
            time.sleep(LOOK_FOR_LAUNCHER_S)
        say("the launcher is gone; the run stops as if it had been asked to")
        self.asked = True

    def _ask(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True


# ---- Resuming ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """Holds what a checkpoint records about its run, to be compared when a run resumes from it.

    The names are those that the user knows, such as flags: they stand in messages and in the checkpoint.
    """

    fixed: Values  # must be the same, or the data position and the weights would mean something else
    settings: Values  # may change, and the resumed run prints how; Schedule's fields are among them
    generation: Values  # the content of generation_config.json, for an export

    def to_meta(self) -> Values:
        """Return the `meta` for training_state."""
        return {**self.fixed, SETTINGS: self.settings, GENERATION: self.generation}

    def refuse_early(self, asked: str, run_dir: Path) -> None:
        """Raise the UsageError about other settings that `resume` would raise, before ranks wait for each
        other and a model is built. It leaves to `resume` whatever only a whole checkpoint can tell."""
        path = newest(run_dir / "checkpoints") if asked == "auto" else Path(asked)
        saved = None if path is None or asked == "never" else read_meta(path)
        # A checkpoint with LoRA adapters and a run without, or the reverse, has a message of its own.
        if saved and bool(saved.get(FROZEN)) == bool(self.fixed.get(FROZEN)):
            refuse_other_run(path, saved, self.to_meta())

    def refuse_other_ranks(self, config: Any, layout: Any) -> None:
        """Raise UsageError, on every rank, unless all ranks have the same record and settings.

        A command starts each node of a run. If one of them gave another learning rate or other data, replicas
        would drift apart in silence, or ranks would wait for each other in different collectives. config: the
        recipe's dataclass. layout: its `parallel`, resolved. The model and the data may have other paths,
        because the record says what is in the files."""
        mine = {**self.fixed, **self.settings, **asdict(config), "parallel": asdict(layout)}
        mine |= {"model": "", "data": ""}
        first, *others = on_all_ranks("the settings of the ranks", lambda: mine)
        for rank, theirs in enumerate(others, start=1):
            for name, difference in _differences(first, theirs):
                raise UsageError(
                    f"{name} not the same on rank {rank} as on rank 0 ({difference}); start all nodes with "
                    "the same command and the same data, and give a value to each setting that was left open."
                )


def resume(
    asked: str,
    checkpoints: Checkpointer,
    model: nn.Module,
    optimizer: Optimizer,
    record: RunRecord,
    say: Say,
) -> tuple[int, int]:
    """Load the checkpoint that was asked for; returns (steps done, sequences read), zeros for a fresh start.

    asked: "auto" for the newest checkpoint if there is one, "never", or a checkpoint's folder
    record: of this run; UsageError unless the checkpoint's agrees
    say: prints on one rank what is resumed and what has changed
    """
    if asked == "never":
        return 0, 0
    path = checkpoints.latest() if asked == "auto" else Path(asked)
    if path is None:
        if (checkpoints.folder.parent / "metrics.jsonl").exists():
            say(f"no checkpoint in {checkpoints.folder}: the run starts anew, and replaces what is beside it")
        return 0, 0
    present = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    state = training_state(model, optimizer)
    checkpoints.load(path, state, lambda saved: refuse_other_run(path, saved, record.to_meta()))
    progress = restore_training_state(state, model, optimizer)
    step, meta = progress["step"], progress["meta"]
    for group, setting in zip(optimizer.param_groups, present, strict=True):
        group.update(setting)  # weight decay and the like are what this run asks for, not what was saved
    say(f"resuming from {path}: {step} steps done")
    if step >= Schedule.named(record.settings).steps:
        say("resuming  no step is left: as many as were asked for, or more, are done already")
    if asked != "auto":
        say("resuming  this command begins there at every start; to go on where it stops, name no checkpoint")
    if record.fixed.get(CONTENT) and not meta.get(CONTENT):  # an older checkpoint
        say(f"resuming  unchecked: the checkpoint does not record {CONTENT}; it must be the same as before")

    def rate_of(settings: Values) -> float:
        return learning_rate(Schedule.named(settings), step)

    for change in changed_settings(meta, record.to_meta(), step, rate_of):
        say(f"resuming  {change}")
    return step, progress["position"]


def refuse_other_run(checkpoint: Path, saved: dict, now: dict) -> None:
    """Raise UsageError if a {name: value} of `now` differs from what the checkpoint was saved with.

    saved, now: what RunRecord.to_meta made for the checkpoint and for this run. Where the data differ, the
        message names the settings of the data that do, as these may be the cause.
    An older checkpoint may have no hash of the data or of frozen weights, and is not refused for that."""
    settings = _changed(saved.get(SETTINGS, {}), now.get(SETTINGS, {}))
    of_data = [change for change in settings if change.startswith("--data.")]
    for name, changes in _differences(saved, now):
        if "--data." in name and of_data:
            changes += f"; {', '.join(of_data)}"
        raise UsageError(
            f"{name} not what checkpoint {checkpoint} was trained with ({changes}); use the same, or another "
            "`run_dir` for a new run."
        )


def _differences(before: Values, after: Values) -> Iterator[tuple[str, str]]:
    """Yield the name of each value of `after` that is another one in `before`, with its verb, and how it has
    changed. Hashes of content that one of the two lacks, and what may change, are passed over."""
    for name, value in after.items():
        was, value = _compared(before.get(name)), _compared(value)
        unknown = name in (CONTENT, FROZEN) and not (was and value)
        if name in (SETTINGS, GENERATION) or unknown or was == value:
            continue
        both = isinstance(was, dict) and isinstance(value, dict)
        verb = "are" if " and " in name else "is"
        yield f"{name} {verb}", ", ".join(_changes(was, value)) if both else f"{was} -> {value}"


# Fields of LlamaConfig that checkpoints from before families.py lack, with the values that held then.
_ADDED_LATER = {
    "model_type": "llama",
    "rope_scaling": None,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
}


def _compared(value: Any) -> Any:
    """Return the settings of a model as they are compared: without the fields of config.json that are only
    carried on, and with the values that held before for fields that an older checkpoint lacks. Of LoRA
    adapters the targets are a set, and an alpha that is left open is twice the rank."""
    if not isinstance(value, dict):
        return value
    if "targets" in value:
        alpha = value["alpha"] or 2 * value["rank"]
        value = value | {"alpha": alpha, "targets": sorted(set(value["targets"]))}
    return _ADDED_LATER | {name: own for name, own in value.items() if name != "other_fields"}


def _changes(before: Values, after: Values) -> list[str]:
    return [
        f"{name} {before.get(name)} -> {after[name]}" for name in after if before.get(name) != after[name]
    ]


def _changed(before: Values, after: Values) -> list[str]:
    """Describe the settings that have changed, without those that `before` does not know."""
    return _changes(before, {name: value for name, value in after.items() if name in before})


def changed_settings(saved: dict, now: dict, step: int, rate_of: Callable[[dict], float]) -> list[str]:
    """Describe the settings that a resumed run has changed, and what this does to the learning rate.

    saved, now: what RunRecord.to_meta made for the checkpoint and for this run
    rate_of: returns the learning rate of the next step under the given settings
    """
    before, after = saved.get(SETTINGS, {}), now[SETTINGS]
    changes = _changed(before, after)
    if not changes:
        return []
    lines = [f"not as the checkpoint was trained: {', '.join(changes)}"]
    old_rate, new_rate = rate_of({**after, **before}), rate_of(after)
    if not math.isclose(old_rate, new_rate, rel_tol=1e-6):
        line = f"the learning rate of step {step + 1} is {new_rate:.3g} and would have been {old_rate:.3g}"
        lines.append(line + (f" ({new_rate / old_rate:.3g} times)" if old_rate else ""))
    return lines


# ---- Descriptions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFacts:
    """Holds what a run finds out about itself before it trains."""

    model_config: LlamaConfig
    sequences: Any  # has n_train and n_validation, how many there are, and seq_len, their length
    corpus: str
    layout: Any  # a dataclass with all parallel settings, resolved
    axes: tuple[str, ...]  # names of those of its fields that are sizes of mesh axes
    n_microbatches: int
    device: torch.device
    attention: str  # the kernel, and why


def open_report(
    run_dir: Path,
    first_step: int,
    settings: Values,
    facts: RunFacts,
    data_lines: list[str],
    launch: Launch,
) -> RunReport:
    """Describe the run on the screen and in its config.json, and return what measures and records its steps.

    All ranks enter; the main one prints and writes. first_step: how many steps are done already. settings,
    data_lines: as in describe_run.
    """
    train, seq_len = settings["train"], facts.sequences.seq_len
    utilization = Utilization(
        facts.model_config,
        seq_len,
        train["recompute"],
        step_tokens=train["global_batch_size"] * seq_len,
        n_devices=launch.world_size,
        peak=peak_flops(facts.device, getattr(torch, train["dtype"])),  # measured on a CPU: all ranks enter
    )
    log = None
    if launch.is_main:
        log = RunLog(run_dir, first_step, train["steps"])
        describe_run(run_dir, settings, facts, utilization.peak, data_lines, log.say)
    return RunReport(log, utilization, facts.device, train["skip_nonfinite"])


def describe_run(
    run_dir: Path,
    settings: Values,
    facts: RunFacts,
    peak: tuple[float, str],
    data_lines: list[str],
    say: Say,
) -> None:
    """Write the run's config.json, and print what is about to happen.

    settings: all of the recipe's configuration as nested dicts
    peak: FLOP/s of one device, and the source of the number
    data_lines: what to print about the data
    """
    config, (peak_flop_s, peak_source), layout = facts.model_config, peak, asdict(facts.layout)
    record = {
        **settings,
        "model_config": config.to_hf(),
        "layout": layout,
        "device": str(facts.device),
        "attention_kernel": facts.attention,
        "n_parameters": config.n_parameters,
        **made_with(),
        "peak_flops_per_device": peak_flop_s,
        "peak_flops_source": peak_source,
        "n_training_rows": facts.sequences.n_train,
        "n_validation_rows": facts.sequences.n_validation,
        "corpus": facts.corpus,
    }
    (run_dir / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    train, n_millions = settings["train"], config.n_parameters / 1e6
    say(f"model     {settings['model']}: {n_millions:,.1f}M parameters, attention {facts.attention}")
    for line in data_lines:
        say(line)
    axes = [f"{axis} {layout[axis]}" for axis in facts.axes if layout[axis] > 1]
    say(
        f"layout    {' x '.join(axes) or 'one process'} on {facts.device.type}, ZeRO stage "
        f"{layout['zero_stage']}; {amount(facts.n_microbatches, 'microbatch', 'es')} of "
        f"{amount(train['micro_batch_size'], 'sequence')} per rank and step"
    )
    say(
        f"numbers   {train['dtype']} compute, float32 masters; MFU against {peak_flop_s / 1e12:.2f} TFLOP/s "
        f"({peak_source})"
    )
    say("loss      {}: {}".format(*choose_loss(facts.device)))


def made_with() -> dict:
    """Return the versions that a run was made with; git_revision is None outside a checkout."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_revision": git.stdout.strip() or None,
    }


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
    """Save the tokenizer in RUN/tokenizer as training begins.

    So a checkpoint can be exported even if the run never ends, or if the files that its flags name are gone.
    A tokenizer is not written over itself."""
    home = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    if home.resolve() != (run_dir / "tokenizer").resolve():
        tokenizer.save(run_dir / "tokenizer", chat_template)


def end_run(log: RunLog, run_dir: Path, step: int, steps: int, stopped: bool, chat: bool = False) -> None:
    """Close the log, draw the loss curve, and print what the run has left where; on the rank that logs.

    stopped: the run was asked to stop before all `steps` were done
    chat: the model was trained to answer conversations
    """
    log.close()
    if log.rows:
        draw_loss_curve(log.rows, run_dir / "loss.png")
    say_where_things_are(run_dir, log.rows, step, steps, stopped, chat)


def say_where_things_are(
    run_dir: Path, rows: list[dict], step: int, steps: int, stopped: bool, chat: bool = False
) -> None:
    """Print the closing lines of a run; arguments as in end_run, rows as in metrics.jsonl."""
    if not rows:
        print(f"nothing to train: {step} steps are done already, and this run folder has no rows")
        return
    # A skipped step may have no loss.
    losses = [row["loss"] for row in rows if row["loss"] is not None] or [float("nan")]
    last = losses[-20:]
    if stopped:
        then = "the same command goes on from there"
        if not (run_dir / "checkpoints" / f"step-{step:08d}").exists():
            then = "no checkpoint has it, so the same command goes on from an older one, or starts anew"
        print(f"\nstopped as asked after step {step} of {steps}; {then}")
    else:
        mean = sum(last) / len(last)
        print(f"\ndone: {step} steps, loss {losses[0]:.3f} -> {mean:.3f} (mean of the last {len(last)})")
    print(f"run folder    {run_dir}")
    print(f"tensorboard   tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}")
    print(f"loss curve    {run_dir / 'loss.png'}")
    if (run_dir / "hf").is_dir() and not stopped:
        print(f"model         {run_dir / 'hf'}   (Hugging Face format)")
        print("\n".join(commands_for(run_dir / "hf", chat)), flush=True)
