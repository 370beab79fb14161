"""All or nothing: work that succeeds on every rank or fails on every rank, and folders that are complete or
not there, whenever the process is killed.

A folder is built under a staging name beside its final one, and renamed when it is complete.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dtensor_llama.errors import UsageError


def on_all_ranks(
    what: str, do: Callable[[], Any], group: dist.ProcessGroup | None = None, share: bool = True
) -> Any:
    """Run `do()` on every rank of the group (default: all) and return the results in rank order (share=False:
    only this rank's). Without a process group this process is the only rank.

    If it raises on one rank it raises on all, so that none is left waiting in a collective. An OSError
    becomes a UsageError that begins with `what`, which describes the work: a full disk, for example, is the
    user's to fix.
    """
    result = error = None
    try:
        result = do()
    except OSError as caught:
        error = UsageError(f"{what}: {caught}")
    except Exception as caught:
        error = caught
    failure = error and (isinstance(error, UsageError), f"{type(error).__name__}: {error}", str(error))
    if dist.is_initialized():
        answers = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, (result if share else None, failure), group=group)
    else:
        answers = [(result, failure)]
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(answers):
        if failure:
            is_usage_error, with_type, message = failure
            raise (
                UsageError(message)
                if is_usage_error
                else RuntimeError(f"{what}, on rank {rank}: {with_type}")
            )
    return [one for one, _ in answers] if share else result


def is_first_rank() -> bool:
    """Return whether this is rank 0, which does what only one process may do."""
    return own_rank() == 0


def own_rank() -> int:
    """Return this process's rank; without a process group it is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first_rank(everywhere: Callable[[Callable], Any], do: Callable[[], Any]) -> Any:
    """Run `do()` on rank 0, and return its result on every rank. everywhere: on_all_ranks with its `what`."""
    return everywhere(do if is_first_rank() else lambda: None)[0]


@contextmanager
def whole_folder(
    final: Path, staged: Path, aside: Path, everywhere: Callable[[Callable], Any], keep_old: bool = False
) -> Iterator[None]:
    """Let the block build the folder `final` as `staged`, and rename it if the block succeeds.

    All ranks enter, on a file system that all of them see, and the block must raise on all of them or on
    none. A folder that has the final name already becomes `aside`, and is then removed unless `keep_old`.
    Killed at any instant, `final` is the whole old folder, the whole new one or, between two renames,
    missing: without `keep_old` the next call then puts the old one back.
    """

    def start():
        if not keep_old:
            _refuse_irreplaceable(final)
            if aside.exists() and not final.exists():  # an earlier process was killed between its two renames
                aside.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def publish():
        fsync_folder(staged)
        if final.exists():
            set_aside(final, aside)
        staged.rename(final)
        fsync_folder(final.parent)
        if not keep_old:
            shutil.rmtree(aside, ignore_errors=True)

    try:
        on_first_rank(everywhere, start)
        yield
        on_first_rank(everywhere, publish)
    finally:
        if is_first_rank():
            shutil.rmtree(staged, ignore_errors=True)  # it exists only after a failure


def _refuse_irreplaceable(folder: Path) -> None:
    here = Path.cwd().resolve()
    is_other = folder.exists() and not folder.is_dir()
    if folder in (here, *here.parents) or os.path.ismount(folder) or is_other:
        raise UsageError(
            f"{folder}: cannot be replaced in one step (a file, a mount point, or the current folder or one "
            f"above it); save into a folder of its own, like {folder / 'hf'}"
        )


def set_aside(folder: Path, aside: Path) -> None:
    """Rename a folder; an older one of the new name is removed first."""
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that there is never half of it under its name."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.deleting")))


def write_durably(path: Path, text: str) -> None:
    """Write a text file that survives a power cut, once the entries of its folder do."""
    with open(path, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a text file such that its name holds the whole old content or the whole new one."""
    staged = path.with_name(f".{path.name}.being-written")
    write_durably(staged, text)
    staged.replace(path)


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (new files, renames) survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
