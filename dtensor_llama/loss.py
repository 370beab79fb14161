"""Token-summed cross-entropy of the language-model head, in chunks, so that (B, T, V) logits never exist."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100                # Hugging Face's label of a token that is not scored
CHUNK_ELEMENTS = 64 * 2**20  # logits held at a time: 256 MiB in fp32, 2,097 tokens of a vocabulary of 32,000


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight^T)[label] in nats over the tokens whose label is not -100.

    hidden (..., D), weight (V, D) of the same dtype, labels (...) int64. Returns a float32 scalar; divide it by the
    number of scored tokens of the whole global batch, so that neither padding nor accumulation changes the loss.
    """
    # Whether gradients are wanted is asked here: inside a Function's forward a weight always seems to want one.
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), wants_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is taken while its logits are at hand, in forward: nothing is kept or computed twice.

    Kept for backward: d loss/d hidden (as large as hidden) and d loss/d weight (V, D) in fp32, summed over the chunks.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, wants_grad: bool) -> Tensor:
        chunk_tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # A frozen head (LoRA) is spared the (V, D) fp32 gradient and a third of the work.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad and ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            scored = labels[chunk] != IGNORE                                      # (C,)
            target = labels[chunk].clamp(min=0)[:, None]                          # (C, 1)
            logits = (hidden[chunk] @ weight.T).float()                           # (C, V): softmax in fp32, always
            log_norm = logits.logsumexp(-1, keepdim=True)                         # (C, 1)
            loss += ((log_norm - logits.gather(1, target)).squeeze(1) * scored).sum()
            if wants_grad:
                grad = logits.sub_(log_norm).exp_()                               # softmax, in the memory of the logits
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
                grad = grad.mul_(scored[:, None]).to(hidden.dtype)                # d loss/d logits
                grad_hidden[chunk] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        to_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss, to_weight, None, None
