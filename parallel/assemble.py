"""Builds what a recipe trains: a model without values is spread over the ranks, and gets an optimizer.

    layout = Layout(config, build_mesh(config, device.type), n_microbatches)
    computation = Computation(device, torch.bfloat16, recompute="selective")
    training = assemble(model, layout, computation, adamw(lr=3e-4, weight_decay=0.1))
    init_weights(training.fp32_weights(), seed=0)          # or load_hf, or a checkpoint

Nothing here loops or calls `.backward()`: the step stands in the recipe. This file and booster.py are the
only ones of parallel/ that know memory/, the chunk offload manager.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.flops import hardware_flops_per_token, matmul_flops, model_flops_per_token
from dtensor_llama.model import Llama
from dtensor_llama.optim import build_adamw
from dtensor_llama.shards import reshard
from dtensor_llama.terminal import Say
from memory import ChunkManager, Machine, MemoryConfig, TrainingLoop
from memory.activations import ActivationOffload
from memory.lanes import device_memory
from memory.optimizer import ChunkOptimizer
from memory.tracer import load_rates
from parallel.apply import Computation, parallelize
from parallel.clip import ClippingAdamW
from parallel.config import ParallelConfig
from parallel.cost import check_states
from parallel.mesh import Layout
from parallel.pipeline import Pipeline
from parallel.plans.family import Family
from parallel.plans.spread import materialize, spread_family
from parallel.plans.stages import FamilyPipeline
from parallel.zero import accumulation_count, set_gradient_sync


@dataclass(frozen=True)
class Offload:
    """Says where states and activations shall live, and what else the chunk manager has to know of a run.

    sequences, seq_len: the shape of a microbatch, from which follow the size of the activations and how long
        a step computes; None where it is not known before the first step.
    clips: False if gradients are never clipped: the manager then steps while they arrive, during backward.
    rates_file: stores the measured rates of this machine's transfers; None: they are not measured.
    """

    config: MemoryConfig
    sequences: int | None = None
    seq_len: int | None = None
    clips: bool = True
    ranks_per_host: int = 1
    rates_file: Path | None = None


@dataclass(frozen=True)
class Training:
    """Holds what a training step needs on this rank. All ranks have one, and call its methods together.

    model: has all parameters of this rank under their Hugging Face names, for the optimizer, checkpoints and
        export.
    stages: what runs. Without pp it is `model` itself; with pp the rank's stages, which share its modules.
    pipeline: runs the microbatches through the stages; None without pp, where the recipe calls `model`.
    optimizer: of `model`; clips with one norm over every axis if it has the method `clip_grad_norm`.
    """

    model: Llama | nn.Module
    stages: list[nn.Module]
    pipeline: Pipeline | None
    optimizer: Optimizer
    layout: Layout
    computation: Computation
    activation_offloads: tuple[ActivationOffload, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.computation.device

    def sync_gradients(self, last: bool) -> None:
        """Decide, before a forward, whether its backward reduces the gradients over the ranks of ZeRO.

        Stages 0 and 1 reduce them once, at the last microbatch of a step; stages 2 and 3 at each microbatch
        (zero.py). last: whether it is the last one."""
        if isinstance(self.model, FSDPModule):
            set_gradient_sync(self.model, self.layout.config.zero_stage, last)

    def reshard(self) -> None:
        """Free the weights that forwards without a backward have gathered, for example in a validation."""
        reshard(self.stages)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Return the mean loss, in nats, over the batches of all dp ranks. All ranks enter, each with the
        same number of batches, since a sharded forward gathers weights."""
        nats = self.sum_of_losses([self.layout.own_tokens(batch) for batch in batches])
        dist.all_reduce(nats, group=self.layout.loss_group)
        n_targets = torch.tensor(sum(batch.n_targets for batch in batches), device=self.device)
        dist.all_reduce(n_targets, group=self.layout.mesh["dp"].get_group())
        return (nats / n_targets).item()

    @torch.no_grad()
    def sum_of_losses(self, batches: list[Batch]) -> Tensor:
        """Return the sum of the token losses of batches that hold this rank's tokens, float64, in nats; with
        pp it is 0 on ranks without the last stage."""
        if self.pipeline:
            return self.pipeline.evaluate(batches)
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            tokens, labels, positions = batch.to(self.device)
            nats += self.model(tokens, labels=labels, positions=positions)
        self.reshard()
        return nats

    def fp32_weights(self) -> nn.Module:
        """Return what is loaded, initialized, saved or exported as float32: the model, or its masters under
        the chunk manager, where the model has only what computes. Waits for the manager's last update."""
        if not isinstance(self.optimizer, ChunkOptimizer):
            return self.model
        masters = self.optimizer.masters()
        masters.generation_config = getattr(self.model, "generation_config", None)  # BERT has none
        masters.whole_shapes = getattr(self.model, "whole_shapes", {})
        return masters


def adamw(lr: float, weight_decay: float) -> Callable[[Llama], Optimizer]:
    """Return a function that builds the recipes' optimizer for `assemble`, a fused AdamW.

    Its clip_grad_norm takes one norm over all axes of the mesh."""
    return partial(build_adamw, lr=lr, weight_decay=weight_decay, kind=ClippingAdamW)


