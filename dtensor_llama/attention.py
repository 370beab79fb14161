"""Causal attention: one object that the model calls, and the kernels it may use.

The model has one attention object, `model.attention`. Each forward uses it in two ways:

    prepare(n_tokens, positions, cache, device)   once: position ids for RoPE and the attention mask
    __call__(q, k, v, mask)                       in every layer: attention of this rank's heads

`WholeSequences` is the one in this file, for ranks that hold whole sequences; parallel/context.py has two for
ranks that share a sequence. Models whose config.json has a sliding window call `near` too, once, for the
layers with that window. To train with another attention, write a subclass of WholeSequences and set it once,
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
kernel cannot do that. Where no other kernel can run, keys and values are first copied for each of the H query
heads (see `plan_sdpa`).
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
            ends = ends.to(device, non_blocking=True)
            # The number of documents differs between batches, and torch.compile shall compile once. The
            # alternative, a fixed length with empty documents at the end, is expensive: FlashAttention's
            # backward adds 128 rows of fp32 gradients for every document, an empty one too (2 MiB for the
            # heads of 7B).
            torch._dynamo.maybe_mark_dynamic(ends, 0)
            return AttentionMask(cu_seqlens=ends)
        # (B, T): the index of each token's document
        document = starts.to(device, non_blocking=True).cumsum(-1)
        is_own = document[:, None, :, None] == document[:, None, None, :]
        return AttentionMask(dense=is_own & causal_mask(T, T, device))


class WholeSequences:
    """Causal attention of a rank that holds whole sequences. Subclass it for another kind of attention."""

    # True in a class that attends over sequences split by context parallelism. A subclass that leaves it
    # False is refused under cp, because Ulysses or Ring in its place would compute something else.
    splits_sequence = False
    sequence_ranks = 1  # ranks that share the tokens of a sequence

    def __init__(self, kernel: str = "sdpa"):
        self.kernel = kernel  # flash, varlen, sdpa or math; choose_attention says which of them can run here

    def prepare(
        self, n_tokens: int, positions: Tensor | None, cache, device: torch.device
    ) -> tuple[Tensor, AttentionMask | None]:
        """Return the position ids (B or 1, T) of this rank's tokens, on `device`, and the mask for __call__.

        n_tokens: how many tokens of each sequence this rank has, T. positions (B, T), on any device, restart
            at 0 where a document begins; None: a sequence is one document. cache: a generate.KVCache, or
            None. A mask of None stands for the causal mask.
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
        seen |= key == at[..., None]  # the softmax over a row of scores without any key would be nan
        # RoPE is relative, and padding moves all positions of a sequence alike.
        return at, AttentionMask(dense=seen[:, None])

    def near(
        self, mask: AttentionMask | None, window: int, n_tokens: int, cache, device: torch.device
    ) -> AttentionMask:
        """Return `mask`, which `prepare` returned, narrowed to a sliding window: each query sees at most the
        last `window` keys, its own among them."""
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
    if dense is None and 1 < T < S:  # several new tokens over a cache
        dense = causal_mask(T, S, q.device)
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
    # The tokens of all sequences in a line, N = B T, as flash-attn takes them.
    flat = [pad_head_width(x).reshape(B * T, x.shape[2], -1) for x in (q, k, v)]
    ends = mask.cu_seqlens
    if q.device.type == "cpu":
        # There is no such kernel. An (N, N) mask is stored: this is for tests and small runs.
        at = torch.arange(B * T, device=q.device)
        document = torch.bucketize(at, ends, right=True)  # (N,): the index of each token's document
        seen = (document[:, None] == document) & (at[:, None] >= at)
        if mask.window is not None:
            seen = seen & (at[:, None] - at < mask.window)
        out = _call_sdpa(*(x[None] for x in flat), seen, scale=E**-0.5)
    else:
        # T bounds the longest document, as for flash-attn.
        # A window that ends at the query itself is the causal mask.
        gqa = _VARLEN_GQA if q.shape[2] != k.shape[2] else {}
        out = varlen_attn(*flat, ends, ends, T, T, scale=E**-0.5, window_size=mask.window_size, **gqa)
    return out.reshape(B, T, H, -1)[..., :E]


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
    attend = _sdpa_on_gpu if q.is_cuda else _call_sdpa
    return attend(q, k, v, mask)


