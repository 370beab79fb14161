"""Starts every recipe: flags become one dataclass, the environment becomes a Launch, and a user's mistake
becomes one line and exit status 2.

This is the only module of the packages that knows flags or reads the environment.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
import tyro

from dtensor_llama.errors import UsageError
from dtensor_llama.places import expanded, is_full, say_full
from dtensor_llama.terminal import hear_ctrl_c_again, make_streams_last

Config = TypeVar("Config")

# The name of a hash of all tokens and masks in the checkpoints of pretrain.py and sft.py.
CONTENT = "the content of --data.path"
# The name of a fingerprint of the frozen weights beside LoRA adapters in the checkpoints of sft.py.
FROZEN = "the content of --model"


# ---- The launch --------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """Describes this process among those that torchrun started."""

    rank: int
    local_rank: int  # among the processes of this machine: it decides which GPU this process takes
    world_size: int
    ranks_per_host: int
    # how often the processes were restarted, where torchrun keeps one store for all attempts
    attempt: int
    launcher_pid: int | None  # of torchrun; None: this process was started without a launcher

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes the run's records."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on the rank that prints."""
        if self.is_main:
            print(text, flush=True)

    def take_device(self) -> torch.device:
        """Return this rank's GPU, which becomes torch's current device, or the CPU if there is no GPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device


def read_launch() -> Launch:
    """Read the environment as torchrun sets it; without it, this is a single process.

    An empty variable counts as unset.

    Raises UsageError if the variables do not fit together, naming the one that is wrong."""
    world_size = _number("WORLD_SIZE", 1, low=1)
    rank = _number("RANK", 0, low=0)
    local_rank = _number("LOCAL_RANK", 0, low=0)
    ranks_per_host = _number("LOCAL_WORLD_SIZE", 1, low=1)
    if rank >= world_size:
        raise UsageError(
            f"RANK={rank} in the environment does not fit WORLD_SIZE={world_size}: ranks count "
            f"from 0 to {world_size - 1}. {LAUNCH_HINT}"
        )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
            if not os.environ.get(name):
                raise UsageError(
                    f"WORLD_SIZE={world_size} in the environment means several processes, and "
                    f"{name} is not set. {LAUNCH_HINT}"
                )
        _number("MASTER_PORT", 0, low=1)
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if n_gpus is not None and local_rank >= n_gpus:
        raise UsageError(
            f"LOCAL_RANK={local_rank} needs a GPU of its own, and this machine shows {n_gpus}; "
            f"launch with torchrun --nproc-per-node {n_gpus}, or show more of them in "
            "CUDA_VISIBLE_DEVICES."
        )
    # If torchrun reuses its store after a restart, stale keys remain, and each attempt needs its own prefix.
    # If it makes a fresh store, no prefix is needed. The count is then not used, as nodes may disagree on it.
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0, low=0) if shares_store else 0
    launcher_pid = os.getppid() if os.environ.get("TORCHELASTIC_RUN_ID") else None
    return Launch(rank, local_rank, world_size, ranks_per_host, attempt, launcher_pid)


LAUNCH_HINT = (
    "torchrun sets all of these (torchrun --nproc-per-node N recipes/...); for one process unset "
    "RANK, LOCAL_RANK and WORLD_SIZE."
)


def _number(name: str, default: int, low: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < low:
        raise UsageError(
            f"{name}={text!r} in the environment is not possible; it must be a whole number "
            f"from {low} on. {LAUNCH_HINT}"
        )
    return int(text)


def refuse_compile_without_compiler(compile: bool, device: torch.device) -> None:
    """Raise UsageError if torch.compile was asked for on a CPU, and there is no C++ compiler."""
    if not compile or device.type != "cpu":
        return
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if not any(map(shutil.which, compilers)):
        raise UsageError(
            "`compile` needs a C++ compiler on a CPU and there is none; install g++, or leave it out."
        )


# ---- The recipe: from the command line to the exit status --------------------------------------------------


def run_recipe(
    main: Callable[[Config], None], config_class: type[Config], stdout_is_result: bool = False
) -> None:
    """Parse the command line into `config_class`, call `main`, and end the process as a shell expects it.

    Exit status 0 when main returns, 2 after a UsageError or where the device has no more memory (one line),
    130 after Ctrl-C; any other exception is a defect of ours and keeps its traceback. If several ranks make
    the same mistake, the first one on a machine prints it.

    What is printed never ends a run: see make_streams_last. stdout_is_result: the program exists for what it
    prints. Then a reader that goes away (`| head -1`) ends it with status 141 and without a word, as it ends
    other programs, and a stdout that cannot be written is one line and status 2.
    """
    hear_ctrl_c_again()
    make_streams_last(stdout_is_result)
    config = None
    try:
        config = parse_cli(config_class)
        main(config)
        if stdout_is_result and sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_is_result or not _stdout_is_lost():
            raise
        sys.exit(141)
    except OSError as error:
        written = getattr(config, "run_dir", None) or getattr(config, "out", None)
        if stdout_is_result and _stdout_is_lost():
            message = (
                f"stdout cannot be written ({error.strerror}), and what is printed is the result; write "
                "it elsewhere."
            )
        elif is_full(error):
            folder = error.filename or written or os.getcwd()
            message = f"{say_full(folder)}. Make room, and start the same command again."
        elif error.filename and written and Path(written) in Path(str(error.filename)).parents:
            message = f"{error.filename} cannot be used ({error.strerror}); make it writable, or remove it."
        else:
            raise
        _exit_with_error(message)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            time.sleep(3)  # torchrun ends us as soon as rank 0, which printed the same, is gone
        _exit_with_error(in_flags(str(error), config_class))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        _exit_with_error(_say_out_of_memory(error, config_class))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _exit_with_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# What takes less memory, written in fields. A line is for the recipes that have all of its fields.
TAKES_LESS_MEMORY = (
    "a lower `train.micro_batch_size` or `data.seq_len`, or with `memory.activations`",
    "a lower `train.rows` or `train.seq_len`",
    "train.recompute=full or memory.placement=auto",
    "a lower `batch_size` or `max_new_tokens`",
    "a lower `max_shard_gb`",
    "more processes, for example for `parallel.tp`",
)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no class for this error on a CPU.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _say_out_of_memory(error: Exception, config_class: type) -> str:
    """Return one line that says what takes less memory, among what this recipe's flags can choose."""
    where = "on its host"
    if isinstance(error, torch.OutOfMemoryError):
        where = "on its device, or in the device budget that it was given"
    turned = {text: in_flags(text, config_class) for text in TAKES_LESS_MEMORY}
    remedies = [said for text, said in turned.items() if said != text and "`" not in said]
    remedy = f" It needs less with {', '.join(remedies)}." if remedies else ""
    details = " ".join(str(error).partition(" If reserved but unallocated")[0].split())
    rank = os.environ.get("RANK", "0")
    return f"rank {rank} has no more memory {where}.{remedy} The error was: {details}"


