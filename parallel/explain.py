"""Says what a layout means for one rank before any of its processes exists: mesh, parameters, pipeline.

    facts = explain(run, rank=0)     a dict that JSON can hold; recipes/dryrun.py draws it

The placements are not computed by a formula: `parallelize`, the function that training uses, is applied to a
model without memory, in a pretended process group of the right size. What a step holds, sends and computes is
counted by dry_run.py, and predicted by cost.py.
"""

import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_llama import Llama
from dtensor_llama.chat.lora import LoraConfig, apply_lora
from dtensor_llama.shards import local
from parallel.apply import Computation, parallelize
from parallel.config import AXES, ParallelConfig
from parallel.mesh import build_mesh
from parallel.pipeline import split_layers, stage_indices
from parallel.pretend import pretended_rank
from parallel.rules import Case, Job
from parallel.schedule_clock import clock, schedule_order


@dataclass(frozen=True)
class Run:
    """Holds what is to be explained: a layout (resolved and checked), its job, dtype and adapters."""

    layout: ParallelConfig
    job: Job
    compute_dtype: torch.dtype = torch.bfloat16
    lora: LoraConfig = LoraConfig()

    @property
    def n_microbatches(self) -> int:
        return Case(self.layout, self.job).n_microbatches


def explain(run: Run, rank: int = 0) -> dict:
    """Return the facts about one rank. Call it where no process group exists."""
    layout, job = run.layout, run.job
    world_size = math.prod(layout.sizes.values())
    with pretended_rank(rank, world_size):
        mesh = build_mesh(layout, "cpu")
        with torch.device("meta"):
            model = Llama(job.model).float()
            if run.lora.rank:
                apply_lora(model, run.lora, run.compute_dtype)
        computation = Computation(dtype=run.compute_dtype, recompute=job.recompute)
        parts = parallelize(model, mesh, layout, computation)
        facts = {
            "n_parameters": job.model.n_parameters,
            "world_size": world_size,
            "rank": rank,
            "seq_len": job.seq_len,
            "layout": asdict(layout),
            "n_micros": run.n_microbatches,
            "micro_batch_size": job.micro_batch_size,
            "tokens_per_step": job.seq_len * job.micro_batch_size * run.n_microbatches * layout.dp,
            "coordinates": {axis: mesh[axis].get_local_rank() for axis in AXES},
            "groups": {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in AXES},
            "parameters": parameter_kinds(model),
        }
        if layout.pp > 1:
            order = schedule_order(layout.schedule, layout.pp, len(parts), run.n_microbatches)
            work, bubble = clock(order)
            layers = split_layers(job.model, layout.pp * len(parts))
            facts["pipeline"] = {
                "stages_of_pp_ranks": stage_indices(layout.schedule, layout.pp, len(parts)),
                "layers_of_stages": [[own[0], own[-1]] for own in layers],
                "work": work,
                "bubble": bubble,
            }
    return facts


def parameter_kinds(model: Llama) -> list[dict]:
    """Return the parameters of this rank, with those that are equal in several layers as one; placements are
    given over the axes of more than one rank."""
    kinds = {}
    for name, parameter in model.named_parameters():
        row = {
            "name": re.sub(r"\.\d+\.", ".*.", name),
            "shape": list(parameter.shape),
            "placements": placements_of(parameter),
            "local_shape": list(local(parameter).shape),
        }
        kinds.setdefault(str(row), {"count": 0, **row})["count"] += 1
    return list(kinds.values())


def placements_of(parameter: Tensor) -> dict[str, str]:
    """Return {axis: "R" (replicated) or "S(dim)" (split)} of a parameter; empty for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    return {
        axis: "R" if placement.is_replicate() else f"S({placement.dim})"
        for axis, placement, size in zip(mesh.mesh_dim_names, parameter.placements, mesh.shape, strict=True)
        if size > 1
    }
