"""ChunkStore: which chunks there are, where they are, and what they hold. The part of the manager that moves
between steps.

    plan       a placement for each chunk, held against the budgets before anything is allocated; `replan` goes to another
    buffers    the ring, device slots that STREAM passes through; the outbox, pinned, where new weights of CPU leave from
    values     masters and moments by parameter, wherever they are: `gather`, `scatter`; all masters as a model: `masters`.
               They pass through the host's memory one parameter at a time, which plans count: `passing_bytes`

All of it comes after the update that is under way: `wait`. What happens in a step is the ChunkManager's
(manager.py).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dtensor_llama.errors import UsageError
from dtensor_llama.shards import local
from dtensor_llama.weights import StandIn
from memory.activations import ActivationOffload
from memory.auto import host_share
from memory.chunk import (
    GIB,
    RESIDENT_CHUNK_ELEMENTS,
    Ledger,
    Managed,
    bytes_per_element,
    chunk_size,
    cut,
    find_managed,
    like,
    placeholder,
    plain_name,
    seen,
)
from memory.config import MemoryConfig
from memory.lanes import DONE, Lanes, empty_caches, hold_to_budget, host_threads
from memory.placement import (
    RESERVE,
    Placement,
    Plan,
    Widths,
    describe,
    gib_up,
    least_device_plan,
    static_plan,
)

# of a parameter that a copy between chunks and the host takes at a time: 1 MiB of float32
PASSING_ELEMENTS = 2**18
# of gradients on their way to the host: else a slow link would fill the device with them
IN_FLIGHT_BYTES = 512 * 2**20
MASTER_AND_MOMENTS = ("master", "exp_avg", "exp_avg_sq")


class ChunkStore:
    """Arguments as ChunkManager's. UsageError, before anything is allocated, if a plan does not fit the
    budgets."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        config: MemoryConfig,
        parts: Sequence[nn.Module] | None,
        outside: Iterable[nn.Parameter],
        arrivals: int,
        plan: Plan | None,
        activations: Sequence[ActivationOffload],
        say: Callable[[str], None],
        ranks_per_host: int,
        chunk_elements: int | None,
        lanes: Lanes | None,
    ):
        self.model, self.config, self.say, self.sums = model, config, say, arrivals > 1
        self.parts = [model] if parts is None else list(parts)
        self.activations, self.slab_bytes = activations, sum(one.host_bytes for one in activations)
        self.managed = find_managed(model, self.parts, optimizer, set(outside))
        self.of = {one.parameter: one for one in self.managed}
        if any(hasattr(one.parameter, "_has_chunks") for one in self.managed):
            raise UsageError(
                "these parameters have a chunk manager already; close() it before they get another."
            )
        shard_sizes = [local(one.parameter).numel() for one in self.managed]
        self.n_here = n_here = sum(shard_sizes)
        # The largest shard in float32, three times: as it passes between chunks and a file, and twice as the
        # file's reader has it, once as bytes and once as a tensor.
        self.passing_bytes = 3 * 4 * max(shard_sizes, default=0)
        self.other_host_bytes = self.slab_bytes + self.passing_bytes
        # nothing to divide or to overlap
        all_resident = config.placement == "static" and config.resident == 1
        largest = RESIDENT_CHUNK_ELEMENTS if all_resident else chunk_size(n_here)
        self.chunks = cut(self.managed, chunk_elements or largest)
        self.device = local(self.managed[0].parameter).device if self.managed else torch.device("cpu")
        self.lanes = lanes or Lanes(self.device, host_threads(self.device, ranks_per_host))
        self.is_cuda = self.lanes.is_cuda
        self.weight_bytes = sum(
            local(one).nbytes for one in {p for part in self.parts for p in part.parameters()}
        )
        self.host_share = host_share(ranks_per_host, self.is_cuda)
        self.plan = plan or self._first_plan()
        budgets = {
            account: None if gib is None else int(gib * GIB)
            for account, gib in (("device", config.device_budget_gib), ("host", config.host_budget_gib))
        }
        self._refuse_what_does_not_fit(budgets)
        self._refuse_what_the_host_lacks()

        hold_to_budget(self.device, budgets["device"])
        self.ledger = Ledger(
            self.device, budgets, lambda tensor: self.lanes.thread.submit(tensor.zero_).result()
        )
        self.ledger.take("device", self.weight_bytes, "weights")
        self.ledger.take("host", self.other_host_bytes, "block inputs and a parameter on its way")
        for chunk, placement in zip(self.chunks, self.plan.placements, strict=True):
            chunk.allocate(self.ledger, placement, self.sums)
        self.ring: list[dict[str, Tensor]] = []
        self.outbox: list[Tensor] = []
        self._fit_buffers()

    # ---- the plan ------------------------------------------------------------------------------------------

    def _first_plan(self) -> Plan:
        sizes = [chunk.n for chunk in self.chunks]
        if self.config.placement == "static":
            return static_plan(
                sizes,
                self.config.resident,
                self.config.stream,
                self.config.cpu,
                widths=self.widths,
                layers=[chunk.covers for chunk in self.chunks],
            )
        # auto: the first steps are traced with the device as empty as the host can make it
        gib = self.config.host_budget_gib
        # the slab is there: no longer free
        room = self.host_share + self.slab_bytes if gib is None else int(gib * GIB)
        return least_device_plan(sizes, room - self.other_host_bytes, self.widths)

    @property
    def widths(self) -> Widths:
        return Widths.of(max((chunk.dtype.itemsize for chunk in self.chunks), default=4), self.sums)

    def needed(self, plan: Plan, traced: bool = False) -> dict[str, int]:
        """Bytes by account that a plan holds at most: weights, states, ring, gradients that wait for their
        step or travel.
        traced: those that travel are in what was traced."""
        total, slot, box, on_cpu = {"device": self.weight_bytes, "host": self.other_host_bytes}, 0, 0, 0
        for chunk, placement in zip(self.chunks, plan.placements, strict=True):
            each = bytes_per_element(placement, chunk.dtype, self.sums)
            for account in total:
                total[account] += each[account] * chunk.n
            if placement is Placement.STREAM:
                slot = max(slot, chunk.n * _slot_bytes(chunk.dtype))
            if placement is Placement.CPU:
                box, on_cpu = (
                    max(box, chunk.n * chunk.dtype.itemsize),
                    on_cpu + chunk.n * chunk.dtype.itemsize,
                )
        total["device"] += slot * min(self.widths.ring_slots, plan.placements.count(Placement.STREAM))
        total["host"] += box * min(self.widths.outbox_slots, plan.placements.count(Placement.CPU))
        if self.lanes.has_queues and not traced:
            total["device"] += min(IN_FLIGHT_BYTES, on_cpu)
        return total

    def _refuse_what_does_not_fit(self, budgets: dict[str, int | None]) -> None:
        other = {
            "device": ", or more of --memory.cpu or --memory.stream",
            "host": ", or more of --memory.resident",
        }
        if self.config.placement == "auto":
            other = {"device": f" and what activations need, and {RESERVE:.0%} in reserve", "host": ""}
        for account, n_bytes in self.needed(self.plan).items():
            if budgets[account] is not None and n_bytes > budgets[account]:
                raise UsageError(
                    f"--memory.{account}-budget-gib {budgets[account] / GIB:.6g} is not enough for this plan, "
                    f"which holds {gib_up(n_bytes)} GiB on the {account} besides activations; use that "
                    f"much{other[account]}."
                )

    def _refuse_what_the_host_lacks(self) -> None:
        """Without a budget the host's free memory is one; the states' pages are taken as they are written,
        too late to say."""
        n_bytes, room = self._host_bytes_and_room()
        both = "" if self.is_cuda else " and, without a GPU, the device"
        if self.config.host_budget_gib is None and n_bytes > room:
            raise UsageError(
                f"the plan holds {n_bytes / GIB:.2f} GiB on the host{both}, and this rank's share of the memory "
                f"that is free there is {room / GIB:.2f} GiB; use more of --memory.resident, more ranks on more "
                "hosts, or say --memory.host-budget-gib if more may be taken."
            )

    def _host_bytes_and_room(self) -> tuple[int, int]:
        """What the plan adds to the host's memory, and how much may be added: the budget, or what was
        free."""
        needed = self.needed(self.plan)
        if self.config.host_budget_gib is not None:
            return needed["host"], int(self.config.host_budget_gib * GIB)
        if self.is_cuda:
            return needed["host"] - self.slab_bytes, self.host_share
        on_both = needed["host"] - self.slab_bytes + needed["device"] - self.weight_bytes
        return on_both, 2 * self.host_share

    @property
    def checkpoint_bytes(self) -> int:
        """Host memory for a copy of masters and moments, which lets training go on while a checkpoint is
        written."""
        return 3 * 4 * self.n_here

    def stages_checkpoints(self) -> bool:
        """Whether the host has room for that copy beside the plan. Else parameters are written one after
        another, within the memory that the plan has for one, and training waits."""
        n_bytes, room = self._host_bytes_and_room()
        return n_bytes + self.checkpoint_bytes <= room

    def in_words(self) -> str:
        """The plan, and what a checkpoint adds to it."""
        gib = f"{gib_up(self.checkpoint_bytes)} GiB"
        if self.stages_checkpoints():
            checkpoint = f"a checkpoint takes {gib} more of the host: a copy, so that training goes on while it is written"
        else:
            checkpoint = (
                "a checkpoint is written one parameter at a time while training waits, and takes no more of the "
                f"host: a copy of masters and moments, {gib}, has no room there"
            )
        return f"{describe(self.plan)}\n  {checkpoint}"

    def replan(self, plan: Plan) -> None:
        """Move chunks to their places in another plan, between steps; values do not change. UsageError if it
        cannot fit."""
        self.wait()
        assert all(one.arrivals == 0 for one in self.managed), "gradients have arrived; replan between steps"
        before, self.plan = self.plan, plan
        try:
            self._refuse_what_does_not_fit(self.ledger.budgets)
        except UsageError:
            self.plan = before
            raise
        moving = [
            (chunk, placement)
            for chunk, placement in zip(self.chunks, plan.placements, strict=True)
            if placement is not chunk.placement
        ]
        moving.sort(key=lambda move: move[1] is Placement.RESIDENT)  # make room on the device first
        self._free_buffers()
        empty_caches(self.device)
        for chunk, placement in moving:
            kept = [
                (piece, {name: chunk.read(name, piece).to("cpu", copy=True) for name in MASTER_AND_MOMENTS})
                for piece in chunk.pieces
            ]
            chunk.release(self.ledger, self.sums)
            chunk.allocate(self.ledger, placement, self.sums)
            for piece, values in kept:
                for name, value in values.items():
                    chunk.write(name, piece, value.to(self.device) if name == "master" else value)
        self._fit_buffers()
        empty_caches(self.device)
        for one in self.managed:
            one.weight_seen = None  # a master was split anew, and its high half written

    def _fit_buffers(self) -> None:
        streaming = [chunk for chunk in self.chunks if chunk.placement is Placement.STREAM]
        for i in range(min(self.widths.ring_slots, len(streaming))):
            n, narrow = (
                max(chunk.n for chunk in streaming),
                any(chunk.dtype != torch.float32 for chunk in streaming),
            )
            dtypes = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32} | (
                {"low": torch.int16} if narrow else {}
            )
            self.ring.append(
                {
                    name: self.ledger.zeros("device", n, dtype, f"ring slot {i}")
                    for name, dtype in dtypes.items()
                }
            )
        self._slot_free = [self.lanes.compute.now()] * len(self.ring)  # its zeros are written by then
        on_cpu = [chunk.n * chunk.dtype.itemsize for chunk in self.chunks if chunk.placement is Placement.CPU]
        for i in range(min(self.widths.outbox_slots, len(on_cpu))):
            self.outbox.append(
                self.ledger.zeros("host", max(on_cpu), torch.uint8, f"outbox {i}", pin=True, nth=4 + i)
            )
        self._sent = [DONE] * len(self.outbox)  # events: the weights that were in it have left
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Say which gradients may wait for the step where they came. FSDP's are views of one buffer a module,
        so that one of them keeps all; so does a part of a parameter's the whole. Where some of it leaves,
        what waits is copied."""
        waits = lambda one: all(
            piece.chunk.placement is not Placement.CPU and "total" not in piece.chunk.tensors
            for piece in one.pieces
        )
        flat_and_mixed = {
            one.gate for one in self.managed if isinstance(one.gate, FSDPModule) and not waits(one)
        }
        for one in self.managed:
            one.keeps_grad = waits(one) and one.gate not in flat_and_mixed

    def _free_buffers(self) -> None:
        for slot in self.ring:
            self.ledger.give("device", sum(tensor.nbytes for tensor in slot.values()))
        for box in self.outbox:
            self.ledger.give("host", box.nbytes)
        self.ring, self.outbox = [], []

    # ---- values --------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all weights and states are new: before anything but a forward of the model reads them."""
        for chunk in self.chunks:
            chunk.wait()
            chunk.done.synchronize()
        self._see_weights(self.managed)

    def _see_weights(self, ones: list[Managed]) -> None:
        """Between an update and the next backward: note how the update left them, and take over what changed
        since. In other memory nothing has: FSDP moves a padded shard when it first runs."""
        for one in ones:
            if one.arrivals == 0 and (now := seen(one.parameter)) != one.weight_seen:
                if one.weight_seen is not None and now[0] == one.weight_seen[0]:
                    self._take_over(one)
                one.weight_seen = now

    @torch.no_grad()
    def _take_over(self, one: Managed) -> None:
        """A weight that somebody changed, by load_state_dict or a clamp, becomes the master that CPU chunks
        have beside it, where it is not that master rounded. Elsewhere it is (the high half of) the master
        anyway."""
        for piece in one.pieces:
            if piece.chunk.placement is Placement.CPU:
                master, weight = (
                    piece.chunk.tensors["master"][piece.in_chunk],
                    one.weight[piece.in_shard].cpu(),
                )
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))
        self.say(f"memory    the weight of {one.name} was changed by hand; it is the master now")

    def masters(self) -> "Masters":
        """A stand-in for the model, for init_weights, load_hf, save_hf and checkpoints; its trainable weights
        are the float32 masters, which come and go one parameter at a time."""
        self.wait()
        return Masters(self)

    @torch.no_grad()
    def gather(self, name: str, one: Managed) -> Tensor:
        """`master`, `exp_avg` or `exp_avg_sq` of this rank's shard, float32, flat, on the host, copied. Waits
        for the chunks that hold it."""
        gathered = torch.empty(local(one.parameter).numel())
        for piece in one.pieces:
            piece.chunk.wait()
            piece.chunk.done.synchronize()
            for part in piece.parts(PASSING_ELEMENTS):
                gathered[part.in_shard] = part.chunk.read(name, part)
        return gathered

    @torch.no_grad()
    def scatter(self, name: str, one: Managed, shard: Tensor) -> None:
        """The reverse of gather, from any shape of as many elements. Waits for the chunks that hold it."""
        values = shard.reshape(-1)
        for piece in one.pieces:
            piece.chunk.wait()
            piece.chunk.done.synchronize()
            for part in piece.parts(PASSING_ELEMENTS):
                part.chunk.write(name, part, values[part.in_shard].float().to(self.device))
        if name == "master":
            one.weight_seen = None


