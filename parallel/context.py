"""Context parallelism: the tokens of every sequence are split over the `cp` axis.

Only attention needs tokens of other ranks.

    share       the T/cp tokens of each sequence that one rank holds, in the order in which it holds them
    slice       a run of consecutive tokens; a share is one slice of cp (ulysses) or two slices of 2 cp (ring)
    ulysses     trades tokens for heads before attention and back after it: (B, T/cp, H, E) becomes
                (B, T, H/cp, E). Any kernel works, but cp must divide the heads. Source: Jacobs et al. 2023,
                arXiv:2309.14509
    ring        keeps queries where they are; keys and values go round all ranks, one hop a round. Any cp
                works. Source: Liu et al. 2023, arXiv:2310.01889
    log-sum-exp log of the sum of exp(score) over the keys seen, per query and head. With it the outputs over
                two sets of keys merge into the output over both, exactly, and backward computes the weights
                of any block again
    zigzag      the order of a ring share: a slice from the head of the sequence and one from its tail, since
                under the causal mask early queries have little to do and late ones much. At cp 4:

                slice   0 1 2 3 4 5 6 7     Rank 1 meets the keys of rank 0 (slices 0, 7): both its slices see
                rank    0 1 2 3 3 2 1 0     0, none sees 7. It meets those of rank 2 (2, 5): its 6 sees both,
                                            its 1 neither. It is always half of the square, and nothing is
                                            masked: equal work.

A sequence 8 times longer on 8 ranks takes the memory it took on one (recipes/bench/context_memory.py). What a
rank sends per layer in forward, with n bytes a number and W = lcm(K, cp):
    ulysses     all-to-all of q, k, v, out: n B T/cp E (2 H + 2 W) (cp - 1)/cp; as much in backward
    ring        cp - 1 hops of k and v: n B T/cp E 2 K (cp - 1); in backward as much, and cp hops of their
                fp32 gradients
All cp ranks have the same parameters: their gradients are summed over cp as over dp (FSDP over dp_shard x
cp), and the loss is the sum over cp of the ranks' token sums.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import lcm
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend

from dtensor_llama.attention import (
    AttentionMask,
    WholeSequences,
    causal_mask,
    expand_heads,
    math_scores,
    pad_head_width,
    plan_sdpa,
)
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.model import Llama

METHODS = ("ulysses", "ring")
_aten = torch.ops.aten


# ---- which rank has which tokens ----


def n_slices(method: str, cp: int) -> int:
    """Return how many slices a sequence is cut into."""
    return 2 * cp if method == "ring" else cp


def slices_of(method: str, cp_rank: int, cp: int) -> list[int]:
    """Return the slices that `cp_rank` holds, in its order."""
    return [cp_rank, 2 * cp - 1 - cp_rank] if method == "ring" else [cp_rank]


def _share(x: Tensor, method: str, cp_rank: int, cp: int) -> Tensor:
    """Return the part of x (B, T) that `cp_rank` holds, (B, T/cp)."""
    slices = n_slices(method, cp)
    if x.shape[1] % slices:
        raise UsageError(
            f"seq_len={x.shape[1]} is not a multiple of the {slices} slices into which cp={cp} with "
            f"cp_method={method} cuts a sequence."
        )
    parts = x.chunk(slices, dim=1)
    return torch.cat([parts[i] for i in slices_of(method, cp_rank, cp)], dim=1)


def shard_sequence(x: Tensor, cp_mesh: DeviceMesh, method: str) -> Tensor:
    """Return this rank's share (B, T/cp) of x (B, T): tokens, labels or positions, which then still match."""
    return _share(x, method, cp_mesh.get_local_rank(), cp_mesh.size())


def shard_batch(batch: Batch, cp_mesh: DeviceMesh, method: str) -> Batch:
    """Return this cp rank's share of a batch. Positions stay whole: they tell where documents begin."""
    if cp_mesh.size() == 1:
        return batch
    tokens, labels = (shard_sequence(x, cp_mesh, method) for x in (batch.tokens, batch.labels))
    return Batch(tokens, labels, batch.positions)


