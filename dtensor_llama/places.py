"""Folders that a user names or that are there by default: `~`, settings files, read-only caches, full disks.

A cache only saves time. Where it cannot be kept (there is no home folder, or the file system is read-only), a
run keeps the same files in its run folder, and prints one line about it. Importing this module is quick.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtensor_llama.errors import UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name


def expanded(path: str, field: str) -> str:
    """Return `path` with the home folder for its leading `~` or `~name`.

    Raises UsageError, naming the field, if that folder is not known."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise UsageError(
            f"{field}={path}: the home folder that {path.split('/')[0]} stands for is not known (no such "
            "user, or no HOME and no entry in /etc/passwd); write the folder in full."
        ) from None


def read_settings(path: Path) -> dict:
    """Return a JSON file of a Hugging Face folder as a dict, which is empty if there is no such file. Raises
    UsageError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not complete JSON ({error}); copy the file again.") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds a {type(settings).__name__}, not an object; copy the file again.")
    return settings


def hub_hint(name: str, kind: str = "model", field: str = "model") -> str:
    """Return a sentence on how to download `name`, for an error message, if it looks like a name on the
    Hugging Face Hub; else nothing.

    kind: "model" or "dataset"; field: where the downloaded folder is to be named."""
    if not HUB_NAME.fullmatch(name) or Path(name.partition("/")[0]).exists():
        return ""
    folder = name.partition("/")[2]
    repo_type, then = "", f"{field}={folder}"
    if kind == "dataset":
        repo_type, then = " --repo-type dataset", f"data.path='{folder}/**/*.parquet'"
    return (
        f" If {name} is a {kind} of the Hugging Face Hub, download it first: hf download {name}{repo_type} "
        f"--local-dir {folder}; then use {then}."
    )


def refuse_hub_name(name: str, field: str) -> None:
    """Raise UsageError if `name` is no folder here and looks like one of the Hub: downloads are left to the
    user. A folder of the Hub's cache, which has the model in a folder below it, is refused too."""
    snapshots = sorted(Path(name).glob("snapshots/*/"))
    if snapshots and not Path(name, "config.json").exists():
        raise UsageError(
            f"{field}={name}: is a folder of the Hugging Face cache, and the files are below it; "
            f"use {field}={snapshots[-1]}."
        )
    hint = hub_hint(name, field=field)
    if hint and not Path(name).exists():
        raise UsageError(f"{field}={name}: there is no such folder.{hint}")


def find_config(folder: str | Path) -> Path:
    """Return the `config.json` of a Hugging Face model folder, which may also be named itself.

    Raises UsageError if there is none, and tells a LoRA adapter and a name of the Hub apart."""
    path = Path(expanded(str(folder), "model"))
    refuse_hub_name(str(folder), "model")
    if path.is_dir():
        refuse_adapter(path)
        path = path / "config.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist; a Hugging Face model folder has a config.json.")
    return path


def refuse_adapter(folder: Path) -> None:
    """Raise UsageError if a folder holds a LoRA adapter in peft's format instead of a model."""
    adapter = {} if (folder / "config.json").is_file() else read_settings(folder / "adapter_config.json")
    if adapter:
        base = adapter.get("base_model_name_or_path") or "a base model"
        raise UsageError(
            f"{folder}: a LoRA adapter, not a whole model: a few matrices beside the weights of "
            f"{base}. Give the folder of the merged model (hf/ of the run), or merge it "
            "with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )


def cache_folders(asked: str, run_dir: str) -> tuple[str, str]:
    """Return where a cache may lie, best first: the folder that was asked for, else one in the run folder."""
    return asked, os.path.join(run_dir, "cache")


def readable(folders: Sequence[str | Path]) -> list[Path]:
    """Return those of the folders that have a name on this machine, whether they exist or not."""
    return [path for path, reason in map(_named, folders) if not reason]


def first_writable(folders: Sequence[str | Path]) -> tuple[Path, str]:
    """Return the first of the folders that can be written, and why an earlier one cannot ("" if it is the
    first of all). The folder is made if needed.

    Raises the OSError of the first one if none can be written."""
    why_not_first = ""
    for folder in folders:
        path, reason = _named(folder)
        if not reason:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # Permissions alone are not enough: a file system may be read-only.
                with tempfile.TemporaryFile(dir=path):
                    return path, why_not_first
            except OSError as error:
                reason = error.strerror or str(error)
        why_not_first = why_not_first or f"{folder} cannot be written: {reason}"
    raise OSError(why_not_first)


def is_full(error: BaseException) -> bool:
    """Return whether the error means that a disk, or a user's share of it, has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes on the file system of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def say_full(folder: str | Path, needed_bytes: int | None = None) -> str:
    """Return the text of an error message about a full disk."""
    needed = "" if needed_bytes is None else f"about {needed_bytes / 1e6:,.1f} MB are needed and "
    return f"no space is left on the disk of {folder}: {needed}{free_bytes(folder) / 1e6:,.1f} MB are free"


def say_unwritten(folder: str | Path, error: OSError) -> str:
    """Return why something cannot be written into a folder, as a part of a message."""
    return say_full(folder) if is_full(error) else str(error)


def _named(folder: str | Path) -> tuple[Path, str]:
    """Return the folder with its `~` expanded, and why that is not possible ("" if it is)."""
    try:
        return Path(folder).expanduser(), ""
    except RuntimeError:
        return Path(folder), "no home folder is known"
