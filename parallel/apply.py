"""parallelize: spread a model over a mesh, from outside, pass by pass."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.config import ParallelConfig
from parallel.recompute import apply_recompute
from parallel.zero import apply_zero


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig,
    *,
    compute_dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    compile: bool = False,
) -> nn.Module:
    """Change `model` (a LLaMA by its module names, on `meta` or real) in place into this rank's share of it.

    mesh: of build_mesh(config, ...), config resolved and checked. Split parameters become DTensors; on `meta` they stay
    there: `to_empty`, then initial or loaded weights.
    """
    blocks = list(model.model.layers)
    # pipeline, tensor, sequence and context parallelism come here: they settle which slices and which traffic a block has
    apply_recompute(blocks, recompute)          # then: a recomputed block must replay the traffic of the passes above
    if compile:
        apply_compile(blocks)                   # then: one graph per block, recompute included
    apply_zero(model, blocks, mesh, config.zero_stage, compute_dtype)    # last: shards whatever the passes above left
    return model


def apply_compile(blocks: list[nn.Module]) -> None:
    """Compile each block's forward. All blocks share one code object, so the first compile serves all; FSDP's hooks
    stay outside the graph."""
    for block in blocks:
        block.forward = torch.compile(block.forward)
