"""Hugging Face safetensors in and out of a model of any layout, a slice at a time.

box: the part of a tensor that this rank holds, as (offsets, sizes) in the whole tensor
run: elements that are neighbours both in the file and in the box, so that one read or write moves them
staging buffer: 32 MiB of host memory that every byte passes through, which is all that loading or saving adds
    (converting to another dtype takes as much again for a moment)

A safetensors file is 8 bytes of header length (little endian), a JSON header with dtype, shape and byte range
of every tensor, and the bytes. So each rank can compute where each of its runs lies, and weights never travel
between ranks. We pread and pwrite the runs rather than map the files: mapped pages count as this process's
memory until the file is closed, and a mapped file that is truncated meanwhile is a SIGBUS, not an error.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtensor_llama.atomic import (
    on_all_ranks,
    on_first_rank,
    own_rank,
    replace_file,
    whole_folder,
    write_durably,
)
from dtensor_llama.errors import UsageError, listed, mismatches
from dtensor_llama.generation_config import generation_config
from dtensor_llama.places import free_bytes, is_full, refuse_adapter, say_full

STAGING_BYTES = 32 << 20  # 8 and 128 MiB load no faster; 32 keeps the Python calls rare
FINGERPRINT_BYTES = 4096  # of each tensor
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
ADAPTER = "_lora.lora_"  # in the name of a parameter that lora.py added: see is_adapter
# What compiling and recomputing put into the names of modules.
WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = FLOATS | {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}  # the others: of buffers
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shapes = dict[str, tuple]  # of tensors, by name
Box = tuple[tuple[int, ...], tuple[int, ...], Tensor]
NamedBoxes = Iterator[tuple[str, Box]]  # each with the name of its tensor
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of the tensors of a file, by name


class Stored(NamedTuple):
    """Locates one tensor on disk."""

    file: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # the first byte, counted from the beginning of the file

    @property
    def n_bytes(self) -> int:
        return _bytes(self.dtype, self.shape)


class FilePlan(NamedTuple):
    """Assigns each tensor of a model its place in files."""

    headers: dict[str, bytes]  # file -> its header
    stored: dict[str, Stored]  # tensor -> its place

    @property
    def n_bytes(self) -> int:
        return sum(where.n_bytes for where in self.stored.values())

    def names_in(self, file: str) -> list[str]:
        return [name for name, where in self.stored.items() if where.file == file]


class StandIn(nn.Module, ABC):
    """Stands in for a model whose float32 weights live somewhere else, for example in the chunks of memory/.

    Its parameters have the model's names, shapes and layouts, but no memory of their own. Values pass through
    one parameter at a time, so that initialising, loading or saving a model takes the memory of its largest
    parameter, and not that of a second model. `values_to_read` and `values_to_write` take either a StandIn or
    an ordinary model.
    """

    @abstractmethod
    def empty(self, name: str) -> Tensor:
        """Return a float32 tensor on the host for the values of one parameter, sharded like it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor as `empty` does, with a copy of the present values."""

    @abstractmethod
    def write(self, name: str, values: Tensor) -> None:
        """Replace the values of one parameter by these, which are sharded as those of `empty`."""


def values_to_read(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter of the model: the parameter itself, or a copy from a StandIn."""
    return model.read(name) if isinstance(model, StandIn) else parameter


@contextmanager
def values_to_write(model: nn.Module, name: str, parameter: nn.Parameter) -> Iterator[Tensor]:
    """Yield the tensor to fill, wholly, with new values of a parameter of the model: the parameter itself, or
    memory from which a StandIn takes them when the block ends."""
    if not isinstance(model, StandIn):
        yield parameter
        return
    values = model.empty(name)
    yield values
    model.write(name, values)