def apply_context_parallel(model: Llama, cp_mesh: DeviceMesh, method: str) -> None:
    """Change `model` so that it takes this rank's share of the tokens, and attends to whole sequences.

    cp_mesh: the 1-D `cp` axis. method: ulysses or ring. The kernel is that of `model.attention`; ring can use
    neither flash nor varlen. The model is then called with tokens and labels from `shard_sequence`, and with
    `positions` whole, (B, T), or None if each sequence is one document.

    An attention of the user's own stays as it is; check_seams in parallel/apply.py refuses one that cannot.
    """
    own = model.attention
    if type(own) is WholeSequences:
        model.attention = Ulysses(cp_mesh, own) if method == "ulysses" else Ring(cp_mesh, own.kernel)


def _refuse_cache(cache) -> None:
    if cache is not None:
        raise UsageError("cp splits sequences for training and has no key/value cache; generate with cp=1.")


# ---- Ulysses ----


class Ulysses:
    """Computes attention over whole sequences for this rank's share of the heads.

    Outside of attention the rank has its share of the tokens, and all heads.

    whole: the attention that computes with whole sequences, a WholeSequences or a subclass of it.
    """

    splits_sequence = True

    def __init__(self, cp_mesh: DeviceMesh, whole: WholeSequences):
        self.cp_mesh = cp_mesh
        self.whole = whole
        self.sequence_ranks = cp_mesh.size()

    def prepare(
        self, n_tokens: int, positions: Tensor | None, cache, device: torch.device
    ) -> tuple[Tensor, AttentionMask | None]:
        """Return the position ids of this rank's share (B or 1, T/cp), and the mask of whole sequences."""
        _refuse_cache(cache)
        positions, mask = self.whole.prepare(n_tokens * self.sequence_ranks, positions, None, device)
        return shard_sequence(positions, self.cp_mesh, "ulysses"), mask

    def near(
        self, mask: AttentionMask | None, window: int, n_tokens: int, cache, device: torch.device
    ) -> AttentionMask:
        """Return the mask of whole sequences for layers with a sliding window."""
        return self.whole.near(mask, window, n_tokens * self.sequence_ranks, None, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q (B, T/cp, H, E), k and v (B, T/cp, K, E) -> (B, T/cp, H, E)."""
        n_kv_heads = lcm(k.shape[2], self.sequence_ranks)  # W: the least multiple of K that cp divides
        k, v = expand_heads(k, n_kv_heads), expand_heads(v, n_kv_heads)  # (B, T/cp, W, E)
        tokens, heads = Shard(1), Shard(2)
        # all-to-all: (B, T, H/cp or W/cp, E)
        q, k, v = (_redistribute(x, self.cp_mesh, tokens, heads) for x in (q, k, v))
        out = self.whole(q, k, v, mask)  # (B, T, H/cp, E)
        return _redistribute(out, self.cp_mesh, heads, tokens)  # all-to-all: (B, T/cp, H, E)


def _redistribute(x: Tensor, mesh: DeviceMesh, source: Shard, target: Shard) -> Tensor:
    return DTensor.from_local(x, mesh, [source], run_check=False).redistribute(placements=[target]).to_local()


# ---- ring ----


class Ring:
    """Computes attention of this rank's queries to the keys of all ranks, which are passed round a ring."""

    splits_sequence = True

    def __init__(self, cp_mesh: DeviceMesh, kernel: str = "sdpa"):
        if kernel not in ("sdpa", "math"):
            raise UsageError(
                f"attention={kernel} cannot merge the blocks of ring attention; use attention=sdpa or math."
            )
        self.cp_mesh = cp_mesh
        self.kernel = kernel
        self.sequence_ranks = cp_mesh.size()
        self.group_name = cp_mesh.get_group().group_name

    def prepare(
        self, n_tokens: int, positions: Tensor | None, cache, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return the position ids of this rank's share (B or 1, T/cp), and the document of each token of each
        rank's share (cp, B, T/cp), or None if each sequence is one document."""
        _refuse_cache(cache)
        cp = self.sequence_ranks
        if positions is None:
            whole = torch.arange(n_tokens * cp, device=device)[None]  # (1, T)
            return shard_sequence(whole, self.cp_mesh, "ring"), None
        own = shard_sequence(positions, self.cp_mesh, "ring").to(device, non_blocking=True)
        starts = (positions == 0).to(device, non_blocking=True)
        document = starts.cumsum(-1)  # (B, T): the index of each token's document in its sequence
        return own, torch.stack([_share(document, "ring", rank, cp) for rank in range(cp)])

    def near(self, mask: Tensor | None, window: int, n_tokens: int, cache, device: torch.device) -> Tensor:
        raise UsageError(
            f"sliding_window={window} is less than a sequence of {n_tokens * self.sequence_ranks} tokens, "
            "and the blocks of cp_method=ring know no window; use cp_method=ulysses."
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, T/cp, H, E), k and v (B, T/cp, K, E), mask (cp, B, T/cp) -> (B, T/cp, H, E)."""
        q, k, v = (x.contiguous() for x in (q, k, v))
        return ring_attention(q, k, v, mask, self.group_name, self.kernel)[0]


class Round(NamedTuple):
    source: int  # cp rank whose keys and values are here
    queries: slice  # tokens of the own share, 0 .. T/cp
    keys: slice  # tokens of the source's share
    causal: bool  # True: own keys, query i sees keys 0 .. i; False: every query sees every key


def ring_rounds(cp_rank: int, cp: int, n_tokens: int) -> list[Round]:
    """Return the order in which the shares, of `n_tokens` each, come to `cp_rank`, and which of its queries
    meet which of their keys. Blocks that the causal mask hides completely are left out."""
    everything, head, tail = slice(0, n_tokens), slice(0, n_tokens // 2), slice(n_tokens // 2, n_tokens)
    rounds = [Round(cp_rank, everything, everything, causal=True)]  # a zigzag share is in ascending order
    for hop in range(1, cp):
        source = (cp_rank - hop) % cp
        # The tail of an earlier rank is later than all we have, and our head earlier than all of a later one.
        queries, keys = (everything, head) if source < cp_rank else (tail, everything)
        rounds.append(Round(source, queries, keys, causal=False))
    return rounds


# It is a custom op and not an autograd.Function, so that selective recompute can keep its result as it keeps
# a kernel's, without sending the keys round again, and torch.compile takes it whole. Its forward and backward
# are the two functions below.
@torch.library.custom_op(
    "dtensor_llama::ring_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? documents, str group_name, str kernel) -> (Tensor, Tensor)"
    ),
)
def ring_attention(q, k, v, documents, group_name, kernel):
    """Return out (B, T/cp, H, E) and the log-sum-exp (B, H, T/cp) fp32 over all keys of the sequence."""
    out = lse = None
    for queries, _, causal, kv, mask in _blocks([k, v], documents, _group(group_name)):
        block_out, block_lse = block_forward(q[:, queries], *kv, causal, mask, kernel)
        if out is None:
            out, lse = block_out.float(), block_lse.contiguous()  # every query sees itself: lse is finite
        else:
            _merge(out[:, queries], lse[:, :, queries], block_out, block_lse)
    return out.to(q.dtype).contiguous(), lse


@torch.library.custom_op(
    "dtensor_llama::ring_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? documents, "
        "str group_name, str kernel) -> (Tensor, Tensor, Tensor)"
    ),
)
def ring_attention_backward(grad_out, q, k, v, out, lse, documents, group_name, kernel):
    """Return the gradients of q, k and v. The keys of each share go round again; their gradient follows one
    round behind, each rank adds its part, and the last hop brings it home."""
    group = _group(group_name)
    grad_q = torch.zeros_like(q, dtype=torch.float32)
    # In fp32, as the cp ranks add to it in turn: twice the bytes of bf16, and none of its rounding.
    next_grad_kv = lambda: [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
    for queries, keys, causal, kv, mask in _blocks([k, v], documents, group):
        own_grad_out, own_q, own_out = (x[:, queries] for x in (grad_out, q, out))
        block_grad_q, *block_grad_kv = block_backward(
            own_grad_out, own_q, *kv, own_out, lse[:, :, queries], causal, mask, kernel
        )
        grad_q[:, queries] += block_grad_q
        grad_kv = next_grad_kv()  # of the keys at hand, from the ranks before us
        for total, part in zip(grad_kv, block_grad_kv, strict=True):
            total[:, keys] += part
        next_grad_kv = _send_round(grad_kv, group, tag=1)
    return tuple(x.to(q.dtype) for x in (grad_q, *next_grad_kv()))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.group_name, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    q, k, v, documents, out, lse = ctx.saved_tensors
    grads = ring_attention_backward(grad_out, q, k, v, out, lse, documents, ctx.group_name, ctx.kernel)
    return *grads, None, None, None


ring_attention.register_autograd(_backward, setup_context=_save_for_backward)
ring_attention.register_fake(
    lambda q, *rest: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
    )
)
ring_attention_backward.register_fake(
    lambda grad_out, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v))
)


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # private; a custom op takes plain values only


def _blocks(kv: list[Tensor], documents: Tensor | None, group: dist.ProcessGroup) -> Iterator[tuple]:
    """Yield what this rank computes in each round; the keys and values of the next round travel meanwhile.

    That is (queries, keys, causal) of the Round, the keys and values [k, v], (B, s, K, E) each, and a mask
    (B, 1, t, s) bool, True where a query may see a key, or None where `causal` alone decides.
    """
    rounds = ring_rounds(group.rank(), group.size(), kv[0].shape[1])
    for hop, (source, queries, keys, causal) in enumerate(rounds):
        next_kv = _send_round(kv, group) if hop + 1 < len(rounds) else list
        mask = None
        if documents is not None:
            own, other = documents[group.rank()], documents[source]
            mask = own[:, None, queries, None] == other[:, None, None, keys]
            mask = mask.tril() if causal else mask
        yield queries, keys, causal, [x[:, keys] for x in kv], mask
        kv = next_kv()


def _send_round(xs: list[Tensor], group: dist.ProcessGroup, tag: int = 0) -> Callable[[], list[Tensor]]:
    """Start to send xs to the next cp rank and to receive tensors like them from the one before. Return a
    function that waits for these."""
    rank, size = group.rank(), group.size()
    if size == 1:
        return lambda: xs
    received = [torch.empty_like(x) for x in xs]
    transfer = partial(dist.P2POp, group=group, tag=tag)
    sends = [transfer(dist.isend, x, group_peer=(rank + 1) % size) for x in xs]
    receives = [transfer(dist.irecv, x, group_peer=(rank - 1) % size) for x in received]
    works = dist.batch_isend_irecv(sends + receives)

    def arrived(_leaving=xs):  # xs must live until they are sent
        for work in works:
            work.wait()
        return received

    return arrived


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's out (B, t, H, E) and lse (B, H, t) into those of the blocks before, in place. An lse of
    -inf means that the query saw no key."""
    total = torch.logaddexp(lse, block_lse)
    # (B, t, H, 1)
    weight, block_weight = ((x - total).exp().transpose(1, 2)[..., None] for x in (lse, block_lse))
    out.mul_(weight).add_(block_out * block_weight)
    lse.copy_(total)


# ---- the kernels of one block: q (B, t, H, E), k and v (B, s, K, E), lse (B, H, t) fp32 ----


def block_forward(q, k, v, causal: bool, mask: Tensor | None, kernel: str) -> tuple[Tensor, Tensor]:
    """Return out (B, t, H, E) and lse (B, H, t) of attention to these keys alone; 0 and -inf for a query that
    may see none of them."""
    forward = _math_forward if kernel == "math" else _cuda_forward if q.is_cuda else _cpu_forward
    if mask is None:
        return forward(q, k, v, causal, None)
    blind = ~mask.any(-1, keepdim=True)  # (B, 1, t, 1)
    out, lse = forward(q, k, v, False, mask)  # here kernels differ on a query with no key
    return out.masked_fill(blind.transpose(1, 2), 0), lse.masked_fill(blind[..., 0], float("-inf"))


def block_backward(grad_out, q, k, v, out, lse, causal: bool, mask: Tensor | None, kernel: str):
    """Return this block's part of the gradients of q, k, v. out and lse are those over all keys of the
    sequence, so that exp(score - lse) are the true weights, 0 where masked."""
    backward = _math_backward if kernel == "math" else _cuda_backward if q.is_cuda else _cpu_backward
    return backward(grad_out, q, k, v, out, lse, causal and mask is None, mask)


def _bias(mask: Tensor | None, dtype: torch.dtype, n_heads: int = 1) -> Tensor | None:
    """Return 0 where mask (B, 1, t, s) is True and -inf elsewhere. Its rows begin on multiples of 16 numbers,
    as CUDA kernels need."""
    if mask is None:
        return None
    bias = F.pad(
        torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf")), (0, -mask.shape[-1] % 16)
    )
    return bias[..., : mask.shape[-1]].expand(-1, n_heads, -1, -1)


def _cpu_forward(q, k, v, causal, mask):
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, attn_mask=_bias(mask, q.dtype)
    )
    return out.transpose(1, 2), lse


def _cpu_backward(grad_out, q, k, v, out, lse, causal, mask):
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in (grad_out, q, k, v, out)),
        lse.contiguous(),
        0.0,
        causal,
        attn_mask=_bias(mask, q.dtype),
    )
    return [x.transpose(1, 2) for x in grads]


