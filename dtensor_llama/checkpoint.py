"""Training state on disk, by torch.distributed.checkpoint (DCP): written while training continues, and
complete or not there.

    checkpoints/step-00000100/              complete: gets this name after all ranks have fsynced their files
        __0_0.distcp, __1_0.distcp ...      what each rank wrote
        .metadata                           which box of which tensor lies where (DCP's)
        checksums.json                      size and CRC-32 of every file above
    checkpoints/step-00000200.partial/      being written; or, after a kill, waste that the next start removes
    checkpoints/step-00000300.superseded/   set aside when a run went back to an older one and saved anew

stage: copy the state to host memory, the only part that training waits for. It costs this rank's bytes of
    state in host memory. The buffers are kept from save to save: filling warm ones takes 0.15 s/GB on a CPU,
    fresh ones 0.4 s/GB. Where the host has no room for them (a chunk manager's plan decides that), tensors
    are written one after another, and training waits.
"""

import functools
import json
import math
import pickle
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dtensor_llama.atomic import (
    is_first_rank,
    on_all_ranks,
    on_first_rank,
    own_rank,
    remove_folder,
    set_aside,
    whole_folder,
    write_durably,
)
from dtensor_llama.errors import UsageError, listed, mismatches
from dtensor_llama.optim import KeepsMasters, StateDict
from dtensor_llama.places import free_bytes, is_full, say_full
from dtensor_llama.shards import copies, local
from dtensor_llama.weights import Shapes, is_adapter

NAME = re.compile(r"step-(\d{8,})")
CHECKSUMS = "checksums.json"
# About what a checkpoint adds to each tensor: a header, padding, and an entry of .metadata.
BYTES_AROUND_A_TENSOR = 8192
NOTHING_LEFT = 1 << 20  # bytes: if fewer are free after a failed write, the disk is taken to be full
# Names the states by parameter, so that they fit any layout and any pipeline stage.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# Frozen weights (LoRA) are those that the run began with. DCP's strict loading would miss them;
# _refuse_other_model looks for all others.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
# DCP warns if there is no process group, and a run of one process need not have one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


@dataclass(frozen=True)
class Deferred:
    """Stands for a tensor of the state that exists only while it is written or read, one at a time.

    It is for states that do not live in tensors of their own (but in the chunks of memory/): gathering all of
    them at once would take as much host memory again as the states themselves.
    """

    like: Tensor  # has its shape, dtype and layout, and needs no memory of its own
    read: Callable[[], Tensor]  # makes this rank's values on the host, in any shape
    write: Callable[[Tensor], None]  # takes new values
    stages: bool  # whether the host has room for a copy of all of them, so that training need not wait


