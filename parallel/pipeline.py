"""Pipeline parallelism: the layers are split over the pp ranks, and microbatches flow through them.

stage: consecutive layers that run as one; the first has the embedding too, the last the norm and the head
part: the module of one stage, a Llama whose other stages' modules are None. A rank holds one part, or several where the
    schedule has virtual stages: then a microbatch visits the rank once per part
microbatch: what one forward sees, here one Batch. F its forward through a stage, B its backward; zero-bubble schedules
    split B into I (gradient of the stage's input, which the stage before waits for) and W (of its weights: can wait)
bubble: time in which a rank has nothing to do: its microbatch is still, or already, elsewhere
schedule: the order of F, B, I, W on each rank. Two ranks, four microbatches, B twice as long as F; dots are bubbles:
    gpipe  0 |F0 F1 F2 F3 .. .. B0 B0 B1 B1 B2 B2 B3 B3     1f1b  0 |F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3 B3
           1 |.. F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .. ..        1 |.. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .. ..
    gpipe keeps the activations of all microbatches until backward, 1f1b of at most pp. Sources: Huang et al. 2018,
    arXiv:1811.06965; 1f1b and interleaved: Narayanan et al. 2021, arXiv:2104.04473; zero-bubble and zbv: Qi et al. 2023,
    arXiv:2401.10241; dualpipev: DeepSeek-V3, arXiv:2412.19437

On the wire between stages: hidden states (B, T, D) forward, their gradients backward. Schedules and transfers are
torch.distributed.pipelining's; this file cuts the model, feeds the microbatches and keeps everything else as without pp.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import RESHARD, UNSHARD
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import GraphExecGroup

from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.model import Llama
from parallel.schedule_picture import Recorder
from parallel.zero import set_gradient_sync
from parallel.zero import set_gradient_sync


class ScheduleKind(NamedTuple):
    torch_class: type
    default_virtual_stages: int
    v_shaped: bool = False         # stages go down the ranks and up again, instead of round and round
    splits_backward: bool = False  # into I and W


SCHEDULES = {
    "gpipe":            ScheduleKind(ScheduleGPipe, 1),
    "1f1b":             ScheduleKind(Schedule1F1B, 1),
    "interleaved-1f1b": ScheduleKind(ScheduleInterleaved1F1B, 2),
    "zero-bubble":      ScheduleKind(ScheduleInterleavedZeroBubble, 1, splits_backward=True),
    "zbv":              ScheduleKind(ScheduleZBVZeroBubble, 2, v_shaped=True, splits_backward=True),
    "dualpipev":        ScheduleKind(ScheduleDualPipeV, 2, v_shaped=True, splits_backward=True),
}


# ---- What goes where: pure functions ----------------------------------------------------------------------------------


def split_layers(config: LlamaConfig, n_stages: int) -> list[range]:
    """The layers of each stage: at least one, the slowest stage as fast as whole layers allow.

    Costs are FLOPs per token of forward and backward: 6 per weight of a block, 6 V D for the head on the last stage, and
    nothing for the embedding, which is looked up. Of equal stages the later ones get the layers left over: under 1f1b the
    first stage holds the activations of the most microbatches.
    """
    D, E = config.hidden_size, config.head_dim
    block_weights = D * E * 2 * (config.num_attention_heads + config.num_key_value_heads) + 3 * D * config.intermediate_size
    costs = [1.0] * (n_stages - 1) + [1.0 + config.vocab_size * D / block_weights]     # in blocks: one layer each to begin
    n_layers = [1] * n_stages
    for _ in range(config.num_hidden_layers - n_stages):
        cheapest = min(range(n_stages), key=lambda stage: (costs[stage], -stage))
        costs[cheapest] += 1
        n_layers[cheapest] += 1
    ends = [sum(n_layers[:stage + 1]) for stage in range(n_stages)]
    return [range(end - n, end) for n, end in zip(n_layers, ends, strict=True)]


def stage_indices(schedule: str, pp: int, virtual_stages: int) -> list[list[int]]:
    """The stages of each pp rank. Loop: rank r has r, r + pp, r + 2 pp ...; V (zbv, dualpipev): r and 2 pp - 1 - r."""
    if SCHEDULES[schedule].v_shaped:
        return [[rank, 2 * pp - 1 - rank] for rank in range(pp)]
    return [list(range(rank, pp * virtual_stages, pp)) for rank in range(pp)]


def check_pipeline(config: LlamaConfig, pp: int, schedule: str, virtual_stages: int, n_microbatches: int,
                   recompute: str = "none", compile: bool = False) -> None:
    """UsageError if this pipeline cannot run. n_microbatches: per dp rank and step. Any answer for pp 1 but a bad name."""
    if schedule not in SCHEDULES:
        raise UsageError(f"--parallel.schedule {schedule} is not one of {', '.join(SCHEDULES)}.")
    if pp == 1:
        return
    kind, flag = SCHEDULES[schedule], f"--parallel.schedule {schedule}"
    if schedule in ("gpipe", "1f1b") and virtual_stages != 1:
        raise UsageError(f"{flag} runs one stage per rank and --parallel.virtual-stages is {virtual_stages}; use "
                         "--parallel.virtual-stages 1, or --parallel.schedule interleaved-1f1b or zero-bubble.")
    if kind.v_shaped and virtual_stages != 2:
        raise UsageError(f"{flag} runs exactly two stages per rank and --parallel.virtual-stages is {virtual_stages}; "
                         "use --parallel.virtual-stages 2.")
    least = 2 if schedule == "interleaved-1f1b" else 1
    if virtual_stages < least:
        raise UsageError(f"{flag} needs --parallel.virtual-stages of at least {least} and it is {virtual_stages}"
                         + ("; with one stage per rank it would be 1f1b." if least == 2 else "."))
    n_stages, n_layers = pp * virtual_stages, config.num_hidden_layers
    if n_stages > n_layers:
        works = [f"--parallel.pp {n}" for n in [n_layers // virtual_stages] if n > 1]
        works += [f"--parallel.virtual-stages {n}" for n in [n_layers // pp] if n >= least and not kind.v_shaped]
        raise UsageError(f"--parallel.pp {pp} x --parallel.virtual-stages {virtual_stages} = {n_stages} stages, and the model "
                         f"has {n_layers} layers; each stage needs one. Use at most {' or '.join(works) or '--parallel.pp 1'}"
                         f"{'' if virtual_stages == 1 else ', or --parallel.schedule 1f1b'}.")
    counted = f"--train.global-batch-size and --train.micro-batch-size make {n_microbatches} microbatches a step"
    at_least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    if n_microbatches < at_least:
        raise UsageError(f"{flag} with --parallel.pp {pp} needs at least {at_least} microbatches ({'one' if at_least == pp else 'two'}"
                         f" per rank) and {counted}; use smaller micro-batches or a larger batch"
                         f"{', or --parallel.schedule gpipe' if schedule == '1f1b' else ', or --parallel.schedule zbv'}.")
    rounds = max(1, n_microbatches // pp)
    if schedule in ("interleaved-1f1b", "zero-bubble") and n_microbatches % rounds:
        lower = n_microbatches // pp * pp
        raise UsageError(f"{flag} sends microbatches in rounds of about --parallel.pp {pp}, all of one size, and {counted}, "
                         f"which {rounds} rounds do not divide; use {lower} or {lower + pp} microbatches.")
    if kind.splits_backward and (compile or recompute == "selective"):
        # A compiled block computes both gradients in one graph; selective keeps what it saved for one backward only.
        what = "--train.compile" if compile else "--train.recompute selective"
        raise UsageError(f"{flag} runs backward in two halves, which {what} cannot do; use --parallel.schedule 1f1b or "
                         f"interleaved-1f1b{'' if compile else ', or --train.recompute full'}.")


# ---- Cutting the model ------------------------------------------------------------------------------------------------


def split_stages(model: Llama, pp_mesh: DeviceMesh, schedule: str, virtual_stages: int) -> list[Llama]:
    """This rank's parts, in the order of their stages; afterwards `model` is what this rank holds, under the same names.

    First of all passes. Parts share their modules with `model`, so tp, recompute, compile and fully_shard are applied to
    each part; `to_empty` too; while the optimizer, the gradient norm, initial weights, checkpoints and export take
    `model`, as without pp: it has every parameter of the parts, once, by its Hugging Face name.

    A tied matrix belongs to the first stage. The last stage works with a copy that is in its part but not in `model`:
    nothing counts, saves or steps it, and Pipeline renews it before each forward and adds its gradient to the owner's.
    """
    pp, pp_rank, config = pp_mesh.size(), pp_mesh.get_local_rank(), model.config
    n_stages = pp * virtual_stages
    layers, parts = split_layers(config, n_stages), []
    own = stage_indices(schedule, pp, virtual_stages)[pp_rank]
    is_tied, has_first, has_last = config.tie_word_embeddings, 0 in own, n_stages - 1 in own
    for stage in own:
        with torch.device("meta"):
            part = type(model)(config)
        part.model.embed_tokens = model.model.embed_tokens if stage == 0 else None
        for layer in range(config.num_hidden_layers):
            part.model.layers[layer] = model.model.layers[layer] if layer in layers[stage] else None
        part.model.norm, part.lm_head = (model.model.norm, model.lm_head) if stage == n_stages - 1 else (None, None)
        if is_tied and stage == n_stages - 1:
            weight = model.model.embed_tokens.weight
            part.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        parts.append(part)
    held = {layer for stage in own for layer in layers[stage]}
    for layer in set(range(config.num_hidden_layers)) - held:
        model.model.layers[layer] = None
    if not has_last:
        model.model.norm = None
    if is_tied:
        model.lm_head = model.model.embed_tokens if has_first else None   # both names of the one matrix; never called
    elif not has_last:
        model.lm_head = None
    if not has_first:
        model.model.embed_tokens = None
    return parts


# ---- Running it -------------------------------------------------------------------------------------------------------


class Stage(PipelineStage):
    """torch's PipelineStage that lets a Recorder watch, and recomputes once per half of a split backward."""

    recorder: Recorder | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._noted(fwd_chunk_id, "F"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss=None, full_backward: bool = True, **kwargs):
        if self.is_first and not full_backward:      # no input to give a gradient to: its I is nothing, its W a whole B
            return super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=False, **kwargs)
        with self._noted(bwd_chunk_id, "B" if full_backward else "I"):
            return super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs):
        # torch asks autograd for one weight after another; without the group each would recompute its block again.
        with self._noted(bwd_chunk_id, "B" if self.is_first else "W"), GraphExecGroup():
            return super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)

    def _noted(self, microbatch: int, kind: str):
        return self.recorder.note(self.stage_index, microbatch, kind) if self.recorder else nullcontext()


