"""Chunks: the unit in which optimizer state is placed, moved and stepped.

shard       this rank's elements of one parameter, flat: DTensor.to_local(), or a plain parameter
piece       a run of a shard that lies in one chunk; a large shard is cut into several
chunk       pieces, in the order in which forward waits for them, of one parameter group and dtype; 16 Mi elements, fewer on a
            small shard
master      the float32 weight. RESIDENT and STREAM keep of it only what the weight lacks: nothing if weights are float32,
            `low`, its lower 16 bits, if they are bfloat16. CPU keeps all of it, on the host
slab        host memory of a CPU chunk in the weights' dtype, pinned: gradients arrive in it
total       float32 sum of gradients that arrive several times a step
account     "device" or "host": where bytes are counted. On a machine without a device both are the same RAM
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from dtensor_llama.errors import UsageError
from dtensor_llama.shards import copies, local
from memory.kernel import join_master, split_master
from memory.lanes import DONE, Lane
from memory.placement import GIB, Placement

# 64 MiB of each float32 tensor: a copy of it runs at the wire's speed, a ring of 4 is 0.6 GiB
CHUNK_ELEMENTS = 16 * 2**20
# where nothing moves: a parameter that no chunk's edge cuts is stepped in one launch
RESIDENT_CHUNK_ELEMENTS = 256 * 2**20
MIN_CHUNKS = 32  # of a rank, if they have LEAST_CHUNK_ELEMENTS
LEAST_CHUNK_ELEMENTS = 4096
# bytes: large tensors all begin at one offset in their pages, and a load whose address ends as a
STAGGER = 1024
# store's before it does waits for that; 1 to 8 % of the host's AdamW
ALIGN = 64  # elements: pieces begin at a vector register's and a cache line's boundary


class State(Enum):
    READY = "ready"  # the update is issued; once `weights_done` says so the weights are new
    COLLECTING = "collecting"  # gradients of the next update have begun to arrive
    QUEUED = "queued"  # an engine was told to step it
    STEPPING = "stepping"  # an engine is at it


LEGAL_MOVES = {
    State.READY: {State.COLLECTING},
    State.COLLECTING: {State.QUEUED, State.READY},
    State.QUEUED: {State.STEPPING},
    State.STEPPING: {State.READY},
}


class Ledger:
    """Bytes held by account, and the budgets they must never pass. fill: writes zeros, so that pages are real
    from the start and, written by the threads that will step them, lie near those."""

    def __init__(
        self,
        device: torch.device,
        budgets: dict[str, int | None],
        fill: Callable[[Tensor], None] = Tensor.zero_,
    ):
        self.device, self.budgets, self.fill = device, budgets, fill
        self.held, self.peak = {"device": 0, "host": 0}, {"device": 0, "host": 0}

    def take(self, account: str, n_bytes: int, what: str) -> None:
        """RuntimeError if the budget is passed: plans are checked before, so it is a defect of ours."""
        held, budget = self.held[account] + n_bytes, self.budgets[account]
        if budget is not None and held > budget:
            raise RuntimeError(
                f"{what} takes {n_bytes / GIB:.6f} GiB on the {account}, which would hold {held / GIB:.6f} GiB; "
                f"its budget is {budget / GIB:.6f} GiB"
            )
        self.held[account] = held
        self.peak[account] = max(self.peak[account], held)

    def give(self, account: str, n_bytes: int) -> None:
        self.held[account] -= n_bytes
        assert self.held[account] >= 0, (account, self.held)

    def zeros(
        self, account: str, n: int, dtype: torch.dtype, what: str, pin: bool = False, nth: int = 0
    ) -> Tensor:
        """(n,) zeros. nth: among those that one loop reads and writes at a time, if they are in pageable
        memory."""
        self.take(account, n * dtype.itemsize, what)
        if account == "device" and self.device.type == "cuda":
            return torch.zeros(n, dtype=dtype, device=self.device)
        pin = pin and self.device.type == "cuda"  # pinned memory comes in powers of two: no room to shift
        shift = 0 if pin else nth * STAGGER // dtype.itemsize
        tensor = torch.empty(shift + n, dtype=dtype, pin_memory=pin)[shift:]
        self.fill(tensor)
        return tensor


@dataclass(eq=False)
class Managed:
    """A parameter that trains, and what happened to its gradient in this step."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]  # of the optimizer: its lr, weight_decay ... as they are at the step
    copies: int  # ranks that hold the same elements
    outside: bool  # its gradient is changed after backward, its weight read outside forward
    gate: nn.Module  # whose forward waits for its weight
    pieces: list["Piece"] = field(default_factory=list)
    keeps_grad: bool = False  # its gradient waits for the step where autograd or FSDP left it
    # what `seen` said of its weight after our last update; None: one may be under way
    weight_seen: tuple | None = None
    step: int = 0  # updates made
    came: int = 0  # backwards that gave it a gradient since the last update
    arrivals: int = 0  # of them, or of their sum, that were taken in

    @property
    def weight(self) -> Tensor:
        """This rank's elements, flat, as they lie (FSDP may move a padded shard when it first runs, so ask
        anew)."""
        return flat(self.parameter)


