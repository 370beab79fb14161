"""ZeRO stages and HSDP on FSDP2's fully_shard. Source: Rajbhandari et al. 2020, arXiv:1910.02054.

The S ranks of the fsdp axis (dp_shard x cp) share what the stage says. The table is for computation in bf16,
with fp32 masters, and M microbatches a step. The traffic is in bytes per parameter, rank and step.

    stage  shared            bytes per parameter and rank, in a step  traffic
    0      nothing           4 + 8 + 4 (+ 2 copy to compute with)     all-reduce of fp32 gradients 2 x 4, once
    1      masters, moments  12/S + 2 + 4 whole fp32 gradients        all-gather 2, reduce-scatter 4, once
    2      + gradients       (12 + 4)/S + 2                           all-gather 2, reduce-scatter 4 x M
    3      + weights         (12 + 4)/S + 2 for the blocks at work    all-gather 2 x 2 M, reduce-scatter 4 x M

Gradients are reduced early only if a rank would otherwise have to keep them whole: stages 0 and 1 do keep
them whole and reduce once, at the last microbatch; stages 2 and 3 reduce at every microbatch. Under HSDP each
of the dp_replicate groups does the above within itself, and the gradients of the shards are all-reduced
between the groups, once a step. Under pp, stages 2 and 3 do as stage 1 does within a step: a gather per
microbatch would cost more than the pipeline saves.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from dtensor_llama.model import OnHost


def apply_zero(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    stage: int,
    compute_dtype: torch.dtype,
    shard_dim: Callable[[nn.Parameter, int], int] = lambda parameter, n_ranks: 0,
) -> None:
    """Shard each block, and with the root what is outside the blocks (embedding, norm, head), over the ranks
    that saw other tokens.

    `mesh` has the axes dp_replicate, fsdp and dp_cp (both together). At stage 3 a block is gathered just
    before it computes and freed after it; the rest stays gathered from forward to backward, because the head
    is needed last and first, and a tied matrix is one parameter with both uses in one group. Masters keep
    their dtype (fp32), the copies that compute have `compute_dtype`, and gradients are reduced in fp32.

    Where all ranks see the same tokens (one process, or tp alone) and weights have the dtype that computes,
    there is nothing to share and nothing to cast. Parameters then stay as they are: FSDP would copy each of
    them for nothing, which took 4 % of a step of tiny-15m on a CPU (recipes/bench/step_price.py) and 7 % of
    one of GPT-2 under tp 2 (recipes/bench/models_tp.py). In a pipeline FSDP stays, because it also adds up
    the gradients of the microbatches before they are reduced.

    shard_dim: returns the dim along which a parameter is sharded over a number of ranks. If it is not dim 0,
        its size must be a multiple of that number.

    FSDP averages gradients over these ranks, so the loss is scaled by their number to get the sum.
    (`set_gradient_divide_factor(1)` would do the same, but gloo has no such reduction.)
    """
    is_alone = mesh["dp_cp"].size() == 1
    if is_alone and mesh["pp"].size() == 1 and all(one.dtype == compute_dtype for one in model.parameters()):
        return
    if stage == 0 and not is_alone:  # torch 2.11 refuses an axis of one rank in front of solo, under tp
        over = mesh["dp_cp", "solo"]  # HSDP in which all ranks are replicas, of shards that are whole
    elif mesh["dp_replicate"].size() > 1:
        over = mesh["dp_replicate", "fsdp"]
    else:
        over = mesh["fsdp"]
    shared = {
        "mesh": over,
        # cast_forward_inputs=True would round the fp32 RoPE tables to bf16 on their way into a block.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "shard_placement_fn": lambda parameter: Shard(shard_dim(parameter, over.size(-1))),
    }
    for block in blocks:
        fully_shard(block, reshard_after_forward=stage == 3, **shared)
    fully_shard(model, reshard_after_forward=False, **shared)
    # This hook runs before FSDP's own hook, which copies all tensors among the arguments to the GPU, and
    # waits for each copy.
    model.register_forward_pre_hook(_leave_positions_on_host, prepend=True, with_kwargs=True)


def _leave_positions_on_host(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keep positions on the CPU if they are still there: the ends of documents are found in them, which on
    the GPU would make the CPU wait for it."""
    if kwargs.get("positions") is not None:
        kwargs = {**kwargs, "positions": OnHost(kwargs["positions"])}
    return args, kwargs


def accumulation_count(model: nn.Module, stage: int, in_pipeline: bool, n_microbatches: int) -> int:
    """Return how often a step accumulates into the gradient of a parameter: once per microbatch, or only once
    if FSDP or the pipeline first sums over the microbatches."""
    sums_first = in_pipeline or (isinstance(model, FSDPModule) and stage < 2)
    return 1 if sums_first else n_microbatches


def set_gradient_sync(model: FSDPModule, stage: int, last: bool) -> None:
    """Set, before a microbatch, what its backward does with gradients and weights. last: it is the last one
    of the step."""
    model.set_requires_gradient_sync(last or stage >= 2)  # stages 0 and 1: gradients wait, whole
    model.set_requires_all_reduce(last)  # HSDP: until then shards are summed within a group
    model.set_reshard_after_backward(last or stage == 3)  # stages 1 and 2 gather weights once a step
