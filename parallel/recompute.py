"""Recomputation, or activation checkpointing: keep less of forward, and compute it again in backward.

    none       keeps everything
    selective  keeps the results of matrix products and of attention that backward needs, and recomputes the
               cheap rest (norms, RoPE, SwiGLU)
    full       keeps only the input of each block, in bf16 2 D bytes per token and layer; a third more FLOPs

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dtensor_llama.shards import local

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default}  # the matrix comes last, transposed
EXPENSIVE = {  # their results are kept by `selective`
    *PRODUCTS,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(unneeded: set[tuple[int, ...]], context, op, *args, **kwargs) -> CheckpointPolicy:
    """Return whether `selective` keeps the result of an operation. It does not keep products with a matrix of
    an `unneeded` shape."""
    # Attention kernels that are registered in namespaces of their own: the flash-attn package, torch's
    # varlen_attn, and our ring attention, which would send all keys and values round again.
    registered = getattr(op, "namespace", None) in ("flash_attn", "torch_attn", "dtensor_llama")
    keeps = registered or op in EXPENSIVE
    if op in PRODUCTS and tuple(args[-1].shape) in unneeded:
        keeps = False
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(
    blocks: list[nn.Module], mode: str, draws: bool = False, last_matrix: str | None = None
) -> None:
    """Make each block recompute what `mode` does not keep. This wraps `forward`, so that hooks on the block
    stay outside, and a compile that comes after it sees the whole.

    draws: whether the blocks have dropout.
    last_matrix: the name of the linear module of a block whose result is only added to the stream. Backward
        does not need that result, (B, T, D), so `selective` does not keep it. For LLaMA-2-70B under tp 4 it
        would be 22 % of what is kept. All blocks have the same shapes.
    """
    if mode == "none" or not blocks:
        return
    keep = {}
    if mode == "selective":
        unneeded = set()
        if last_matrix is not None:
            weight = blocks[0].get_submodule(last_matrix).weight
            # An operation takes it transposed. With DTensors it has the whole shape, or compiled the local.
            unneeded = {tuple(weight.shape)[::-1], tuple(local(weight).shape)[::-1]}
        policy = partial(_keep_expensive, unneeded)
        keep = {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    if draws:  # to its end, so that a tp rank leaves the region in which it has a random stream of its own
        keep["early_stop"] = False
    for block in blocks:
        # Without dropout nothing random is replayed, so the state of the generator need not be saved.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws, **keep
        )