@dataclass(eq=False)
class Piece:
    """`shard[in_shard]` is `chunk[in_chunk]`."""

    managed: Managed
    chunk: "Chunk"
    index: int  # among all pieces
    in_shard: slice
    in_chunk: slice
    waiting: Tensor | None = None  # the gradient until the step, where it cannot stay where it came
    adding: Any = None  # future: the gradient of an earlier microbatch is being added to the total

    def parts(self, n: int) -> Iterator["Piece"]:
        """The piece in runs of at most n elements."""
        for start in range(0, self.in_chunk.stop - self.in_chunk.start, n):
            in_chunk = slice(
                self.in_chunk.start + start, min(self.in_chunk.start + start + n, self.in_chunk.stop)
            )
            in_shard = slice(
                self.in_shard.start + start, min(self.in_shard.start + start + n, self.in_shard.stop)
            )
            yield replace(self, in_chunk=in_chunk, in_shard=in_shard)


class Chunk:
    """State of the pieces of one chunk. `state` is changed by move_to alone."""

    def __init__(self, index: int, group: dict[str, Any], dtype: torch.dtype):
        self.index, self.group, self.dtype, self.n = index, group, dtype, 0
        self.pieces: list[Piece] = []
        self.placement: Placement | None = None
        self.tensors: dict[str, Tensor] = {}
        self.state = State.READY
        self.job = None  # future of the host's step
        self.weights_done = self.done = DONE
        self.arrived: list = []  # events: copies of gradients to the slab

    def __repr__(self) -> str:
        return f"chunk {self.index} ({self.placement.value}, {self.n} elements from {self.pieces[0].managed.name})"

    @property
    def managed(self) -> list[Managed]:
        return [piece.managed for piece in self.pieces]

    @property
    def covers(self) -> tuple[str, str]:
        """Its first and its last parameter, without what all names have."""
        first, last = (
            piece.managed.name.removeprefix("model.").removesuffix(".weight")
            for piece in (self.pieces[0], self.pieces[-1])
        )
        return first, last

    def move_to(self, state: State) -> None:
        if state not in LEGAL_MOVES[self.state]:
            raise RuntimeError(f"{self} cannot move from {self.state.value} to {state.value}")
        self.state = state

    def wait(self) -> None:
        """Until its weights are new; raises what went wrong in the host's step."""
        self._wait_for_host()
        self.weights_done.synchronize()

    def wait_on(self, lane: Lane) -> None:
        """As `wait`, for what is given to the lane from now on: the caller goes on once the host has stepped
        the chunk."""
        self._wait_for_host()
        lane.wait(self.weights_done)

    def _wait_for_host(self) -> None:
        if self.job is not None:
            self.job.result()
            self.job = None

    # ---- where it lives ----

    def allocate(self, ledger: Ledger, placement: Placement, sums: bool) -> None:
        """Memory for a placement: moments 0, and `low` 0, with which the weight is the master."""
        for nth, (name, (account, dtype, pin)) in enumerate(layout(placement, self.dtype, sums).items()):
            self.tensors[name] = ledger.zeros(
                account, self.n, dtype, f"{name} of chunk {self.index}", pin, nth
            )
        self.placement = placement
        if placement is Placement.CPU:
            for piece in self.pieces:
                self.tensors["master"][piece.in_chunk] = piece.managed.weight[piece.in_shard]

    def release(self, ledger: Ledger, sums: bool) -> None:
        for name, (account, _, _) in layout(self.placement, self.dtype, sums).items():
            ledger.give(account, self.tensors.pop(name).nbytes)
        self.placement = None

    def read(self, name: str, piece: Piece) -> Tensor:
        """`master`, `exp_avg` or `exp_avg_sq` of a piece, float32, where it is; may be a view."""
        if name in self.tensors:
            return self.tensors[name][piece.in_chunk]
        weight = piece.managed.weight[piece.in_shard]
        return (
            join_master(weight, self.tensors["low"][piece.in_chunk].to(weight.device))
            if "low" in self.tensors
            else weight
        )

    def write(self, name: str, piece: Piece, value: Tensor) -> None:
        """As read; a new master is rounded into the weight too."""
        if name in self.tensors:
            self.tensors[name][piece.in_chunk] = value
        if name == "master":
            weight = piece.managed.weight[piece.in_shard]
            if "low" in self.tensors:
                weight_value, low = split_master(value.contiguous())
                self.tensors["low"][piece.in_chunk] = low
                value = weight_value
            weight.copy_(value)


