"""Hugging Face safetensors in and out of a model of any layout, a slice at a time.

box: the part of a tensor that this rank holds, as (offsets, sizes) in the whole tensor
run: elements that are neighbours both in the file and in the box: what one read or write moves
staging buffer: 32 MiB of host memory that every byte passes through, all that loading or saving adds
    (converting to another dtype takes as much again for a moment)

A safetensors file is 8 bytes of header length (little endian), a JSON header that gives dtype, shape and byte
range of every tensor, and the bytes. So each rank can compute where each of its runs lies, and weights never
travel between ranks. We pread and pwrite the runs rather than map the files: mapped pages count as this
process's memory until the file is closed, and a mapped file that is cut under us is a SIGBUS instead of an
error.
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtensor_llama.config import refuse_adapter
from dtensor_llama.errors import UsageError
from dtensor_llama.places import free_bytes, say_full

STAGING_BYTES = 32 << 20  # 8 and 128 MiB load no faster; 32 keeps the Python calls rare
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
ADAPTER = "_lora.lora_"  # in the name of a parameter that lora.py added
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Box = tuple[tuple[int, ...], tuple[int, ...], Tensor]


class Stored(NamedTuple):
    """Where one tensor lies: file, safetensors' name of its dtype, shape, first byte counted from the file's
    start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class StandIn(nn.Module):
    """Stands in for a model whose float32 weights live somewhere else, for example in the chunks of memory/.

    Its parameters have the model's names, shapes and layouts, but no memory of their own. Values pass through
    one parameter at a time, so that initialising, loading or saving a model takes the memory of its largest
    parameter, not that of a second model. `values_to_read` and `values_to_write` treat it and an ordinary
    model alike.
    """

    def empty(self, name: str) -> Tensor:
        """A tensor for the values of one parameter, float32 on the host, spread as the parameter is."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """As `empty`, with a copy of the values of now."""
        raise NotImplementedError

    def write(self, name: str, values: Tensor) -> None:
        """The values of one parameter become these, which are spread as `empty` has it."""
        raise NotImplementedError


def values_to_read(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """The values of a parameter of the model: itself, or of a StandIn a copy."""
    return model.read(name) if isinstance(model, StandIn) else parameter


@contextmanager
def values_to_write(model: nn.Module, name: str, parameter: nn.Parameter) -> Iterator[Tensor]:
    """What to fill, all of it, with new values of a parameter of the model: itself, or memory that a StandIn
    takes from."""
    if not isinstance(model, StandIn):
        yield parameter
        return
    values = model.empty(name)
    yield values
    model.write(name, values)


def load_hf(model: nn.Module, folder: str | Path) -> None:
    """Fill the parameters (plain tensors or DTensors of any placements, any floating dtype) from a Hugging
    Face folder.

    All ranks call it; each reads only the slices it holds. Everything is checked before the first parameter
    changes: raises one UsageError, the same on all ranks, that lists whatever is missing, unexpected,
    misshapen or cut."""
    folder, parameters = Path(folder), hf_parameters(model)
    for name, param in parameters.items():
        if param.is_meta:
            raise UsageError(
                f"{name} is on the meta device, without memory; call model.to_empty(device=...) first"
            )
    everywhere = functools.partial(on_all_ranks, f"loading {folder}")
    held = everywhere(lambda: {name: tuple(param.shape) for name, param in parameters.items()})
    # under pp a rank holds a part
    wanted = {name: shape for one_rank in held for name, shape in one_rank.items()}
    tied = getattr(model.config, "tie_word_embeddings", False)
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
    """Raise the UsageError that load_hf would raise for this whole model, which may be on `meta`. Reads only
    headers and needs no process group, so a recipe can refuse bad weights before anything starts."""
    _checked(
        Path(folder),
        {name: tuple(param.shape) for name, param in hf_parameters(model).items()},
        getattr(model.config, "tie_word_embeddings", False),
    )


def save_hf(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers opens as it is: config, generation config, safetensors (split above
    the limit).

    All ranks call it, on a file system that all of them see; of equal boxes the lowest rank writes its own.
    `dtype` None keeps the parameters'. Other files in the folder (a tokenizer) stay. The new folder is built
    beside the final name and renamed: killed at any instant, that name holds the whole old model, the whole
    new one, or (between two renames; the next save_hf puts the old one back) nothing. Raises UsageError if it
    cannot be written."""
    folder, parameters = Path(os.path.realpath(folder)), hf_parameters(model)
    if len(parameters) < len(hf_parameters(model, adapters=True)):
        raise ValueError(
            "the model has LoRA adapters, which save_hf would leave out; merge_lora(model) first"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    everywhere = functools.partial(on_all_ranks, f"saving {folder}")
    shares = everywhere(lambda: _share(parameters, dtype))
    headers, stored = plan_files(
        {name: share[:2] for one in shares for name, share in one.items()}, max_shard_bytes
    )
    writer = writers(shares)
    staged = folder.with_name(f".{folder.name}.being-written")

    def write():
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        for file in headers:
            with open(staged / file, "r+b", buffering=0) as opened:
                for name in [name for name in parameters if stored[name].file == file]:
                    mine = [
                        box[:2]
                        for box in local_boxes(parameters[name])
                        if writer[name, box[0], box[1]] == rank
                    ]
                    for box in local_boxes(values_to_read(model, name, parameters[name])) if mine else ():
                        if box[:2] in mine:
                            _move(opened.fileno(), stored[name], box, staging, to_file=True)
                os.fsync(opened.fileno())

    try:
        settings = model.config, getattr(model, "generation_config", None)
        everywhere(lambda: _create(folder, staged, headers, stored, *settings) if rank == 0 else None)
        everywhere(write)
        everywhere(lambda: _publish(staged, folder) if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(staged, ignore_errors=True)  # there still only after a failure


def save_generation_config(folder: str | Path, settings: dict) -> None:
    """Put `settings` into the generation_config.json of a folder that is complete, in one step."""
    staged = Path(folder, ".generation_config.json.being-written")
    _write_json(staged, settings)
    staged.rename(Path(folder, "generation_config.json"))


def save_hf_in_parts(
    folder: str | Path,
    config: Any,
    shapes: dict[str, tuple],
    dtype: torch.dtype,
    read: Callable[[list[str]], dict[str, Tensor]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As save_hf writes a model of these parameters (name -> shape), byte for byte, in one process that never
    holds all of
    it: `read(names)` makes the tensors of one file, at most max_shard_bytes of `dtype` (or one tensor that is
        larger)."""
    folder = Path(os.path.realpath(folder))
    headers, stored = plan_files(
        {name: (DTYPE_NAMES[dtype], tuple(shape)) for name, shape in shapes.items()}, max_shard_bytes
    )
    staged = folder.with_name(f".{folder.name}.being-written")

    def write():
        _create(folder, staged, headers, stored, config)
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        for file in headers:
            tensors = read([name for name in shapes if stored[name].file == file])
            with open(staged / file, "r+b", buffering=0) as opened:
                for name, tensor in tensors.items():
                    for box in local_boxes(tensor):
                        _move(opened.fileno(), stored[name], box, staging, to_file=True)
                os.fsync(opened.fileno())
        _publish(staged, folder)

    try:
        on_all_ranks(f"saving {folder}", write)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # there still only after a failure


def hf_parameters(model: nn.Module, adapters: bool = False) -> dict[str, nn.Parameter]:
    """Parameters by Hugging Face name, tied ones once, without what compiling or recomputing puts into names.

    adapters: those of LoRA too, which no Hugging Face model has."""
    wrappers = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
    return {
        wrappers.sub("", name): param
        for name, param in model.named_parameters()
        if adapters or ADAPTER not in name
    }


def local_boxes(tensor: Tensor) -> list[Box]:
    """This rank's part of a tensor: (offsets in the whole tensor, sizes, view of the local memory), detached.

    A plain tensor is one whole box; an empty shard gives none. Works on meta. The one place that asks DTensor
    where its shard lies. Raises ValueError for a shard that is not one box (a _StridedShard that no later
    axis completes)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tuple(tensor.shape), tensor)] if tensor.numel() else []
    if tensor.device_mesh.get_coordinate() is None:  # this rank is not in the tensor's mesh
        return []
    local = tensor.to_local()
    (chunk,) = tensor.__create_chunk_list__()  # what DCP asks; refuses Partial; right for tp inside FSDP
    pieces = {}  # dim -> pieces: an FSDP axis outside tp takes one of each tp slice, then tp picks among them
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


def batches(shape: tuple, offsets: tuple, sizes: tuple, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """The runs of a box, in batches of at most `most` elements. A run is (place in the whole tensor, place in
    the box, length), in elements and row-major order; runs follow each other in the box without gaps."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # whole from here on
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


def on_all_ranks(
    what: str, do: Callable[[], Any], group: dist.ProcessGroup | None = None, share: bool = True
) -> Any:
    """Run `do()` on every rank of the group (default: all) and return the results in rank order (share=False:
    only this rank's). Without a process group this process is the only rank.

    If it raises on one rank it raises on all, so that none is left waiting in a collective. An OSError
    becomes a UsageError that says what was being done: a full disk is for the user to mend."""
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
            raise (
                UsageError(failure[2])
                if failure[0]
                else RuntimeError(f"{what}, on rank {rank}: {failure[1]}")
            )
    return [one for one, _ in answers] if share else result


def _checked(folder: Path, wanted: dict[str, tuple], tied: bool) -> dict[str, Stored]:
    """Where every wanted tensor lies; raises UsageError that lists all that is wrong with the folder for this
    model."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; weights are read from a local folder with model.safetensors"
        )
    file_of, problems, stored = {}, [], {}
    if (folder / "model.safetensors").exists():  # first, as transformers does
        files = ["model.safetensors"]
    elif (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
            # never a path out of the folder
            file_of = {name: Path(file).name for name, file in weight_map.items()}
            files = sorted(set(file_of.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{folder / INDEX}: not an index of safetensors files ({error}); fetch it again"
            ) from None
    else:
        refuse_adapter(folder)
        there = sorted(
            p.name for p in folder.iterdir() if re.search(r"\.(safetensors|bin|pth?|gguf|ckpt)$", p.name)
        )
        raise UsageError(
            f"{folder}: no model.safetensors and no {INDEX}; it has {', '.join(there[:5]) or 'no weights at all'}. "
            "Only safetensors are opened: pickles run code. Convert with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    for file in files:
        try:
            header, size_problem = _read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {'no such file' if isinstance(error, FileNotFoundError) else error}")
            continue
        problems += [f"{file}: {size_problem}"] if size_problem else []
        problems += [
            f"{name}: in {INDEX} but not in {file}"
            for name, its in file_of.items()
            if its == file and name not in header
        ]
        stored |= header
    if stored or not problems:  # what only lies in a bad file is not listed as missing: the file is
        problems += [f"{name}: missing" for name in wanted if name not in stored and name not in file_of]
    for name, where in stored.items():
        derived = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name not in wanted and not derived:
            problems.append(f"{name}: unexpected")
        elif name in wanted and where.shape != wanted[name]:
            problems.append(f"{name}: is {list(where.shape)}, the model needs {list(wanted[name])}")
        elif name in wanted and where.dtype not in DTYPES:
            problems.append(f"{name}: dtype {where.dtype}, only {', '.join(DTYPES)} are read")
    if problems:
        rest = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UsageError(
            f"{folder}: weights do not fit this model: {'; '.join(problems[:20])}{rest}. "
            "Use the folder's own config.json, or fetch the files again"
        )
    return stored


def _read_header(path: Path) -> tuple[dict[str, Stored], str]:
    """The tensors of one file, and what is wrong with its length ("": nothing). Raises ValueError if
    unreadable."""
    with open(path, "rb") as opened:
        actual = os.fstat(opened.fileno()).st_size
        first = opened.read(8)
        if first == b"version ":
            raise ValueError("a Git LFS pointer, not the weights; run git lfs pull")
        header_bytes = int.from_bytes(first, "little")
        # the limit of the safetensors library
        if len(first) < 8 or header_bytes > min(actual - 8, 100_000_000):
            raise ValueError(f"unreadable header: cut or not safetensors (file has {actual} bytes)")
        try:
            header = json.loads(opened.read(header_bytes))
            tensors = {
                name: (one["dtype"], tuple(one["shape"]), *one["data_offsets"])
                for name, one in header.items()
                if name != "__metadata__"
            }
            end = 0
            for dtype, shape, start, stop in sorted(tensors.values(), key=lambda tensor: tensor[2:]):
                if start != end or dtype in DTYPES and stop - start != _bytes(dtype, shape):
                    raise ValueError("byte ranges overlap, leave holes or do not match the shapes")
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unreadable header: {error}") from None
    whole = 8 + header_bytes + end
    return {
        name: Stored(path.name, dtype, shape, 8 + header_bytes + start)
        for name, (dtype, shape, start, _) in tensors.items()
    }, "" if whole == actual else f"header says {whole} bytes, file has {actual}"


def _share(parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> dict[str, tuple]:
    """What this rank holds: name -> (safetensors dtype in the file, whole shape, [(offsets, sizes) of its
    boxes])."""
    share = {}
    for name, param in parameters.items():
        if (dtype or param.dtype) not in DTYPE_NAMES:
            raise UsageError(
                f"{name}: cannot be saved as {dtype or param.dtype}; dtype is one of {[*DTYPE_NAMES]}"
            )
        boxes = [(offsets, sizes) for offsets, sizes, _ in local_boxes(param)]
        share[name] = (DTYPE_NAMES[dtype or param.dtype], tuple(param.shape), boxes)
    return share


def writers(shares: list[dict[str, tuple]]) -> dict[tuple, int]:
    """(name, offsets, sizes) of every box -> the lowest rank that holds it. Asserts that the boxes fill each
    tensor."""
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


def plan_files(
    tensors: dict[str, tuple[str, tuple]], max_bytes: int
) -> tuple[dict[str, bytes], dict[str, Stored]]:
    """Deal tensors (name -> dtype name, shape) to files of at most max_bytes (a larger tensor has one to
    itself).

    Returns each file's header bytes and each tensor's place. Depends on names and shapes only, never on the
    layout."""

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
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + _bytes(*tensors[name])],
            }
            end += _bytes(*tensors[name])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        for name in names:
            stored[name] = Stored(file, *tensors[name], len(headers[file]) + header[name]["data_offsets"][0])
    return headers, stored


def _bytes(dtype: str, shape: tuple) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _create(
    folder: Path,
    staged: Path,
    headers: dict[str, bytes],
    stored: dict[str, Stored],
    config: Any,
    generation: Any = None,
) -> None:
    """Rank 0's part of a save: the staging folder with every file at its full size, headers and JSON
    written."""
    replaced, here = folder.with_name(f".{folder.name}.replaced"), Path.cwd().resolve()
    if (
        folder in (here, *here.parents)
        or os.path.ismount(folder)
        or (folder.exists() and not folder.is_dir())
    ):
        raise UsageError(
            f"{folder}: cannot be replaced in one step (a file, a mount point, or the current folder or "
            f"one above it); save into a folder of its own, like {folder / 'hf'}"
        )
    if replaced.exists() and not folder.exists():  # a save was killed between its two renames
        replaced.rename(folder)
    for leftover in (replaced, staged):
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=True)
    total_bytes = sum(_bytes(where.dtype, where.shape) for where in stored.values())
    if total_bytes > free_bytes(staged):
        raise UsageError(
            f"{folder} is not written: {say_full(folder, total_bytes)}, beside what is there. "
            "The checkpoints stay: recipes/export.py writes the same from the newest one."
        )
    for file, header in headers.items():
        (staged / file).write_bytes(header)
        its = [where for where in stored.values() if where.file == file]
        os.truncate(staged / file, len(header) + sum(_bytes(where.dtype, where.shape) for where in its))
    if len(headers) > 1:
        weight_map = {name: where.file for name, where in stored.items()}
        _write_json(staged / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    dtypes = [where.dtype for where in stored.values()]
    most = str(DTYPES[max(set(dtypes), key=dtypes.count)]).removeprefix("torch.")
    # ours, or a transformers config
    settings = config.to_hf() if hasattr(config, "to_hf") else config.to_dict()
    settings.pop("torch_dtype", None)
    settings |= {"dtype": most, "architectures": settings.get("architectures") or ["LlamaForCausalLM"]}
    _write_json(staged / "config.json", settings)
    if generation is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: settings[name] for name in names if settings.get(name) is not None}
        generation = {"_from_model_config": True, **ids}
    elif not isinstance(generation, dict):  # of a transformers model; without what are defaults there
        generation = json.loads(generation.to_json_string())
    _write_json(staged / "generation_config.json", generation)


def _publish(staged: Path, folder: Path) -> None:
    """Rank 0's part of a save: give the finished staging folder the final name, with the other files of the
    old one."""

    def keep(source, target):
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # file systems without hard links
            shutil.copy2(source, target)

    def replaced_files(directory, names):
        return [name for name in names if Path(directory) == folder and OURS.fullmatch(name)]

    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.copytree(
            folder, staged, copy_function=keep, ignore=replaced_files, symlinks=True, dirs_exist_ok=True
        )
    fsync_folder(staged)
    if folder.exists():
        folder.rename(replaced)
    staged.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (new files, renames) survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w") as opened:
        opened.write(json.dumps(value, indent=2) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def _move(fd: int, where: Stored, box: Box, staging: Tensor, to_file: bool) -> None:
    """A box between the file and this rank's memory, through the staging buffer; dtype is converted on the
    device."""
    offsets, sizes, local = box
    dtype, raw = DTYPES[where.dtype], memoryview(staging.numpy())
    flat = local.reshape(-1)  # a view, unless a layout left the shard non-contiguous
    for batch in batches(where.shape, offsets, sizes, staging.numel() // dtype.itemsize):
        first, count = batch[0][1], sum(length for _, _, length in batch)
        part, staged = flat[first : first + count], staging[: count * dtype.itemsize].view(dtype)
        if to_file:
            # A copy from a device would cast on the wrong side of the link; on the host it casts without
            # another buffer.
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
