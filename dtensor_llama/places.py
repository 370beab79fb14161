"""Folders that a user names or that are there by default: `~`, and caches that cannot be written.

A cache only saves time. Where it cannot be kept - there is no home folder, the file system is read-only - a run keeps the same
in its run folder, and says so once. This module imports nothing that takes time.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtensor_llama.errors import UsageError


def expanded(path: str, flag: str) -> str:
    """`path` with the home folder for its leading `~` or `~name`. UsageError, naming the flag, if that is not known."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise UsageError(f"{flag} {path}: the home folder that {path.split('/')[0]} stands for is not known (no such "
                         "user, or no HOME and no entry in /etc/passwd); write the folder in full.") from None


def cache_folders(asked: str, run_dir: str) -> tuple[str, str]:
    """Where a cache may lie, best first: the folder that was asked for, else one in the run folder."""
    return asked, os.path.join(run_dir, "cache")


def readable(folders: Sequence[str | Path]) -> list[Path]:
    """Those of the folders that have a name on this machine, whether they exist or not."""
    return [path for path, reason in map(_named, folders) if not reason]


def first_writable(folders: Sequence[str | Path]) -> tuple[Path, str]:
    """(the first of the folders that can be written, made if need be; why it is not the first of all, or nothing).

    OSError of the first one if there is none."""
    failures = []
    for folder in folders:
        path, reason = _named(folder)
        if not reason:
            try:
                path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path):       # permissions alone do not say it: a file system may be read-only
                    return path, failures[0] if failures else ""
            except OSError as error:
                reason = error.strerror or str(error)
        failures.append(f"{folder} cannot be written: {reason}")
    raise OSError(failures[0])


def _named(folder: str | Path) -> tuple[Path, str]:
    """(the folder with its `~` expanded, why that is not possible or nothing)."""
    try:
        return Path(folder).expanduser(), ""
    except RuntimeError:
        return Path(folder), "no home folder is known"