def assemble(
    model: Llama | nn.Module,
    layout: Layout,
    computation: Computation,
    build_optimizer: Callable[[Llama], Optimizer],
    offload: Offload | None = None,
    say: Say = lambda text: None,
) -> Training:
    """Spread `model` (on `meta`) over the mesh and give it an optimizer. The weights have no values yet.

    model: a Llama, or a model of transformers whose attribute `family` says how (spread.shell_of).

    offload: None, or with a placement that is off: the optimizer's states live on the device. With a
        placement the parameters are what computes, in computation.dtype, and the chunk manager keeps the
        float32 masters: see Training.fp32_weights. say: prints the manager's plans; give it on one rank only.
    """
    config = layout.config
    manages = offload is not None and offload.config.is_on
    if manages:
        model.to(computation.dtype)
    family: Family | None = getattr(model, "family", None)
    if family is None:
        stages = parallelize(model, layout.mesh, config, computation)
    else:
        stages = spread_family(model, family, layout.mesh, config, computation)
    for stage in stages:
        materialize(stage, computation.device)
    activations = []
    if offload is not None and offload.config.activations:
        activations = [_offload_activations(stage, layout, computation, offload) for stage in stages]
    kind = Pipeline if family is None else FamilyPipeline
    pipeline = kind(stages, layout, computation) if config.pp > 1 else None
    optimizer = build_optimizer(model)
    if manages:
        rates = None
        if offload.rates_file is not None:
            rates = load_rates(
                offload.rates_file, computation.device, offload.config.kernel, offload.ranks_per_host, say=say
            )
        owner = pipeline.tied_ends()[0] if pipeline else None
        loop = TrainingLoop(
            stages,
            accumulation=accumulation_count(model, config.zero_stage, config.pp > 1, layout.n_microbatches),
            clips=offload.clips,
            tied=[] if owner is None else [owner],
            activations=activations,
        )
        compute_seconds = _compute_seconds(model, layout, computation, offload)
        machine = Machine(offload.ranks_per_host, rates, compute_seconds, say)
        optimizer = ChunkManager(model, optimizer, offload.config, loop, machine).optimizer
    return Training(model, stages, pipeline, optimizer, layout, computation, tuple(activations))


def settle_memory(
    memory: MemoryConfig,
    model: LlamaConfig,
    config: ParallelConfig,
    n_microbatches: int,
    computation: Computation,
) -> tuple[MemoryConfig, str]:
    """Return the configuration with a placement, and a sentence on what was chosen if it was left open.

    config: resolved. Raises UsageError if the states alone are more than the GPU has, so that a run fails
        before anything starts, and not in the middle of its first step."""
    device, dtype = computation.device, computation.dtype
    memory, chosen = memory.settle(device, dtype, math.prod(config.sizes.values()))
    if device_bytes := device_memory(device):
        per_parameter = memory.device_bytes_per_parameter(dtype.itemsize, n_microbatches)
        check_states(model, config, device_bytes, per_parameter)
    return memory, chosen


def check_skips(skip_nonfinite: int, max_grad_norm: float, memory: MemoryConfig) -> None:
    """Raise UsageError if steps whose gradient is not finite are to be skipped, and cannot be."""
    if skip_nonfinite and max_grad_norm == math.inf and memory.is_on:
        raise UsageError(
            f"skip_nonfinite={skip_nonfinite} cannot skip a step under a chunk manager with "
            "max_grad_norm=inf, which steps while gradients arrive; give `max_grad_norm` a number, however "
            "large, or use placement=off."
        )


def _offload_activations(
    stage: Llama, layout: Layout, computation: Computation, offload: Offload
) -> ActivationOffload:
    """Keep the inputs of a stage's blocks, (B, T/cp/tp, D) each, on the host between forward and backward."""
    if offload.seq_len is None:
        raise UsageError(
            "activations=True needs to know the shape of a microbatch before the first one comes; leave it "
            "out here, or use recipes/pretrain.py."
        )
    config = layout.config
    n_tokens = offload.sequences * offload.seq_len // (config.cp * config.sequence_shards)
    input_bytes = n_tokens * stage.config.hidden_size * computation.dtype.itemsize
    blocks = [block for block in stage.model.layers if block is not None]
    in_flight = layout.n_microbatches if config.pp > 1 else 1
    return ActivationOffload(blocks, computation.device, input_bytes, in_flight)


def _compute_seconds(
    model: Llama, layout: Layout, computation: Computation, offload: Offload
) -> tuple[float, float] | None:
    """Estimate the seconds of a step's forwards and backwards on this rank, as if all were matrix products.

    Returns None if the shape of a microbatch is not known. Placement auto measures, and replaces this."""
    if offload.seq_len is None:
        return None
    # The ranks that read the same sequences share the computation.
    n_tokens = offload.sequences * offload.seq_len * layout.n_microbatches / layout.ranks_per_batch
    seconds_per_flop = n_tokens / matmul_flops(computation.device, computation.dtype)
    forward_s = seconds_per_flop * model_flops_per_token(model.config, offload.seq_len) / 3
    both_s = seconds_per_flop * hardware_flops_per_token(model.config, offload.seq_len, computation.recompute)
    return forward_s, both_s - forward_s
