"""The door of every recipe: flags become one dataclass, and a user's mistake becomes one line and exit status
2."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeVar, get_args, get_type_hints

import torch
import tyro

from dtensor_llama.errors import UsageError
from dtensor_llama.places import expanded, is_full, say_full
from dtensor_llama.terminal import hear_ctrl_c_again, make_streams_last

Config = TypeVar("Config")


class _Place:
    """Marks the type of a flag that names a file or a folder."""


PLACE = _Place()
FilePath = Annotated[str, PLACE]  # type of a flag that names a file or folder: `~` is the home folder


class Launch(NamedTuple):
    """Who this process is among those that torchrun started."""

    rank: int
    local_rank: int  # among the processes of this machine: which GPU it takes
    world_size: int
    ranks_per_host: int
    # how often the processes were restarted, where torchrun keeps one store for all attempts
    attempt: int
    launcher_pid: int | None  # of torchrun; None: nobody launched this process


def read_launch() -> Launch:
    """From the environment, as torchrun sets it; without one, a single process. An empty variable is an unset
    one.

    UsageError if the variables do not fit together, naming the one that is wrong."""
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
    # Where torchrun makes a new store for each start, nodes may count their starts differently, and need no
    # count.
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


def run_recipe(
    main: Callable[[Config], None], config_class: type[Config], stdout_is_result: bool = False
) -> None:
    """Parse the command line into `config_class`, call `main`, and end the process as a shell expects it.

    Exit status 0 when main returns, 2 after a UsageError or where the device has no more memory (one line),
    130 after Ctrl-C; anything else is our defect and keeps its traceback. Of several ranks that make the same
    mistake the first on a machine speaks.

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
        if stdout_is_result and _stdout_is_lost():
            said = (
                f"stdout cannot be written ({error.strerror}), and what is printed is the result; write "
                "it elsewhere."
            )
        elif is_full(error):
            written = getattr(config, "run_dir", None) or getattr(config, "out", None)
            folder = error.filename or written or os.getcwd()
            said = f"{say_full(folder)}. Make room, and start the same command again."
        else:
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        sys.exit(2)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            time.sleep(3)  # torchrun ends us as soon as rank 0, which printed the same, is gone
        print(f"error: {in_flags(str(error), config_class)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        rank, said = os.environ.get("RANK", "0"), str(error).partition(" If reserved but unallocated")[0]
        print(
            f"error: rank {rank} has no more memory on its device, or in its --memory.device-budget-gib. Training needs less "
            "with a lower --train.micro-batch-size or --data.seq-len, --train.recompute full, --memory.activations, "
            f"--memory.placement auto, or more ranks. torch says: {said}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def in_flags(message: str, config_class: type) -> str:
    """A message of the packages as a user of a recipe knows its settings: fields become the recipe's flags.

    The packages know no flags. Their messages name a field of a configuration as Python would, with its value
    (`tp=3`) or alone in backticks, and put its group in front where two groups have a field of that name
    (`lora.rank=0`). With the dataclass of pretrain.py:

        tp=3 and sequence_parallel=True: leave `virtual_stages` out, or use tp=2
        --parallel.tp 3 and --parallel.sequence-parallel: leave --parallel.virtual-stages out, or use --parallel.tp 2

    What is no field of `config_class` stays as it is.
    """
    flags = _flags_by_field(config_class, "")

    def with_value(match: re.Match) -> str:
        flag, value = flags.get(match["field"]), match["value"]
        if flag is None:
            return match[0]
        if value == "False":
            group, dot, name = flag.rpartition(".")
            return f"--{group}{dot}no-{name}"
        return f"--{flag}" if value == "True" else f"--{flag} {value}"

    def alone(match: re.Match) -> str:
        flag = flags.get(match["field"])
        return match[0] if flag is None else f"--{flag}"

    message = re.sub(r"`(?P<field>[a-z_.]+)`", alone, message)
    return re.sub(r"(?<![\w.-])(?P<field>[a-z_.]+)=(?P<value>True\b|False\b|(?=\S))", with_value, message)


def _flags_by_field(config_class: type, prefix: str) -> dict[str, str]:
    """{field: flag without its dashes}: each field as `group.field`, and alone where no other has its name."""
    flags: dict[str, str] = {}
    shared = set()
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


def _stdout_is_lost() -> bool:
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", False)


def parse_cli(config_class: type[Config], args: list[str] | None = None) -> Config:
    """`config_class` from the command line; flags are its fields, nested ones dotted, hyphens and underscores
    alike.

    Raises UsageError where tyro would draw a box. --help prints everything and exits with 0.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(config_class, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue())) from None
    return _with_homes(config, "--")


def _with_homes(config: Config, prefix: str) -> Config:
    """The dataclass with `~` expanded in every FilePath, nested dataclasses included: `--model=~/llama` gets
    no help from a shell, which expands it only where it begins a word."""
    hints, changed = get_type_hints(type(config), include_extras=True), {}
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_homes(value, f"{flag}.")
        elif isinstance(value, str) and _names_a_place(hints[field.name]):
            if not value:
                raise UsageError(f"{flag} is empty; name a file or folder, or leave the flag out.")
            changed[field.name] = expanded(value, flag)
    return dataclasses.replace(config, **changed)


def _names_a_place(hint) -> bool:
    return PLACE in getattr(hint, "__metadata__", ()) or any(map(_names_a_place, get_args(hint)))


def _one_line(box: str) -> str:
    """What tyro's box (drawn in ASCII where stdout is) says first under its title, and the flags it
    suggests."""
    lines = [line.strip("│╭╮╰╯─| ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if not line.strip("-")]
    first = 2 if 1 in rules else 1  # below the title, which may be underlined
    end = next((i for i in rules if i > first), len(lines))
    message = " ".join(lines[first:end])
    mentioned = [flag for line in lines[end:] for flag in re.findall(r"^--[\w.-]+", line)]
    similar = [flag for flag in dict.fromkeys(mentioned) if flag not in message]
    return (
        message
        + (f" Did you mean {' or '.join(similar[:3])}?" if similar else "")
        + " See --help for all flags."
    )
