"""Folders that a user names or that are there by default: `~`, caches that cannot be written, and full disks.

A cache only saves time. Where it cannot be kept - there is no home folder, the file system is read-only - a
run keeps the same in its run folder, and says so once. This module imports nothing that takes time.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtensor_llama.errors import UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name


def expanded(path: str, flag: str) -> str:
    """`path` with the home folder for its leading `~` or `~name`. UsageError, naming the flag, if that is not
    known."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise UsageError(
            f"{flag} {path}: the home folder that {path.split('/')[0]} stands for is not known "
            "(no such user, or no HOME and no entry in /etc/passwd); write the folder in "
            "full."
        ) from None


def hub_hint(name: str, kind: str = "model") -> str:
    """How to download it, for an error message, if `name` looks like a name on the Hugging Face Hub; else
    nothing.

    kind: "model" or "dataset"."""
    if not HUB_NAME.fullmatch(name) or Path(name.partition("/")[0]).exists():
        return ""
    folder = name.partition("/")[2]
    of_kind = "" if kind == "model" else f" --repo-type {kind}"
    then = f"--model {folder}" if kind == "model" else f"--data.path '{folder}/**/*.parquet'"
    return (
        f" If {name} is a {kind} of the Hugging Face Hub, download it first: hf download {name}{of_kind} "
        f"--local-dir {folder}; then use {then}."
    )


def refuse_hub_name(name: str, flag: str) -> None:
    """UsageError if `name` is no folder here and looks like one of the Hub: nothing is downloaded by itself.
    So is a folder of the Hub's cache that has the model in a folder below it."""
    snapshots = sorted(Path(name).glob("snapshots/*/"))
    if snapshots and not Path(name, "config.json").exists():
        raise UsageError(
            f"{flag} {name}: is a folder of the Hugging Face cache, and the files are below it; "
            f"use {flag} {snapshots[-1]}."
        )
    hint = hub_hint(name)
    if hint and not Path(name).exists():
        raise UsageError(f"{flag} {name}: there is no such folder.{hint.replace('--model', flag)}")


def cache_folders(asked: str, run_dir: str) -> tuple[str, str]:
    """Where a cache may lie, best first: the folder that was asked for, else one in the run folder."""
    return asked, os.path.join(run_dir, "cache")


def readable(folders: Sequence[str | Path]) -> list[Path]:
    """Those of the folders that have a name on this machine, whether they exist or not."""
    return [path for path, reason in map(_named, folders) if not reason]


def first_writable(folders: Sequence[str | Path]) -> tuple[Path, str]:
    """(the first of the folders that can be written, made if need be; why it is not the first of all, or
    nothing).

    OSError of the first one if there is none."""
    failures = []
    for folder in folders:
        path, reason = _named(folder)
        if not reason:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # permissions alone do not say it: a file system may be read-only
                with tempfile.TemporaryFile(dir=path):
                    return path, failures[0] if failures else ""
            except OSError as error:
                reason = error.strerror or str(error)
        failures.append(f"{folder} cannot be written: {reason}")
    raise OSError(failures[0])


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, or a user's share of it, has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: str | Path) -> int:
    """On the file system of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def say_full(folder: str | Path, needed_bytes: int | None = None) -> str:
    """What an error message says of a full disk."""
    needed = "" if needed_bytes is None else f"about {needed_bytes / 1e6:,.1f} MB are needed and "
    return f"no space is left on the disk of {folder}: {needed}{free_bytes(folder) / 1e6:,.1f} MB are free"


def _named(folder: str | Path) -> tuple[Path, str]:
    """(the folder with its `~` expanded, why that is not possible or nothing)."""
    try:
        return Path(folder).expanduser(), ""
    except RuntimeError:
        return Path(folder), "no home folder is known"
