"""Pipeline parallelism: the layers are split over the pp ranks, and microbatches flow through them.

stage: consecutive layers that run as one; the first has the embedding too, the last the norm and the head
part: the module of one stage, a Llama whose other stages' modules are None. A rank holds one part, or several
    where the schedule has virtual stages: then a microbatch visits the rank once per part
microbatch: what one forward sees, here one Batch. F its forward through a stage, B its backward; zero-bubble
    schedules split B into I (gradient of the stage's input, which the stage before waits for) and W (of its
    weights: can wait)
bubble: time in which a rank has nothing to do: its microbatch is still, or already, elsewhere
schedule: the order of F, B, I, W on each rank. Two ranks, four microbatches, B twice as long as F; dots are bubbles:
    gpipe  0 |F0 F1 F2 F3 .. .. .. B0 B0 B1 B1 B2 B2 B3 B3  1f1b  0 |F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3 B3
           1 |.. F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .. ..        1 |.. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .. ..
    gpipe keeps the activations of all microbatches until backward, 1f1b of at most pp. Sources: Huang et al.
    2018, arXiv:1811.06965; 1f1b and interleaved: Narayanan et al. 2021, arXiv:2104.04473; zero-bubble and
    zbv: Qi et al. 2023, arXiv:2401.10241; dualpipev: DeepSeek-V3, arXiv:2412.19437

On the wire between stages: hidden states (B, T, D) forward, their gradients backward. Schedules and transfers
are torch.distributed.pipelining's; this file cuts the model, feeds the microbatches and keeps everything else
as without pp.
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
from torch.utils.checkpoint import GraphExecGroup

from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.model import Llama
from dtensor_llama.shards import local
from parallel.schedule_picture import Recorder
from parallel.zero import set_gradient_sync


class ScheduleKind(NamedTuple):
    torch_class: type
    default_virtual_stages: int
    v_shaped: bool = False  # stages go down the ranks and up again, instead of round and round
    splits_backward: bool = False  # into I and W


# fmt: off
SCHEDULES = {
    "gpipe":            ScheduleKind(ScheduleGPipe, 1),
    "1f1b":             ScheduleKind(Schedule1F1B, 1),
    "interleaved-1f1b": ScheduleKind(ScheduleInterleaved1F1B, 2),
    "zero-bubble":      ScheduleKind(ScheduleInterleavedZeroBubble, 1, splits_backward=True),
    "zbv":              ScheduleKind(ScheduleZBVZeroBubble, 2, v_shaped=True, splits_backward=True),
    "dualpipev":        ScheduleKind(ScheduleDualPipeV, 2, v_shaped=True, splits_backward=True),
}
# fmt: on


# ---- What goes where: pure functions -----------------------------------------------------------------------


def split_layers(config: LlamaConfig, n_stages: int) -> list[range]:
    """The layers of each stage: at least one, the slowest stage as fast as whole layers allow.

    Costs are FLOPs per token of forward and backward: 6 per weight of a block (attention over T adds to all
    alike and is left out), 6 V D for the head on the last stage, nothing for the embedding, which is looked
    up. Of equal stages the later ones get the layers left over: under 1f1b the first holds the activations of
    the most microbatches.
    """
    D, E = config.hidden_size, config.head_dim
    block_weights = (
        D * E * 2 * (config.num_attention_heads + config.num_key_value_heads)
        + 3 * D * config.intermediate_size
    )
    # in blocks: one layer each to begin
    costs = [1.0] * (n_stages - 1) + [1.0 + config.vocab_size * D / block_weights]
    n_layers = [1] * n_stages
    for _ in range(config.num_hidden_layers - n_stages):
        cheapest = min(range(n_stages), key=lambda stage: (costs[stage], -stage))
        costs[cheapest] += 1
        n_layers[cheapest] += 1
    ends = [sum(n_layers[: stage + 1]) for stage in range(n_stages)]
    return [range(end - n, end) for n, end in zip(n_layers, ends, strict=True)]


def stage_indices(schedule: str, pp: int, virtual_stages: int) -> list[list[int]]:
    """The stages of each pp rank. Loop: rank r has r, r + pp, r + 2 pp ...; V (zbv, dualpipev): r and 2 pp -
    1 - r."""
    if SCHEDULES[schedule].v_shaped:
        return [[rank, 2 * pp - 1 - rank] for rank in range(pp)]
    return [list(range(rank, pp * virtual_stages, pp)) for rank in range(pp)]


def check_pipeline(
    config: LlamaConfig,
    pp: int,
    schedule: str,
    virtual_stages: int,
    n_microbatches: int,
    recompute: str = "none",
    compile: bool = False,
) -> None:
    """UsageError if this pipeline cannot run. n_microbatches: per dp rank and step."""
    if schedule not in SCHEDULES:
        raise UsageError(f"--parallel.schedule {schedule} is not one of {', '.join(SCHEDULES)}.")
    if pp == 1:
        return
    kind, flag = SCHEDULES[schedule], f"--parallel.schedule {schedule}"
    if schedule in ("gpipe", "1f1b") and virtual_stages != 1:
        raise UsageError(
            f"{flag} runs one stage per rank and --parallel.virtual-stages is {virtual_stages}; use "
            "--parallel.virtual-stages 1, or --parallel.schedule interleaved-1f1b or zero-bubble."
        )
    if kind.v_shaped and virtual_stages != 2:
        raise UsageError(
            f"{flag} runs exactly two stages per rank and --parallel.virtual-stages is {virtual_stages}; "
            "use --parallel.virtual-stages 2."
        )
    least = 2 if schedule == "interleaved-1f1b" else 1
    if virtual_stages < least:
        raise UsageError(
            f"{flag} needs --parallel.virtual-stages of at least {least} and it is {virtual_stages}"
            + ("; with one stage per rank it would be 1f1b." if least == 2 else ".")
        )
    n_stages, n_layers = pp * virtual_stages, config.num_hidden_layers
    if n_stages > n_layers:
        works = [f"--parallel.pp {n}" for n in [n_layers // virtual_stages] if n > 1]
        works += [
            f"--parallel.virtual-stages {n}" for n in [n_layers // pp] if n >= least and not kind.v_shaped
        ]
        raise UsageError(
            f"--parallel.pp {pp} x --parallel.virtual-stages {virtual_stages} = {n_stages} stages, and the model "
            f"has {n_layers} layers; each stage needs one. Use at most {' or '.join(works) or '--parallel.pp 1'}"
            f"{'' if virtual_stages == 1 else ', or --parallel.schedule 1f1b'}."
        )
    counted = (
        f"--train.global-batch-size and --train.micro-batch-size make {n_microbatches} microbatches a step"
    )
    least, other = {"1f1b": (pp, "gpipe"), "dualpipev": (2 * pp, "zbv")}.get(schedule, (1, ""))
    if n_microbatches < least:
        raise UsageError(
            f"{flag} needs a microbatch for each of its {least} stages and {counted}; use smaller micro-batches, "
            f"a larger batch, or --parallel.schedule {other}."
        )
    rounds = max(1, n_microbatches // pp)
    if schedule in ("interleaved-1f1b", "zero-bubble") and n_microbatches % rounds:
        lower = n_microbatches // pp * pp
        raise UsageError(
            f"{flag} sends microbatches in rounds of about --parallel.pp {pp}, all of one size, and {counted}, "
            f"which {rounds} rounds do not divide; use {lower} or {lower + pp} microbatches."
        )
    if kind.splits_backward and torch.__version__.startswith("2.11."):
        # There the halves cannot pass through an autograd.Function, and the loss is one.
        raise UsageError(
            f"{flag} runs backward in two halves, which fails inside torch {torch.__version__}; use a newer "
            "torch, or --parallel.schedule 1f1b or interleaved-1f1b."
        )
    if kind.splits_backward and (compile or recompute == "selective"):
        # A compiled block has one graph for both gradients and would run it whole, twice; selective lets go
        # of what it kept after the first half.
        what = "--train.compile" if compile else "--train.recompute selective"
        raise UsageError(
            f"{flag} runs backward in two halves, which {what} cannot do; use --parallel.schedule 1f1b or "
            f"interleaved-1f1b{'' if compile else ', or --train.recompute full'}."
        )


# ---- Cutting the model -------------------------------------------------------------------------------------


def split_stages(model: Llama, pp_mesh: DeviceMesh, schedule: str, virtual_stages: int) -> list[Llama]:
    """Return this rank's model parts, in the order of their stages. Afterwards `model` has what this rank
    holds, under the same names.

    Parts share their modules with `model`, so tp, recompute, compile, fully_shard and `to_empty` are applied
    to each part. The optimizer, the gradient norm, initial weights, checkpoints and export take `model`, as
    without pp: it has every parameter of the parts, once, by its Hugging Face name. Each part has the token
    loss and the attention of `model`.

    A tied matrix belongs to the first stage. The last stage works with a copy that is in its part but not in
    `model`: nothing counts, saves or steps it. Pipeline renews it before each forward and adds its gradient
    to the owner's.
    """
    pp, pp_rank, config = pp_mesh.size(), pp_mesh.get_local_rank(), model.config
    n_stages = pp * virtual_stages
    layers, parts = split_layers(config, n_stages), []
    own = stage_indices(schedule, pp, virtual_stages)[pp_rank]
    is_tied, has_first, has_last = config.tie_word_embeddings, 0 in own, n_stages - 1 in own
    for stage in own:
        with torch.device("meta"):
            part = type(model)(config)
        part.token_loss, part.attention = model.token_loss, model.attention
        part.model.embed_tokens = model.model.embed_tokens if stage == 0 else None
        for layer in range(config.num_hidden_layers):
            part.model.layers[layer] = model.model.layers[layer] if layer in layers[stage] else None
        part.model.norm, part.lm_head = (
            (model.model.norm, model.lm_head) if stage == n_stages - 1 else (None, None)
        )
        if is_tied and stage == n_stages - 1:
            weight = model.model.embed_tokens.weight
            part.lm_head = nn.Linear(
                weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype
            )
            part.lm_head.weight.requires_grad_(weight.requires_grad)
        parts.append(part)
    held = {layer for stage in own for layer in layers[stage]}
    for layer in set(range(config.num_hidden_layers)) - held:
        model.model.layers[layer] = None
    if not has_last:
        model.model.norm = None
    if is_tied:
        # both names of the one matrix; never called
        model.lm_head = model.model.embed_tokens if has_first else None
    elif not has_last:
        model.lm_head = None
    if not has_first:
        model.model.embed_tokens = None
    return parts


# ---- Running it --------------------------------------------------------------------------------------------


class Stage(PipelineStage):
    """torch's PipelineStage that lets a Recorder watch, and recomputes once per half of a split backward."""

    recorder: Recorder | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._noted(fwd_chunk_id, "F"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss=None, full_backward: bool = True, **kwargs):
        # no input to give a gradient to: its I is nothing, its W a whole B
        if self.is_first and not full_backward:
            return super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=False, **kwargs)
        with self._noted(bwd_chunk_id, "B" if full_backward else "I"):
            return super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs):
        # torch asks autograd for one weight after another; without the group each would recompute its block
        # again.
        with self._noted(bwd_chunk_id, "B" if self.is_first else "W"), GraphExecGroup():
            return super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)

    def _noted(self, microbatch: int, kind: str):
        return self.recorder.note(self.stage_index, microbatch, kind) if self.recorder else nullcontext()


