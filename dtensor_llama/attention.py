"""Causal attention: one function, several kernels.

    flash   the flash-attn package (extra `flash`): fastest on NVIDIA GPUs, packed documents without a mask
    sdpa    torch.nn.functional.scaled_dot_product_attention: torch's flash, cuDNN or memory-efficient kernel
    math    the formula written out: the reference to read and to test against; stores (T, S) scores

B rows, T queries, S keys (S = T when training), H query heads, K key/value heads (K divides H), E head width.
K and V are never expanded to H heads: each kernel reads a key/value head once for its group of H/K query heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtensor_llama.errors import UsageError

KERNELS = ("flash", "sdpa", "math")


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed rows begin and end: what a token may look back to, in each kernel's form."""

    mask: Tensor | None = None         # (B, 1, T, S) bool, True where query t may see key s: sdpa, math
    cu_seqlens: Tensor | None = None   # (n_documents + 1,) int32, ends of documents in the flattened rows: flash

    @staticmethod
    def from_positions(positions: Tensor, kernel: str, device: torch.device) -> "Documents":
        """`positions` (B, T) restart at 0 where a document begins. If they are on the CPU, nothing waits for the GPU."""
        B, T = positions.shape
        starts = positions == 0
        starts[:, 0] = True                                    # a document cut by the row's edge begins with the row
        if kernel == "flash":
            first = starts.flatten().nonzero().flatten()       # (n_documents,): dynamic, hence better on the CPU
            ends = torch.cat([first, first.new_tensor([B * T])]).to(torch.int32)
            return Documents(cu_seqlens=ends.to(device, non_blocking=True))
        document = starts.to(device, non_blocking=True).cumsum(-1)                 # (B, T): which document of the row
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return Documents(mask=(document[:, None, :, None] == document[:, None, None, :]) & causal)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str, documents: Documents | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, causal: query t of the last T positions sees keys 0 .. S - T + t.

    q is (B, T, H, E); k and v are (B, S, K, E), S > T when earlier keys come from a cache. Returns (B, T, H, E).
    With `documents`, a query sees its own document only. Source: Vaswani et al. 2017, arXiv:1706.03762; grouped
    queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if kernel == "flash":
        return _flash(q, k, v, documents)
    T, S = q.shape[1], k.shape[1]
    mask = documents.mask if documents else None
    if mask is None and 1 < T < S:   # several new tokens over a cache: the causal diagonal is shifted by S - T
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    if kernel == "math":
        return _math(q, k, v, mask)
    return _sdpa(q, k, v, mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is None:
        return flash_attn_func(q, k, v, causal=True)           # aligned to the last key: right for a cache too
    B, T, H, E = q.shape
    ends = documents.cu_seqlens
    flat = [x.reshape(B * T, -1, E) for x in (q, k, v)]        # documents of all rows, one after another
    # T bounds the longest document; the exact number would have to be fetched from the GPU.
    return flash_attn_varlen_func(*flat, ends, ends, T, T, causal=True).view(B, T, H, E)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    causal = mask is None and q.shape[1] > 1                   # a single query sees every key there is
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]       # (B, H or K, T or S, E)
    grouped = q.shape[2] != k.shape[2]
    if q.is_cuda:   # without this torch falls back in silence to a kernel that stores the (T, S) scores
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    q = q.view(B, T, K, H // K, E)                                              # the H/K queries of each k/v head
    scores = torch.einsum("btkge,bske->bkgts", q.float(), k.float()) / E**0.5    # (B, K, H/K, T, S) fp32
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return torch.einsum("bkgts,bske->btkge", scores.softmax(-1).to(v.dtype), v).reshape(B, T, H, E)


def choose_attention(asked: str, device: torch.device, dtype: torch.dtype, merges_blocks: bool = False) -> tuple[str, str]:
    """The kernel for `--train.attention` and the reason, to be printed: `auto` picks, anything else is done or refused.

    merges_blocks: ring attention will put the result together from blocks, which flash-attn's backward cannot take.
    UsageError when flash was asked for and cannot run: on a CPU, in float32, or without the package.
    """
    if asked not in ("auto", *KERNELS):
        raise UsageError(f"--train.attention {asked} is not one of auto, {', '.join(KERNELS)}.")
    obstacle = _flash_obstacle(device, dtype)
    if asked == "flash" and obstacle:
        raise UsageError(f"--train.attention flash cannot run here: {obstacle}. Use --train.attention sdpa or auto.")
    if asked != "auto":
        return asked, "asked for"
    if obstacle is None and merges_blocks:
        return "sdpa", "flash-attn cannot merge the blocks of --parallel.cp-method ring"
    if obstacle is None:
        return "flash", "the flash-attn package is installed"
    return "sdpa", f"flash-attn: {obstacle}"


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn needs an NVIDIA GPU and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bfloat16 and --train.dtype is {str(dtype).removeprefix('torch.')}"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"the flash-attn package does not import ({error}; pip install '.[flash]')"
    return None