def _stdout_is_lost() -> bool:
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", False)


# ---- Fields and flags --------------------------------------------------------------------------------------


class _Place:
    """Marks the type of a flag that names a file or a folder."""


PLACE = _Place()
FilePath = Annotated[str, PLACE]  # type of a flag that names a file or folder: `~` is the home folder


def in_flags(message: str, config_class: type) -> str:
    """Return a message of the packages with its fields replaced by the recipe's flags, which the user knows.

    The packages know no flags. Their messages name a field of a configuration as Python would, with its value
    (`tp=3`) or alone in backticks, and put its group in front where two groups have a field of that name
    (`lora.rank=0`). With the dataclass of pretrain.py:

        tp=3 and sequence_parallel=True: leave `virtual_stages` out, or use tp=2 --parallel.tp 3 and
        --parallel.sequence-parallel: leave --parallel.virtual-stages out, or use --parallel.tp 2

    What is no field of `config_class` stays as it is.
    """
    flags = _flags_by_field(config_class, "")

    def in_flag(match: re.Match) -> str:
        flag, value = flags.get(match["alone"] or match["field"]), match["value"]
        if flag is None:
            return match[0]
        if value == "False":
            group, dot, name = flag.rpartition(".")
            return f"--{group}{dot}no-{name}"
        return f"--{flag}" if match["alone"] or value == "True" else f"--{flag} {value}"

    alone, with_value = r"`(?P<alone>[a-z_.]+)`", r"(?P<field>[a-z_.]+)=(?P<value>True\b|False\b|(?=\S))"
    return re.sub(rf"{alone}|(?<![\w./-]){with_value}", in_flag, message)


def _flags_by_field(config_class: type, prefix: str) -> dict[str, str]:
    """Map each field, as `group.field` and, if no other has its name, alone, to its flag without dashes."""
    flags, shared = {}, set()
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            inner = _flags_by_field(hints[field.name], f"{flag}.")
            shared |= flags.keys() & inner.keys()
            flags |= inner | {f"{field.name}.{name}": own for name, own in inner.items()}
        else:
            shared |= flags.keys() & {field.name}
            flags[field.name] = flag
    return {name: flag for name, flag in flags.items() if name not in shared}