class Pipeline:
    """Runs optimizer steps and evaluations over the pp axis. All ranks of pp_mesh call each method, in step.

    parts: from split_stages, after all passes and `to_empty`. sequence_shards: how many ranks share the T of
        a batch between blocks (tp under sequence parallelism; a batch has this cp rank's tokens only).
        compute_dtype: of hidden states.

    Under ZeRO a part's weights are gathered once a step, at its first forward, and gradients are reduced
    once, after its last backward, at every stage from 0 to 3: else each microbatch would cost the traffic of
    a whole step.
    """

    def __init__(
        self,
        parts: list[Llama],
        pp_mesh: DeviceMesh,
        schedule: str,
        n_microbatches: int,
        device: torch.device,
        compute_dtype: torch.dtype = torch.float32,
        sequence_shards: int = 1,
    ):
        self.parts, self.kind, self.n_microbatches, self.device = (
            parts,
            SCHEDULES[schedule],
            n_microbatches,
            device,
        )
        self.compute_dtype, self.sequence_shards = compute_dtype, sequence_shards
        self.group, self.pp_rank = pp_mesh.get_group(), pp_mesh.get_local_rank()
        placement = stage_indices(schedule, pp_mesh.size(), len(parts))
        self.own, self.last = placement[self.pp_rank], pp_mesh.size() * len(parts) - 1
        self.rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
        # made at the first step, for the shape of its microbatches
        self.schedule, self.batch_shape = None, None
        for module in _fsdp_modules(parts):
            # reshard after backward: PipelineStage, once a step
            module.set_reshard_after_forward(False, recurse=False)

    def step(
        self,
        micros: list[Batch],
        n_scored: Tensor | int,
        grad_scale: float = 1,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Forward and backward of n_microbatches; gradients are summed over them, then synced over dp.

        Each label counts grad_scale / n_scored in the gradients (n_scored: scored labels of the whole global
        batch). Returns the sum of the microbatches' token losses / n_scored, 0 on ranks without the last
        stage: summed over pp and whoever has other tokens it is the loss. recorder: notes who worked when.
        """
        assert len(micros) == self.n_microbatches, (len(micros), self.n_microbatches)
        if micros[0].tokens.shape != self.batch_shape:
            self._build_schedule(micros[0].tokens.shape)
        self._renew_tied_copy()
        self.loss_scale = grad_scale / n_scored
        for stage in self.torch_stages:
            stage.recorder = recorder
        if recorder:
            recorder.start()
        # torch cuts the rows of one whole batch into microbatches again: the same ones, as all have as many
        # rows
        tokens = [torch.cat([micro.tokens for micro in micros]).to(self.device)] if 0 in self.own else []
        labels = (
            torch.cat([micro.labels for micro in micros]).to(self.device) if self.last in self.own else None
        )
        inputs = {} if labels is None else {"labels": labels}  # the last part computes the loss itself
        if micros[0].positions is not None:
            # every part's RoPE and mask
            inputs["positions"] = torch.cat([micro.positions for micro in micros])
        losses = []
        self.schedule.step(*tokens, target=labels, losses=losses, return_outputs=False, **inputs)
        self.sync_tied_gradients()
        return (
            torch.stack(losses).detach().sum() / grad_scale if losses else torch.zeros((), device=self.device)
        )

    @torch.no_grad()
    def evaluate_step(self, micros: list[Batch]) -> Tensor:
        """Sum of the token losses in nats over any number of microbatches, 0 on ranks without the last stage.

        All microbatches pass through a rank's first part, then through its second."""
        self._renew_tied_copy()
        nats, sends, kept = torch.zeros((), dtype=torch.float64, device=self.device), [], {}
        for stage, part in zip(self.own, self.parts, strict=True):
            outgoing = []
            for i, micro in enumerate(micros):
                if stage == 0:
                    x = micro.tokens.to(self.device)
                elif self.rank_of[stage - 1] == self.pp_rank:
                    x = kept.pop(i)
                else:
                    x = torch.empty(
                        self._hidden_shape(micro.tokens.shape), dtype=self.compute_dtype, device=self.device
                    )
                    dist.recv(x, group=self.group, group_src=self.rank_of[stage - 1])
                x = part(x, labels=micro.labels.to(self.device), positions=micro.positions)
                if stage == self.last:
                    nats += x
                elif self.rank_of[stage + 1] == self.pp_rank:
                    kept[i] = x
                else:
                    outgoing.append(x.contiguous())
                    # Round the loop to rank 0, which listens only after its last microbatch of the stage
                    # before: what two ranks exchange has to be in the same order on both.
                    round_the_loop = self.rank_of[stage + 1] < self.pp_rank and not self.kind.v_shaped
                    if not round_the_loop or i == len(micros) - 1:
                        sends += [
                            (dist.isend(x, group=self.group, group_dst=self.rank_of[stage + 1]), x)
                            for x in outgoing
                        ]
                        outgoing = []
        for work, _ in sends:
            work.wait()
        for module in _fsdp_modules(self.parts):
            module.reshard()  # without a backward they would stay gathered, and be stale after the next step
        return nats

    def _hidden_shape(self, batch_shape: torch.Size) -> tuple[int, int, int]:
        return batch_shape[0], batch_shape[1] // self.sequence_shards, self.parts[0].config.hidden_size

    def _build_schedule(self, batch_shape: torch.Size) -> None:
        """Stages with buffers for this shape. Told what they receive and send, torch need not run the model
        to find out."""
        tokens = torch.empty(batch_shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            self._hidden_shape(batch_shape), dtype=self.compute_dtype, device="meta", requires_grad=True
        )
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [
            Stage(
                part,
                stage,
                self.last + 1,
                self.device,
                group=self.group,
                input_args=hidden if stage else tokens,
                output_args=loss if stage == self.last else hidden,
            )
            for stage, part in zip(self.own, self.parts, strict=True)
        ]
        one_each = self.kind.torch_class in (ScheduleGPipe, Schedule1F1B)
        schedule = self.kind.torch_class(
            stages[0] if one_each else stages,
            self.n_microbatches,
            scale_grads=False,
            loss_fn=lambda loss_sum, _: loss_sum * self.loss_scale,
        )
        if not one_each:
            # The runtime gathers a part before its first use and frees it when three others come before its
            # next: with four virtual stages that is per microbatch. So leave it to FSDP, which gathers a part
            # at its first forward.
            schedule.register_custom_function(
                UNSHARD, lambda action, _: schedule.unsharded_stages.add(action.stage_index)
            )
            schedule.register_custom_function(RESHARD, lambda action, _: None)
        self.schedule, self.torch_stages, self.batch_shape = schedule, stages, batch_shape

    # ---- a tied matrix: the owner is the embedding of the first stage, the copy the head of the last ----
    # Each rank passes on its shard. The two ranks have the same place on every other axis, so their shards
    # correspond.

    def _tied(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        if not self.parts[0].config.tie_word_embeddings:
            return None, None
        return (
            self.parts[0].model.embed_tokens.weight if 0 in self.own else None,
            self.parts[-1].lm_head.weight if self.last in self.own else None,
        )

    @torch.no_grad()
    def _renew_tied_copy(self) -> None:
        owner, copy = self._tied()
        if owner is not None and copy is not None:  # V: one rank has both ends
            local(copy).copy_(local(owner))
        elif owner is not None:
            dist.send(local(owner).contiguous(), group=self.group, group_dst=self.rank_of[self.last])
        elif copy is not None:
            received = torch.empty_like(local(copy), memory_format=torch.contiguous_format)
            dist.recv(received, group=self.group, group_src=self.rank_of[0])
            local(copy).copy_(received)

    @torch.no_grad()
    def sync_tied_gradients(self) -> None:
        """Add the copy's gradient to the owner's. `step` calls it, after the gradients were synced over
        dp."""
        owner, copy = self._tied()
        # frozen, or no end of it here
        if not any(end is not None and end.requires_grad for end in (owner, copy)):
            return
        if owner is not None and copy is not None:
            local(owner.grad).add_(local(copy.grad))
        elif copy is not None:
            dist.send(local(copy.grad).contiguous(), group=self.group, group_dst=self.rank_of[0])
        elif owner is not None:
            received = torch.empty_like(local(owner.grad), memory_format=torch.contiguous_format)
            dist.recv(received, group=self.group, group_src=self.rank_of[self.last])
            local(owner.grad).add_(received)
        if copy is not None:
            copy.grad = None


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
            # without a backward the root would stay gathered, and be stale after the next step
            module.reshard()
        return nats

    def _loss_sum(self, micro: Batch) -> Tensor:
        tokens, labels = (x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels))
        return self.model(tokens, labels=labels, positions=micro.positions)


def make_step_runner(
    parts: list[nn.Module],
    pp_mesh: DeviceMesh | None,
    schedule: str,
    n_microbatches: int,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
    sequence_shards: int = 1,
    zero_stage: int = 3,
) -> Pipeline | Accumulation:
    """What the training loop calls: `step` and `evaluate_step`, over pp_mesh or (None, or of size 1) without
    pp."""
    if pp_mesh is None or pp_mesh.size() == 1:
        (model,) = parts
        return Accumulation(model, device, zero_stage)
    return Pipeline(parts, pp_mesh, schedule, n_microbatches, device, compute_dtype, sequence_shards)


def _fsdp_modules(parts: list[nn.Module]) -> list[FSDPModule]:
    return [module for part in parts for module in part.modules() if isinstance(module, FSDPModule)]