def _runs_flash(q: Tensor, mask: Tensor | None) -> bool:
    """Decide as for whole sequences: FlashAttention where it can run, else the memory-efficient kernel, which
    takes no grouped heads. cuDNN's results cannot be merged."""
    plan = plan_sdpa(q.dtype, grouped=False, masked=mask is not None, over_cache=False)
    return SDPBackend.FLASH_ATTENTION in plan.kernels


def _cuda_forward(q, k, v, causal, mask):
    t, H, E = q.shape[1:]
    if _runs_flash(q, mask):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(
            *_cuda_layout(q, k, v), 0.0, causal, scale=E**-0.5
        )
    else:
        k, v = expand_heads(k, H), expand_heads(v, H)  # this block's keys, on this rank only
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            *_cuda_layout(q, k, v), _bias(mask, q.dtype, H), True, 0.0, causal, scale=E**-0.5
        )
    return out.transpose(1, 2)[..., :E], lse[..., :t]  # efficient pads its lse


def _cuda_backward(grad_out, q, k, v, out, lse, causal, mask):
    t, H, E, s, K = *q.shape[1:], *k.shape[1:3]
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # random state: read under dropout only
    if _runs_flash(q, mask):
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *_cuda_layout(grad_out, q, k, v, out),
            lse.contiguous(),
            None,
            None,
            t,
            s,
            0.0,
            causal,
            unused,
            unused,
            scale=E**-0.5,
        )
    else:
        k, v = expand_heads(k, H), expand_heads(v, H)
        grad_out, q, k, v, out = _cuda_layout(grad_out, q, k, v, out)
        # exp(score - inf) = 0: what efficient expects
        lse = F.pad(lse, (0, -t % 32), value=float("inf")).contiguous()
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            q,
            k,
            v,
            _bias(mask, q.dtype, H),
            out,
            lse,
            unused,
            unused,
            0.0,
            [True, True, True, False],
            causal,
            scale=E**-0.5,
        )[:3]
    grad_q, *grad_kv = (x.transpose(1, 2)[..., :E] for x in grads)
    return grad_q, *(x.unflatten(2, (K, -1)).sum(3) for x in grad_kv)  # over the copies, if any were made


