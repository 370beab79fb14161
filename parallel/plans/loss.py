"""The loss of a model of transformers, of the logits that its own forward returns.

Under tp its head returns this rank's V/tp columns of the logits: what the model does to them one by one (a
softcap, a scale) is the same for some of them, and the loss adds up its parts over tp (parallel/tensor.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dtensor_llama.loss import IGNORE, Vocabulary, token_nll
from parallel.plans.family import Family
from parallel.plans.styles import Boundary, own_columns
from parallel.tensor import SplitVocabulary

Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits and labels


class HfBatch(NamedTuple):
    """Holds a microbatch of a family: as dtensor_llama's Batch, with the other columns (attention_mask)."""

    tokens: Tensor
    labels: Tensor  # as they came
    others: dict[str, Tensor]
    positions: None = None


def loss_sum(model: nn.Module, family: Family, batch: HfBatch, criterion: Criterion | None = None) -> Tensor:
    """Return the sum of the token losses of a microbatch, float32, the same on all tp ranks.

    criterion: the user's, a mean over scored labels; it gets whole logits, and the labels as they came."""
    inputs = {"input_ids": batch.tokens, **batch.others}
    if family.inputs is not None:
        inputs = family.inputs(model, inputs, batch.labels)
    keeps_own = own_columns(model.get_submodule(family.head)) if criterion is None else nullcontext()
    with keeps_own:
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    return sum_of_losses(logits, batch.labels, family, model.boundary, criterion)


def sum_of_losses(
    logits: Tensor,
    labels: Tensor,
    family: Family,
    boundary: Boundary | None,
    criterion: Criterion | None = None,
) -> Tensor:
    """Return the sum of the losses of logits (B, T, V), or under tp of this rank's columns of them."""
    logits, targets = logits.float(), targets_of(family, labels)
    if criterion is not None:
        return summed(criterion, logits, labels, int((targets != IGNORE).sum()))
    vocabulary = Vocabulary(logits.shape[-1])
    if boundary is not None:
        vocabulary = SplitVocabulary(boundary.n_tokens, boundary.mesh, sequence_parallel=False)
    targets = targets.flatten()
    losses = token_nll(logits.flatten(0, -2), targets.clamp(min=0), vocabulary)
    return (losses * (targets != IGNORE)).sum()


def summed(criterion: Criterion, logits: Tensor, labels: Tensor, n_targets: int) -> Tensor:
    """Return the user's mean as a sum over the scored tokens. A mean over nothing is nan; nothing scored adds
    nothing, but every rank must go through backward."""
    return criterion(logits, labels) * n_targets if n_targets else logits.sum() * 0


def targets_of(family: Family | None, labels: Tensor) -> Tensor:
    """Return for each position the label that is scored there, in most families and our own Llama (None) that
    of the token after it."""
    shifts = family is None or family.shifts_labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE) if shifts else labels
