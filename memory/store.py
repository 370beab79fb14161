"""ChunkStore: which chunks there are, where they are, and what they hold. It is the part of the manager that
acts between steps, after the update that is under way (see `wait`); manager.py is what happens in a step.

plan       a home for each chunk, checked against the budgets before anything is allocated
buffers    the ring: device slots through which STREAM chunks pass; the weight buffers: pinned host memory
           from which the new weights of CPU chunks leave
values     masters and moments by parameter, wherever they are: `read_state`, `write_state`, and `masters`,
           all masters in the form of a model. They pass through the host one parameter at a time, which
           plans count as `transit_bytes`
"""

from collections import deque
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dtensor_llama.errors import UsageError
from dtensor_llama.shards import local
from dtensor_llama.weights import StandIn
from memory.auto import host_share
from memory.chunk import (
    RESIDENT_CHUNK_ELEMENTS,
    Ledger,
    ParamState,
    chunk_size,
    cut,
    find_params,
    from_local_like,
    placeholder,
    plain_name,
    version_of,
)
from memory.config import MemoryConfig
from memory.home import MOMENTS, ByAccount, Home, StateFormat
from memory.inputs import Machine, Overrides, TrainingLoop
from memory.lanes import DONE, Lanes, device_memory, empty_caches, hold_to_budget, host_threads
from memory.placement import (
    GIB,
    RESERVE,
    RING_SLOTS,
    WEIGHT_BUFFERS,
    ChunkSizes,
    Plan,
    describe,
    gib_up,
    least_device_plan,
    static_plan,
)

# The most bytes of gradients on their way to the host; over a slow link they would otherwise fill the device.
IN_FLIGHT_BYTES = 512 * 2**20
MASTER_AND_MOMENTS = ("master", *MOMENTS)