def _cuda_layout(*xs: Tensor) -> list[Tensor]:
    """Lay tensors out for CUDA kernels: (B, t, heads, E) -> (B, heads, t, E'), E' a multiple of 8."""
    return [pad_head_width(x).transpose(1, 2) for x in xs]


def _scores(q, k, causal, mask):
    """Return the scores (B, K, H/K, t, s) fp32, -inf where a query may not see a key."""
    return math_scores(q, k, causal_mask(q.shape[1], k.shape[1], q.device) if causal else mask)


def _math_forward(q, k, v, causal, mask):
    scores = _scores(q, k, causal, mask)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bkgts,bske->btkge", (scores - lse[..., None]).exp(), v.float())
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def _math_backward(grad_out, q, k, v, out, lse, causal, mask):
    weights = (_scores(q, k, causal, mask) - lse.unflatten(1, (k.shape[2], -1))[..., None]).exp()
    # (B, t, K, H/K, E)
    grad_out, groups, out = (x.float().unflatten(2, (k.shape[2], -1)) for x in (grad_out, q, out))
    grad_weights = torch.einsum("btkge,bske->bkgts", grad_out, v.float())
    # (B, K, H/K, t, 1): weights * grad, over all keys
    mean = (grad_out * out).sum(-1).permute(0, 2, 3, 1)[..., None]
    grad_scores = weights * (grad_weights - mean) / q.shape[-1] ** 0.5
    grad_q = torch.einsum("bkgts,bske->btkge", grad_scores, k.float()).flatten(2, 3)
    grad_k = torch.einsum("bkgts,btkge->bske", grad_scores, groups)
    return grad_q, grad_k, torch.einsum("bkgts,btkge->bske", weights, grad_out)
