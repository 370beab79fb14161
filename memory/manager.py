"""ChunkManager: the engine that collects gradients, clips, and steps chunks on the device and on the host at
once. Where chunks are, and how they move between steps, is the ChunkStore's (store.py).

    phase        what happens                                                                       on lane
    backward     hook per parameter: CPU pieces -> slab, and the device's gradient is dropped       d2h
    clip         one all-reduce of the square sum; the factor stays on the device, for Adam
    step         RESIDENT  Adam where it lies                                                       device adam
                 STREAM    home -> ring slot -> Adam -> home, three chunks in flight                h2d, device adam, d2h
                 CPU       Adam by host threads while the caller goes on; outbox -> weights         host adam, weights
    forward      each layer waits for the chunks that cover it, no other

On a CUDA device lanes are streams; without one they are the calling thread, and only CPU chunks run beside it
(lanes.py).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtensor_llama.optim import clip_factor, float64_norms
from dtensor_llama.shards import local
from memory.activations import ActivationOffload
from memory.auto import AutoPolicy
from memory.chunk import Chunk, Managed, Piece, State, flat, gated
from memory.config import MemoryConfig
from memory.kernel import Hyper, Kernel
from memory.lanes import DONE, Lanes, hold_to_budget
from memory.optimizer import ChunkOptimizer, check_adamw
from memory.placement import Placement, Plan, describe_measured, with_prediction
from memory.store import IN_FLIGHT_BYTES, MASTER_AND_MOMENTS, ChunkStore
from memory.timeline import draw_timeline
from memory.tracer import Rates, Traced, measure_rates

MEASURED_STEPS = 5  # with a plan, of which the median is told


class ChunkManager(ChunkStore):
    """Owns master weights and moments of a model's trainable parameters; `manager.optimizer` is its face.

    model: what `parameters()` of names; its parameters, plain or DTensor, float32 or bfloat16, hold values or
        will get them by `masters().write`. Made after parallelize and to_empty.
    optimizer: an AdamW on them that never stepped. Its groups (the dicts themselves: schedulers go on) become
        those of `manager.optimizer`, which takes its place.
    parts: the modules that run, in forward order, if they are not `model`: pipeline stages.
    arrivals: how often a gradient arrives between two steps: 1, or where each microbatch is reduced (ZeRO 2
        and 3 without pp), or without FSDP, the microbatches of a step.
    clips: False: there is no bound on the gradient norm, so a chunk is stepped as soon as its last gradient
        has arrived, in backward, with the learning rate of then; `step` does the rest.
    outside: parameters with gradients that change after backward, or weights that are read outside forward (a
        matrix tied over pipeline stages). `step` returns when they are new.
    plan: instead of the configuration's; placements of as many chunks as there are.
    rates: of the machine, measured here if placement auto needs them; compute_seconds: what a step's forward
        and backward will take, as far as is known before the first: with both a static plan is told with the
        step it predicts.
    activations: offloads of block inputs, whose slabs count on the host and whose copies are drawn with the
        rest.
    say: called with plans in words. ranks_per_host: that share its memory, of which plans take a rank's part
        of what is free, or what --memory.host-budget-gib says.
    UsageError, before anything is allocated, if the optimizer or the budgets do not allow it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        config: MemoryConfig,
        *,
        parts: Sequence[nn.Module] | None = None,
        arrivals: int = 1,
        clips: bool = True,
        outside: Iterable[nn.Parameter] = (),
        plan: Plan | None = None,
        rates: Rates | None = None,
        compute_seconds: tuple[float, float] | None = None,
        activations: Sequence[ActivationOffload] = (),
        say: Callable[[str], None] = lambda text: None,
        ranks_per_host: int = 1,
        chunk_elements: int | None = None,
        lanes: Lanes | None = None,
    ):
        config.check()
        check_adamw(optimizer)
        super().__init__(
            model,
            optimizer,
            config,
            parts,
            outside,
            arrivals,
            plan,
            activations,
            say,
            ranks_per_host,
            chunk_elements,
            lanes,
        )
        self.arrivals, self.clips, self.kernel = arrivals, clips, Kernel(config.kernel, self.device)
        n_pieces = sum(len(chunk.pieces) for chunk in self.chunks)
        self._zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.norms = [self._zero] * n_pieces  # of each piece's whole gradient, float64
        self.host_squares = [0.0] * n_pieces  # of those summed on the host
        self.shares = torch.tensor(
            [1 / one.copies for one in self.managed for _ in one.pieces],
            dtype=torch.float64,
            device=self.device,
        )  # of a square in the world's sum
        self.clip: Tensor | None = None  # factor of the next step; nan: it shall change nothing
        self._host_clip = torch.ones((), pin_memory=self.is_cuda)
        self._uncertain: tuple[Any, list[Managed]] | None = None  # of a step: event of its factor, counted
        self._in_flight: list[tuple[Any, Tensor]] = []  # (event, gradient that lives until then): on its way
        self._in_use: list[tuple[Any, list[Tensor]]] = []  # likewise, what the latest update reads
        self._issued: set[Chunk] = set()  # told to step since the last `step`
        self._is_updating = False  # an update has begun: in backward, or in `step`
        self._turns = dict.fromkeys(Placement, 0)  # chunks stepped: whose turn it is in ring and outbox
        self._phase: tuple[str | None, Any] = None, None
        self._host_began_s = self._host_done_s = self._host_update_s = None
        self._steps_s: list[float] | None = []  # when steps ended, until they are told; None: they were
        self._warm_up()
        self._frozen = [p for group in optimizer.param_groups for p in group["params"] if p not in self.of]
        self._gates = _gates(self.parts, self.of)
        if config.placement == "auto" and plan is None and rates is None:
            rates = measure_rates(self.device, config.kernel, ranks_per_host)
        self._install_hooks()
        self._see_weights(self.managed)
        self.optimizer = ChunkOptimizer(self, optimizer)
        self.auto = None
        say(f"memory    {len(self.chunks)} chunks on this rank; AdamW by {self.kernel.why}")
        if config.placement == "static":
            self.plan = replace(self.plan, other_host_bytes=self.other_host_bytes)
            if rates and compute_seconds:
                self.plan = with_prediction(self.plan, rates, Traced(0, *compute_seconds))
            say(self.in_words())
        if config.placement == "auto" and plan is None:
            self.auto = AutoPolicy(self, rates, say)

    def take_plan(self, saved: str) -> None:
        """Under placement auto: go on with this rank's plan of a checkpoint (Plan.to_json, or ""), without
        tracing again, if on every rank it is one for the chunks and budgets of now. All ranks enter."""
        if self.auto:
            self.auto.take_plan(Plan.from_json(saved) if saved else None)

    def replan(self, plan: Plan) -> None:
        """ChunkStore.replan, when all of the last update is over."""
        self.wait()
        self._let_go()
        super().replan(plan)
        self._warm_up()
        self._steps_s = []

    def _warm_up(self) -> None:
        """Compile what steps under the plan of now will run, between steps: in one, other ranks would wait in
        a collective. What the plan has no chunk for is not compiled; another plan may need it later."""
        for dtype in {chunk.dtype for chunk in self.chunks}:
            chunks = [chunk for chunk in self.chunks if chunk.dtype == dtype]
            on_device = [chunk for chunk in chunks if chunk.placement is not Placement.CPU]
            pieces = [piece for chunk in on_device for piece in chunk.pieces]
            lengths = {piece.in_chunk.stop - piece.in_chunk.start for piece in pieces}
            grad_dtype = torch.float32 if self.sums else dtype
            if len(on_device) < len(chunks):
                self.kernel.warm_up_host(dtype, grad_dtype, self.lanes.n_threads)
            self.kernel.warm_up_device(self.device, dtype, grad_dtype, lengths)

    # ---- backward: gradients arrive ------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        self._handles = []
        for module in {self.model, *self.parts}:  # what reads or writes all weights comes after the update
            self._handles += [
                module.register_state_dict_pre_hook(lambda *_: self.wait()),
                module.register_load_state_dict_pre_hook(lambda *_: self.wait()),
            ]
        for one in self.managed:
            one.parameter._has_chunks = True
            if not one.outside:
                hook = lambda _, one=one: self._arrive_in_backward(one)
                self._handles.append(one.parameter.register_post_accumulate_grad_hook(hook))
        for module, chunks in self._gates.items():
            # after fully_shard and prepended: it comes before FSDP gathers the weights
            ones = [one for one in self.managed if one.gate is module]
            gathers = isinstance(module, FSDPModule)

            def hook(_module, _args, chunks=chunks, ones=ones, gathers=gathers) -> None:
                self._enter(chunks, ones, gathers)

            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _arrive_in_backward(self, one: Managed) -> None:
        self._mark("backward")
        one.came += 1
        can_sum = self.sums or self.clips and one.keeps_grad and one.parameter.dtype == torch.float32
        if one.came > 1 and (not can_sum or not self.clips and one.came > self.arrivals):
            n = one.came
            raise RuntimeError(
                f"the gradient of {one.name} arrived {n} times before one step, and there is no place to sum it "
                f"in float32, or it was stepped with; pass arrivals={n} or more to ChunkManager, or throw the "
                "first away by optimizer.zero_grad()."
            )
        # else it is taken in with all others like it, by finish_backward
        if not (one.keeps_grad and self.clips):
            self._arrive(one)

    @torch.no_grad()
    def _arrive(self, one: Managed) -> None:
        """A gradient, or with kept gradients their sum so far, is in `parameter.grad`."""
        grad = one.parameter.grad
        if isinstance(grad, DTensor) and grad.placements != one.parameter.placements:
            # Partial, where no FSDP has reduced it
            grad = grad.redistribute(placements=one.parameter.placements)
            # it is the last one's sum
            if one.keeps_grad and (self.clips or one.arrivals + 1 == self.arrivals):
                one.parameter.grad = grad
        grad, ready = local(grad).reshape(-1), self.lanes.compute.now()
        for piece in one.pieces:
            self._collect(piece, grad[piece.in_shard], ready, adds=one.arrivals > 0 and not one.keeps_grad)
        if one.arrivals == 0:
            self.ledger.take("device", _waiting_bytes(one), f"gradient of {one.name}")
        if not one.keeps_grad:
            one.parameter.grad = None
        one.arrivals += 1
        if not self.clips and one.arrivals == self.arrivals:
            ready = self.lanes.compute.now()  # what waits on the device has been copied
            for chunk in dict.fromkeys(piece.chunk for piece in one.pieces):
                if all(other.arrivals == self.arrivals and not other.outside for other in chunk.managed):
                    self._issue(chunk, ready, DONE)
        self._let_go()
        self._bound_in_flight()

    def _collect(self, piece: Piece, grad: Tensor, ready, adds: bool) -> None:
        """ready: the event of the gradient. adds: to those of microbatches before; else it is the first, or,
        where it is kept, their sum."""
        chunk = piece.chunk
        if chunk.state is not State.COLLECTING:
            chunk.wait()
            chunk.arrived.clear()
            chunk.move_to(State.COLLECTING)
        if chunk.placement is Placement.CPU:
            if piece.adding is not None:
                piece.adding.result()  # the slab still holds the gradient of the microbatch before
            slab = chunk.tensors["slab"][piece.in_chunk]
            copied = self.lanes.d2h.run(
                f"gradient of {piece.managed.name}",
                lambda: slab.copy_(grad, non_blocking=True),
                after=[ready],
            )
            self._in_flight.append((copied, grad))
            if "total" in chunk.tensors:
                piece.adding = self.lanes.thread.submit(self._add, piece, copied, adds)
                return
            chunk.arrived.append(copied)
            [self.norms[piece.index]] = float64_norms([grad])
        elif "total" in chunk.tensors:
            self.kernel.sum_into(chunk.tensors["total"][piece.in_chunk], grad, adds)
        elif not piece.managed.keeps_grad:
            piece.waiting = piece.waiting.add_(grad) if adds else grad.clone()

    @torch.no_grad()
    def _add(self, piece: Piece, arrived, adds: bool) -> None:
        """On the host's thread: slab into total."""
        arrived.synchronize()
        total, slab = (piece.chunk.tensors[name][piece.in_chunk] for name in ("total", "slab"))
        self.kernel.sum_into(total, slab, adds)
        [norm] = float64_norms([total])
        self.host_squares[piece.index] = norm.item() ** 2 / piece.managed.copies

    def _let_go(self) -> None:
        """Of gradients that have been copied, or stepped with."""
        for entries in (self._in_flight, self._in_use):
            entries[:] = [entry for entry in entries if not entry[0].query()]

    def _bound_in_flight(self) -> None:
        """Where the link is slower than backward, backward waits for it here."""
        n_bytes = sum(grad.nbytes for _, grad in self._in_flight)
        while n_bytes > IN_FLIGHT_BYTES:
            event, grad = self._in_flight.pop(0)
            event.synchronize()
            n_bytes -= grad.nbytes

    def finish_backward(self) -> None:
        """Take in gradients that no hook has seen: those from outside backward, or set by hand."""
        if self.auto:
            self.auto.backward_ended()
        for one in self.managed:
            if one.arrivals == 0 and one.parameter.grad is not None:
                self._arrive(one)
            elif one.arrivals and one.keeps_grad and one.parameter.grad is None:  # by the model's zero_grad
                self._forget(one)
        strange = next((p for p in self._frozen if p.grad is not None), None)
        if strange is not None:
            raise RuntimeError(
                f"a parameter of shape {tuple(strange.shape)} has a gradient and was frozen when chunks were "
                "cut; unfreeze what shall train before ChunkManager is made."
            )

    def discard_gradients(self) -> None:
        for one in self.managed:
            if one.came or one.arrivals:
                self._forget(one)
        for chunk in self.chunks:
            if chunk.state is State.COLLECTING:
                chunk.move_to(State.READY)
        self.clip = None  # it was of these gradients

    def _forget(self, one: Managed) -> None:
        if one.arrivals:
            self.ledger.give("device", _waiting_bytes(one))
        one.parameter.grad = None
        for piece in one.pieces:
            piece.adding, piece.waiting = piece.adding and piece.adding.result(), None
            self.norms[piece.index], self.host_squares[piece.index] = self._zero, 0.0
        one.came = one.arrivals = 0

    # ---- the norm ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Make the next step scale all gradients so that their 2-norm over all ranks is at most `max_norm`;
        returns what it is before, a float64 scalar, the same on every rank. Gradients stay as they are: the
        factor is an argument of Adam. If the norm is inf or nan the next step changes nothing, on any rank:
        no weight, no moment and no step count.

        max_norm: inf only asks for the norm. It is all that a manager with clips=False can do: its chunks
        were stepped as their gradients arrived, before there was a norm, so it cannot keep a gradient that is
        not finite out of them."""
        if max_norm < math.inf and not self.clips:
            raise RuntimeError(
                f"gradients cannot be clipped to {max_norm} any more: with clips=False chunks are stepped as "
                "their gradients arrive; pass clips=True to ChunkManager."
            )
        self.finish_backward()
        for chunk in self.chunks if self.sums else ():
            for piece in chunk.pieces:
                piece.adding = piece.adding and piece.adding.result()
        squares = self._zero.clone()
        arrived = [piece for one in self.managed if one.arrivals for piece in one.pieces]
        on_device = [piece for piece in arrived if piece.chunk.placement is not Placement.CPU]
        norms = float64_norms([self._grad_of(piece) for piece in on_device])
        for piece, norm in zip(on_device, norms, strict=True):
            self.norms[piece.index] = norm
        if self.norms:
            squares = (torch.stack(self.norms).square() * self.shares).sum() + sum(self.host_squares)
        if dist.is_initialized():
            dist.all_reduce(squares)
        norm = squares.sqrt()
        self.clip = clip_factor(norm, max_norm) if self.clips else None
        return norm

    # ---- the update ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW update of every parameter whose gradient arrived; gradients are used up. Returns at once:
        what reads weights or states waits for what it reads."""
        self.finish_backward()
        self._mark(None)
        self._begin_update()
        # STREAM need not wait for the residents' Adam, given below
        ready, clip_arrived = self.lanes.compute.now(), DONE
        if self.clip is not None:
            clip_arrived = self.lanes.d2h.run(
                "clip", partial(self._host_clip.copy_, self.clip, non_blocking=True), after=[ready]
            )
            self._in_use.append((clip_arrived, [self.clip]))
        for placement in (Placement.CPU, Placement.RESIDENT, Placement.STREAM):
            for chunk in self.chunks:
                if (
                    chunk.placement is placement
                    and chunk not in self._issued
                    and any(one.arrivals for one in chunk.managed)
                ):
                    self._issue(chunk, ready, clip_arrived)
        read = [piece.waiting for one in self.managed for piece in one.pieces] + [
            one.parameter.grad for one in self.managed
        ]
        self._in_use.append(
            (self.lanes.adam.now(), [tensor for tensor in [*read, self.clip] if tensor is not None])
        )
        counted = [one for one in self.managed if one.arrivals]
        for one in counted:
            one.step += 1
        if self.clip is not None:
            self._uncertain = clip_arrived, counted
        for one in self.managed:
            self._forget(one)
        self._issued.clear()
        self._is_updating, self.clip = False, None
        for one in self.managed:
            for piece in one.pieces if one.outside else ():
                piece.chunk.wait()
        if self.auto:
            self.auto.step_ended()
        self._measure()

    def wait(self) -> None:
        """ChunkStore.wait; step counts are right then, too."""
        super().wait()
        self._settle_counts()

    def _settle_counts(self) -> None:
        """Take the last step out of the counts if it changed nothing, as its gradient norm was not finite.
        The host does not know that when it counts; it does before the counts are used: by the next step, or
        by who reads the states. The event waited for is a whole forward and backward old by then."""
        if self._uncertain is None:
            return
        clip_arrived, counted = self._uncertain
        self._uncertain = None
        clip_arrived.synchronize()
        if self._host_clip.isnan():
            for one in counted:
                one.step -= 1

    def _measure(self) -> None:
        """Hold the plan against steps that were made with it, once; the first follows the move to it."""
        if self._steps_s is None or self.auto and self.auto.is_tracing:
            return
        self._steps_s.append(self.lanes.clock())
        if len(self._steps_s) == MEASURED_STEPS + 2:
            times = [end - start for start, end in pairwise(self._steps_s[1:])]
            self.say(
                describe_measured(
                    self.plan, statistics.median(times), self.host_update_seconds(), self.ledger.peak
                )
            )
            self._steps_s = None

    def _begin_update(self) -> None:
        """Before the first chunk of an update is stepped: what the last one left behind is waited for, and
        timed."""
        if self._is_updating:
            return
        self._is_updating = True
        for chunk in self.chunks:
            if chunk.state is not State.COLLECTING:
                chunk.wait()  # long done, but for one whose layers did not run since the last step
        self._settle_counts()
        self._host_update_s = self._host_began_s and self._host_done_s - self._host_began_s
        self._host_began_s = None

    def _issue(self, chunk: Chunk, ready, clip_arrived) -> None:
        """Have its engine step the pieces of a chunk whose gradients are there, once the event `ready` has
        happened."""
        self._begin_update()
        self._issued.add(chunk)
        engine = {
            Placement.CPU: self._queue,
            Placement.RESIDENT: self._step_resident,
            Placement.STREAM: self._step_stream,
        }[chunk.placement]
        chunk.move_to(State.QUEUED)
        for one in chunk.managed:
            if one.arrivals:
                one.weight_seen = None  # until the next forward, or wait
        engine(
            chunk,
            [(piece, _hyper(piece.managed)) for piece in chunk.pieces if piece.managed.arrivals],
            ready,
            clip_arrived,
            self._turns[chunk.placement],
        )
        self._turns[chunk.placement] += 1

    def host_update_seconds(self) -> float | None:
        """From when the host could begin an update until its last weight was sent, of the one before the
        latest; None: the host had no chunk in it."""
        return self._host_update_s

    def _step_resident(self, chunk: Chunk, pieces: list, ready, clip_arrived, turn: int) -> None:
        """Where it lies, on the caller's stream: what the caller computes from now on is after it without a
        wait."""
        chunk.move_to(State.STEPPING)
        self.lanes.resident.run(f"chunk {chunk.index}", self._adam_on_device(chunk.tensors, pieces))
        chunk.weights_done = chunk.done = DONE
        chunk.move_to(State.READY)

    def _step_stream(self, chunk: Chunk, pieces: list, ready, clip_arrived, turn: int) -> None:
        """Through a ring slot; the three copies and the step of different chunks overlap, each on its own
        lane."""
        i, what = turn % len(self.ring), f"chunk {chunk.index}"
        home = {name: tensor for name, tensor in chunk.tensors.items() if name != "total"}
        slot = {name: self.ring[i][name][: chunk.n] for name in home}

        def copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
            for name, target in targets.items():
                target.copy_(sources[name], non_blocking=True)

        chunk.move_to(State.STEPPING)
        loaded = self.lanes.h2d.run(what, partial(copy, slot, home), after=[self._slot_free[i], chunk.done])
        stepped = self.lanes.adam.run(what, self._adam_on_device(slot, pieces), after=[loaded, ready])
        stored = self.lanes.d2h.run(what, partial(copy, home, slot), after=[stepped])
        chunk.weights_done, chunk.done = stepped, stored
        self._slot_free[i] = stored
        chunk.move_to(State.READY)

    def _adam_on_device(self, states: dict[str, Tensor], pieces: list) -> Callable[[], None]:
        """What steps the pieces, once it is called; gradients and clip factor are those of now."""
        steps = []
        for piece, hyper in pieces:
            of_piece = (
                states[name][piece.in_chunk] if name in states else None
                for name in ("low", "exp_avg", "exp_avg_sq")
            )
            steps.append(
                (piece.managed.weight[piece.in_shard], *of_piece, self._grad_of(piece), self.clip, hyper)
            )

        return partial(self.kernel.device_steps, steps)

    @staticmethod
    def _grad_of(piece: Piece) -> Tensor:
        """Of a piece on the device, whole since backward ended."""
        if "total" in piece.chunk.tensors:
            return piece.chunk.tensors["total"][piece.in_chunk]
        return (
            flat(piece.managed.parameter.grad)[piece.in_shard] if piece.managed.keeps_grad else piece.waiting
        )

    def _queue(self, chunk: Chunk, pieces: list, ready, clip_arrived, turn: int) -> None:
        weights = [(piece, piece.managed.weight[piece.in_shard]) for piece, _ in pieces]
        whole = len(pieces) == len(chunk.pieces) and len({hyper for _, hyper in pieces}) == 1
        runs = (
            [(slice(0, chunk.n), pieces[0][1])]
            if whole
            else [(piece.in_chunk, hyper) for piece, hyper in pieces]
        )
        clip = None if self.clip is None else self._host_clip
        chunk.weights_done = DONE
        chunk.job = self.lanes.thread.submit(self._step_host, chunk, runs, weights, clip, clip_arrived, turn)

    @torch.no_grad()
    def _step_host(
        self, chunk: Chunk, runs: list, weights: list, clip: Tensor | None, clip_arrived, turn: int
    ) -> None:
        """On the host's thread, chunk after chunk in forward order."""
        chunk.move_to(State.STEPPING)
        i = turn % len(self.outbox)
        for event in (clip_arrived, *chunk.arrived, self._sent[i]):
            event.synchronize()
        if clip is not None and clip.isnan():  # the gradient is not finite: nothing changes
            chunk.weights_done = chunk.done = DONE
            chunk.move_to(State.READY)
            return
        if self._host_began_s is None:
            self._host_began_s = self.lanes.clock()
        states = [chunk.tensors[name] for name in MASTER_AND_MOMENTS]
        grad, new = chunk.tensors.get("total", chunk.tensors["slab"]), self.outbox[i].view(chunk.dtype)

        def step() -> None:
            for run, hyper in runs:
                self.kernel.host_step(*(state[run] for state in states), grad[run], new[run], clip, hyper)

        def send() -> None:
            for piece, weight in weights:
                weight.copy_(new[piece.in_chunk], non_blocking=True)

        self.lanes.host.run(f"chunk {chunk.index}", step)
        chunk.weights_done = chunk.done = self._sent[i] = self.lanes.weights.run(
            f"weights of chunk {chunk.index}", send
        )
        chunk.move_to(State.READY)
        self._host_done_s = self.lanes.clock()

    # ---- forward and readers -------------------------------------------------------------------------------

    def _enter(self, chunks: list[Chunk], ones: list[Managed], gathers: bool) -> None:
        """Before the forward of a module that waits for `chunks`, all of its parameters `ones`."""
        for chunk in chunks:
            if gathers:
                chunk.wait()  # FSDP gathers on streams of its own, which wait for no lane
            else:
                chunk.wait_on(self.lanes.compute)
        self._see_weights(ones)
        self._let_go()
        self._mark("forward")
        if self.auto and torch.is_grad_enabled():
            self.auto.forward_begins()

    def gated_modules(self) -> dict[str, nn.Module]:
        """What waits for weights as one, in forward order, by name: blocks, and each part for the rest of
        it."""
        names = {
            module: name or f"part {i}"
            for i, part in enumerate(self.parts)
            for name, module in part.named_modules()
        }
        return {names[module]: module for module in self._gates}

    def draw(self, path: str | Path, title: str) -> None:
        """Write a PNG of who moved and computed what while `record` was true."""
        draw_timeline(self.events, path, title)

    def close(self) -> None:
        """Finish, take the hooks off and end the host's thread."""
        self.wait()
        for handle in self._handles:
            handle.remove()
        for one in self.managed:
            del one.parameter._has_chunks
        if self.auto:
            self.auto.close()
        hold_to_budget(self.device, None)
        self.lanes.thread.shutdown()

    # ---- what happened when --------------------------------------------------------------------------------

    @property
    def record(self) -> bool:
        """Whether what happens is noted, for `events`."""
        return self.lanes.recording

    @record.setter
    def record(self, on: bool) -> None:
        for lanes in self._all_lanes():
            lanes.recording = on

    def _mark(self, phase: str | None) -> None:
        """The caller computes `phase` from now on. Backward is seen when its first gradient is there."""
        if not self.record or phase == self._phase[0]:
            return
        now = self.lanes.compute.now(timing=True) if self.is_cuda else self.lanes.clock()
        if self._phase[0]:
            self.lanes.note(self._phase[0], "compute", self._phase[1], now)
        self._phase = phase, now

    @property
    def events(self) -> list[tuple[str, str, float, float]]:
        """Lanes.events, once all is over, in the order of their starts."""
        self.wait()
        return sorted(
            (event for lanes in self._all_lanes() for event in lanes.events()), key=lambda event: event[2]
        )

    def _all_lanes(self) -> list[Lanes]:
        return [self.lanes, *(one.lanes for one in self.activations)]


def _gates(parts: list[nn.Module], of: dict[nn.Parameter, Managed]) -> dict[nn.Module, list[Chunk]]:
    """Module -> chunks that must be ready before its forward; in forward order, modules without a chunk
    too."""
    gates: dict[nn.Module, list[Chunk]] = {}
    for part in parts:
        for parameter, module in gated(part).items():
            mine = gates.setdefault(module, [])
            if parameter in of:
                mine += [piece.chunk for piece in of[parameter].pieces if piece.chunk not in mine]
    return gates


def _hyper(one: Managed) -> Hyper:
    """Of the update to come."""
    lr, betas, eps, decay = (one.group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    return Hyper(float(lr), *map(float, betas), float(eps), float(decay), one.step + 1)


def _waiting_bytes(one: Managed) -> int:
    """Of a gradient, what stays on the device until its step."""
    return sum(
        (piece.in_chunk.stop - piece.in_chunk.start) * one.parameter.dtype.itemsize
        for piece in one.pieces
        if piece.chunk.placement is not Placement.CPU and "total" not in piece.chunk.tensors
    )
