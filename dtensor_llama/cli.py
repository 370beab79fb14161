"""The door of every recipe: flags become one dataclass, and a user's mistake becomes one line and exit status 2."""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro

from dtensor_llama.errors import UsageError

Config = TypeVar("Config")


def run_recipe(main: Callable[[Config], None], config_class: type[Config]) -> None:
    """Parse the command line into `config_class`, call `main`, and end the process as a shell expects it.

    Exit status 0 when main returns, 2 after a UsageError or where the device has no more memory (one line), 130 after Ctrl-C;
    anything else is our defect and keeps its traceback. Of several ranks that make the same mistake the first on a machine
    speaks.
    """
    try:
        main(parse_cli(config_class))
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)               # torchrun ends us as soon as rank 0, which printed the same, is gone
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        rank, said = os.environ.get("RANK", "0"), str(error).partition(" If reserved but unallocated")[0]
        print(f"error: rank {rank} has no more memory on its device, or in its --memory.device-budget-gib. Training needs less "
              "with a lower --train.micro-batch-size or --data.seq-len, --train.recompute full, --memory.activations, "
              f"--memory.placement auto, or more ranks. torch says: {said}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse_cli(config_class: type[Config], args: list[str] | None = None) -> Config:
    """`config_class` from the command line; flags are its fields, nested ones dotted, hyphens and underscores alike.

    Raises UsageError where tyro would draw a box. --help prints everything and exits with 0.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro's box (drawn in ASCII where stdout is) says first under its title, and the flags it suggests."""
    lines = [line.strip("│╭╮╰╯─| ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if not line.strip("-")]
    first = 2 if 1 in rules else 1                                       # below the title, which may be underlined
    end = next((i for i in rules if i > first), len(lines))
    message = " ".join(lines[first:end])
    mentioned = [flag for line in lines[end:] for flag in re.findall(r"^--[\w.-]+", line)]
    similar = [flag for flag in dict.fromkeys(mentioned) if flag not in message]
    return message + (f" Did you mean {' or '.join(similar[:3])}?" if similar else "") + " See --help for all flags."