class ChunkStore:
    """See ChunkManager for the arguments. UsageError, before anything is allocated, if the plan does not fit
    the budgets."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        config: MemoryConfig,
        loop: TrainingLoop,
        machine: Machine,
        overrides: Overrides,
    ):
        self.model, self.config, self.loop, self.say = model, config, loop, machine.say
        self.parts = [model] if loop.parts is None else list(loop.parts)
        self.params = find_params(model, self.parts, optimizer, set(loop.tied))
        self.param_of = {param.parameter: param for param in self.params}
        if any(hasattr(parameter, "_has_chunks") for parameter in self.param_of):
            raise UsageError(
                "these parameters have a chunk manager already; close() it before they get another."
            )
        shard_sizes = [local(parameter).numel() for parameter in self.param_of]
        self.n_parameters = sum(shard_sizes)
        # The largest shard in float32, three times: as it passes between chunks and a file, and as the file's
        # reader has it, once as bytes and once as a tensor.
        self.transit_bytes = 3 * 4 * max(shard_sizes, default=0)
        self.activation_bytes = sum(offload.host_bytes for offload in loop.activations)
        self.other_host_bytes = self.activation_bytes + self.transit_bytes
        all_resident = config.placement == "static" and config.resident == 1
        largest = RESIDENT_CHUNK_ELEMENTS if all_resident else chunk_size(self.n_parameters)
        no_weight = torch.empty(0, dtype=torch.bfloat16)
        any_weight = local(next(iter(self.param_of), no_weight))  # all have one device and one dtype
        self.device = any_weight.device
        self.format = StateFormat(any_weight.dtype, accumulates=loop.accumulation > 1)
        self.chunks = cut(self.params, overrides.chunk_elements or largest, self.format)
        layers = tuple(chunk.first_and_last for chunk in self.chunks)
        self.chunk_sizes = ChunkSizes(tuple(chunk.n for chunk in self.chunks), self.format, layers)
        n_threads = host_threads(self.device, machine.ranks_per_host)
        self.lanes = overrides.lanes or Lanes(self.device, n_threads)
        self.is_cuda = self.lanes.is_cuda
        weights = set(chain.from_iterable(part.parameters() for part in self.parts))
        self.weight_bytes = sum(local(weight).nbytes for weight in weights)
        self.host_share = host_share(machine.ranks_per_host, self.is_cuda)
        in_bytes = lambda gib: None if gib is None else int(gib * GIB)
        self.budgets = {
            "device": in_bytes(config.device_budget_gib),
            "host": in_bytes(config.host_budget_gib),
        }
        # What a plan of placement auto may take: what was asked for, or else what there is. The memory of the
        # activation offload has been allocated, so it is not free any more.
        self.room = {
            "device": self.budgets["device"] or device_memory(self.device) or self.host_share,
            "host": self.budgets["host"] or self.host_share + self.activation_bytes,
        }
        plan = overrides.plan
        if plan is None and config.placement == "static":
            plan = static_plan(self.chunk_sizes, config.resident, config.stream, config.cpu)
        elif plan is None:  # auto traces the first steps with the device as empty as the host can make it
            plan = least_device_plan(self.chunk_sizes, self.room["host"] - self.other_host_bytes)
        self.plan = replace(plan, chunks=self.chunk_sizes, other_host_bytes=self.other_host_bytes)
        self._refuse_what_does_not_fit(self.plan)
        self._refuse_what_the_host_lacks()

        hold_to_budget(self.device, self.budgets["device"])
        fill = lambda tensor: self.lanes.thread.submit(tensor.zero_).result()
        self.ledger = Ledger(self.device, self.budgets, fill)
        self.ledger.reserve("device", self.weight_bytes, "weights")
        self.ledger.reserve("host", self.other_host_bytes, "block inputs and a parameter in transit")
        for chunk, home in zip(self.chunks, self.plan.homes, strict=True):
            chunk.allocate(self.ledger, home)
        # Buffers that are used in turn, each with the event after which it may be written again.
        self.ring: deque[tuple[dict[str, Tensor], Any]] = deque()
        self.weight_buffers: deque[tuple[Tensor, Any]] = deque()
        self._allocate_buffers()

    # ---- the plan ------------------------------------------------------------------------------------------

    def bytes_needed(self, plan: Plan, traced: bool = False) -> ByAccount:
        """Return the most bytes that a plan holds, by account: weights, states, buffers, and gradients that
        wait for their step or are on their way to the host. traced: those on their way are counted in what
        was traced."""
        held = plan.chunks.totals_held(plan.split)
        total = {"device": self.weight_bytes + held["device"], "host": self.other_host_bytes + held["host"]}
        if self.lanes.has_queues and not traced:
            leaving = self.format.weight_dtype.itemsize * plan.split.cpu
            total["device"] += min(IN_FLIGHT_BYTES, leaving)
        return total

    def _refuse_what_does_not_fit(self, plan: Plan) -> None:
        remedy = {"device": ", or a larger `cpu` or `stream`", "host": ", or a larger `resident`"}
        if self.config.placement == "auto":
            remedy = {"device": f" and what activations need, and {RESERVE:.0%} in reserve", "host": ""}
        for account, n_bytes in self.bytes_needed(plan).items():
            budget = self.budgets[account]
            if budget is not None and n_bytes > budget:
                raise UsageError(
                    f"{account}_budget_gib={budget / GIB:.4g} is not enough for this plan, which holds "
                    f"{gib_up(n_bytes)} GiB on the {account} besides activations; use that much"
                    f"{remedy[account]}."
                )

    def _refuse_what_the_host_lacks(self) -> None:
        """Without a host budget the host's free memory is the limit. The operating system would not refuse in
        time: it takes pages as they are written."""
        free, left = self.host_share * (1 if self.is_cuda else 2), self._host_bytes_left()
        both = "" if self.is_cuda else " and, without a GPU, for the device"
        if self.budgets["host"] is None and left < 0:
            raise UsageError(
                f"the plan needs {(free - left) / GIB:.2f} GiB for the host{both}, and this rank's share of "
                f"the host's free memory is {free / GIB:.2f} GiB; use a larger `resident`, or more ranks on "
                "more hosts, or set `host_budget_gib` if the plan may take more."
            )

    def _host_bytes_left(self) -> int:
        """Return what the plan leaves of the budget of the host, or of what was free there."""
        needed = self.bytes_needed(self.plan)
        left = self.room["host"] - needed["host"]
        if self.is_cuda or self.budgets["host"] is not None:
            return left
        return left + self.host_share - (needed["device"] - self.weight_bytes)  # one RAM has both accounts

    @property
    def checkpoint_bytes(self) -> int:
        """Host memory for a copy of masters and moments, with which training goes on while a checkpoint is
        written."""
        return 3 * 4 * self.n_parameters

    def stages_checkpoints(self) -> bool:
        """Return whether the host has room for that copy beside the plan. Otherwise parameters are written
        one after another, in the memory that the plan has for one of them, and training waits."""
        return self.checkpoint_bytes <= self._host_bytes_left()

    def plan_in_words(self) -> str:
        """Return the plan, and how a checkpoint will be written."""
        gib = f"{gib_up(self.checkpoint_bytes)} GiB"
        if self.stages_checkpoints():
            checkpoint = f"copies {gib} on the host, so that training goes on while it is written"
        else:
            checkpoint = (
                "is written one parameter at a time while training waits, because the host has no room for a "
                f"copy of masters and moments, which takes {gib}"
            )
        return f"{describe(self.plan)}\n  a checkpoint {checkpoint}"

    def _move_chunks(self, plan: Plan) -> None:
        """Move chunks to the homes of another plan, between steps; values do not change. UsageError if it
        does not fit."""
        assert all(param.n_collected == 0 for param in self.params), (
            "gradients have arrived; move between steps"
        )
        self._refuse_what_does_not_fit(plan)
        self.plan = plan
        pairs = zip(self.chunks, plan.homes, strict=True)
        moving = [(chunk, home) for chunk, home in pairs if home is not chunk.home]
        moving.sort(key=lambda move: move[1] is Home.RESIDENT)  # make room on the device first
        self._free_buffers()
        empty_caches(self.device)
        for chunk, home in moving:
            # States on the host are not copied: the old tensors live until their values are written.
            kept = [
                (piece, name, piece.on_host(name)) for piece in chunk.pieces for name in MASTER_AND_MOMENTS
            ]
            chunk.free(self.ledger)
            chunk.allocate(self.ledger, home)
            for piece, name, values in kept:
                piece.write(name, values)
        self._allocate_buffers()
        empty_caches(self.device)
        for param in self.params:
            param.weight_version = None  # masters were split again and their upper halves written

    def _allocate_buffers(self) -> None:
        homes, n = set(self.plan.homes), max(self.chunk_sizes.n_elements, default=0)
        tensors = self.format.tensors(Home.STREAM).items()
        dtypes = {name: dtype for name, (account, dtype) in tensors if account == "host"}
        for i in range(RING_SLOTS if Home.STREAM in homes else 0):
            what = f"ring slot {i}"
            slot = {name: self.ledger.zeros("device", n, dtype, what) for name, dtype in dtypes.items()}
            self.ring.append((slot, self.lanes.compute.now()))  # its zeros are written by then
        for i in range(WEIGHT_BUFFERS if Home.CPU in homes else 0):
            dtype, what = self.format.weight_dtype, f"weight buffer {i}"
            buffer = self.ledger.zeros("host", n, dtype, what, pin=True, nth=4 + i)
            self.weight_buffers.append((buffer, DONE))
        self._decide_which_gradients_stay()

    def _decide_which_gradients_stay(self) -> None:
        """Decide which gradients may stay in p.grad until the step. FSDP's gradients are views into one
        buffer per module, so keeping one keeps the whole buffer alive. If any part of that buffer is
        offloaded, the parts that stay are cloned, so that the buffer can be freed. The same holds for the
        parts of one gradient."""
        for param in self.params:
            param.keeps_grad = all(piece.grad_waits for piece in param.pieces)
        leaving = {param.owner for param in self.params if not param.keeps_grad}
        for param in self.params:
            param.keeps_grad &= not (isinstance(param.owner, FSDPModule) and param.owner in leaving)

    def _free_buffers(self) -> None:
        for slot, _ in self.ring:
            self.ledger.release("device", sum(tensor.nbytes for tensor in slot.values()))
        for buffer, _ in self.weight_buffers:
            self.ledger.release("host", buffer.nbytes)
        self.ring.clear()
        self.weight_buffers.clear()

    # ---- values --------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until all weights and states are new. Call it before anything but a forward of the model reads
        them."""
        for chunk in self.chunks:
            chunk.wait_for_states()
        self._note_weights(self.params)

    def _note_weights(self, params: list[ParamState]) -> None:
        """Between an update and the next backward, record each weight's data pointer and version counter. If
        only the version changed since our update, someone modified the weight: adopt it as the new master. A
        new pointer is not a modification: FSDP reallocates padded shards on first use."""
        for param in params:
            if param.n_collected == 0 and (version := version_of(param.parameter)) != param.weight_version:
                if param.weight_version is not None and version[0] == param.weight_version[0]:
                    self._adopt_weight(param)
                param.weight_version = version

    @torch.no_grad()
    def _adopt_weight(self, param: ParamState) -> None:
        """After a modification from outside (load_state_dict, a clamp) overwrite the float32 masters of CPU
        chunks, except where the weight still equals the rounded master, so that no precision is lost.
        RESIDENT and STREAM chunks need nothing: there the weight is part of the master."""
        for piece in param.pieces:
            if piece.chunk.home is Home.CPU:
                master, weight = piece.part_of("master"), piece.weight.cpu()
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))
        self.say(f"memory    the weight of {param.name} was modified between steps; it is the new master")

    def masters(self) -> "Masters":
        """Return a stand-in for the model, for init_weights, load_hf, save_hf and checkpoints. Its trainable
        weights are the float32 masters, which come and go one parameter at a time."""
        self.wait()
        return Masters(self)

    @torch.no_grad()
    def read_state(self, name: str, param: ParamState) -> Tensor:
        """Return a copy of `master`, `exp_avg` or `exp_avg_sq` of this rank's shard: float32, flat, on the
        host."""
        values = torch.empty(local(param.parameter).numel())
        for piece in param.pieces:
            piece.chunk.wait_for_states()
            values[piece.in_shard] = piece.on_host(name)
        return values

    @torch.no_grad()
    def write_state(self, name: str, param: ParamState, shard: Tensor) -> None:
        """Write what read_state returns, in any shape."""
        values = shard.reshape(-1).float()
        for piece in param.pieces:
            piece.chunk.wait_for_states()
            piece.write(name, values[piece.in_shard])
        if name == "master":
            param.weight_version = None