def load_hf(model: nn.Module, folder: str | Path) -> None:
    """Fill the parameters, plain tensors or DTensors of any placements, from a Hugging Face folder.

    All ranks call it; each reads only the slices it holds, in any floating dtype. Everything is checked
    before the first parameter changes: one UsageError, the same on all ranks, lists what is missing,
    unexpected, misshapen or truncated."""
    folder, parameters = Path(folder), hf_parameters(model)
    for name, param in parameters.items():
        if param.is_meta:
            raise UsageError(
                f"{name} is on the meta device, without memory; call model.to_empty(device=...) first"
            )
    everywhere = functools.partial(on_all_ranks, f"loading {folder}")
    held = everywhere(lambda: {name: tuple(param.shape) for name, param in parameters.items()})
    # Under pp a rank holds only some of the parameters.
    wanted = {}
    for of_one_rank in held:
        wanted |= of_one_rank
    tied = _is_tied(model)
    stored = everywhere(lambda: _checked(folder, wanted, tied), share=False)

    def read():
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        in_file_order = sorted(parameters, key=lambda name: (stored[name].file, stored[name].start))
        for file, names in itertools.groupby(in_file_order, key=lambda name: stored[name].file):
            with open(folder / file, "rb", buffering=0) as opened:
                for name in names:
                    with values_to_write(model, name, parameters[name]) as values:
                        for box in local_boxes(values):
                            _move(opened.fileno(), stored[name], box, staging, to_file=False)

    everywhere(read)


def check_hf(model: nn.Module, folder: str | Path) -> None:
    """Raise the UsageError that load_hf would raise for this whole model, which may be on `meta`.

    It reads little more than headers and needs no process group, so a recipe can call it first of all."""
    shapes = {name: tuple(one.shape) for name, one in hf_parameters(model).items()}
    _checked(Path(folder), shapes, _is_tied(model))


def fingerprint(folder: str | Path) -> str:
    """Return a hash of the first bytes of all tensors in a Hugging Face folder. It tells models of one shape
    apart, and takes no time. The weights must have passed check_hf."""
    digest = hashlib.sha256()
    for name, where in sorted(_read_headers(Path(folder))[0].items()):
        with open(Path(folder, where.file), "rb") as opened:
            opened.seek(where.start)
            first = opened.read(min(FINGERPRINT_BYTES, where.n_bytes))
        digest.update(repr((name, where.dtype, where.shape, first)).encode())
    return digest.hexdigest()


