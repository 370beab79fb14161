"""Token-summed cross-entropy of the language-model head, in chunks, so that (B, T, V) logits never exist."""

import functools
import importlib.util
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # Hugging Face's label of a token that is not scored
CHUNK_ELEMENTS = 64 * 2**20  # logits held at a time: 256 MiB in fp32, 2,048 tokens of a vocabulary of 32,000
WHOLE_TILES = 256  # a matrix product computes this many rows at a time: a multiple of it wastes none


class WholeVocabulary:
    """Every row of the head's weight is here. parallel/tensor.py has the vocabulary of which a rank has a
    slice."""

    def place(self, labels: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """labels (C,) -> the row of each target among the `n_rows` here, and whether its logit counts here,
        (C,) both."""
        return labels.clamp(min=0), labels != IGNORE

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the numbers that all slices of the vocabulary have in each place."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Their sum in each place."""
        return values


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight^T)[label] in nats over the tokens whose label is not -100.

    hidden (..., D), weight (V, D) of the same dtype, labels (...) int64. Returns a float32 scalar; divide it
    by the number of scored tokens of the whole global batch, so that neither padding nor accumulation changes
    the loss.
    """
    chunk_tokens = tokens_per_chunk(weight.shape[0])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return chunked_cross_entropy(hidden, weight, labels.reshape(-1), chunk_tokens, WholeVocabulary())


def tokens_per_chunk(n_rows: int) -> int:
    """How many tokens' logits are held at a time, for a slice of the vocabulary of `n_rows`."""
    n_tokens = max(1, CHUNK_ELEMENTS // n_rows)
    return n_tokens if n_tokens < WHOLE_TILES else n_tokens // WHOLE_TILES * WHOLE_TILES


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, vocabulary
) -> Tensor:
    """cross_entropy_sum of hidden (N, D), weight (V, D), or a slice of its rows, and labels (N,)."""
    # Whether gradients are wanted is asked here: inside a Function's forward a weight always seems to want
    # one.
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_tokens, vocabulary, wants_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is taken while its logits are at hand, in forward: nothing is kept or computed
    twice.

    Kept for backward: d loss/d hidden (as large as hidden) and d loss/d weight (V, D) in fp32, summed over
    the chunks. Of a slice of the vocabulary the gradient of hidden is a partial sum, and that of the slice's
    weight is complete.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, vocabulary, wants_grad: bool
    ) -> Tensor:
        loss_of_a_chunk = (
            _compiled_loss_of_a_chunk
            if choose_loss(hidden.device)[0] == "compiled"
            else eager_loss_of_a_chunk
        )
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # A frozen head (LoRA) is spared the (V, D) fp32 gradient and a third of the work.
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if wants_grad and ctx.needs_input_grad[1] else None
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            nll_sum, grad = loss_of_a_chunk(hidden[chunk], weight, labels[chunk], vocabulary, wants_grad)
            loss += nll_sum
            if wants_grad:
                grad_hidden[chunk] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[chunk]
            del grad  # else the logits of the next chunk would lie beside it
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        to_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss, to_weight, None, None, None, None


def eager_loss_of_a_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """hidden (C, D), weight (V, D), labels (C,) -> the sum of C tokens' losses, and its gradient by the
    logits (C, V).

    As eager torch runs this, all between the logits and their gradient happens in one (C, V) of fp32 numbers.
    Compiled, those numbers exist in registers only. Source of the two reductions over a split vocabulary:
    Shoeybi et al. 2019, arXiv:1909.08053, sec. 3.
    """
    n_rows, compiled = weight.shape[0], torch.compiler.is_compiling()
    scored = labels != IGNORE  # (C,)
    target, here = vocabulary.place(labels, n_rows)  # (C,) both
    logits = (hidden @ weight.T).float()  # (C, V): softmax in fp32, always
    peak = vocabulary.largest(logits.amax(-1, keepdim=True))  # (C, 1)
    logits -= peak  # so that no exp overflows
    target_logit = logits.gather(1, target[:, None]) * here[:, None]  # (C, 1)
    exps = logits.exp_()  # in the memory of the logits
    sums = torch.cat([target_logit, exps.sum(-1, keepdim=True)], dim=1)  # (C, 2), so that it is one message
    target_logit, norm = vocabulary.total(sums).unbind(1)  # (C,) both
    nll_sum = ((norm.log() - target_logit) * scored).sum()
    if not wants_grad:
        return nll_sum, None
    grad = exps.div_(norm[:, None])  # softmax
    if compiled:  # part of the same pass over the logits, where a scatter would be a pass of its own
        is_target = torch.arange(n_rows, device=labels.device) == target[:, None]
        grad = grad - (is_target & here[:, None]).float()
    else:
        grad.scatter_add_(1, target[:, None], -here[:, None].float())
    return nll_sum, grad.mul_(scored[:, None]).to(hidden.dtype)  # (C, V): d loss/d logits


# ---- eager or compiled ----


@functools.cache
def choose_loss(device: torch.device) -> tuple[str, str]:
    """How the loss of a chunk is computed, `compiled` or `eager`, and the reason, to be printed."""
    if device.type != "cuda":
        return "eager", "on a CPU compiling takes longer than a short run gains"
    has_c_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))  # triton calls one
    missing = [] if importlib.util.find_spec("triton") else ["triton"]
    missing += [] if has_c_compiler else ["C compiler"]
    if missing:
        return "eager", f"there is no {' and no '.join(missing)}; it takes 25 kernels a chunk, and compiled 5"
    return "compiled", "one pass over the logits"


def _compiled_loss_of_a_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, *rest
) -> tuple[Tensor, Tensor | None]:
    if hidden.shape[0] == 1:  # a single row would be compiled anew, for itself
        return eager_loss_of_a_chunk(hidden, weight, labels, *rest)
    # The last chunk of a batch may be shorter: told so, the compiler makes one kernel for all lengths. V
    # stays a number in the code, with which loads are as wide as they can be.
    for tensor in (hidden, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(hidden, weight, labels, *rest)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(eager_loss_of_a_chunk)