class Pipeline:
    """Runs optimizer steps and evaluations over the pp axis. All ranks of pp_mesh call each method, in step.

    parts: from split_stages, after all passes and `to_empty`. sequence_shards: how many ranks share the T of a batch
    between blocks (tp under sequence parallelism; a batch has this cp rank's tokens only). compute_dtype: of the hidden states.
    """

    def __init__(self, parts: list[Llama], pp_mesh: DeviceMesh, schedule: str, n_microbatches: int, device: torch.device,
                 compute_dtype: torch.dtype = torch.float32, sequence_shards: int = 1):
        self.parts, self.pp_mesh, self.kind, self.n_microbatches = parts, pp_mesh, SCHEDULES[schedule], n_microbatches
        self.device, self.compute_dtype, self.sequence_shards = device, compute_dtype, sequence_shards
        self.group, self.pp, self.pp_rank = pp_mesh.get_group(), pp_mesh.size(), pp_mesh.get_local_rank()
        placement = stage_indices(schedule, self.pp, len(parts))
        self.stages, self.n_stages = placement[self.pp_rank], self.pp * len(parts)
        self.rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
        self.schedule, self.batch_shape, self.loss_scale, self.events = None, None, None, []
        for module in _fsdp_modules(parts):
            module.set_reshard_after_forward(False, recurse=False)   # else one all-gather per microbatch, not per step

    def step(self, micros: list[Batch], n_scored: Tensor | int, grad_scale: float = 1, record: bool = False) -> Tensor:
        """Forward and backward of n_microbatches; gradients are summed over them and synced over dp once, at the end.

        Each label counts grad_scale / n_scored in the gradients (n_scored: scored labels of the whole global batch).
        Returns the sum of the token losses / n_scored of the microbatches: 0 on ranks without the last stage, so its sum
        over pp and dp is the loss. record: measure the step, for gather_events.
        """
        assert len(micros) == self.n_microbatches, (len(micros), self.n_microbatches)
        if micros[0].tokens.shape != self.batch_shape:
            self._build_schedule(micros[0].tokens.shape)
        self._renew_tied_copy()
        self.loss_scale = grad_scale / n_scored
        began = self._start_recording() if record else None
        losses, args, kwargs = [], (), {}
        whole = self._inputs(Batch(*(None if column[0] is None else torch.cat(column) for column in zip(*micros, strict=True))))
        if 0 in self.stages:
            args = (whole.tokens,)
        if self.n_stages - 1 in self.stages:
            kwargs = {"labels": whole.labels}        # the last part computes the loss itself: see loss_fn below
        if whole.positions is not None:
            kwargs["positions"] = whole.positions
        self.schedule.step(*args, target=kwargs.get("labels"), losses=losses, return_outputs=False, **kwargs)
        self.sync_tied_gradients()
        if record:
            self._stop_recording(began)
        return torch.stack(losses).detach().sum() / grad_scale if losses else torch.zeros((), device=self.device)

    @torch.no_grad()
    def evaluate_step(self, micros: list[Batch]) -> Tensor:
        """Sum of the token losses in nats over any number of microbatches, 0 on ranks without the last stage."""
        self._renew_tied_copy()
        nats, sends, kept = torch.zeros((), dtype=torch.float64, device=self.device), [], {}
        for stage, part in zip(self.stages, self.parts, strict=True):
            is_last = stage == self.n_stages - 1
            next_rank = None if is_last else self.rank_of[stage + 1]
            outgoing = []
            for i, micro in enumerate(map(self._inputs, micros)):
                if stage == 0:
                    x = micro.tokens
                elif self.rank_of[stage - 1] == self.pp_rank:
                    x = kept.pop(i)
                else:
                    x = torch.empty(self._hidden_shape(micro.tokens.shape), dtype=self.compute_dtype, device=self.device)
                    dist.recv(x, group=self.group, group_src=self.rank_of[stage - 1])
                x = part(x, labels=micro.labels, positions=micro.positions)
                if is_last:
                    nats += x
                elif next_rank == self.pp_rank:
                    kept[i] = x
                else:
                    outgoing.append(x.contiguous())
                    if next_rank > 0 or self.kind.v_shaped:
                        sends.append((dist.isend(x, group=self.group, group_dst=next_rank), x))
            if next_rank == 0 and not self.kind.v_shaped:
                # Round the loop: rank 0 listens only after its last microbatch of the stage before, and what a pair of
                # ranks exchanges must be in one order on both.
                sends += [(dist.isend(x, group=self.group, group_dst=0), x) for x in outgoing]
        for work, _ in sends:
            work.wait()
        for module in _fsdp_modules(self.parts):
            module.reshard()         # without a backward they would stay gathered, and be stale after the next step
        return nats

    def sync_tied_gradients(self) -> None:
        """Add the gradient of the last stage's copy of a tied matrix to its owner's, on the first stage. step calls it."""
        self._between_tied(lambda copy: copy.grad, lambda owner, sent: _local(owner.grad).add_(sent), to_owner=True)
        if self._tied_copy() is not None:
            self._tied_copy().grad = None

    # ---- the stages ----

    def _inputs(self, micro: Batch) -> Batch:
        """The tensors this rank's stages need, on its device. Positions stay where they are: see Documents."""
        tokens, labels = (x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels))
        return Batch(tokens, labels, micro.positions)

    def _hidden_shape(self, batch_shape: torch.Size) -> tuple[int, int, int]:
        B, T = batch_shape
        return B, T // self.sequence_shards, self.parts[0].config.hidden_size

    def _build_schedule(self, batch_shape: torch.Size) -> None:
        """Stages with buffers for this shape. Told what they receive and send, torch need not run the model to find out."""
        hidden = torch.empty(self._hidden_shape(batch_shape), dtype=self.compute_dtype, device="meta", requires_grad=True)
        tokens, loss = torch.empty(batch_shape, dtype=torch.int64, device="meta"), torch.empty((), device="meta", requires_grad=True)
        stages = [Stage(part, stage, self.n_stages, self.device, group=self.group, input_args=tokens if stage == 0 else hidden,
                        output_args=loss if stage == self.n_stages - 1 else hidden)
                  for stage, part in zip(self.stages, self.parts, strict=True)]
        single = self.kind.torch_class in (ScheduleGPipe, Schedule1F1B)
        self.schedule = self.kind.torch_class(stages[0] if single else stages, self.n_microbatches, scale_grads=False,
                                              loss_fn=lambda loss_sum, _labels: loss_sum * self.loss_scale)
        self.batch_shape, self._torch_stages = batch_shape, stages
        if not single:
            # The runtime gathers a part before its first use and frees it when more than three others come before its
            # next: with four virtual stages, per microbatch. Left to FSDP, a part is gathered at its first forward.
            self.schedule.register_custom_function(UNSHARD, lambda action, _: self.schedule.unsharded_stages.add(action.stage_index))
            self.schedule.register_custom_function(RESHARD, lambda action, _: None)

    # ---- a tied matrix ----

    def _tied_copy(self) -> nn.Parameter | None:
        is_here = self.parts[0].config.tie_word_embeddings and self.stages[-1] == self.n_stages - 1
        return self.parts[-1].lm_head.weight if is_here else None

    @torch.no_grad()
    def _renew_tied_copy(self) -> None:
        self._between_tied(lambda owner: owner, lambda copy, sent: _local(copy).copy_(sent), to_owner=False)

    @torch.no_grad()
    def _between_tied(self, what, receive, to_owner: bool) -> None:
        """Send `what(parameter)` from the copy to its owner or back, and `receive(parameter, sent)` there.

        Only this rank's shard moves: the two ranks have the same place in every other axis, so their shards correspond."""
        if not self.parts[0].config.tie_word_embeddings:
            return
        owner, copy = self.parts[0].model.embed_tokens if 0 in self.stages else None, self._tied_copy()
        owner = owner.weight if owner is not None else None
        source, target = (copy, owner) if to_owner else (owner, copy)
        ranks = self.rank_of[0], self.rank_of[self.n_stages - 1]
        source_rank, target_rank = reversed(ranks) if to_owner else ranks
        sent = _local(what(source)).contiguous() if source is not None else None
        if source_rank != target_rank and source is not None:
            dist.send(sent, group=self.group, group_dst=target_rank)
        elif source_rank != target_rank and target is not None:
            sent = torch.empty_like(_local(target), memory_format=torch.contiguous_format)
            dist.recv(sent, group=self.group, group_src=source_rank)
        if target is not None:
            receive(target, sent)


