"""Reads a batch for a model of transformers: the columns that its own forward takes."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtensor_llama.errors import UsageError
from dtensor_llama.loss import IGNORE
from parallel.plans.family import refuse


def columns_of(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the columns of a batch, {name: (B, T)}. UsageError if input_ids or labels are missing, or if the
    forward of `model` does not take one of the columns."""
    check_tensors(batch)
    missing = [name for name in ("input_ids", "labels") if name not in batch]
    known = inspect.signature(type(model).forward).parameters
    if missing:
        raise UsageError(f'a batch lacks {missing[0]}; it must have "input_ids" and "labels", (B, T) each.')
    n_sequences = batch["input_ids"].shape[:1]
    for name, column in batch.items():
        fits = column.dim() == 2 and column.shape[:1] == n_sequences
        if not fits or name not in known:
            refuse(
                model,
                f"a batch has {name}, which its forward does not take, or which is not (B, T) with "
                "as many sequences as input_ids; leave it out.",
            )
    check_ids(batch, model.config.get_text_config().vocab_size)
    longest = getattr(model.config, "max_position_embeddings", None)
    n_tokens = batch["input_ids"].shape[1]
    if longest is not None and n_tokens > longest:
        refuse(
            model,
            f"sequences of {n_tokens} tokens are longer than its {longest} positions "
            "(max_position_embeddings); cut them.",
        )
    return dict(batch)


def check_tensors(batch: Mapping[str, Tensor]) -> None:
    """Raise UsageError for a column that is no tensor."""
    for name, column in batch.items():
        if not isinstance(column, Tensor):
            raise UsageError(
                f"a batch has {name} as a {type(column).__name__}; it must be a tensor (B, T). A collate_fn "
                "of the dataloader can make one."
            )


def check_ids(columns: Mapping[str, Tensor], n_ids: int) -> None:
    """Raise UsageError for columns without whole numbers, and for ids that a vocabulary of `n_ids` lacks.
    Columns on a GPU are not looked into: that would wait for it."""
    for name in ("input_ids", "decoder_input_ids", "labels"):
        column = columns.get(name)
        if column is None:
            continue
        if column.numel() == 0 or column.is_floating_point() or column.dtype == torch.bool:
            raise UsageError(
                f"{name} are {list(column.shape)} numbers of {column.dtype}; they must be whole numbers "
                "(B, T), with B and T at least 1."
            )
        if column.device.type != "cpu":
            continue
        ids = column[column != IGNORE] if name == "labels" else column
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_ids:
            ignored = f" Labels that do not count are {IGNORE}." if name == "labels" else ""
            raise UsageError(
                f"{name} has ids from {int(ids.min())} to {int(ids.max())}, and the model's vocabulary is "
                f"0 to {n_ids - 1}; use the model's own tokenizer.{ignored}"
            )
