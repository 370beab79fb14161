"""Recomputation, or activation checkpointing: keep less of forward, and compute it again in backward.

    none       keeps everything
    selective  keeps the results of matrix products and attention, and recomputes the cheap rest (norms, RoPE,
               SwiGLU)
    full       keeps only the input of each block, in bf16 2 D bytes per token and layer; a third more FLOPs

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
EXPENSIVE = {  # their results are kept by `selective`
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    # Attention kernels that are registered in namespaces of their own: the flash-attn package, torch's
    # varlen_attn, and our ring attention, which would send all keys and values round again.
    registered = getattr(op, "namespace", None) in ("flash_attn", "torch_attn", "dtensor_llama")
    return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE or registered else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(blocks: list[nn.Module], mode: str, draws: bool = False) -> None:
    """Make each block recompute what `mode` does not keep. This wraps `forward`, so that hooks on the block
    stay outside, and a compile that comes after it sees the whole. draws: the blocks have dropout."""
    if mode == "none":
        return
    keep = {}
    if mode == "selective":
        keep = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_expensive)}
    if draws:  # to its end, so that a tp rank leaves the region in which it has a random stream of its own
        keep["early_stop"] = False
    for block in blocks:
        # Without dropout nothing random is replayed, so the state of the generator need not be saved.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws, **keep
        )
