"""Causal attention: one object that the model calls, and the kernels it may use.

The model has one attention object, `model.attention`. It is called twice in each forward:

    prepare(n_tokens, positions, cache, device)   once: position ids for RoPE and the attention mask
    __call__(q, k, v, mask)                       in every layer: attention of this rank's heads

`WholeRows` is the one in this file, for ranks that hold whole sequences; parallel/context.py has two for
ranks that share a sequence. Models whose config.json has a sliding window call `near` too, once, for the
layers with that window. To train with another attention, write a subclass of WholeRows and set it once,
`model.attention = Mine(...)`, before `parallelize`: every pipeline stage and every layout then uses it, and a
layout that cannot is refused. The tests have such a class (tests/test_seams.py).

Kernels:
    flash   the flash-attn package (extra `flash`): the fastest on NVIDIA GPUs; packed documents need no mask
    varlen  torch.nn.attention.varlen, the FlashAttention inside torch: packed documents need no mask.
            Sequences that are one document each, and decoding over a cache, are computed by sdpa
    sdpa    torch.nn.functional.scaled_dot_product_attention: torch's flash, cuDNN or memory-efficient kernel
    math    the formula written out: the reference to read and to test against; it stores (T, S) scores

B sequences, T queries, S keys (S = T in training), H query heads, K key/value heads (K divides H), E head
width. A kernel reads a key/value head once for its group of H/K query heads. Only torch's memory-efficient
kernel cannot; where no other kernel computes what is asked for, K and V are first copied for all H heads
(`plan_sdpa`).
"""

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from dtensor_llama.errors import UsageError

KERNELS = ("flash", "varlen", "sdpa", "math")
# torch 2.11 takes fewer key/value heads than query heads as they are; later versions want to be told.
_VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class AttentionMask:
    """Holds which keys a query may see, in the form that a kernel takes: `dense` for sdpa and math, the other
    fields for flash and varlen."""

    dense: Tensor | None = None  # (B or 1, 1, T, S) bool, True where query t may see key s
    # (n_documents + 1,) int32: 0, then where each document ends in the flattened sequences
    cu_seqlens: Tensor | None = None
    window: int | None = None  # a query sees so many keys, its own among them; None: all before it

    @property
    def window_size(self) -> tuple[int, int]:
        """Return how many keys before and after its own a query sees, as FlashAttention has it; -1: all."""
        return (-1 if self.window is None else self.window - 1, 0)

    @staticmethod
    def of_documents(positions: Tensor, kernel: str, device: torch.device) -> "AttentionMask":
        """Return the mask of packed documents: causal, and no token sees another document.

        `positions` (B, T) restart at 0 where a document begins. While they are on the CPU, nothing here waits
        for the GPU.
        """
        B, T = positions.shape
        starts = positions == 0
        starts[:, 0] = True  # a document that was cut at the sequence's edge begins with the sequence
        if kernel in ("flash", "varlen"):
            first = starts.flatten().nonzero().flatten()  # (n_documents,): a size that only the data knows
            ends = torch.cat([first, first.new_tensor([B * T])]).to(torch.int32)
            if device.type == "cuda" and not ends.is_cuda:
                ends = ends.pin_memory()  # a copy from pageable memory would wait for the GPU
            return AttentionMask(cu_seqlens=_of_any_length(ends.to(device, non_blocking=True)))
        document = starts.to(device, non_blocking=True).cumsum(
            -1
        )  # (B, T): the index of each token's document
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return AttentionMask(dense=(document[:, None, :, None] == document[:, None, None, :]) & causal)


def _of_any_length(ends: Tensor) -> Tensor:
    """Tell torch.compile that the number of documents changes from batch to batch, so that no step compiles
    again.

    The alternative, a fixed length with empty documents at the end, is expensive: FlashAttention's backward
    adds 128 rows of fp32 gradients for every document, an empty one too (2 MiB for the heads of 7B).
    """
    torch._dynamo.maybe_mark_dynamic(ends, 0)
    return ends