class Checkpointer:
    """Saves into, and loads from, one folder that all ranks see.

    Every rank makes one and calls the same methods in step.

    keep: how many of the newest complete checkpoints to keep; 0 or less keeps all

    Its collectives run in a background thread on a gloo group of its own, so they never interleave with
    training's. Call close() before destroying the default process group: on gloo, a group or thread that is
    alive at exit occasionally aborts the process.
    """

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder, self.keep = Path(folder), keep
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if dist.is_initialized() else None
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # The stager keeps its buffers, since fresh pages would cost more than the copy. They are pageable,
        # since pinning takes longer than it saves.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self._copies: dict[str, Tensor] = {}  # buffers for Deferred tensors, also kept
        self._writing: tuple[Path, Future] | None = None
        self._saved: Path | None = None
        self._needed_bytes = 0  # of the newest save, over all ranks
        self._free_when_it_failed = math.inf  # bytes on the disk
        self._everywhere = functools.partial(on_all_ranks, f"checkpoints in {self.folder}", group=self._group)
        on_first_rank(self._everywhere, self._start)

    def save(self, step: int, state: StateDict, wait: bool = False) -> float:
        """Write nested dicts of tensors and plain values; returns how many seconds the caller waited.

        It waits for the previous save, stages, and leaves the rest to the background unless `wait`. An error
        of the previous save (with `wait`: of this one) is raised here, naming its folder. The step that was
        just saved is not saved again. Deferred tensors for which the host has no room are written at once,
        one after another, while the caller waits."""
        began = time.perf_counter()
        final = self.folder / f"step-{step:08d}"
        self.wait()
        if self._saved == final:
            return time.perf_counter() - began
        deferred = {name: value for name, value in _leaves(state) if isinstance(value, Deferred)}
        staged = self._stage(state)
        if all(one.stages for one in deferred.values()):
            self._copy(deferred)
            deferred = {}
        else:
            self._copies.clear()
        planner = _SavePlanner(deferred, self._copies)
        self._writing = final, self._thread.submit(self._write, final, staged, planner)
        if wait or deferred:
            self.wait()
        return time.perf_counter() - began

    def _stage(self, state: StateDict) -> StateDict:
        """Copy the state, host tensors included, since the next step overwrites them. The `like` of a
        Deferred tensor takes its place."""
        rest = _map_leaves(state, lambda value: None if isinstance(value, Deferred) else value)
        if self._stager.state_dict_cache is None:
            self._stager.state_dict_cache = BlockingAsyncStager().stage(rest)
        staged = self._stager.stage(rest)
        return _map_leaves(
            state, lambda value, copy: value.like if isinstance(value, Deferred) else copy, staged
        )

    def _copy(self, deferred: dict[str, Deferred]) -> None:
        for name, one in deferred.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(local(one.like).numel(), dtype=one.like.dtype)
            self._copies[name].copy_(one.read().reshape(-1))

    def wait(self) -> None:
        """Wait until the running save, if any, is complete. Raises if it failed: UsageError, which names the
        disk, if the disk did."""
        if self._writing is None:
            return
        (final, written), self._writing = self._writing, None
        try:
            written.result()
        except (Exception, CheckpointException) as error:  # DCP's is a BaseException
            cause = _cause(error)
            is_users = isinstance(cause, (OSError, UsageError))
            # torch's writer may report a full disk as a RuntimeError about positions in its file.
            if is_full(cause) or isinstance(cause, RuntimeError) and self._free_when_it_failed < NOTHING_LEFT:
                cause, is_users = say_full(self.folder, self._needed_bytes), True
            elif "inline_container" in str(cause):  # torch's writer, of a write that the system cut short
                is_users = True
                cause = (
                    f"the file system of {self.folder} did not take a whole file, and has "
                    f"{self._free_when_it_failed / 1e6:,.1f} MB free; a quota, or a limit on the size of "
                    "files (ulimit -f), may be reached"
                )
            complete = _complete(self.folder)
            newest = f" The newest complete one is {complete[-1]}." if is_users and complete else ""
            kind = UsageError if is_users else RuntimeError
            raise kind(f"checkpoint {final} was not written: {cause}.{newest}") from error
        self._saved = final

    def latest(self) -> Path | None:
        """Return the complete checkpoint of the highest step, as rank 0 sees it; None if there is none.

        It is not verified: load does that, so that a damaged newest one is refused by name and never passed
        over in silence. Like load, it waits for a running save first, since both use one process group."""
        self.wait()
        return on_first_rank(self._everywhere, lambda: newest(self.folder))

    def load(self, path: str | Path, state: StateDict, refuse: Callable[[dict], None] | None = None) -> None:
        """Verify a checkpoint, then fill `state`: tensors in place (resharded as needed), values anew.

        refuse: is called with the `meta` of a training_state, and raises UsageError if it does not fit
        The ranks share the reading for the checksums, then each reads what its boxes need. Before anything is
        changed, UsageError is raised if this is no checkpoint, or if it is not complete, damaged, or of a
        model with other tensors."""
        self.wait()
        path = Path(path)
        sums = self._everywhere(lambda: _checksums(path))[0]
        world = dist.get_world_size() if dist.is_initialized() else 1
        mine = sorted(sums, key=lambda name: sums[name][0])[own_rank() :: world]  # by size, for even shares
        found = self._everywhere(lambda: [_damage(path / name, *sums[name]) for name in mine])
        _refuse_damage(path, sum(found, []))
        reader = _Reader(path)
        leaves = dict(_leaves(state))
        names = self._everywhere(lambda: set(leaves))
        deferred = {name: value for name, value in leaves.items() if isinstance(value, Deferred)}
        tensors = _map_leaves(state, lambda value: value.like if isinstance(value, Deferred) else value)

        def compare():
            stored = reader.read_metadata().state_dict_metadata
            all_names = set().union(*names)
            _refuse_other_kind(path, all_names, stored)
            if refuse is not None:  # before a list of tensors, since it names settings
                refuse(_read_progress(path)["meta"])
            _refuse_other_model(path, tensors, all_names, stored)

        self._everywhere(compare)
        try:
            dcp.load(tensors, storage_reader=reader, planner=_Planner(deferred), process_group=self._group)
        except CheckpointException as error:
            raise RuntimeError(f"checkpoint {path} was not loaded: {_cause(error)}") from error
        # Deferred ones were written to where they live.
        loaded = _map_leaves(state, lambda old, new: old if isinstance(old, Deferred) else new, tensors)
        state.update(loaded)

    def close(self) -> None:
        """Finish the running save, then end the thread and the process group. Raises as wait() does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)
            self._stager.close()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = self._everywhere = None

    def _start(self) -> None:
        """Remove what a killed process has left. Only rank 0 calls it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for waste in [*self.folder.glob("step-*.partial"), *self.folder.glob("step-*.deleting")]:
            shutil.rmtree(waste)

    def _write(self, final: Path, staged: StateDict, planner: "_SavePlanner") -> None:
        """Write a staged state. This runs in the background, on every rank."""
        partial, superseded = (final.with_name(final.name + state) for state in (".partial", ".superseded"))
        self._needed_bytes = sum(self._everywhere(lambda: _bytes_of(staged)))
        on_first_rank(self._everywhere, self._refuse_full_disk)
        with whole_folder(final, partial, superseded, self._everywhere, keep_old=True):
            writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=planner.copies_ahead)
            try:
                dcp.save(staged, storage_writer=writer, planner=planner, process_group=self._group)
            except (Exception, CheckpointException):
                # It is raised on all ranks, so none of them writes any more.
                self._free_when_it_failed = on_first_rank(self._everywhere, lambda: free_bytes(self.folder))
                raise
            # Read back what this rank wrote: the sums also vouch for what the file system says it has.
            mine = [*partial.glob(f"__{own_rank()}_*"), *([partial / ".metadata"] if is_first_rank() else [])]
            sums = self._everywhere(lambda: {file.name: _size_and_crc(file) for file in mine})
            on_first_rank(self._everywhere, lambda: self._finish(partial, _step(final), sums))
        on_first_rank(self._everywhere, self._remove_oldest)

    def _refuse_full_disk(self) -> None:
        if free_bytes(self.folder) < self._needed_bytes:
            raise UsageError(say_full(self.folder, self._needed_bytes))

    def _finish(self, partial: Path, step: float, sums: list[dict]) -> None:
        """Write the checksums, and set aside checkpoints of later steps: a run that went back to an earlier
        one has abandoned them, and resume="auto" must not return to them."""
        of_all_files = {}
        for of_one_rank in sums:
            of_all_files |= of_one_rank
        write_durably(partial / CHECKSUMS, json.dumps(of_all_files, indent=1))
        for later in [path for path in _complete(self.folder) if _step(path) > step]:
            set_aside(later, later.with_name(later.name + ".superseded"))

    def _remove_oldest(self) -> None:
        for old in _complete(self.folder)[: -self.keep] if self.keep > 0 else []:
            remove_folder(old)


