"""Chunks: the unit in which optimizer state is placed, moved and stepped.

shard      this rank's elements of one parameter, flat: DTensor.to_local(), or a plain parameter
piece      a run of a shard that lies in one chunk; a large shard is cut into several
chunk      pieces of one parameter group, in the order in which forward waits for them: 16 Mi elements, or
           fewer on a small shard
owner      the module whose forward waits until a parameter has its new weight
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB
from dtensor_llama.shards import copies, local
from dtensor_llama.weights import plain_name
from memory.home import Home, StateFormat
from memory.kernel import blocks, join_master, split_master
from memory.lanes import DONE, Lane

# 64 MiB per float32 tensor: a copy of it runs at full bandwidth, and a ring of 4 takes 0.6 GiB
CHUNK_ELEMENTS = 16 * 2**20
# Where nothing moves: a parameter that no chunk boundary cuts is stepped in one launch.
RESIDENT_CHUNK_ELEMENTS = 256 * 2**20
MIN_CHUNKS = 32  # on a rank, as long as they have LEAST_CHUNK_ELEMENTS
LEAST_CHUNK_ELEMENTS = 4096
# bytes: large tensors all begin at the same offset in their pages, and a load waits for an earlier store
# whose address has the same low bits. That takes 1 to 8 % of the host's AdamW.
STAGGER = 1024
ALIGN = 64  # elements: pieces begin where a vector register and a cache line begin


ParamGroup = dict[str, Any]  # of an optimizer's param_groups


class State(Enum):
    """Says what a chunk waits for. Copies of an update may still be under way on a lane when the chunk is
    idle again: `weights_done` is the event of its new weights."""

    IDLE = "idle"  # no gradient of the next update has arrived
    COLLECTING = "collecting"  # some have
    UPDATING = "updating"  # an engine has it, and has not yet issued all of its work


LEGAL_MOVES = {
    State.IDLE: {State.COLLECTING},
    State.COLLECTING: {State.UPDATING, State.IDLE},
    State.UPDATING: {State.IDLE},
}


class Ledger:
    """Counts the bytes that are held by account, which never exceed the budgets.

    fill: writes zeros, so that the pages are real from the start. Where the threads that will step the
    tensors write them, the pages lie near those threads.
    """

    def __init__(
        self,
        device: torch.device,
        budgets: dict[str, int | None],
        fill: Callable[[Tensor], None] = Tensor.zero_,
    ):
        self.device, self.budgets, self.fill = device, budgets, fill
        self.held, self.peak = Counter(), Counter()  # bytes by account

    def reserve(self, account: str, n_bytes: int, what: str) -> None:
        """RuntimeError if this exceeds the budget: plans are checked before, so it is our defect."""
        held, budget = self.held[account] + n_bytes, self.budgets[account]
        if budget is not None and held > budget:
            raise RuntimeError(
                f"{what} takes {n_bytes / GIB:.6f} GiB on the {account}, which would then hold "
                f"{held / GIB:.6f} GiB; its budget is {budget / GIB:.6f} GiB"
            )
        self.held[account] = held
        self.peak[account] = max(self.peak[account], held)

    def release(self, account: str, n_bytes: int) -> None:
        self.held[account] -= n_bytes
        assert self.held[account] >= 0, (account, self.held)

    def zeros(
        self, account: str, n: int, dtype: torch.dtype, what: str, pin: bool = False, nth: int = 0
    ) -> Tensor:
        """Return n zeros. nth: the tensor's number among those in pageable memory that one loop reads and
        writes together."""
        self.reserve(account, n * dtype.itemsize, what)
        if account == "device" and self.device.type == "cuda":
            return torch.zeros(n, dtype=dtype, device=self.device)
        pin = pin and self.device.type == "cuda"
        shift = 0 if pin else nth * STAGGER // dtype.itemsize  # pinned memory is sized in powers of two
        tensor = torch.empty(shift + n, dtype=dtype, pin_memory=pin)[shift:]
        self.fill(tensor)
        return tensor


@dataclass(eq=False)
class ParamState:
    """A parameter that trains, and what has happened to its gradient in this step."""

    name: str
    parameter: nn.Parameter
    group: ParamGroup  # its lr, weight_decay and so on are read at each step
    copies: int  # ranks that hold the same elements
    is_tied: bool  # its gradient changes after backward, or its weight is read outside forward
    owner: nn.Module
    pieces: list["Piece"] = field(default_factory=list)
    keeps_grad: bool = False  # its gradient stays in p.grad until the step
    # What version_of returned after our last update. None: an update may be under way.
    weight_version: tuple | None = None
    step: int = 0  # updates made
    n_backwards: int = 0  # backwards since the last update that gave it a gradient
    n_collected: int = 0  # gradients of these, or sums of them, that were collected


@dataclass(eq=False)
class Piece:
    """`shard[in_shard]` is `chunk[in_chunk]`."""

    param: ParamState
    chunk: "Chunk"
    in_shard: slice
    in_chunk: slice
    grad: Tensor | None = None  # a copy of the gradient until the step, if it cannot stay in p.grad
    norm: Tensor | None = None  # of its gradient: 0-dim, float64
    host_square: float = 0.0  # the square of its norm, if the host accumulates its gradient
    adding: Any = DONE  # a future: the gradient of an earlier microbatch is being added on the host

    @property
    def n_elements(self) -> int:
        return self.in_chunk.stop - self.in_chunk.start

    @property
    def grad_waits(self) -> bool:
        """Return whether its gradient waits on the device until the step, neither moved nor accumulated."""
        return self.chunk.home is not Home.CPU and "grad_accum" not in self.chunk.tensors

    @property
    def weight(self) -> Tensor:
        """Its part of the parameter's weight. FSDP may reallocate a padded shard when it first runs, so do
        not keep the tensor."""
        return flat_view(self.param.parameter)[self.in_shard]

    def part_of(self, name: str) -> Tensor:
        """Return its part of a tensor of the chunk."""
        return self.chunk.tensors[name][self.in_chunk]

    # ---- values, wherever they are ----

    def on_host(self, name: str) -> Tensor:
        """Return `master`, `exp_avg` or `exp_avg_sq`, float32, on the host; a view of it if it is there as it
        is."""
        if name in self.chunk.tensors:
            return self.part_of(name).to("cpu")
        if "master_low16" not in self.chunk.tensors:
            return self.weight.to("cpu")
        values = torch.empty(self.n_elements)
        for part, high, low16 in blocks(values, self.weight, self.part_of("master_low16")):
            part.copy_(join_master(high, low16.to(high.device)))
        return values

    def write(self, name: str, values: Tensor) -> None:
        """Write what `on_host` returns; a new master is rounded into the weight too."""
        if name in self.chunk.tensors:
            self.part_of(name).copy_(values)
        if name == "master":
            weight = self.weight
            if "master_low16" in self.chunk.tensors:
                for part, high, low16 in blocks(values, weight, self.part_of("master_low16")):
                    new_high, new_low16 = split_master(part.to(weight.device))
                    high.copy_(new_high)
                    low16.copy_(new_low16)
            else:
                weight.copy_(values.to(weight.dtype))  # first, so that only the weight crosses the link


class Chunk:
    """The state of the pieces of one chunk. `state` is changed by move_to alone."""

    def __init__(self, index: int, state_format: StateFormat):
        self.index, self.format, self.n = index, state_format, 0
        self.pieces: list[Piece] = []
        self.home: Home | None = None
        self.tensors: dict[str, Tensor] = {}
        self.state = State.IDLE
        self.job: Any = DONE  # a future: the host's step of this chunk
        self.weights_done = self.states_done = DONE  # events of the last update
        self.grads_copied = DONE  # event: the last gradient, and so all, has arrived in grad_buffer

    def __repr__(self) -> str:
        return f"chunk {self.index} ({self.home.value}, {self.n} elements from {self.pieces[0].param.name})"

    @property
    def params(self) -> list[ParamState]:
        return [piece.param for piece in self.pieces]

    @property
    def first_and_last(self) -> tuple[str, str]:
        """Its first and its last parameter, without the parts that all names share."""
        names = (self.pieces[0].param.name, self.pieces[-1].param.name)
        return tuple(name.removeprefix("model.").removesuffix(".weight") for name in names)

    def move_to(self, state: State) -> None:
        if state not in LEGAL_MOVES[self.state]:
            raise RuntimeError(f"{self} cannot move from {self.state.value} to {state.value}")
        self.state = state

    def end_update(self, weights_done, states_done) -> None:
        """Note the events of the new weights and states, now that an engine has issued all of its work."""
        self.weights_done, self.states_done = weights_done, states_done
        self.move_to(State.IDLE)

    def wait(self) -> None:
        """Wait until its weights are new. Raises what went wrong in the host's step."""
        self.job.result()
        self.weights_done.synchronize()

    def wait_for_states(self) -> None:
        """Wait until its weights and its states are new."""
        self.wait()
        self.states_done.synchronize()

    def wait_on(self, lane: Lane) -> None:
        """Let work that the lane is given from now on wait until the weights are new. The caller waits only
        until the host has stepped the chunk."""
        self.job.result()
        lane.wait(self.weights_done)

    # ---- where it lives ----

    def allocate(self, ledger: Ledger, home: Home) -> None:
        """Take memory for a home. Moments are 0, and so is master_low16, with which the weight is the
        master."""
        for nth, (name, (account, dtype)) in enumerate(self.format.tensors(home).items()):
            what = f"{name} of chunk {self.index}"
            crosses = home is Home.STREAM or name == "grad_buffer"  # the link, so it is pinned on the host
            self.tensors[name] = ledger.zeros(account, self.n, dtype, what, crosses, nth)
        self.home = home
        if home is Home.CPU:
            for piece in self.pieces:
                piece.part_of("master").copy_(piece.weight)

    def free(self, ledger: Ledger) -> None:
        for name, (account, _) in self.format.tensors(self.home).items():
            ledger.release(account, self.tensors.pop(name).nbytes)