class WholeRows:
    """Causal attention of a rank that holds whole sequences. Subclass it for another kind of attention."""

    # True in a class that attends over sequences split by context parallelism. A class that does not say so
    # is refused under cp: its subclasses compute something that Ulysses and Ring would not.
    splits_sequence = False
    sequence_ranks = 1  # ranks that share the tokens of a sequence

    def __init__(self, kernel: str = "sdpa"):
        self.kernel = kernel  # flash, varlen, sdpa or math; choose_attention says which of them can run here

    def prepare(
        self, n_tokens: int, positions: Tensor | None, cache, device: torch.device
    ) -> tuple[Tensor, AttentionMask | None]:
        """Return the position ids (B or 1, T) of this rank's tokens, on `device`, and the mask for __call__.

        n_tokens: how many tokens of each sequence this rank has, T. positions (B, T), on any device, restart
            at 0 where a document begins; None: a sequence is one document. cache: a model.KVCache, or None.
            A mask of None stands for the causal mask.
        """
        if positions is not None:
            mask = AttentionMask.of_documents(positions, self.kernel, device)
            return positions.to(device, non_blocking=True), mask
        first = cache.n_seen if cache is not None else 0
        at = torch.arange(first, first + n_tokens, device=device)[None]  # (1, T)
        if cache is None or cache.padding is None:
            return at, None
        key = torch.arange(first + n_tokens, device=device)
        seen = (key >= cache.padding[:, None])[:, None] & (key <= at[..., None])  # (B, T, S)
        seen = seen | (key == at[..., None])  # the softmax over a row without any key would be nan
        # RoPE is relative, and padding moves all positions of a sequence alike.
        return at, AttentionMask(dense=seen[:, None])

    def near(
        self, mask: AttentionMask | None, window: int, n_tokens: int, cache, device: torch.device
    ) -> AttentionMask:
        """Return the mask that hides from a query, beside what `mask` from `prepare` hides, all keys but the
        last `window` ones, its own among them."""
        ends = mask.cu_seqlens if mask else None
        if self.kernel == "flash" or ends is not None:
            return AttentionMask(cu_seqlens=ends, window=window)
        first = cache.n_seen if cache is not None else 0
        query = torch.arange(first, first + n_tokens, device=device)[:, None]
        key = torch.arange(first + n_tokens, device=device)
        near = ((key <= query) & (key > query - window))[None, None]  # (1, 1, T, S)
        return AttentionMask(dense=near & mask.dense if mask else near)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q (B, T, H, E), k and v (B, S, K, E) -> (B, T, H, E); H and K are the heads of this rank."""
        return attention(q, k, v, self.kernel, mask)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str, mask: AttentionMask | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v, causal: query t of the last T positions sees keys 0 .. S - T + t.

    q is (B, T, H, E); k and v are (B, S, K, E), S > T when earlier keys come from a cache. The result is
    (B, T, H, E). With a mask a query sees what the mask shows it. Source: Vaswani et al. 2017,
    arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if kernel == "flash":
        return _flash(q, k, v, mask)
    if kernel == "varlen" and mask is not None and mask.cu_seqlens is not None:
        return _varlen(q, k, v, mask)
    T, S = q.shape[1], k.shape[1]
    dense = mask.dense if mask else None
    if (
        dense is None and 1 < T < S
    ):  # several new tokens over a cache: the causal diagonal is shifted by S - T
        dense = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    if kernel == "math":
        return _math(q, k, v, dense)
    return _sdpa(q, k, v, dense)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    mask = mask or AttentionMask()
    if mask.dense is not None:
        raise UsageError("attention=flash takes no dense mask, only packed documents; use attention=sdpa.")
    if mask.cu_seqlens is None:
        # It is aligned to the last key, which is right for a cache too.
        return flash_attn_func(q, k, v, causal=True, window_size=mask.window_size)
    B, T, H, E = q.shape
    ends = mask.cu_seqlens
    flat = [x.reshape(B * T, -1, E) for x in (q, k, v)]  # the documents of all sequences, one after another
    # T bounds the longest document; the exact number would have to be fetched from the GPU.
    out = flash_attn_varlen_func(*flat, ends, ends, T, T, causal=True, window_size=mask.window_size)
    return out.view(B, T, H, E)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    B, T, H, E = q.shape
    flat = [pad_head_width(x).reshape(B * T, x.shape[2], -1) for x in (q, k, v)]  # one after another
    ends = mask.cu_seqlens
    if q.device.type == "cpu":
        out = _varlen_reference(*flat, mask, scale=E**-0.5)
    else:
        # T bounds the longest document, as for flash-attn. A window that ends at the query is the causal
        # mask.
        gqa = _VARLEN_GQA if q.shape[2] != k.shape[2] else {}
        out = varlen_attn(*flat, ends, ends, T, T, scale=E**-0.5, window_size=mask.window_size, **gqa)
    return out.view(B, T, H, -1)[..., :E]


def _varlen_reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Compute on a CPU, which has no such kernel, what varlen_attn computes on a GPU.

    q is (N, H, E), the tokens of all sequences in a line; k and v are (N, K, E). The result is (N, H, E). An
    (N, N) mask is stored: this is for tests and small runs.
    """
    at = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(at, mask.cu_seqlens, right=True)  # (N,): the index of each token's document
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if mask.window is not None:
        seen = seen & (at[:, None] - at < mask.window)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, H or K, N, E)
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1).contiguous()


class SdpaPlan(NamedTuple):
    """Says how scaled_dot_product_attention is called on a GPU."""

    kernels: tuple[SDPBackend, ...]  # torch may choose among these: none of them stores (T, S) scores
    in_order: bool  # True: the first of them that can run; False: torch's own order for this GPU
    expands_heads: bool  # K and V are first copied for each of the H query heads