class Masters(StandIn):
    """The model as a checkpoint or an export sees it: its names, layouts and `config`, with float32 masters
    as weights.

    Trainable parameters are placeholders; `read` and `write` move their values from and to the chunks. Frozen
    ones and buffers are the model's own.
    """

    def __init__(self, store: ChunkStore):
        super().__init__()
        self.config = getattr(store.model, "config", None)
        self._store = store
        self._managed = {one.name: one for one in store.managed}
        self._stands_for: dict[nn.Parameter, Managed] = {}
        placeholders: dict[nn.Parameter, nn.Parameter] = {}
        for name, value in store.model.state_dict(keep_vars=True).items():
            if value in store.of and value not in placeholders:  # a tied matrix is one parameter of two names
                placeholders[value] = nn.Parameter(placeholder(value))
                self._stands_for[placeholders[value]] = store.of[value]
            *path, last = plain_name(name).split(".")
            module = self
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module._modules[step]
            value = placeholders.get(value, value)
            is_parameter = isinstance(value, nn.Parameter)
            module.register_parameter(last, value) if is_parameter else module.register_buffer(last, value)

    def managed_of(self, parameter: nn.Parameter) -> Managed | None:
        """What the manager knows of a parameter of this stand-in; None: it is none of the manager's."""
        return self._stands_for.get(parameter)

    def empty(self, name: str) -> Tensor:
        if name not in self._managed:
            return self.get_parameter(name)
        parameter = self._managed[name].parameter
        return like(parameter, torch.empty(local(parameter).numel()))

    def read(self, name: str) -> Tensor:
        if name not in self._managed:
            return self.get_parameter(name)
        one = self._managed[name]
        return like(one.parameter, self._store.gather("master", one))

    def write(self, name: str, values: Tensor) -> None:
        if name in self._managed:
            self._store.scatter("master", self._managed[name], local(values))


def _slot_bytes(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float32 else 10
