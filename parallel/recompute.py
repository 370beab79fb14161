"""Activation checkpointing: keep less of forward, compute it again in backward. Source: Chen et al. 2016,
arXiv:1604.06174.

    none       keep everything
    selective  keep what matrix products and attention gave, recompute the cheap rest (norms, RoPE, SwiGLU)
    full       keep only the input of each block: 2 D bytes per token and layer in bf16, for a third more FLOPs
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
EXPENSIVE = {  # dear to compute again: kept by `selective`
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    # Kernels with a namespace of their own: the flash-attn package's, torch's varlen_attn, and our ring
    # attention, whose keys would go round again.
    registered = getattr(op, "namespace", None) in ("flash_attn", "torch_attn", "dtensor_llama")
    return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE or registered else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(blocks: list[nn.Module], mode: str) -> None:
    """Make each block recompute what `mode` does not keep. Wraps `forward`, so hooks on the block stay
    outside and a compile that comes after sees the whole."""
    if mode == "none":
        return
    keep = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _keep_expensive)}
        if mode == "selective"
        else {}
    )
    for block in blocks:
        # No dropout anywhere in the model: nothing random is replayed, so the RNG state need not be saved.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **keep
        )