class SavedWeights:
    """Reads the weights in a complete checkpoint of any layout, in one process without the ranks, the model
    or the GPU that wrote it.

    It verifies the checkpoint when it is made, and raises UsageError as Checkpointer.load does.
    step: of the checkpoint; meta: as given to training_state
    """

    def __init__(self, path: str | Path):
        self.path, sums = Path(path), _checksums(Path(path))
        with ThreadPoolExecutor() as threads:  # zlib releases the interpreter lock
            damage = list(threads.map(lambda name: _damage(self.path / name, *sums[name]), sums))
        _refuse_damage(self.path, damage)
        self.stored = _Reader(self.path).read_metadata().state_dict_metadata
        progress = _read_progress(self.path)
        self.step, self.meta = progress["step"], progress["meta"]

    def check(self, shapes: Shapes, derived: tuple[str, ...] = ()) -> None:
        """Raise UsageError unless these parameters, by Hugging Face name, are what it holds. `derived` ones
        may be there too."""
        held = {
            name.removeprefix("model."): where.size
            for name, where in self.stored.items()
            if name.startswith("model.") and name.removeprefix("model.") not in derived
        }
        problems = mismatches(held, {name: shape for name, shape in shapes.items() if name not in derived})
        if problems:
            raise UsageError(f"{self.path}: checkpoint of other weights: {listed(sorted(problems))}")

    def read(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fill these tensors, by Hugging Face name, converting to their dtype; returns them."""
        _load_alone(self.path, {"model": tensors})
        return tensors


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int = 0,
    position: int = 0,
    meta: dict | None = None,
) -> StateDict:
    """Return all that a run needs to resume bit for bit, for Checkpointer.save.

    With a new model and optimizer it is also what Checkpointer.load fills.

    step: optimizer steps done; position: sequences that were read; meta: any value that JSON can hold

    Tensors are the live ones, not copies; those of an optimizer that KeepsMasters are Deferred, and the
    weights are its fp32 masters. Frozen parameters are left out: load them first. The random states are this
    rank's own; a rank that has none in the checkpoint (it was written by fewer ranks) keeps its present ones.
    Gradients are not part of the state, so call this between steps."""
    never_stepped = not optimizer.state
    if never_stepped:
        optimizer.zero_grad()  # DCP makes the moments, which it does only without gradients
    if isinstance(optimizer, KeepsMasters):
        state = optimizer.checkpoint_state()
    else:
        weights = get_model_state_dict(model, options=TRAINED)
        if any(map(is_adapter, weights)):  # of frozen weights that are tied, torch leaves out one name only
            weights.pop("lm_head.weight", None)
        state = {
            "model": weights,
            "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
        }
    state["rng"] = {name: generator.get_rng_state() for name, generator in _generators()}
    state["progress"] = json.dumps({"step": step, "position": position, "meta": meta or {}})
    if never_stepped:  # DCP made the moments by a step with lr 0, which Adam's bias correction must not count
        for moments in optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"].zero_()
    return state


def restore_training_state(state: StateDict, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put a loaded training_state into effect; returns {"step": int, "position": int, "meta": dict}.

    Learning rate, betas and decay of the optimizer's groups become the saved ones, as in
    optimizer.load_state_dict."""
    if isinstance(optimizer, KeepsMasters):
        optimizer.restore(state)
    else:
        set_model_state_dict(model, state["model"], options=TRAINED)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
    for name, generator in _generators():
        generator.set_rng_state(state["rng"][name])
    return json.loads(state["progress"])


def _generators() -> list[tuple[str, Any]]:
    """Return this rank's generators, by the names of their states in a checkpoint."""
    generators = [(f"{own_rank()}.cpu", torch)]
    if torch.accelerator.is_available():
        generators.append((f"{own_rank()}.device", torch.get_device_module()))
    return generators


def _bytes_of(state: StateDict) -> int:
    """Estimate what this rank writes of the tensors; what several ranks hold alike is divided among them."""
    tensors = [value for _, value in _leaves(state) if isinstance(value, Tensor)]
    return sum((local(tensor).nbytes + BYTES_AROUND_A_TENSOR) // copies(tensor) for tensor in tensors)


def _leaves(state: StateDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every entry of nested dicts, named as DCP does."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _map_leaves(state: StateDict, change: Callable, *others: StateDict) -> StateDict:
    """Return nested dicts of the same keys with every entry changed: change(entry), or with others
    change(entry, their entries in the same place)."""
    mapped = {}
    for key, value in state.items():
        theirs = [other[key] for other in others]
        is_inner = isinstance(value, dict)
        mapped[key] = _map_leaves(value, change, *theirs) if is_inner else change(value, *theirs)
    return mapped


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> float:
    step = NAME.match(path.name)
    return int(step[1]) if step else float("inf")


def _older(path: Path) -> str:
    older = [one for one in _complete(path.parent) if _step(one) < _step(path)]
    return f"An older one: {older[-1]}" if older else "There is no older one beside it to go back to"


def _checksums(path: Path) -> dict[str, tuple[int, int]]:
    """Return {file: (size in bytes, CRC-32)} as written. UsageError if this is not a complete checkpoint."""
    if path.suffix in (".partial", ".deleting"):
        raise UsageError(
            f"{path}: not a complete checkpoint (it was being written or removed). {_older(path)}"
        )
    if not (path / CHECKSUMS).is_file() and not (path / ".metadata").is_file():
        inside = [*_complete(path), *_complete(path / "checkpoints")]  # the second is of a run folder
        hint = "a checkpoint is a folder like step-00000100"
        if NAME.fullmatch(path.name) and path.is_dir():
            hint = f"its files are missing. {_older(path)}"
        if inside:
            hint = f"name one inside it, like {inside[-1].relative_to(path)}"
        raise UsageError(f"{path}: {'not a checkpoint' if path.exists() else 'no such folder'}; {hint}")
    try:
        sums = json.loads((path / CHECKSUMS).read_bytes())
        return {str(name): (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _refuse_damage(path, [f"{CHECKSUMS}: {error}"])


def _refuse_damage(path: Path, damage: list[str]) -> None:
    """Raise UsageError if any of these descriptions of files is not empty."""
    damage = [one for one in damage if one]
    if damage:
        raise UsageError(f"{path}: damaged checkpoint: {'; '.join(damage)}. {_older(path)}")


def _size_and_crc(file: Path) -> tuple[int, int]:
    size = crc = 0
    with open(file, "rb", buffering=0) as opened:
        while block := opened.read(8 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _damage(file: Path, size: int, crc: int) -> str:
    """Describe what is wrong with a file; "" if nothing is."""
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes, {size} were written"
    if _size_and_crc(file)[1] != crc:
        return f"{file.name} does not have the bytes that were written (CRC-32)"
    return ""


def read_meta(path: Path) -> dict | None:
    """Return the `meta` of a training_state; None if it cannot be read, and Checkpointer.load will say why.

    Raises UsageError if this is no complete checkpoint."""
    _checksums(path)
    try:
        _Reader(path).read_metadata()  # of a damaged one DCP would print a traceback
        return _read_progress(path)["meta"]
    except (Exception, CheckpointException):
        return None


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in a folder; None if there is none."""
    return max(_complete(folder), key=_step, default=None)


def _read_progress(path: Path) -> dict:
    """Return {"step": int, "position": int, "meta": dict} of a training_state."""
    state = {"progress": ""}
    _load_alone(path, state)
    return json.loads(state["progress"])


def _load_alone(path: Path, state: StateDict) -> None:
    """Fill `state` in this process, without the others."""
    try:
        dcp.load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=True)
    except CheckpointException as error:
        raise RuntimeError(f"checkpoint {path} was not read: {_cause(error)}") from error


def _refuse_other_kind(path: Path, names: set[str], stored: dict[str, Any]) -> None:
    """Raise UsageError if one of the run and the checkpoint has LoRA adapters and the other has none.

    names: of all ranks' states; stored: DCP's record of each tensor and value by name"""
    adapters_here, adapters_there = (any(map(is_adapter, some)) for some in (names, stored))
    if adapters_there and not adapters_here:
        raise UsageError(
            f"{path}: a LoRA checkpoint, of adapters beside frozen weights, and this run trains the whole "
            "model; use the run's `lora.rank` and `lora.targets`, or start from its merged hf/ as `model`."
        )
    if adapters_here and not adapters_there:
        raise UsageError(
            f"{path}: a checkpoint of a whole model, and this run trains LoRA adapters; leave `lora.rank` "
            "out, or start anew from its hf/ as `model`."
        )


def _refuse_other_model(path: Path, state: StateDict, names: set[str], stored: dict[str, Any]) -> None:
    """Raise UsageError unless the checkpoint has what the run's state needs.

    state: this rank's; names and stored are as in _refuse_other_kind"""
    wanted = dict.fromkeys(names) | {
        name: value.shape for name, value in _leaves(state) if isinstance(value, Tensor)
    }
    found = {name: getattr(stored[name], "size", ()) for name in stored}
    for shapes in (found, wanted):
        for name in list(shapes):
            if name.startswith(("rng.", "plan.")):  # of each rank, however many ranks there are
                del shapes[name]
    if any(map(is_adapter, names)):  # an older checkpoint has the frozen head of tied embeddings too
        found.pop("model.lm_head.weight", None)
    problems = mismatches(found, wanted)
    if problems:
        raise UsageError(
            f"{path}: checkpoint of another model or optimizer: {listed(sorted(problems))}. "
            "Resume with the settings in the run folder's config.json"
        )


def _cause(error: BaseException) -> BaseException:
    """Return the error itself, from among what DCP gathered from all ranks."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


class _Reader(dcp.FileSystemReader):
    """Checks that .metadata names nothing but DCP's records, since DCP unpickles it without limits."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as opened:
            _RecordsOnly(opened).load()
        return super().read_metadata(*args, **kwargs)


class _RecordsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "torch.distributed.checkpoint.metadata": "." not in name,
            "torch.distributed.checkpoint.filesystem": name == "_StorageInfo",
            "torch.serialization": name == "_get_layout",
            "torch": name == "Size" or isinstance(getattr(torch, name, None), torch.dtype),
            "pathlib": name in ("PosixPath", "WindowsPath"),
        }
        if not allowed.get(module):
            raise UsageError(
                f".metadata of the checkpoint names {module}.{name}, which DCP does not write; not opened"
            )
        return super().find_class(module, name)


class _SavePlanner(DefaultSavePlanner):
    """Gives DCP the values of Deferred tensors: copies made before, or values read as DCP writes them.

    DCP keeps every tensor that it is given until the file is closed. So all tensors that are read here share
    one buffer. This is right as long as each is written before the next one is asked for, hence
    `copies_ahead` of 0.
    """

    def __init__(self, deferred: dict[str, Deferred], copies: dict[str, Tensor]):
        super().__init__()
        self.deferred, self.copies = deferred, copies
        self.copies_ahead = 0 if deferred else 10_000_000  # bytes; DCP's own default
        sizes = [local(one.like).nbytes for one in deferred.values()]
        self.buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8).numpy()

    def lookup_object(self, index):
        found = super().lookup_object(index)
        if index.fqn in self.deferred:
            values = self.deferred[index.fqn].read()
            # NumPy gives the tensor a storage of its own size: DCP would clone a part of a larger storage.
            lent = torch.from_numpy(self.buffer[: values.nbytes]).view(values.dtype)
            return lent.copy_(values.reshape(-1)).view(found.shape)
        if index.fqn in self.copies:
            return self.copies[index.fqn].view(found.shape)
        return found


class _Planner(DefaultLoadPlanner):
    """Reads plain values and Deferred tensors.

    DCP reads tensors with weights_only, but would unpickle values without limits, so they are checked first.
    Deferred tensors are filled box by box: DCP reads a box into memory made for it, and the values are moved
    to their place before the next box is read.
    """

    def __init__(self, deferred: dict[str, Deferred] | None = None):
        super().__init__()
        self.deferred = deferred or {}

    def create_local_plan(self):
        for name in [name for name in self.state_dict if name not in self.metadata.state_dict_metadata]:
            del self.state_dict[name]  # this rank's random state, in a checkpoint of fewer ranks
        return super().create_local_plan()

    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)  # raises on anything but plain values
        value.seek(0)
        super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item):
        one = self.deferred.get(read_item.dest_index.fqn)
        if one is None:
            return super().resolve_tensor(read_item)
        return torch.empty(read_item.lengths, dtype=one.like.dtype)

    def commit_tensor(self, read_item, tensor):
        one = self.deferred.get(read_item.dest_index.fqn)
        if one is None:
            return super().commit_tensor(read_item, tensor)
        shape = local(one.like).shape
        if tuple(read_item.lengths) != tuple(shape):  # another layout has written it in smaller boxes
            whole = one.read().view(shape)
            self.transform_tensor(read_item, whole).copy_(tensor)
            tensor = whole
        one.write(tensor)