def _call_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),  # (B, H or K, T or S, E)
        attn_mask=mask,
        # A single query sees every key there is. The length is compared in a branch, because torch.compile
        # makes a symbol of a length that has changed, and sdpa refuses a comparison of symbols.
        is_causal=False if q.shape[1] == 1 else mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _sdpa_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    T, H, E = q.shape[1:]
    plan = plan_sdpa(q.dtype, grouped=H != k.shape[2], masked=mask is not None, over_cache=T != k.shape[1])
    if plan.expands_heads:
        k, v = expand_heads(k, H), expand_heads(v, H)
    # Without this choice torch falls back in silence to a kernel that stores the (T, S) scores.
    with sdpa_kernel(list(plan.kernels), set_priority=plan.in_order):
        return _call_sdpa(*(pad_head_width(x) for x in (q, k, v)), mask, scale=E**-0.5)[..., :E]


def expand_heads(x: Tensor, n_heads: int) -> Tensor:
    """Copy every key/value head for each query head of its group: (B, S, K, E) -> (B, S, n_heads, E)."""
    n_copies = n_heads // x.shape[2]
    return x.repeat_interleave(n_copies, dim=2) if n_copies > 1 else x


def pad_head_width(x: Tensor) -> Tensor:
    """Pad the head width with zeros to a multiple of 8, as CUDA kernels need. They do not change a score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    mask = causal_mask(q.shape[1], k.shape[1], q.device) if mask is None else mask
    weights = math_scores(q, k, mask).softmax(-1).to(v.dtype)
    return torch.einsum("bkgts,bske->btkge", weights, v).flatten(2, 3)


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return (1, 1, T, S) bool, True where a query may see a key. The last query sees all keys, and each
    earlier query one key less than the next. With T = S a query sees the keys up to its own."""
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return seen.tril(n_keys - n_queries)[None, None]


def math_scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the scores of q (B, T, H, E) and k (B, S, K, E), (B, K, H/K, T, S) fp32 with the H/K queries of
    each key/value head together; -inf where the mask (B or 1, 1, T, S) is False."""
    groups = q.float().unflatten(2, (k.shape[2], -1))  # (B, T, K, H/K, E)
    scores = torch.einsum("btkge,bske->bkgts", groups, k.float()) / q.shape[-1] ** 0.5
    return scores if mask is None else scores.masked_fill(~mask[:, :, None], float("-inf"))


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, merges_blocks: bool = False, documents: bool = False
) -> tuple[str, str]:
    """Return the kernel for the field `attention` and the reason, to be printed.

    `auto` picks one; any other is used or refused. merges_blocks: ring attention will merge the results of
    blocks, which only sdpa and math can give. documents: several documents are packed into a sequence, and no
    token may see another document than its own.

    Raises UsageError if flash is asked for and cannot run (on a CPU, in float32, or without its package), or
    varlen without documents. On a CPU a slow reference stands in for varlen, so that the code around the
    kernel can be tried there.
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
    if merges_blocks and (documents or no_flash is None):
        unable = "neither flash-attn nor varlen_attn can" if documents else "flash-attn cannot"
        return "sdpa", f"{unable} merge the blocks of ring attention"
    if no_varlen is None and device.type != "cpu":
        return "varlen", f"documents without a mask; {no_flash}"
    mask = f"; documents through a mask: {no_varlen}" if documents and device.type == "cuda" else ""
    return "sdpa", f"flash-attn: {no_flash}{mask}"


def _gpu_obstacle(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a kernel for GPUs cannot run here: the device, or the dtype."""
    if device.type != "cuda":
        return f"{kernel} needs an NVIDIA GPU and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{kernel} computes in bfloat16 and dtype={str(dtype).removeprefix('torch.')}"
    return None


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if obstacle := _gpu_obstacle("flash-attn", device, dtype):
        return obstacle
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"the flash-attn package does not import ({error}; pip install '.[flash]')"
    return None


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, documents: bool) -> str | None:
    if not documents:
        return "varlen_attn is for packed documents and `document_mask` is off"
    return None if device.type == "cpu" else _gpu_obstacle("varlen_attn", device, dtype)