def chunk_size(n_elements: int) -> int:
    """Return the elements of a chunk for a rank with so many: CHUNK_ELEMENTS, halved until there are
    MIN_CHUNKS, so that fractions and budgets can be met closely. On small shards a chunk that takes a launch
    or two is as quick as a large one."""
    size = CHUNK_ELEMENTS
    while size > LEAST_CHUNK_ELEMENTS and n_elements < MIN_CHUNKS * size:
        size //= 2
    return size


def owners_of(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield each module that owns parameters, and those, in the order in which forward waits for them: the
    root module of a part first, then block by block.

    FSDP gathers the weights of a wrapped module together, so that module owns them. Without FSDP each
    transformer block (an element of an nn.ModuleList) owns its parameters. Everything else (embedding, head)
    belongs to the root module, with or without FSDP, and is waited for before the first block, because it may
    be read anywhere."""
    for part in parts:
        wrapped = [module for module in part.modules() if isinstance(module, FSDPModule)]
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        modules, innermost = dict.fromkeys([part, *(wrapped or chain.from_iterable(lists))]), {}
        for module in modules:  # inner modules come after outer ones
            innermost |= dict.fromkeys(module.parameters(), module)
        for module in modules:
            if own := [p for p in module.parameters() if innermost[p] is module]:
                yield module, own


def find_params(
    model: nn.Module,
    parts: list[nn.Module],
    optimizer: torch.optim.AdamW,
    tied: set[nn.Parameter] = frozenset(),
) -> list[ParamState]:
    """Return the optimizer's trainable parameters, in the order in which the next forward waits for them."""
    names, group_of, owner_of = names_of(model), {}, {}
    for group in optimizer.param_groups:
        group_of |= {p: group for p in group["params"] if p.requires_grad}
    for module, own in owners_of(parts):  # what several parts use is waited for by the first
        owner_of |= {p: module for p in own if p in group_of and p not in owner_of}
    unknown = [p for p in group_of if p not in owner_of or p not in names]
    if unknown:
        raise UsageError(
            f"the optimizer has {len(unknown)} parameters that are not the model's (the first has the shape "
            f"{tuple(unknown[0].shape)}); build it on model.parameters()."
        )
    for parameter in owner_of:
        if not local(parameter).is_contiguous():
            raise UsageError(
                f"{names[parameter]} is not contiguous, so its memory cannot be cut into chunks; make it "
                "contiguous()."
            )
    dtypes = {parameter.dtype for parameter in owner_of}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.bfloat16}:
        raise UsageError(
            f"the parameters that train are {' and '.join(sorted(map(str, dtypes)))}, and the chunk manager "
            "needs all in float32 or all in bfloat16; call model.to(torch.bfloat16) or "
            "model.to(torch.float32)."
        )
    return [
        ParamState(names[p], p, group_of[p], copies(p), p in tied, module) for p, module in owner_of.items()
    ]


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in model.named_parameters()}