class Masters(StandIn):
    """The model as a checkpoint or an export sees it: its names, layouts and `config`, with float32 masters
    as weights.

    Trainable parameters are placeholders; `read` and `write` move their values from and to the chunks. Frozen
    parameters and buffers are the model's own.
    """

    def __init__(self, store: ChunkStore):
        super().__init__()
        self.config = getattr(store.model, "config", None)
        self._store = store
        placeholders = {parameter: nn.Parameter(placeholder(parameter)) for parameter in store.param_of}
        # what the manager knows of a parameter of this stand-in, if it manages it
        self.param_of = {placeholders[parameter]: param for parameter, param in store.param_of.items()}
        for name, value in store.model.state_dict(keep_vars=True).items():
            *path, last = plain_name(name).split(".")
            module = self
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module._modules[step]
            value = placeholders.get(value, value)  # a tied matrix has two names and one placeholder
            is_parameter = isinstance(value, nn.Parameter)
            module.register_parameter(last, value) if is_parameter else module.register_buffer(last, value)

    def empty(self, name: str) -> Tensor:
        own = self.get_parameter(name)
        if (param := self.param_of.get(own)) is None:
            return own
        return from_local_like(param.parameter, torch.empty(local(own).numel()))

    def read(self, name: str) -> Tensor:
        own = self.get_parameter(name)
        if (param := self.param_of.get(own)) is None:
            return own
        return from_local_like(param.parameter, self._store.read_state("master", param))

    def write(self, name: str, values: Tensor) -> None:
        if param := self.param_of.get(self.get_parameter(name)):
            self._store.write_state("master", param, local(values))
