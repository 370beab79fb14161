"""Pipeline parallelism: the layers are split over the pp ranks, and microbatches flow through them.

    stage       consecutive layers that run as one, as a Llama whose other modules are None. The first has the
                embedding too, the last the norm and the head. A rank holds one stage, or several where the
                schedule has virtual stages: then a microbatch visits the rank once per stage.
    microbatch  what one forward sees, here one Batch. F is its forward through a stage, B its backward.
                Zero-bubble schedules split B into I, the gradient of the stage's input, which the previous
                stage waits for, and W, the gradients of its weights, which can wait.
    bubble      time in which a rank has nothing to do, because its microbatch is on another rank
    schedule    the order of F, B, I and W on each rank. With two ranks, four microbatches, and a B that takes
                twice as long as an F (dots are bubbles):

                gpipe  0 |F0 F1 F2 F3 .. .. .. B0 B0 B1 B1 B2 B2 B3 B3
                       1 |.. F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .. ..
                1f1b   0 |F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3 B3
                       1 |.. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .. ..

gpipe keeps the activations of all microbatches until backward, 1f1b those of at most pp microbatches.
Sources: Huang et al. 2018, arXiv:1811.06965; 1f1b and interleaved: Narayanan et al. 2021, arXiv:2104.04473;
zero-bubble and zbv: Qi et al. 2023, arXiv:2401.10241; dualpipev: DeepSeek-V3, arXiv:2412.19437.

Between two stages hidden states (B, T, D) are sent forward and their gradients backward. Schedules and
transfers are those of torch.distributed.pipelining; this file splits the model, feeds the microbatches, and
keeps everything else as it is without pp.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import RESHARD, UNSHARD

from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import Llama
from dtensor_llama.shards import local, reshard
from parallel.schedule_picture import Recorder
from parallel.stage import Stage

if TYPE_CHECKING:
    from parallel.apply import Computation
    from parallel.mesh import Layout


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
    """Return the layers of each stage, at least one, so that the slowest stage is as fast as possible.

    Costs are FLOPs per token of forward and backward: 6 per weight of a block (attention over T adds to all
    alike and is left out), 6 V D for the head on the last stage, nothing for the embedding, which is looked
    up. Of equal stages the later ones get the layers left over: under 1f1b the first holds the activations of
    the most microbatches.
    """
    matrices = [shape for shape in config.block_weights().values() if len(shape) == 2]
    head = config.vocab_size * config.hidden_size / sum(map(prod, matrices))
    costs = [1.0] * (n_stages - 1) + [1.0 + head]  # in blocks; each stage begins with one
    n_layers = [1] * n_stages
    for _ in range(config.num_hidden_layers - n_stages):
        cheapest = min(range(n_stages), key=lambda stage: (costs[stage], -stage))
        costs[cheapest] += 1
        n_layers[cheapest] += 1
    return [range(end - n, end) for n, end in zip(n_layers, accumulate(n_layers), strict=True)]


def stage_indices(schedule: str, pp: int, virtual_stages: int) -> list[list[int]]:
    """Return the stages of each pp rank.

    In a V (zbv, dualpipev) rank r has r and 2 pp - 1 - r; otherwise it has r, r + pp, r + 2 pp, ..."""
    if SCHEDULES[schedule].v_shaped:
        return [[rank, 2 * pp - 1 - rank] for rank in range(pp)]
    return [list(range(rank, pp * virtual_stages, pp)) for rank in range(pp)]


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
    pp, config = pp_mesh.size(), model.config
    own = stage_indices(schedule, pp, virtual_stages)[pp_mesh.get_local_rank()]
    layers, last = split_layers(config, pp * virtual_stages), pp * virtual_stages - 1
    parts = []
    for stage in own:
        with torch.device("meta"):
            part = type(model)(config)
        part.token_loss, part.attention = model.token_loss, model.attention
        _take(part, model, layers[stage], has_first=stage == 0, has_last=stage == last)
        if stage == last and config.tie_word_embeddings:
            part.lm_head = deepcopy(model.lm_head)
        parts.append(part)
    held = {layer for stage in own for layer in layers[stage]}
    _take(model, model, held, has_first=0 in own, has_last=last in own)
    if config.tie_word_embeddings:
        model.lm_head = model.model.embed_tokens  # both names of the one matrix; never called
    return parts


def _take(part: Llama, model: Llama, layers: Collection[int], has_first: bool, has_last: bool) -> None:
    """Give `part` these modules of `model`, and None in the place of the others."""
    part.model.embed_tokens = model.model.embed_tokens if has_first else None
    for layer, block in enumerate(model.model.layers):
        part.model.layers[layer] = block if layer in layers else None
    part.model.norm = model.model.norm if has_last else None
    part.lm_head = model.lm_head if has_last else None


# ---- Running it --------------------------------------------------------------------------------------------


class Pipeline:
    """Runs forward and backward of an optimizer step, or an evaluation, over the pp axis.

    All ranks of the axis call each method together. stages: of this rank, from split_stages, after all passes
    and `to_empty`. The batches hold this cp rank's tokens only (layout.own_tokens).

    Under ZeRO the weights of a stage are gathered once a step, at its first forward, and its gradients are
    reduced once, after its last backward, whatever the ZeRO stage: else each microbatch would cost the
    traffic of a whole step.
    """

    def __init__(self, stages: list[Llama], layout: "Layout", computation: "Computation"):
        self.stages, self.layout, self.computation = stages, layout, computation
        self.device = computation.device
        pp_mesh, config = layout.mesh["pp"], layout.config
        self.kind = SCHEDULES[config.schedule]
        self.group, self.pp_rank = pp_mesh.get_group(), pp_mesh.get_local_rank()
        placement = stage_indices(config.schedule, pp_mesh.size(), len(stages))
        self.own = placement[self.pp_rank]  # the numbers of `stages` among all stages, from 0 to `last`
        self.rank_of = {stage: rank for rank, of_rank in enumerate(placement) for stage in of_rank}
        self.last = max(self.rank_of)
        # The schedule is made at the first step, for the shape of its microbatches.
        self.schedule, self.batch_shape = None, None
        self.recorder: Recorder | None = None  # set for one step, it notes which rank worked when
        for stage in stages:
            if isinstance(stage, FSDPModule):
                stage.set_reshard_after_forward(False)  # PipelineStage does so after a step's last backward

    def step(self, microbatches: list[Batch], n_targets: Tensor | int) -> Tensor:
        """Run forward and backward of all microbatches; gradients are summed over them, then synced over dp.

        n_targets: how many labels of the whole global batch are scored. Returns the sum of the token losses
            here, divided by n_targets, on ranks with the last stage, and 0 on the others: summed over pp and
            over the ranks with other tokens it is the loss.
        """
        assert len(microbatches) == self.layout.n_microbatches
        if microbatches[0].tokens.shape != self.batch_shape:
            self._build_schedule(microbatches[0].tokens.shape)
        self._renew_tied_copy()
        gradient_ranks = self.layout.gradient_ranks
        self.loss_scale = gradient_ranks / n_targets  # FSDP averages over these ranks; we want the sum
        for stage in self.torch_stages:
            stage.recorder = self.recorder
        if self.recorder:
            self.recorder.start()
        tokens, inputs = self._arguments(microbatches)
        losses = []
        self.schedule.step(
            *tokens, target=inputs.get("labels"), losses=losses, return_outputs=False, **inputs
        )
        for stage in self.torch_stages:
            stage.wait_for_sends()
        self.sync_tied_gradients()
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack(losses).detach().sum() / gradient_ranks

    def _arguments(self, microbatches: list[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return what the rank's stages are called with: the tokens, for the first one, and the rest by name.

        torch takes one batch and cuts it into microbatches again. These are the same microbatches, because
        all of them have the same number of sequences.
        """
        inputs = {}
        joined = lambda name: torch.cat([getattr(batch, name) for batch in microbatches])
        tokens = [joined("tokens").to(self.device)] if 0 in self.own else []
        if self.last in self.own:  # the last stage computes the loss itself
            inputs["labels"] = joined("labels").to(self.device)
        if microbatches[0].positions is not None:  # every stage needs them, for RoPE and the attention mask
            inputs["positions"] = joined("positions")
        return tokens, inputs

    @torch.no_grad()
    def evaluate(self, microbatches: list[Batch]) -> Tensor:
        """Return the sum of the token losses in nats, float64, over any number of microbatches; 0 on ranks
        without the last stage.

        All microbatches pass through a rank's first stage, then through its second."""
        self._renew_tied_copy()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        kept, sends = [], []  # outputs for this rank's next stage, and for other ranks
        for index in self.own:
            outputs = self._outputs_of(index, microbatches, kept)
            receiver = self.rank_of.get(index + 1)
            if receiver is None:  # the last stage
                nats = sum(outputs, nats)
            elif receiver == self.pp_rank:
                kept = list(outputs)
            else:
                # In looped schedules the last rank sends on to rank 0, which starts to receive only after it
                # has finished its previous stage. So these sends wait for the last microbatch; else both
                # ranks would order their sends and receives differently, and deadlock.
                if receiver < self.pp_rank and not self.kind.v_shaped:
                    outputs = list(outputs)
                outputs = map(Tensor.contiguous, outputs)
                sends += [(dist.isend(x, group=self.group, group_dst=receiver), x) for x in outputs]
        for work, _ in sends:  # each beside its tensor, which has to live until it is sent
            work.wait()
        reshard(self.stages)
        return nats

    def _outputs_of(self, index: int, microbatches: list[Batch], kept: list[Tensor]) -> Iterator[Tensor]:
        """Run one of this rank's stages. Yield its output for each microbatch before the next one is begun:
        hidden states (B, T, D), or on the last stage the sum of the losses.

        kept: the hidden states that come in, where the stage before is this rank's too; they are taken out,
            which frees them."""
        stage = self.stages[self.own.index(index)]
        sender = self.rank_of.get(index - 1)
        for batch in microbatches:
            if sender is None:  # the first stage
                x = batch.tokens.to(self.device)
            elif sender == self.pp_rank:
                x = kept.pop(0)
            else:
                shape = self._hidden_shape(batch.tokens.shape)
                x = torch.empty(shape, dtype=self.computation.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=sender)
            yield stage(x, labels=batch.labels.to(self.device), positions=batch.positions)

    def _hidden_shape(self, batch_shape: torch.Size) -> tuple[int, int, int]:
        """Return the shape (B, T, D) of hidden states between two stages, T as a tp rank holds it there."""
        n_tokens = batch_shape[1] // self.layout.config.sequence_shards
        return batch_shape[0], n_tokens, self.stages[0].config.hidden_size

    def _build_schedule(self, batch_shape: torch.Size) -> None:
        """Make torch's stages with buffers for this shape. They are given the shapes of what they receive and
        send, so torch need not run the model to find out."""
        tokens = torch.empty(batch_shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            self._hidden_shape(batch_shape), dtype=self.computation.dtype, device="meta", requires_grad=True
        )
        loss = torch.empty((), device="meta", requires_grad=True)
        torch_stages = []
        for index, stage in zip(self.own, self.stages, strict=True):
            takes, gives = hidden if index else tokens, loss if index == self.last else hidden
            torch_stages.append(
                Stage(stage, index, self.last + 1, self.device, takes, gives, group=self.group)
            )
        one_each = self.kind.torch_class in (ScheduleGPipe, Schedule1F1B)
        schedule = self.kind.torch_class(
            torch_stages[0] if one_each else torch_stages,
            self.layout.n_microbatches,
            scale_grads=False,
            loss_fn=lambda loss_sum, _: loss_sum * self.loss_scale,
        )
        if not one_each:
            for stage in torch_stages:
                stage.sends = deque()
            # The runtime gathers a stage before its first use and frees it when three others come before its
            # next: with four virtual stages that is per microbatch. So we leave it to FSDP, which gathers a
            # stage at its first forward.
            schedule.register_custom_function(
                UNSHARD, lambda action, _: schedule.unsharded_stages.add(action.stage_index)
            )
            schedule.register_custom_function(RESHARD, lambda action, _: None)
        self.schedule, self.torch_stages, self.batch_shape = schedule, torch_stages, batch_shape

    # ---- a tied matrix: the owner is the embedding of the first stage, the copy the head of the last ----
    # Each rank passes on its shard.
    # The two ranks have the same place on every other axis, so their shards are of the same elements.

    def tied_ends(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return the owner and the copy of a tied matrix, where this rank has them."""
        if not self.stages[0].config.tie_word_embeddings:
            return None, None
        return (
            self.stages[0].model.embed_tokens.weight if 0 in self.own else None,
            self.stages[-1].lm_head.weight if self.last in self.own else None,
        )

    @torch.no_grad()
    def _renew_tied_copy(self) -> None:
        owner, copy = self.tied_ends()
        self._pass_on(owner, copy, from_stage=0, to_stage=self.last, put=Tensor.copy_)

    @torch.no_grad()
    def sync_tied_gradients(self) -> None:
        """Add the copy's gradient to the owner's. `step` calls it after gradients are summed over dp."""
        owner, copy = self.tied_ends()
        # A frozen matrix has no gradient at either end.
        grads = (None if end is None else end.grad for end in (copy, owner))
        self._pass_on(*grads, from_stage=self.last, to_stage=0, put=Tensor.add_)
        if copy is not None:
            copy.grad = None

    def _pass_on(
        self, source: Tensor | None, target: Tensor | None, from_stage: int, to_stage: int, put: Callable
    ) -> None:
        """Call put(target, source) with this rank's shards. Each is None on ranks without its stage."""
        if source is not None and target is not None:  # V: one rank has both ends
            put(local(target), local(source))
        elif source is not None:
            dist.send(local(source).contiguous(), group=self.group, group_dst=self.rank_of[to_stage])
        elif target is not None:
            received = torch.empty_like(local(target), memory_format=torch.contiguous_format)
            dist.recv(received, group=self.group, group_src=self.rank_of[from_stage])
            put(local(target), received)
