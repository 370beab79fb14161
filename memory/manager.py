"""ChunkManager: the engine that collects gradients, clips, and steps chunks on the device and on the host at
the same time. Where chunks are, and how they move between steps, is the ChunkStore's business (store.py).

    phase      what happens                                                              on lane
    backward   a hook per parameter; CPU pieces go to grad_buffer, and p.grad is freed   d2h
    clip       one all-reduce of the squared norm; the factor stays on the device
    step       RESIDENT  Adam where the states are                                       device adam
               STREAM    home -> ring slot -> Adam -> home, three chunks at once         h2d, device adam, d2h
               CPU       Adam by host threads while the caller goes on, then new         host adam, weights
                         weights to the device
    forward    each module waits for the chunks with its own weights, and for no others

On a CUDA device lanes are streams. Without one they are the calling thread, and only CPU chunks are stepped
beside it (lanes.py).
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtensor_llama.optim import clip_factor, float64_norms
from dtensor_llama.shards import local
from memory.auto import AutoPolicy
from memory.chunk import Chunk, ParamState, Piece, State, flat_view, owners_of
from memory.config import MemoryConfig
from memory.home import Home
from memory.inputs import Machine, Overrides, TrainingLoop
from memory.kernel import HyperParameters, Kernel
from memory.lanes import DONE, Event, hold_to_budget
from memory.optimizer import ChunkOptimizer, check_adamw
from memory.placement import Plan, describe_measured, with_prediction
from memory.store import IN_FLIGHT_BYTES, MASTER_AND_MOMENTS, ChunkStore
from memory.timeline import draw_timeline
from memory.tracer import StepTrace, measure_rates

MEASURED_STEPS = 5  # steps under a plan whose median is reported


class ChunkManager(ChunkStore):
    """Owns the master weights and moments of a model's trainable parameters; `manager.optimizer` is its face.

    model: names the parameters, which are plain or DTensor, all float32 or all bfloat16. They have values, or
        will get them from `masters().write`. Make the manager after parallelize and to_empty.
    optimizer: an AdamW on the parameters that has never stepped. Its groups (the very dicts, so that
        schedulers go on) become those of `manager.optimizer`, which takes its place.
    UsageError, before anything is allocated, if the optimizer or the budgets do not allow it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        config: MemoryConfig,
        loop: TrainingLoop = TrainingLoop(),
        machine: Machine = Machine(),
        overrides: Overrides = Overrides(),
    ):
        config.check()
        check_adamw(optimizer)
        super().__init__(model, optimizer, config, loop, machine, overrides)
        self.kernel = Kernel(config.kernel, self.device)
        self._zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.pieces = list(chain.from_iterable(param.pieces for param in self.params))
        for piece in self.pieces:
            piece.norm = self._zero
        copies = [piece.param.copies for piece in self.pieces]
        # The weight of each piece's square in the sum over the world.
        self.shares = 1 / torch.tensor(copies, dtype=torch.float64, device=self.device)
        self.clip: Tensor | None = None  # factor of the next step; nan: the step shall change nothing
        self._host_clip = torch.ones((), pin_memory=self.is_cuda)  # 1: there is no factor
        # the last step's event of its clip factor, and the parameters whose step is still to be counted
        self._unconfirmed: tuple[Any, list[ParamState]] = DONE, []
        # (event, what has to live until then): gradients that are being copied; what the last update reads
        self._in_flight: list[tuple[Any, Tensor]] = []
        self._in_use: list[tuple[Any, list[Tensor | None]]] = []
        self._issued: set[Chunk] = set()  # chunks handed to an engine since the last `step`
        self._phase: tuple[str | None, Any] = None, None
        self._all_lanes = [self.lanes, *(offload.lanes for offload in loop.activations)]
        # From when the host could begin an update until its last weight was sent, for the update before the
        # latest; None if the host had no chunk in it.
        self.host_update_s: float | None = None
        self._host_began_s = self._host_done_s = None
        self._steps_s: list[float] | None = []  # when steps ended; None: they have been reported
        self._warm_up()
        self.owners: dict[nn.Module, list[ParamState]] = {}  # what trains of a module's own parameters
        self._install_hooks()
        self._note_weights(self.params)
        self.optimizer = ChunkOptimizer(self, optimizer)
        self.auto = None
        self.say(f"memory    this rank has {len(self.chunks)} chunks; AdamW runs by {self.kernel.why}")
        if config.placement == "static":
            if machine.rates and machine.compute_seconds:
                self.plan = with_prediction(self.plan, machine.rates, StepTrace(0, *machine.compute_seconds))
            self.say(self.plan_in_words())
        if config.placement == "auto" and overrides.plan is None:
            rates = machine.rates or measure_rates(self.device, config.kernel, machine.ranks_per_host)
            self.auto = AutoPolicy(self, rates)

    def replan(self, plan: Plan) -> None:
        """Move chunks to the homes of another plan, once the last update is over."""
        self.wait()
        self._release_finished()
        self._move_chunks(plan)
        self._warm_up()
        self._steps_s = []

    def _warm_up(self) -> None:
        """Compile between steps what steps under the current plan will run: if it were compiled within one,
        other ranks would wait in a collective. What the plan has no chunk for is not compiled; another plan
        may need it later."""
        dtype = self.format.weight_dtype
        grad_dtype = torch.float32 if self.format.accumulates else dtype
        if Home.CPU in self.plan.homes:
            self.kernel.warm_up_host(dtype, grad_dtype, self.lanes.n_threads)
        lengths = {piece.n_elements for piece in self.pieces if piece.chunk.home is not Home.CPU}
        self.kernel.warm_up_device(dtype, grad_dtype, lengths)

    # ---- backward: gradients arrive ------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        self._handles = []
        wait = lambda *_: self.wait()
        for module in {self.model, *self.parts}:  # what reads or writes all weights comes after the update
            self._handles += [
                module.register_state_dict_pre_hook(wait),
                module.register_load_state_dict_pre_hook(wait),
            ]
        for param in self.params:
            param.parameter._has_chunks = True
            if not param.is_tied:
                hook = lambda _, param=param: self._on_gradient(param)
                self._handles.append(param.parameter.register_post_accumulate_grad_hook(hook))
        for module, own in owners_of(self.parts):
            self.owners[module] = [self.param_of[p] for p in own if p in self.param_of]
            hook = lambda module, _: self._before_forward(module)
            # Prepended after fully_shard, so that it runs before FSDP gathers the weights.
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _on_gradient(self, param: ParamState) -> None:
        """A backward has left a gradient in `parameter.grad`."""
        self._mark("backward")
        param.n_backwards += 1
        n, clips = param.n_backwards, self.loop.clips
        can_sum = (
            self.format.accumulates or clips and param.keeps_grad and param.parameter.dtype == torch.float32
        )
        if n > 1 and (not can_sum or not clips and n > self.loop.accumulation):
            raise RuntimeError(
                f"the gradient of {param.name} arrived {n} times before one step, and there is no place to "
                f"sum it in float32, or it was stepped with; give TrainingLoop(accumulation={n}) or more to "
                "ChunkManager, or throw the first away by optimizer.zero_grad()."
            )
        # A gradient that stays in p.grad is collected when it is the sum of all: by finish_backward, or here
        # if its chunk shall be stepped during backward.
        if not param.keeps_grad or not clips and n == self.loop.accumulation:
            self._collect(param)

    @torch.no_grad()
    def _collect(self, param: ParamState) -> None:
        """Take the gradient that is in `parameter.grad`, or where gradients stay there, their sum."""
        grad = param.parameter.grad
        if isinstance(grad, DTensor) and grad.placements != param.parameter.placements:
            # Partial, where no FSDP has reduced it
            grad = grad.redistribute(placements=param.parameter.placements)
            if param.keeps_grad:
                param.parameter.grad = grad
        grad, ready = local(grad).reshape(-1), self.lanes.compute.now()
        for piece in param.pieces:
            self._collect_piece(piece, grad[piece.in_shard], ready)
        if param.n_collected == 0:
            self.ledger.reserve("device", _waiting_bytes(param), f"gradient of {param.name}")
        if not param.keeps_grad:
            param.parameter.grad = None
        param.n_collected += 1
        if not self.loop.clips:
            ready = self.lanes.compute.now()  # by then what waits on the device has been copied
            for chunk in _chunks_of([param]):
                # A tied parameter has no hook, so none of its backwards are counted.
                if all(other.n_backwards == self.loop.accumulation for other in chunk.params):
                    self._begin_update()
                    self._issue(chunk, ready, DONE)
        self._release_finished()
        while sum(grad.nbytes for _, grad in self._in_flight) > IN_FLIGHT_BYTES:
            # Backward waits here for the link, if the link is slower.
            event, _ = self._in_flight.pop(0)
            event.synchronize()

    def _collect_piece(self, piece: Piece, grad: Tensor, ready) -> None:
        """ready: the event of the gradient."""
        chunk, adds = piece.chunk, piece.param.n_collected > 0  # to those of earlier microbatches
        if chunk.state is not State.COLLECTING:
            chunk.wait()
            chunk.move_to(State.COLLECTING)
        if chunk.home is Home.CPU:
            piece.adding.result()  # the buffer still holds the gradient of the microbatch before
            copy = partial(piece.part_of("grad_buffer").copy_, grad, non_blocking=True)
            copied = self.lanes.d2h.run(f"gradient of {piece.param.name}", copy, after=[ready])
            self._in_flight.append((copied, grad))
            if "grad_accum" in chunk.tensors:
                piece.adding = self.lanes.thread.submit(self._add_on_host, piece, copied, adds)
                return
            chunk.grads_copied = copied  # one lane copies all gradients, one after another
            [piece.norm] = float64_norms([grad])
        elif "grad_accum" in chunk.tensors:
            self.kernel.sum_into(piece.part_of("grad_accum"), grad, adds)
        elif not piece.param.keeps_grad:
            piece.grad = piece.grad.add_(grad) if adds else grad.clone()

    @torch.no_grad()
    def _add_on_host(self, piece: Piece, copied, adds: bool) -> None:
        """Add grad_buffer to grad_accum, on the host's thread."""
        copied.synchronize()
        total = piece.part_of("grad_accum")
        self.kernel.sum_into(total, piece.part_of("grad_buffer"), adds)
        [norm] = float64_norms([total])
        piece.host_square = norm.item() ** 2 / piece.param.copies

    def _release_finished(self) -> None:
        """Let go of gradients that have been copied or stepped with."""
        for entries in (self._in_flight, self._in_use):
            entries[:] = [entry for entry in entries if not entry[0].query()]

    def finish_backward(self) -> None:
        """Collect the gradients that no hook has collected: those that stay in p.grad, those that came
        outside backward, and those that were set by hand."""
        if self.auto:
            self.auto.backward_ended()
        for param in self.params:
            if param.n_collected == 0 and param.parameter.grad is not None:
                self._collect(param)
            elif param.n_collected and param.keeps_grad and param.parameter.grad is None:
                self._forget_gradient(param)  # model.zero_grad() has discarded it
        for parameter in chain.from_iterable(group["params"] for group in self.optimizer.param_groups):
            if parameter.grad is not None and parameter not in self.param_of:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient and was frozen when "
                    "chunks were cut; unfreeze what shall train before ChunkManager is made."
                )

    def discard_gradients(self) -> None:
        for param in self.params:
            if param.n_backwards or param.n_collected:
                self._forget_gradient(param)
        for chunk in self.chunks:
            if chunk.state is State.COLLECTING:
                chunk.move_to(State.IDLE)
        self.clip = None  # it belonged to these gradients

    def _forget_gradient(self, param: ParamState) -> None:
        if param.n_collected:
            self.ledger.release("device", _waiting_bytes(param))
        param.parameter.grad = None
        for piece in param.pieces:
            piece.adding.result()
            piece.grad, piece.norm, piece.host_square = None, self._zero, 0.0
        param.n_backwards = param.n_collected = 0

    # ---- the norm ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Make the next step scale all gradients so that their 2-norm over all ranks is at most `max_norm`.
        Return the norm before that, a float64 scalar, the same on every rank. The gradients themselves stay
        as they are: the factor is an argument of Adam. If the norm is inf or nan, the next step changes
        nothing on any rank: no weight, no moment and no step count.

        max_norm: inf only asks for the norm. A manager with clips=False can do no more: it has stepped its
        chunks as their gradients arrived, before there was a norm. So it cannot leave out a gradient that is
        not finite."""
        if max_norm < math.inf and not self.loop.clips:
            raise RuntimeError(
                f"gradients cannot be clipped to {max_norm} any more: with clips=False chunks are stepped as "
                "their gradients arrive; give ChunkManager TrainingLoop(clips=True)."
            )
        self.finish_backward()
        for piece in self.pieces:
            piece.adding.result()
        on_device = [
            piece for piece in self.pieces if piece.param.n_collected and piece.chunk.home is not Home.CPU
        ]
        norms = float64_norms([self._grad_of(piece) for piece in on_device])
        for piece, norm in zip(on_device, norms, strict=True):
            piece.norm = norm
        squares = self._zero.clone()
        if self.pieces:
            squares = (torch.stack([piece.norm for piece in self.pieces]).square() * self.shares).sum()
            squares += sum(piece.host_square for piece in self.pieces)
        if dist.is_initialized():
            dist.all_reduce(squares)
        norm = squares.sqrt()
        self.clip = clip_factor(norm, max_norm) if self.loop.clips else None
        return norm

    # ---- the update ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Make one AdamW update of every parameter whose gradient arrived, and use the gradients up. It
        returns at once: whatever reads weights or states waits for those it reads."""
        self.finish_backward()
        self._mark(None)
        self._begin_update()
        # STREAM need not wait for Adam of the RESIDENT chunks, which is given to the caller's stream below.
        ready, clip_copied = self.lanes.compute.now(), DONE
        self._host_clip.fill_(1.0)
        if self.clip is not None:
            copy = partial(self._host_clip.copy_, self.clip, non_blocking=True)
            clip_copied = self.lanes.d2h.run("clip", copy, after=[ready])
            self._in_use.append((clip_copied, [self.clip]))
        for home in (Home.CPU, Home.RESIDENT, Home.STREAM):
            for chunk in self.chunks:
                is_due = chunk.home is home and chunk not in self._issued
                if is_due and any(param.n_collected for param in chunk.params):
                    self._issue(chunk, ready, clip_copied)
        read = [piece.grad for piece in self.pieces]
        read += [param.parameter.grad for param in self.params]
        self._in_use.append((self.lanes.adam.now(), [*read, self.clip]))
        self._unconfirmed = clip_copied, [param for param in self.params if param.n_collected]
        for param in self.params:
            self._forget_gradient(param)
        self._issued.clear()
        self.clip = None
        for piece in self.pieces:
            if piece.param.is_tied:
                piece.chunk.wait()
        if self.auto:
            self.auto.step_ended()
        self._report_measured()

    def wait(self) -> None:
        """See ChunkStore.wait; afterwards step counts are right too."""
        super().wait()
        self._confirm_counts()

    def _confirm_counts(self) -> None:
        """Count the last step, unless it changed nothing because its gradient norm was not finite. The host
        does not know that when it gives out the work, but before the counts are used, by the next step or by
        a reader of the states. The event that is waited for is a whole forward and backward old by then."""
        clip_copied, stepped = self._unconfirmed
        self._unconfirmed = DONE, []
        clip_copied.synchronize()
        if not self._host_clip.isnan():
            for param in stepped:
                param.step += 1

    def _report_measured(self) -> None:
        """Report once what steps under a plan took, beside what was predicted. The first step, which follows
        the move to the plan, does not count."""
        if self._steps_s is None or self.auto and self.auto.is_tracing:
            return
        self._steps_s.append(self.lanes.clock())
        if len(self._steps_s) == MEASURED_STEPS + 2:
            step_s = statistics.median(end - start for start, end in pairwise(self._steps_s[1:]))
            self.say(describe_measured(self.plan, step_s, self.host_update_s, self.ledger.peak))
            self._steps_s = None

    def _begin_update(self) -> None:
        """Before the first chunk of an update is stepped, wait for the rest of the last update, and note its
        time."""
        if self._issued:
            return
        for chunk in self.chunks:
            chunk.wait()  # long done, except for a chunk whose layers did not run since the last step
        self._confirm_counts()
        self.host_update_s = self._host_began_s and self._host_done_s - self._host_began_s
        self._host_began_s = None

    def _issue(self, chunk: Chunk, ready, clip_copied) -> None:
        """Let the engine of a chunk step those pieces whose gradients are there, once the event `ready` has
        happened."""
        self._issued.add(chunk)
        chunk.move_to(State.UPDATING)
        pieces = []
        for piece in chunk.pieces:
            if piece.param.n_collected:
                pieces.append((piece, piece.weight, _hyper(piece.param)))
                piece.param.weight_version = None  # until the next forward, or `wait`
        if chunk.home is Home.RESIDENT:
            # On the caller's stream, so that what the caller computes next comes after it without a wait.
            self.lanes.resident.run(f"chunk {chunk.index}", self._adam_on_device(chunk.tensors, pieces))
            chunk.end_update(DONE, DONE)
        elif chunk.home is Home.STREAM:
            self._step_stream(chunk, pieces, ready)
        else:
            chunk.job = self.lanes.thread.submit(self._step_host, chunk, pieces, clip_copied)

    def _step_stream(self, chunk: Chunk, pieces: list, ready) -> None:
        """Step a chunk in a ring slot. The two copies and the step of different chunks overlap, each on its
        own lane."""
        what = f"chunk {chunk.index}"
        whole_slot, freed = self.ring.popleft()
        slot = {name: tensor[: chunk.n] for name, tensor in whole_slot.items()}
        home = chunk.tensors

        def copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
            for name in slot:
                targets[name].copy_(sources[name], non_blocking=True)

        loaded = self.lanes.h2d.run(what, partial(copy, slot, home), after=[freed, chunk.states_done])
        stepped = self.lanes.adam.run(what, self._adam_on_device(slot, pieces), after=[loaded, ready])
        stored = self.lanes.d2h.run(what, partial(copy, home, slot), after=[stepped])
        self.ring.append((whole_slot, stored))
        chunk.end_update(stepped, stored)

    def _adam_on_device(self, states: dict[str, Tensor], pieces: list) -> Callable[[], None]:
        """Return a function that steps the pieces when it is called, with the gradients and clip factor of
        now."""
        steps = []
        for piece, weight, hyper in pieces:
            own = {name: tensor[piece.in_chunk] for name, tensor in states.items()}
            all_states = weight, own.get("master_low16"), own["exp_avg"], own["exp_avg_sq"]
            steps.append((*all_states, self._grad_of(piece), self.clip, hyper))
        return partial(self.kernel.device_steps, steps)

    @staticmethod
    def _grad_of(piece: Piece) -> Tensor:
        """Return the gradient of a piece on the device, which is complete once backward has ended."""
        if "grad_accum" in piece.chunk.tensors:
            return piece.part_of("grad_accum")
        return flat_view(piece.param.parameter.grad)[piece.in_shard] if piece.param.keeps_grad else piece.grad

    @torch.no_grad()
    def _step_host(self, chunk: Chunk, pieces: list, clip_copied) -> None:
        """Step a chunk on the host's thread, which takes them one after another in forward order."""
        clip_copied.synchronize()
        if self._host_clip.isnan():  # the gradient is not finite: nothing changes
            chunk.end_update(DONE, DONE)
            return
        new, emptied = self.weight_buffers.popleft()
        chunk.grads_copied.synchronize()
        emptied.synchronize()
        if self._host_began_s is None:
            self._host_began_s = self.lanes.clock()
        grad = chunk.tensors.get("grad_accum", chunk.tensors["grad_buffer"])
        tensors = [*(chunk.tensors[name] for name in MASTER_AND_MOMENTS), grad, new]

        runs = [(piece.in_chunk, hyper) for piece, _, hyper in pieces]
        if len(runs) == len(chunk.pieces) and len({hyper for _, hyper in runs}) == 1:
            runs = [(slice(0, chunk.n), runs[0][1])]  # one call for the whole chunk

        def step() -> None:
            for run, hyper in runs:
                parts = [tensor[run] for tensor in tensors]
                self.kernel.host_step(*parts, self._host_clip, hyper)

        def send() -> None:
            for piece, weight, _ in pieces:
                weight.copy_(new[piece.in_chunk], non_blocking=True)

        self.lanes.host.run(f"chunk {chunk.index}", step)
        sent = self.lanes.weights.run(f"weights of chunk {chunk.index}", send)
        self.weight_buffers.append((new, sent))
        chunk.end_update(sent, sent)
        self._host_done_s = self.lanes.clock()

    # ---- forward and readers -------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module) -> None:
        """Let the forward of a module wait for the weights that it owns."""
        params = self.owners[module]
        for chunk in _chunks_of(params):
            if isinstance(module, FSDPModule):
                chunk.wait()  # FSDP gathers on streams of its own, which wait for no lane
            else:
                chunk.wait_on(self.lanes.compute)
        self._note_weights(params)
        self._release_finished()
        self._mark("forward")
        if self.auto and torch.is_grad_enabled():
            self.auto.forward_begins()

    def close(self) -> None:
        """Finish the update, remove the hooks and end the host's thread."""
        self.wait()
        for handle in self._handles:
            handle.remove()
        for parameter in self.param_of:
            del parameter._has_chunks
        if self.auto:
            self.auto.close()
        hold_to_budget(self.device, None)
        self.lanes.thread.shutdown()

    # ---- what happened when --------------------------------------------------------------------------------

    @property
    def record(self) -> bool:
        """Return whether what happens is noted, for `events`."""
        return self.lanes.recording

    @record.setter
    def record(self, on: bool) -> None:
        for lanes in self._all_lanes:
            lanes.recording = on

    def _mark(self, phase: str | None) -> None:
        """Note that the caller computes `phase` from now on. Backward is noticed when its first gradient
        arrives."""
        if not self.record or phase == self._phase[0]:
            return
        now = self.lanes.compute.now(timing=True) if self.is_cuda else self.lanes.clock()
        if self._phase[0]:
            self.lanes.note(self._phase[0], "compute", self._phase[1], now)
        self._phase = phase, now

    @property
    def events(self) -> list[Event]:
        """See Lanes.events; in the order of their starts. Waits until all is over."""
        self.wait()
        noted = chain.from_iterable(lanes.events() for lanes in self._all_lanes)
        return sorted(noted, key=lambda event: event[2])

    def draw(self, path: str | Path, title: str) -> None:
        """Write a PNG of what was moved and computed while `record` was true."""
        draw_timeline(self.events, path, title)


def _chunks_of(params: list[ParamState]) -> list[Chunk]:
    return list(dict.fromkeys(piece.chunk for param in params for piece in param.pieces))


def _hyper(param: ParamState) -> HyperParameters:
    """Return the hyperparameters of the update to come."""
    group = param.group
    numbers = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
    return HyperParameters(*map(float, numbers), param.step + 1)


def _waiting_bytes(param: ParamState) -> int:
    """Return how much of a gradient stays on the device until its step."""
    return (
        sum(piece.n_elements for piece in param.pieces if piece.grad_waits) * param.parameter.dtype.itemsize
    )
