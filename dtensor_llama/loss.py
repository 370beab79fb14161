"""The token loss and the language-model head, in chunks of tokens, so that (B, T, V) logits never exist.

A token loss is a plain function of the logits of C tokens, their labels, and the vocabulary. The default:

    def token_nll(logits, labels, vocab):                        # (C, V) float32, (C,) -> (C,) float32
        return vocab.logsumexp(logits) - vocab.pick(logits, labels)

To train with another one, write it and set it once, `model.token_loss = mine`, before `parallelize`: every
pipeline stage and every layout then uses it. With a z-loss, for example:

    def nll_with_z_loss(logits, labels, vocab):
        log_z = vocab.logsumexp(logits)
        return log_z - vocab.pick(logits, labels) + 1e-4 * log_z**2

What looks at the whole vocabulary goes through `vocab` (see Vocabulary): where tensor parallelism splits the
vocabulary, `logits` has this rank's V/tp columns only. What looks at one logit at a time (a temperature, a
softcap) and at one token at a time (weights) needs no `vocab`.

Everything else is done here: the head's matrix product, the chunks, and the gradients, which autograd derives
from the function. Tokens without a label (-100) add nothing to the loss. The function is called with label 0
for them, and must return a finite number there too. Only the logits get a gradient, so the function can have
no trained parameters of its own.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtensor_llama.errors import UsageError

IGNORE = -100  # Hugging Face's label of a token that is not scored
CHUNK_ELEMENTS = 64 * 2**20  # logits held at a time: 256 MiB in fp32, 2,048 tokens of a vocabulary of 32,000
EAGER_ELEMENTS = 32 * 2**20  # the same where autograd runs eagerly, and keeps two tensors of their size
WHOLE_TILES = 256  # a matrix product computes this many rows at a time: a multiple of it wastes none


class Vocabulary:
    """Answers what a token loss asks about the whole vocabulary. Here a rank has all V columns of the logits.

    `x` is (C, V): the logits, or anything with one column for each of them. Every answer is (C,), the same on
    all ranks, and autograd knows its gradient. parallel/tensor.py has the vocabulary whose columns are split
    over tp, which overrides `pick` and the three methods at the end.
    """

    def __init__(self, size: int):
        self.size = size  # V
        self.n_columns = size  # of x on each rank; with a split vocabulary the last rank may have fewer

    def logsumexp(self, x: Tensor) -> Tensor:
        """Return the log of the sum of exp(x) over the vocabulary: the normaliser of the softmax."""
        peak = self.largest(x.detach().amax(-1, keepdim=True))  # (C, 1), so that no exp overflows
        return (self.total(sum_of_exp(x, peak)).log() + peak).squeeze(-1)

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the column of each token's label; labels (C,)."""
        return take_columns(x, labels)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the vocabulary."""
        return self.total(x.sum(-1))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the vocabulary, as label smoothing needs it."""
        return self.sum(x) / self.size

    def inputs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what this rank multiplies: the hidden states of all tokens, and its rows of the head."""
        return hidden, weight

    def largest(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum of x over the tp ranks, without a gradient; here x itself."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Return the elementwise sum of x over the tp ranks, with its gradient; here x itself."""
        return x


def sum_of_exp(x: Tensor, peak: Tensor) -> Tensor:
    """Return the sum of exp(x - peak) over each row of x (C, n); peak and result (C, 1)."""
    if torch.compiler.is_compiling():
        return (x - peak).exp().sum(-1, keepdim=True)
    return _SumOfExp.apply(x, peak)