def plan_sdpa(dtype: torch.dtype, grouped: bool, masked: bool, over_cache: bool) -> SdpaPlan:
    """Return which of torch's kernels may compute attention in `dtype`. Ring attention follows it too.

    grouped: fewer key/value heads than query heads. masked: there is a mask that is not just the causal one.
    over_cache: T != S, keys of earlier tokens come from a cache. What decides (torch 2.11 to 2.13):
    - FlashAttention and cuDNN compute in 16 bits only, and FlashAttention takes no mask;
    - the memory-efficient kernel takes everything but grouped heads, so those are expanded for it;
    - cuDNN builds a plan for each new shape, and over a cache every token has a new S.
    """
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    efficient = SDPBackend.EFFICIENT_ATTENTION
    if dtype not in (torch.bfloat16, torch.float16):
        return SdpaPlan((efficient,), in_order=False, expands_heads=grouped)
    if masked:
        kernels = (efficient,) if over_cache else (cudnn, efficient)
        return SdpaPlan(kernels, in_order=False, expands_heads=grouped)
    return SdpaPlan((flash, cudnn, efficient), in_order=over_cache, expands_heads=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.is_cuda:
        return _sdpa_on_gpu(q, k, v, mask)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),  # (B, H or K, T or S, E)
        attn_mask=mask,
        is_causal=mask is None and q.shape[1] > 1,  # a single query sees every key there is
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _sdpa_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    T, H, E = q.shape[1:]
    plan = plan_sdpa(q.dtype, grouped=H != k.shape[2], masked=mask is not None, over_cache=T != k.shape[1])
    if plan.expands_heads:
        k, v = expand_heads(k, H), expand_heads(v, H)
    heads_first = [pad_head_width(x).transpose(1, 2) for x in (q, k, v)]  # (B, H or K, T or S, E)
    # Without this choice torch falls back in silence to a kernel that stores the (T, S) scores.
    with sdpa_kernel(list(plan.kernels), set_priority=plan.in_order):
        out = F.scaled_dot_product_attention(
            *heads_first,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            scale=E**-0.5,
            enable_gqa=H != k.shape[2],
        )
    return out.transpose(1, 2)[..., :E]


def expand_heads(x: Tensor, n_heads: int) -> Tensor:
    """Copy every key/value head for each query head of its group: (B, S, K, E) -> (B, S, n_heads, E)."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


def pad_head_width(x: Tensor) -> Tensor:
    """Pad the head width with zeros to a multiple of 8, as CUDA kernels need; zeros add nothing to a
    score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    B, T, H, E = q.shape
    S, K = k.shape[1], k.shape[2]
    q = q.view(B, T, K, H // K, E)  # the H/K queries of each k/v head
    scores = torch.einsum("btkge,bske->bkgts", q.float(), k.float()) / E**0.5  # (B, K, H/K, T, S) fp32
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return torch.einsum("bkgts,bske->btkge", scores.softmax(-1).to(v.dtype), v).reshape(B, T, H, E)


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, merges_blocks: bool = False, documents: bool = False
) -> tuple[str, str]:
    """Return the kernel for the field `attention` and the reason, to be printed.

    `auto` picks one; any other is used or refused. merges_blocks: ring attention will merge the results of
    blocks, which only sdpa and math can give. documents: sequences are packed, and no token may see another
    document.

    UsageError when flash is asked for and cannot run: on a CPU, in float32, or without its package; or varlen
    without documents. On a CPU a reference computes what varlen would, so that the code around the kernel can
    be tried there.
    """
    if asked not in ("auto", *KERNELS):
        raise UsageError(f"attention={asked} is not one of auto, {', '.join(KERNELS)}.")
    no_flash = _flash_obstacle(device, dtype)
    no_varlen = _varlen_obstacle(device, dtype, documents)
    obstacle = {"flash": no_flash, "varlen": no_varlen}.get(asked)
    if obstacle:
        raise UsageError(f"attention={asked} cannot run here: {obstacle}. Use attention=sdpa or auto.")
    if asked == "varlen" and device.type == "cpu":
        return asked, "asked for; on a CPU a slow reference in its place, with a mask over a whole microbatch"
    if asked != "auto":
        return asked, "asked for"
    if no_flash is None and not merges_blocks:
        return "flash", "the flash-attn package is installed"
    if documents and merges_blocks:
        return "sdpa", "neither flash-attn nor varlen_attn can merge the blocks of ring attention"
    if merges_blocks and no_flash is None:
        return "sdpa", "flash-attn cannot merge the blocks of ring attention"
    if no_varlen is None and device.type != "cpu":
        return "varlen", f"documents without a mask; {no_flash}"
    if documents and device.type == "cuda":
        return "sdpa", f"flash-attn: {no_flash}; documents through a mask: {no_varlen}"
    return "sdpa", f"flash-attn: {no_flash}"


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn needs an NVIDIA GPU and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bfloat16 and dtype={str(dtype).removeprefix('torch.')}"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"the flash-attn package does not import ({error}; pip install '.[flash]')"
    return None


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, documents: bool) -> str | None:
    if not documents:
        return "varlen_attn is for packed documents and `document_mask` is off"
    if device.type not in ("cuda", "cpu"):
        return f"varlen_attn needs an NVIDIA GPU and the device is {device.type}"
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn computes in bfloat16 and dtype={str(dtype).removeprefix('torch.')}"
    return None
