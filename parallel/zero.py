"""ZeRO on FSDP2: parameters, gradients and optimizer state are split over the dp_shard axis (stage 3).

Bytes per parameter and rank, S ranks, bf16 compute: 16 / S held (fp32 master, gradient, two moments), and 2 for the
blocks gathered at the moment. Traffic per parameter, rank and step: all-gather in forward and again in backward, 2 bytes
each, and a reduce-scatter of 4 (fp32). Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def apply_zero(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard each block, and what is left (embedding, norm, head) with the root, over the 1-D `mesh`.

    Each block is gathered just before it computes and freed after. The rest stays gathered from forward to backward: the
    head is needed last and first, and a tied matrix is one parameter with both uses in one group. Masters keep their
    dtype (fp32); the gathered copies have `compute_dtype`; gradients are reduced in fp32.

    FSDP averages gradients over the mesh; scale the loss by its size to get their sum. (`set_gradient_divide_factor(1)`
    would do it too, but gloo has no such reduction.)
    """
    # cast_forward_inputs would round the fp32 RoPE tables to bf16 on their way into a block.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