class _SumOfExp(torch.autograd.Function):
    """Keeps one tensor of x's size: the gradient takes the place of the exponentials."""

    @staticmethod
    def forward(ctx, x: Tensor, peak: Tensor) -> Tensor:
        exps = (x - peak).exp_()
        ctx.save_for_backward(exps)
        return exps.sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (exps,) = ctx.saved_tensors
        return exps.mul_(grad), None


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Return x[i, columns[i]] for each row i of x (C, n), or 0 where columns[i] is negative; (C,)."""
    # This is fused into one pass with what comes before and after, which the gradient of a gather is not.
    if torch.compiler.is_compiling():
        return torch.where(torch.arange(x.shape[1], device=x.device) == columns[:, None], x, 0.0).sum(-1)
    # The gradient of the logits themselves is added up as C numbers, not as C x n that are nearly all zero.
    taken = x.gather(1, columns.clamp(min=0)[:, None], sparse_grad=x.is_leaf and not x.is_meta).squeeze(-1)
    return torch.where(columns >= 0, taken, 0.0)


TokenLoss = Callable[[Tensor, Tensor, Vocabulary], Tensor]
LossAndGradient = tuple[Tensor, Tensor | None]  # of a chunk: the sum of its losses, and that by the logits


def token_nll(logits: Tensor, labels: Tensor, vocab: Vocabulary) -> Tensor:
    """Return -log softmax(logits)[label] in nats of each token: cross-entropy."""
    return vocab.logsumexp(logits) - vocab.pick(logits, labels)


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss = token_nll,
    vocab: Vocabulary | None = None,
) -> Tensor:
    """Return the float32 sum of `token_loss` over the tokens that have a label; the same on all tp ranks.

    hidden (..., D), of all tokens or of this tp rank's share, weight (V, D) of the same dtype, labels (...)
    int64 of all tokens, -100 where there is none. Divide the sum by the number of labels in the whole global
    batch, so that neither padding nor accumulation changes the loss.
    """
    vocab = vocab or Vocabulary(weight.shape[0])
    hidden, weight = vocab.inputs(hidden, weight)
    # Asked here, because inside a Function's forward a weight always seems to want a gradient.
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_of = functools.partial(_scored_sum, token_loss=token_loss, vocab=vocab)
    hidden, labels = hidden.flatten(0, -2), labels.flatten()  # (N, D), (N,)
    return _ChunkedTokenLoss.apply(hidden, weight, labels, loss_of, vocab.n_columns, wants_grad)


def tokens_per_chunk(n_columns: int, eager_on: torch.device | None = None) -> int:
    """Return how many tokens have logits at a time, on a rank with `n_columns` of the vocabulary.

    eager_on: the device of a loss that is not compiled. On a CPU few tokens are faster: memory that is small
        enough is used again, where the system would have to provide and clear new memory for each chunk.
    """
    elements = min(CHUNK_ELEMENTS, EAGER_ELEMENTS) if eager_on else CHUNK_ELEMENTS
    if eager_on and eager_on.type == "cpu":
        elements = min(elements, max(2**20, WHOLE_TILES * n_columns))
    n_tokens = max(1, elements // n_columns)
    return n_tokens if n_tokens < WHOLE_TILES else n_tokens // WHOLE_TILES * WHOLE_TILES


class _ChunkedTokenLoss(torch.autograd.Function):
    """Computes the gradient of a chunk of tokens in forward, while the logits of the chunk exist.

    So logits are neither kept until backward nor computed twice. Kept for backward are d loss/d hidden, which
    is as large as hidden, and d loss/d weight (V, D) in fp32, summed over the chunks. With a split vocabulary
    the gradient of hidden is a partial sum over tp, and that of this rank's rows of the weight is complete.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_of: Callable,
        n_columns: int,
        wants_grad: bool,
    ) -> Tensor:
        if choose_loss(hidden.device)[0] == "compiled":
            loss_of_a_chunk, chunk_tokens = _compiled_loss_of_a_chunk, tokens_per_chunk(n_columns)
        else:
            chunk_tokens = tokens_per_chunk(n_columns, eager_on=hidden.device)
            logits = hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight), dtype=torch.float32)
            loss_of_a_chunk = functools.partial(_eager_loss_of_a_chunk, logits)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # A frozen head (LoRA) is spared the (V, D) fp32 gradient and a third of the work.
        wants_grad_weight = wants_grad and ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad_weight else None
        losses = []
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            chunk_loss, grad = loss_of_a_chunk(hidden[chunk], weight, labels[chunk], loss_of, wants_grad)
            losses.append(chunk_loss)
            if wants_grad:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if wants_grad_weight and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[chunk])
            elif wants_grad_weight:
                grad_weight += grad.T @ hidden[chunk]
            del grad  # else the logits of the next chunk would lie beside it
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        to_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss, to_weight, None, None, None, None


def _eager_loss_of_a_chunk(
    logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, loss_of: Callable, wants_grad: bool
) -> LossAndGradient:
    """Return the sum of the losses of C tokens, and its gradient by the logits (C, V).

    hidden (C, D), weight (V, D), labels (C,). logits: memory for (C, V), or more, in fp32.
    """
    logits = logits[: len(hidden)]
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    with torch.set_grad_enabled(wants_grad):
        loss = loss_of(logits.requires_grad_(wants_grad), labels)
    if not wants_grad:
        return loss, None
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), (grad.to_dense() if grad.is_sparse else grad).to(hidden.dtype)


def _scored_sum(logits: Tensor, labels: Tensor, token_loss: TokenLoss, vocab: Vocabulary) -> Tensor:
    """Return the sum of the losses of the tokens that have a label; the others are given label 0."""
    losses = token_loss(logits, labels.clamp(min=0), vocab)
    if losses.shape != labels.shape:
        raise UsageError(
            f"the token loss returned a tensor of shape {list(losses.shape)} for {len(labels)} tokens; it "
            "must return one number for each of them, and not their sum or mean."
        )
    return (losses * (labels != IGNORE)).sum()


# ---- eager or compiled ----


@functools.cache
def choose_loss(device: torch.device) -> tuple[str, str]:
    """Return how the loss of a chunk is computed, `compiled` or `eager`, and the reason, to be printed."""
    if device.type != "cuda":
        return "eager", "on a CPU compiling takes longer than a short run gains"
    has_c_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))  # triton calls one
    missing = [] if importlib.util.find_spec("triton") else ["triton"]
    missing += [] if has_c_compiler else ["C compiler"]
    if missing:
        return (
            "eager",
            f"there is no {' and no '.join(missing)}; it takes 34 kernels a chunk, and compiled 5",
        )
    return "compiled", "one pass over the logits"


def _compiled_loss_of_a_chunk(hidden: Tensor, weight: Tensor, labels: Tensor, *rest) -> LossAndGradient:
    if hidden.shape[0] == 1:  # torch.compile would make a graph of its own for a single token
        logits = hidden.new_empty(1, len(weight), dtype=torch.float32)
        return _eager_loss_of_a_chunk(logits, hidden, weight, labels, *rest)
    # The last chunk of a batch may be shorter: with this the compiler makes one kernel for all lengths. V
    # stays a number in the code, with which loads are as wide as they can be.
    for tensor in (hidden, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(hidden, weight, labels, *rest)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(loss_and_gradient)


def loss_and_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_of: Callable, wants_grad: bool
) -> LossAndGradient:
    """Compute what _eager_loss_of_a_chunk computes, as one graph whose fp32 numbers stay in registers."""
    logits = (hidden @ weight.T).float()
    if not wants_grad:
        return loss_of(logits, labels), None
    grad, loss = torch.func.grad_and_value(loss_of)(logits, labels)
    return loss, grad.to(hidden.dtype)