def layout(placement: Placement, dtype: torch.dtype, sums: bool) -> dict[str, tuple[str, torch.dtype, bool]]:
    """Tensors of a chunk's elements: name -> (account, dtype, pinned). sums: gradients arrive several times a
    step."""
    f32, narrow = torch.float32, dtype != torch.float32
    if placement is Placement.CPU:
        pageable = {
            name: ("host", f32, False) for name in ("master", "exp_avg", "exp_avg_sq", *["total"] * sums)
        }
        return pageable | {"slab": ("host", dtype, True)}
    home = ("host", True) if placement is Placement.STREAM else ("device", False)
    states = {name: (home[0], f32, home[1]) for name in ("exp_avg", "exp_avg_sq")}
    states |= {"low": (home[0], torch.int16, home[1])} if narrow else {}
    return states | ({"total": ("device", f32, False)} if sums and narrow else {})


def bytes_per_element(placement: Placement, dtype: torch.dtype, sums: bool) -> dict[str, int]:
    """By account, without the weights; the gradients of RESIDENT and STREAM wait on the device for their
    step."""
    need = {
        "device": 0 if placement is Placement.CPU or (sums and dtype != torch.float32) else dtype.itemsize,
        "host": 0,
    }
    for account, one, _ in layout(placement, dtype, sums).values():
        need[account] += one.itemsize
    return need


def chunk_size(n_elements: int) -> int:
    """Elements of a chunk for a rank with so many: CHUNK_ELEMENTS, or halved until it has MIN_CHUNKS, so that
    fractions and budgets are met closely; on small shards a chunk that takes a launch or two is as quick as a
    large one."""
    size = CHUNK_ELEMENTS
    while size > LEAST_CHUNK_ELEMENTS and n_elements < MIN_CHUNKS * size:
        size //= 2
    return size