def cut(
    params: list[ParamState], chunk_elements: int, state_format: StateFormat = StateFormat()
) -> list[Chunk]:
    """Cut the shards, in this order, into chunks. At any time one chunk is open per group; chunks are in the
    order of their first pieces."""
    assert chunk_elements % ALIGN == 0, chunk_elements
    chunks, open_chunks = [], {}
    for param in params:
        done, n = 0, local(param.parameter).numel()
        while done < n:
            chunk = open_chunks.get(id(param.group))
            if chunk is None or chunk.n == chunk_elements:
                chunk = Chunk(len(chunks), state_format)
                open_chunks[id(param.group)] = chunk
                chunks.append(chunk)
            run = min(n - done, chunk_elements - chunk.n)
            piece = Piece(param, chunk, slice(done, done + run), slice(chunk.n, chunk.n + run))
            param.pieces.append(piece)
            chunk.pieces.append(piece)
            chunk.n = min(chunk_elements, -(-(chunk.n + run) // ALIGN) * ALIGN)
            done += run
    return chunks


def version_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return which memory a tensor has, and how often it was written: an in-place change adds to the count of
    the shard, or of the DTensor around it."""
    shard = local(tensor)
    return shard.data_ptr(), shard._version, tensor._version


def flat_view(tensor: Tensor) -> Tensor:
    # view raises if the shard is not contiguous; what is written into a copy would be lost.
    return local(tensor).detach().view(-1)


def from_local_like(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Return a tensor that is sharded as the parameter is, with `shard` (of any dtype, on host or device) as
    this rank's part.

    DTensor.from_local would move a host tensor to the mesh's device; the constructor does not. It is not
    public in torch 2.11 to 2.13, but FSDP2's CPU offload makes its parameters in this way."""
    shard = shard.view(local(parameter).shape)
    if not isinstance(parameter, DTensor):
        return shard
    meta = TensorMeta(parameter.shape, parameter.stride(), shard.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    return DTensor(shard, spec, requires_grad=False)


_ONE_NUMBER = torch.zeros(1)  # all elements of all placeholders


def placeholder(parameter: nn.Parameter) -> Tensor:
    """Return a float32 host tensor with the shape and layout of the parameter that takes no memory: all its
    elements are one number in memory, so copying values into it raises."""
    return from_local_like(parameter, _ONE_NUMBER.expand(local(parameter).shape))