def _is_tied(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", False)


def save_hf(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    generation: Any = None,
) -> None:
    """Write a folder that transformers opens as it is: config, generation config and safetensors.

    dtype: of the files; None: that of the parameters
    max_shard_bytes: of one file; a larger model is split over several
    generation: the content of generation_config.json, or a transformers GenerationConfig; None: that of
        `model.generation_config` if there is one, else the token ids of the model's config

    All ranks call it, on a file system that all of them see. A box that several ranks hold is written by the
    lowest of them. Other files in the folder (a tokenizer) stay. The new folder is built beside the final
    name and then renamed. If the process is killed at any instant, that name holds the whole old model, the
    whole new one or, between two renames, nothing; then the next save_hf puts the old one back. Raises
    UsageError if the folder cannot be written."""
    parameters = hf_parameters(model)
    if len(parameters) < len(hf_parameters(model, adapters=True)):
        raise ValueError(
            "the model has LoRA adapters, which save_hf would leave out; merge_lora(model) first"
        )
    for name, parameter in parameters.items():
        if parameter.is_meta and not isinstance(model, StandIn):
            raise UsageError(f"{name} is on the meta device, without values; load or initialize them first")
    # A model of transformers may have buffers that belong to its weights, whole on each rank of a stage.
    buffers = getattr(model, "kept_buffers", {})
    held = parameters | buffers
    # A packed parameter (parallel/plans/styles.py) is kept in another shape than Hugging Face's.
    whole_shapes = {name: tuple(one.shape) for name, one in held.items()}
    whole_shapes |= getattr(model, "whole_shapes", {})
    shares = on_all_ranks(
        f"saving {folder}",
        lambda: _share(parameters, whole_shapes, dtype) | _share(buffers, whole_shapes, None),
    )
    tensors = {name: share[:2] for one_rank in shares for name, share in one_rank.items()}
    writer = writers(shares)

    def own_boxes(names: list[str]) -> NamedBoxes:
        for name in names:
            boxes = packed_boxes(held[name], whole_shapes[name]) if name in held else []
            mine = [box[:2] for box in boxes if writer[name, box[0], box[1]] == own_rank()]
            if not mine:
                continue
            values = buffers[name] if name in buffers else values_to_read(model, name, held[name])
            for box in packed_boxes(values, whole_shapes[name]):
                if box[:2] in mine:
                    yield name, box

    if generation is None:
        generation = getattr(model, "generation_config", None)
    convert = getattr(model, "convert_to_save", None)
    _save(Path(folder), plan_files(tensors, max_shard_bytes), model.config, generation, own_boxes, convert)


def save_hf_in_parts(
    folder: str | Path,
    config: Any,
    shapes: Shapes,
    dtype: torch.dtype,
    read: Callable[[list[str]], dict[str, Tensor]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write what save_hf would write of a model with these parameters (name -> shape), byte for byte, in one
    process that never holds all of it.

    read: makes the tensors of one file, at most max_shard_bytes of `dtype` (or one tensor that is larger)
    """
    tensors = {name: (DTYPE_NAMES[dtype], tuple(shape)) for name, shape in shapes.items()}

    def boxes(names: list[str]) -> NamedBoxes:
        for name, tensor in read(names).items():
            for box in local_boxes(tensor):
                yield name, box

    _save(Path(folder), plan_files(tensors, max_shard_bytes), config, None, boxes)


def save_generation_config(folder: str | Path, settings: dict) -> None:
    """Put `settings` into the generation_config.json of a folder that is complete, in one step."""
    replace_file(Path(folder, "generation_config.json"), _as_json(settings))


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to a LoRA adapter."""
    return ADAPTER in name


def plain_name(name: str) -> str:
    """Return a parameter's name without what compiling or recomputing puts into it."""
    return WRAPPERS.sub("", name)


def hf_parameters(model: nn.Module, adapters: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters by Hugging Face name, tied ones once.

    adapters: include those of LoRA, which no Hugging Face model has."""
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if adapters or not is_adapter(name)
    }


def packed_boxes(tensor: Tensor, whole: tuple[int, ...]) -> list[Box]:
    """Return this rank's part of a tensor as boxes of a tensor of shape `whole` that has the same elements in
    the same order: (D, 3, F) of (D, 3 F), for example. One dimension of the whole is two of the tensor's.

    So a rank that has its share of each of several matrices, packed behind each other, has a box in each."""
    if tuple(tensor.shape) == tuple(whole):
        return local_boxes(tensor)
    at = next(dim for dim, size in enumerate(whole) if tensor.shape[dim] != size)
    width, boxes = tensor.shape[at + 1], []
    for offsets, sizes, local in local_boxes(tensor):
        for part in range(sizes[at]):
            start = (offsets[at] + part) * width + offsets[at + 1]
            merged = (*offsets[:at], start, *offsets[at + 2 :]), (*sizes[:at], *sizes[at + 1 :])
            boxes.append((*merged, local.select(at, part)))
    return boxes


def local_boxes(tensor: Tensor) -> list[Box]:
    """Return this rank's part of a tensor as (offsets in the whole tensor, sizes, view of the local memory).

    The view is detached. A plain tensor is one whole box; an empty shard gives none. It works on meta. This
    is the one place that asks DTensor where its shard lies. Raises ValueError for a shard that is not one box
    (a _StridedShard that no later axis completes)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tuple(tensor.shape), tensor)] if tensor.numel() else []
    if tensor.device_mesh.get_coordinate() is None:  # this rank is not in the tensor's mesh
        return []
    local = tensor.to_local()
    # DCP asks this too. It refuses Partial, and is right for tp inside FSDP.
    (chunk,) = tensor.__create_chunk_list__()
    # dim -> number of pieces.
    # An FSDP axis outside tp takes one piece of each tp slice, and then tp picks one among these.
    pieces = {}
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            split = getattr(placement, "split_factor", None)  # only a _StridedShard has one
            before = pieces.get(placement.dim, 1)
            pieces[placement.dim] = (
                before * split if split else max(1, before // tensor.device_mesh.size(axis))
            )
    if tuple(chunk.sizes) != tuple(local.shape) or any(n > 1 for n in pieces.values()):
        raise ValueError(
            f"{tuple(tensor.shape)} as {tensor.placements} over {tensor.device_mesh}: not one box a rank"
        )
    return [(tuple(chunk.offsets), tuple(chunk.sizes), local)] if local.numel() else []


def copy_own_part(whole: Tensor, values: Tensor) -> None:
    """Copy this rank's part of a whole tensor into `values`, plain or a DTensor, of the same shape."""
    for offsets, sizes, local in local_boxes(values):
        box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        local.copy_(whole[box])


def batches(shape: tuple, offsets: tuple, sizes: tuple, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the runs of a box, in batches of at most `most` elements.

    A run is (place in the whole tensor, place in the box, length), in elements and row-major order. Runs
    follow each other in the box without gaps."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # The box has the tensor's full size in all dims after this one.
    cut_dim = max((dim for dim in range(len(shape)) if sizes[dim] != shape[dim]), default=0)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    run = math.prod(sizes[cut_dim:])
    batch, filled = [], 0
    for i, outer in enumerate(itertools.product(*map(range, offsets[:cut_dim], ends[:cut_dim]))):
        start = sum(at * stride for at, stride in zip((*outer, *offsets[cut_dim:]), strides, strict=True))
        for done in range(0, run, most):
            length = min(most, run - done)
            if filled + length > most:
                yield batch
                batch, filled = [], 0
            batch.append((start + done, i * run + done, length))
            filled += length
    if batch:
        yield batch


def _checked(folder: Path, wanted: Shapes, tied: bool) -> dict[str, Stored]:
    """Return the place of every tensor in the folder. Raises one UsageError that lists all that does not fit
    a model with the `wanted` parameters (name -> shape)."""
    stored, problems, indexed = _read_headers(folder)
    found = {name: where.shape for name, where in stored.items()}
    for name in stored:
        is_derived = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if is_derived and name not in wanted:
            del found[name]
    # A problem with a file stands for its tensors.
    lost = indexed - stored.keys() if stored or not problems else wanted.keys()
    problems += mismatches(found, {name: shape for name, shape in wanted.items() if name not in lost})
    of_other_types = [
        f"{name}: dtype {where.dtype}, only {', '.join(FLOATS)} are read"
        for name, where in stored.items()
        if name in wanted and where.dtype not in FLOATS
    ]
    remedy = "Use the folder's own config.json, or fetch the files again"
    if of_other_types and not problems:
        remedy = "Give a copy of these weights in one of the types that are read"
    problems += of_other_types
    ends = stored.get("model.embed_tokens.weight"), stored.get("lm_head.weight")
    if tied and all(ends) and not problems and not _hold_the_same(folder, *ends):
        problems.append(
            "lm_head.weight is there and differs from model.embed_tokens.weight, and config.json ties them "
            "(tie_word_embeddings is true); transformers would keep both, so set it to false"
        )
    if problems:
        raise UsageError(f"{folder}: weights do not fit this model: {listed(problems)}. {remedy}")
    return stored


def _hold_the_same(folder: Path, one: Stored, other: Stored) -> bool:
    """Return whether two stored tensors are equal byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(folder / one.file, "rb") as first, open(folder / other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for done in range(0, one.n_bytes, STAGING_BYTES):
            length = min(STAGING_BYTES, one.n_bytes - done)
            if first.read(length) != second.read(length):
                return False
    return True


def _read_headers(folder: Path) -> tuple[dict[str, Stored], list[str], set[str]]:
    """Return the tensors in the folder's files, what is wrong with the files, and the names in its index.
    Raises UsageError if there are no safetensors."""
    files, file_of = _find_files(folder)
    stored, problems = {}, []
    for file in files:
        try:
            header, size_problem = _read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {'no such file' if isinstance(error, FileNotFoundError) else error}")
            continue
        if size_problem:
            problems.append(f"{file}: {size_problem}")
        problems += [
            f"{name}: in {INDEX} but not in {file}"
            for name, its_file in file_of.items()
            if its_file == file and name not in header
        ]
        stored |= header
    return stored, problems, set(file_of)


def _find_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the folder's safetensors files, and from its index, if it has one, {tensor: file}."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; weights are read from a local folder with model.safetensors"
        )
    if (folder / "model.safetensors").exists():  # first, as transformers does
        return ["model.safetensors"], {}
    if not (folder / INDEX).exists():
        refuse_adapter(folder)
        kinds = re.compile(r"\.(safetensors|bin|pth?|gguf|ckpt)$")
        others = sorted(path.name for path in folder.iterdir() if kinds.search(path.name))
        raise UsageError(
            f"{folder}: no model.safetensors and no {INDEX}; it has "
            f"{', '.join(others[:5]) or 'no weights at all'}. Only safetensors are opened: pickles run code. "
            "Convert with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        # Only the last part of a path is used, so that an index cannot name files outside the folder.
        file_of = {name: Path(file).name for name, file in weight_map.items()}
        return sorted(set(file_of.values())), file_of
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / INDEX}: not an index of safetensors files ({error}); fetch it again"
        ) from None


def _read_header(path: Path) -> tuple[dict[str, Stored], str]:
    """Return the tensors of one file, and what is wrong with its length ("": nothing).

    Raises ValueError if the header cannot be read."""
    with open(path, "rb") as opened:
        actual = os.fstat(opened.fileno()).st_size
        first = opened.read(8)
        if first == b"version ":
            raise ValueError("a Git LFS pointer, not the weights; run git lfs pull")
        header_bytes = int.from_bytes(first, "little")
        # 100 MB is the limit of the safetensors library.
        if len(first) < 8 or header_bytes > min(actual - 8, 100_000_000):
            raise ValueError(f"unreadable header: cut or not safetensors (file has {actual} bytes)")
        stored, end = {}, 8 + header_bytes
        try:
            header = json.loads(opened.read(header_bytes))
            header.pop("__metadata__", None)
            for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                stored[name] = where = Stored(path.name, one["dtype"], tuple(one["shape"]), end)
                start, stop = (8 + header_bytes + offset for offset in one["data_offsets"])
                if start != end or where.dtype in DTYPES and stop - start != where.n_bytes:
                    raise ValueError("byte ranges overlap, leave holes or do not match the shapes")
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unreadable header: {error}") from None
    return stored, "" if end == actual else f"header says {end} bytes, file has {actual}"


def _share(
    parameters: dict[str, nn.Parameter], whole_shapes: Shapes, dtype: torch.dtype | None
) -> dict[str, tuple]:
    """Return what this rank holds: name -> (dtype in the file, whole shape, [(offsets, sizes) of boxes])."""
    share = {}
    for name, param in parameters.items():
        as_dtype = dtype or param.dtype
        if as_dtype not in DTYPE_NAMES or as_dtype.is_floating_point != param.dtype.is_floating_point:
            raise UsageError(f"{name}: cannot be saved as {as_dtype}; dtype is one of {[*FLOATS.values()]}")
        boxes = [(offsets, sizes) for offsets, sizes, _ in packed_boxes(param, whole_shapes[name])]
        share[name] = (DTYPE_NAMES[as_dtype], whole_shapes[name], boxes)
    return share


def writers(shares: list[dict[str, tuple]]) -> dict[tuple, int]:
    """Map (name, offsets, sizes) of every box to the lowest rank that holds it; all boxes must be held."""
    writer, unwritten = {}, {}
    for rank, share in enumerate(shares):
        for name, (_, shape, boxes) in share.items():
            unwritten.setdefault(name, math.prod(shape))
            for offsets, sizes in boxes:
                if writer.setdefault((name, offsets, sizes), rank) == rank:
                    unwritten[name] -= math.prod(sizes)
    assert not any(unwritten.values()), (
        f"the ranks together do not hold {[k for k, left in unwritten.items() if left]}"
    )
    return writer


def plan_files(tensors: dict[str, tuple[str, tuple]], max_bytes: int) -> FilePlan:
    """Distribute tensors (name -> dtype name, shape) over files of at most max_bytes (a larger tensor has one
    to itself). The plan depends on names and shapes only, never on the layout."""

    def natural(name):  # layers.2 before layers.10
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    shards, filled = [[]], 0
    for name in sorted(tensors, key=natural):
        if shards[-1] and filled + _bytes(*tensors[name]) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(*tensors[name])
    headers, stored = {}, {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        # keeps every tensor aligned to its dtype
        names.sort(key=lambda name: -DTYPES[tensors[name][0]].itemsize)
        for name in names:
            dtype, shape = tensors[name]
            start, end = end, end + _bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        for name in names:
            stored[name] = Stored(file, *tensors[name], len(headers[file]) + header[name]["data_offsets"][0])
    return FilePlan(headers, stored)


def _bytes(dtype: str, shape: tuple) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _save(
    folder: Path,
    plan: FilePlan,
    config: Any,
    generation: Any,
    boxes: Callable[[list[str]], NamedBoxes],
    convert: Convert | None = None,
) -> None:
    """Write a Hugging Face folder in one step.

    boxes: yields (name, box) of what this rank writes of the tensors of one file
    convert: returns the tensors of a file as they are to be saved, by name, where that is otherwise than the
        model has them; None: they are the same
    """
    folder = Path(os.path.realpath(folder))
    staged, aside = (folder.with_name(f".{folder.name}.{state}") for state in ("being-written", "replaced"))
    everywhere = functools.partial(on_all_ranks, f"saving {folder}")

    def write():
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        try:
            for file in plan.headers:
                with open(staged / file, "r+b", buffering=0) as opened:
                    for name, box in boxes(plan.names_in(file)):
                        _move(opened.fileno(), plan.stored[name], box, staging, to_file=True)
                    os.fsync(opened.fileno())
        except OSError as error:
            if is_full(error):
                raise UsageError(_disk_is_full(folder, plan.n_bytes)) from None
            raise

    with whole_folder(folder, staged, aside, everywhere):
        on_first_rank(everywhere, lambda: _create(folder, staged, plan, config, generation))
        everywhere(write)
        if convert is not None:
            on_first_rank(everywhere, lambda: _convert_files(folder, staged, plan, convert))
        on_first_rank(everywhere, lambda: _keep_other_files(folder, staged))


def _disk_is_full(folder: Path, needed_bytes: int) -> str:
    return (
        f"{folder} is not written: {say_full(folder, needed_bytes)}, beside what is there. "
        "The checkpoints stay: recipes/export.py writes the same from the newest one."
    )


def _create(folder: Path, staged: Path, plan: FilePlan, config: Any, generation: Any) -> None:
    """Create every file in the staging folder: JSON, and safetensors with their headers, at full size."""
    if plan.n_bytes > free_bytes(staged):
        raise UsageError(_disk_is_full(folder, plan.n_bytes))
    for file, header in plan.headers.items():
        (staged / file).write_bytes(header)
        os.truncate(
            staged / file, len(header) + sum(plan.stored[name].n_bytes for name in plan.names_in(file))
        )
    if len(plan.headers) > 1:
        weight_map = {name: where.file for name, where in plan.stored.items()}
        index = {"metadata": {"total_size": plan.n_bytes}, "weight_map": weight_map}
        write_durably(staged / INDEX, _as_json(index))
    dtypes = [where.dtype for where in plan.stored.values()]
    most_frequent = DTYPES[max(set(dtypes), key=dtypes.count)]
    # The config is ours, or transformers'.
    settings = config.to_hf() if hasattr(config, "to_hf") else json.loads(config.to_json_string())
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(most_frequent).removeprefix("torch.")
    settings["architectures"] = settings.get("architectures") or ["LlamaForCausalLM"]
    write_durably(staged / "config.json", _as_json(settings))
    if generation is None:
        generation = generation_config({}, config, same_tokens=True)
    elif not isinstance(generation, dict):  # a transformers GenerationConfig; its defaults are left out
        generation = json.loads(generation.to_json_string())
    write_durably(staged / "generation_config.json", _as_json(generation))


def _convert_files(folder: Path, staged: Path, plan: FilePlan, convert: Convert) -> None:
    """Write each file anew with what `convert` makes of its tensors. They are read whole, one after another,
    and the disk has room for one of them twice, or UsageError says so."""
    weight_map = {}
    for file in plan.headers:
        before = load_file(staged / file)
        tensors = convert(before)
        weight_map |= dict.fromkeys(tensors, file)
        if tensors.keys() == before.keys():
            continue
        if (staged / file).stat().st_size > free_bytes(staged):
            raise UsageError(_disk_is_full(folder, plan.n_bytes))
        anew = staged / f"{file}.anew"
        # safetensors refuses tensors that share memory, and what was cut out of another does.
        save_file({name: one.clone() for name, one in tensors.items()}, anew, metadata={"format": "pt"})
        with open(anew, "rb") as written:
            os.fsync(written.fileno())
        anew.rename(staged / file)
    if len(plan.headers) > 1:
        index = json.loads((staged / INDEX).read_text()) | {"weight_map": weight_map}
        write_durably(staged / INDEX, _as_json(index))


def _keep_other_files(folder: Path, staged: Path) -> None:
    """Link into the new folder the files of the old one that stay, such as those of a tokenizer."""

    def keep(source, target):
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # file systems without hard links
            shutil.copy2(source, target)

    def replaced_files(directory, names):
        return [name for name in names if Path(directory) == folder and OURS.fullmatch(name)]

    if folder.exists():
        shutil.copytree(
            folder, staged, copy_function=keep, ignore=replaced_files, symlinks=True, dirs_exist_ok=True
        )


def _as_json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


def _move(fd: int, where: Stored, box: Box, staging: Tensor, to_file: bool) -> None:
    """Move a box between the file and this rank's memory through the staging buffer, converting the dtype."""
    offsets, sizes, local = box
    dtype, raw = DTYPES[where.dtype], memoryview(staging.numpy())
    flat = local.reshape(-1)  # a view, unless a layout left the shard non-contiguous
    for batch in batches(where.shape, offsets, sizes, staging.numel() // dtype.itemsize):
        first, count = batch[0][1], sum(length for _, _, length in batch)
        part, staged = flat[first : first + count], staging[: count * dtype.itemsize].view(dtype)
        if to_file:
            # From a device, copy_ would cast on the host, after the numbers have crossed the link uncast.
            # On the host it casts without another buffer.
            staged.copy_(part if part.device.type == "cpu" else part.to(dtype))
        for at, in_box, length in batch:
            piece = raw[(in_box - first) * dtype.itemsize :][: length * dtype.itemsize]
            position = where.start + at * dtype.itemsize
            while piece:
                moved = os.pwrite(fd, piece, position) if to_file else os.preadv(fd, [piece], position)
                if not moved:
                    raise UsageError(f"{where.file}: ended while being read; something else is writing it")
                piece, position = piece[moved:], position + moved
        if not to_file:
            part.copy_(staged.to(local.device))
    if not to_file and not local.is_contiguous():
        local.copy_(flat.view(local.shape))