def values_by_flag(config: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return {flag: value} of some fields of a recipe's configuration, for example of "train.min_lr"."""
    return {"--" + field.replace("_", "-"): attrgetter(field)(config) for field in fields}


class AtLeast(NamedTuple):
    """States a rule for one number of a configuration, for example AtLeast("train.steps", 1)."""

    field: str  # dotted, as in "train.steps"
    low: float
    exclusive: bool = False  # the number must be above `low`
    may_be_infinite: bool = False
    below: float = math.inf  # the number must also be below this


def at_least(low: float, *fields: str, exclusive: bool = False) -> list[AtLeast]:
    """Return the same rule for several fields."""
    return [AtLeast(field, low, exclusive) for field in fields]


def check_numbers(config: Any, rules: list[AtLeast]) -> None:
    """Raise UsageError for the first field that breaks its rule. nan breaks every rule; None means that a
    setting is left open, and breaks none."""
    for rule in rules:
        value = attrgetter(rule.field)(config)
        if value is None or (value == math.inf and rule.may_be_infinite):
            continue
        if not (rule.low < value < rule.below or (value == rule.low and not rule.exclusive)):
            works = f"a number above {rule.low}" if rule.exclusive else f"{rule.low} or more"
            works += f", and less than {rule.below}" if rule.below < math.inf else ""
            raise UsageError(f"{rule.field}={value} is not possible; use {works}.")


def parse_cli(config_class: type[Config], args: list[str] | None = None) -> Config:
    """Return `config_class` filled from the command line. Its fields are the flags; those of nested
    dataclasses are dotted; hyphens and underscores are alike.

    Raises UsageError where tyro would draw a box. --help prints all flags and exits with status 0.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = tyro.cli(config_class, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(printed.getvalue())) from None
    return _with_homes(config, "")


def _with_homes(config: Config, prefix: str) -> Config:
    """Return the dataclass with `~` expanded in every FilePath, also in nested dataclasses. A shell expands
    it only at the beginning of a word, so not in `--model=~/llama`."""
    hints, changed = get_type_hints(type(config), include_extras=True), {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_homes(value, f"{name}.")
        elif isinstance(value, str) and _names_a_place(hints[field.name]):
            if not value:
                raise UsageError(f"`{name}` is empty; name a file or folder, or leave the flag out.")
            changed[field.name] = expanded(value, name)
    return dataclasses.replace(config, **changed)


def _names_a_place(hint) -> bool:
    return PLACE in getattr(hint, "__metadata__", ()) or any(map(_names_a_place, get_args(hint)))


# The frames of tyro's boxes: Unicode's box-drawing characters or, on a stdout in ASCII, bars and crosses.
FRAME = "".join(map(chr, range(0x2500, 0x2580))) + "|+ "


def _one_line(box: str) -> str:
    """Return the first paragraph of tyro's error box, and the flags that it suggests, as one line.

    A box has a title, a paragraph, and further paragraphs under rules. tyro offers no other public way to the
    text of its errors; a private module of 1.0.17, tyro._errors, has hooks that may change in any release.
    tests/test_bad_input.py holds the lines that come out of here.
    """
    lines = [line.strip(FRAME) for line in box.splitlines()]
    text = "\n".join(line if line.strip("-") else "" for line in lines)  # "-----" is a rule in ASCII
    paragraphs = re.split(r"\n{2,}", text.strip("\n"))
    first = paragraphs.pop(0).partition("\n")[2]  # without the title
    if not first and paragraphs:  # the title is underlined, so it is a paragraph of its own
        first = paragraphs.pop(0)
    message = " ".join((first or text).split())
    suggested = re.findall(r"^--[\w.-]+", "\n".join(paragraphs), re.MULTILINE)
    mentioned = ["--help", *re.findall(r"--[\w.-]+", message)]
    similar = [flag for flag in dict.fromkeys(suggested) if flag not in mentioned]
    if similar:
        message += f" Did you mean {' or '.join(similar[:3])}?"
    return f"{message} See --help for all flags."


# ---- Commands to type --------------------------------------------------------------------------------------


def commands_for(hf_folder: Path, chat: bool) -> list[str]:
    """Return lines with the commands that use an exported model, to be printed at the end of a run.

    Paths are quoted, so that the commands can be typed as they are printed. chat: whether the model was
    trained to answer conversations.
    """
    hf = shlex.quote(str(hf_folder))
    beside = Path(sys.argv[0]).parent / "generate.py"  # another recipe, beside the one that runs
    generate = shlex.quote(str(beside)) if beside.is_file() else "recipes/generate.py"
    prompt = "--chat" if chat else "--prompt 'Once upon a time'"
    lines = [f"try           python {generate} --model {hf} {prompt}"]
    if chat:
        lines.append(f"serve         transformers serve {hf}   (pip install '.[serve]'), or")
        lines.append(f"              vllm serve {hf}")
    return lines