def gated(part: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """Parameter -> the module whose forward waits for it, in the order in which they are waited for: the
    whole, then blocks.

    FSDP gathers the weights of a module as one. Without it the elements of lists, the blocks, wait for their
    own. The rest, an embedding, a head, is the whole's in both: it is gathered before the first block, and
    may be read from anywhere."""
    wrapped = [module for module in part.modules() if isinstance(module, FSDPModule)]
    listed = [block for module in part.modules() if isinstance(module, nn.ModuleList) for block in module]
    modules = dict.fromkeys([part, *(wrapped or listed)])
    gate = {}
    for module in modules:  # inner ones come after outer ones
        gate |= dict.fromkeys(module.parameters(), module)
    return {
        parameter: module
        for module in modules
        for parameter in module.parameters()
        if gate[parameter] is module
    }


def find_managed(
    model: nn.Module,
    parts: list[nn.Module],
    optimizer: torch.optim.AdamW,
    outside: set[nn.Parameter] = frozenset(),
) -> list[Managed]:
    """The optimizer's trainable parameters, in the order in which the next forward waits for them."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    gates: dict[nn.Parameter, nn.Module] = {}
    for part in parts:  # what several use is waited for by the first
        gates |= {p: module for p, module in gated(part).items() if p in group_of and p not in gates}
    strange = [
        tuple(parameter.shape) for parameter in group_of if parameter not in gates or parameter not in names
    ]
    if strange:
        raise UsageError(
            f"the optimizer has {len(strange)} parameters that are not the model's (the first: {strange[0]}); "
            "build it on model.parameters()."
        )
    torn = [names[parameter] for parameter in gates if not local(parameter).is_contiguous()]
    if torn:
        raise UsageError(
            f"{torn[0]} is not contiguous, so no run of its memory can be a chunk's; make it contiguous()."
        )
    wrong = [
        names[parameter] for parameter in gates if parameter.dtype not in (torch.float32, torch.bfloat16)
    ]
    if wrong:
        raise UsageError(
            f"{wrong[0]} is neither float32 nor bfloat16; use --train.dtype float32 or bfloat16."
        )
    return [
        Managed(
            names[parameter], parameter, group_of[parameter], copies(parameter), parameter in outside, module
        )
        for parameter, module in gates.items()
    ]


def plain_name(name: str) -> str:
    """Without what compiling or recomputing puts into names."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def cut(managed: list[Managed], chunk_elements: int) -> list[Chunk]:
    """Chunks of the shards in the order given, one open chunk per (group, dtype); in the order of their first
    pieces."""
    assert chunk_elements % ALIGN == 0, chunk_elements
    chunks: list[Chunk] = []
    open_chunks: dict[tuple, Chunk] = {}
    n_pieces = 0
    for one in managed:
        key, done, n = (id(one.group), one.parameter.dtype), 0, local(one.parameter).numel()
        while done < n:
            chunk = open_chunks.get(key)
            if chunk is None or chunk.n == chunk_elements:
                chunk = open_chunks[key] = Chunk(len(chunks), one.group, one.parameter.dtype)
                chunks.append(chunk)
            run = min(n - done, chunk_elements - chunk.n)
            piece = Piece(one, chunk, n_pieces, slice(done, done + run), slice(chunk.n, chunk.n + run))
            one.pieces.append(piece)
            chunk.pieces.append(piece)
            chunk.n = min(chunk_elements, -(-(chunk.n + run) // ALIGN) * ALIGN)
            done, n_pieces = done + run, n_pieces + 1
    return chunks


def seen(tensor: Tensor) -> tuple[int, int, int]:
    """Which memory, and which writing of it: an in-place change adds to the count of the shard, or of the
    DTensor around it."""
    shard = local(tensor)
    return shard.data_ptr(), shard._version, tensor._version


def flat(tensor: Tensor) -> Tensor:
    # view raises if it is not contiguous: nothing could be written through a copy
    return local(tensor).detach().view(-1)


def like(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """A tensor spread as the parameter is, with `shard` (any dtype, host or device) as this rank's part.

    DTensor.from_local would move a host tensor to the mesh's device; what it calls does not. Not public in
    torch 2.11 to 2.13; FSDP2's CPU offload makes its parameters in this way."""
    shard = shard.view(local(parameter).shape)
    if not isinstance(parameter, DTensor):
        return shard
    meta = TensorMeta(parameter.shape, parameter.stride(), shard.dtype)
    return DTensor(
        shard, DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta), requires_grad=False
    )


_NO_MEMORY = torch.zeros(1)  # the one number that all placeholders consist of


def placeholder(parameter: nn.Parameter) -> Tensor:
    """A float32 tensor with the shape and layout of the parameter, on the host, that takes no memory: all its
    elements are one number, so that copying values into it raises."""
    return like(parameter, _NO_MEMORY.expand(local(parameter).shape))
