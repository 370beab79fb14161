"""Runs a training step for any number of GPUs on a laptop, and says what each rank holds, sends and computes.

    plan = Plan(layout, job, memory=MemoryConfig(...))
    result = dry_run(plan, step)              # step: the recipe's own, on Training and microbatches
    result.largest.peak_bytes, result.largest.traffic

Nothing is described here: the model is built, spread and stepped by the code that trains, as one rank of a
pretended process group, on tensors that hold no memory (pretend.py), while a StepCounter watches. Ranks differ by
their pipeline stages only, so a step is run once for each kind of them.
"""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from dtensor_llama import Llama
from dtensor_llama.chat.lora import LoraConfig, apply_lora
from dtensor_llama.data.reader import Batch
from dtensor_llama.shards import local
from parallel.apply import Computation
from parallel.assemble import Training, adamw, assemble
from parallel.config import AXES, ParallelConfig
from parallel.mesh import Layout, build_mesh
from parallel.pipeline import split_layers, stage_indices
from parallel.pretend import META, pretended_device, pretended_rank
from parallel.rules import Case, Job
from parallel.step_counter import (
    CUDA_BLOCK,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    Attention,
    Collective,
    Product,
    StepCounter,
    groups_of,
    ring_bytes,
)

Step = Callable[[Training, list[Batch]], None]


@dataclass(frozen=True)
class Plan:
    layout: ParallelConfig
    job: Job
    computation: Computation = Computation(torch.device("cuda"), torch.bfloat16)
    lora: LoraConfig = LoraConfig()
    n_documents: int = 0


def count_rank(plan: Plan, pp_rank: int, n_microbatches: int, step: Step):
    layout, job = plan.layout, plan.job
    world_size = prod(layout.sizes.values())
    rank = pp_rank * (world_size // layout.pp)
    computation = replace(plan.computation, device=META)
    is_gpu = plan.computation.device.type == "cuda"
    with pretended_rank(rank, world_size):
        counter = StepCounter("meta", {}, CUDA_BLOCK if is_gpu else 1)
        with pretended_device(plan.computation.device, counter), counter.following_resizes():
            mesh = build_mesh(layout, "meta" if is_gpu else "cpu")
            counter.axes = groups_of(mesh)
            with META:
                model = Llama(job.model)
            if plan.lora.rank:
                apply_lora(model, plan.lora, plan.computation.dtype)
            training = assemble(model, Layout(layout, mesh, n_microbatches), computation, adamw(1e-3, 0.1))
            give_states(training)
            counter.tag([p for part in {training.model, *training.stages} for p in part.parameters()], PARAMETERS)
            states = [s for state in training.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
            counter.tag(states, OPTIMIZER)
            counter.watch(training.stages, training.optimizer)
            counter.now("x", OTHER)
            gc.collect()
            counter.reset()
            shape = (job.micro_batch_size, job.seq_len)
            micros = [Batch(*torch.zeros(2, *shape, dtype=torch.int64), None) for _ in range(n_microbatches)]
            with counter:
                step(training, micros)
    return counter


def give_states(training):
    for p in training.model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    training.optimizer.step()
    training.optimizer.zero_grad()