class Accumulation:
    """The same methods without pp: one microbatch after another through the whole model."""

    def __init__(self, model: nn.Module, device: torch.device, zero_stage: int = 3):
        self.model, self.device, self.zero_stage = model, device, zero_stage

    def step(self, micros: list[Batch], n_scored: Tensor | int, grad_scale: float = 1) -> Tensor:
        """As Pipeline.step."""
        loss_sum = torch.zeros((), device=self.device)
        for i, micro in enumerate(micros):
            if isinstance(self.model, FSDPModule):
                set_gradient_sync(self.model, self.zero_stage, last=i == len(micros) - 1)
            loss = self._loss_sum(micro) / n_scored
            (loss * grad_scale).backward()
            loss_sum += loss.detach()
        return loss_sum

    @torch.no_grad()
    def evaluate_step(self, micros: list[Batch]) -> Tensor:
        """As Pipeline.evaluate_step."""
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in micros:
            nats += self._loss_sum(micro)
        for module in _fsdp_modules([self.model]):
            module.reshard()         # without a backward the root would stay gathered, and be stale after the next step
        return nats

    def _loss_sum(self, micro: Batch) -> Tensor:
        tokens, labels = (x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels))
        return self.model(tokens, labels=labels, positions=micro.positions)


def make_step_runner(parts: list[nn.Module], pp_mesh: DeviceMesh | None, schedule: str, n_microbatches: int, device: torch.device,
                     compute_dtype: torch.dtype = torch.float32, sequence_shards: int = 1,
                     zero_stage: int = 3) -> Pipeline | Accumulation:
    """What the training loop calls: `step` and `evaluate_step`, over pp_mesh or (None, or of size 1) without pp."""
    if pp_mesh is None or pp_mesh.size() == 1:
        (model,) = parts
        return Accumulation(model, device, zero_stage)
    return Pipeline(parts, pp_mesh, schedule, n_microbatches, device, compute_dtype, sequence_shards)


def _fsdp_modules(parts: list[nn.Module]) -> list[FSDPModule]:
    return [module for part in parts for module in part.modules() if isinstance(module, FSDPModule)]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
