"""Reads a batch for a model of transformers: the columns that its own forward takes."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from dtensor_llama.errors import UsageError
from parallel.plans.family import refuse


def columns_of(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the columns of a batch, {name: (B, T)}. UsageError if input_ids or labels are missing, or if the
    forward of `model` does not take one of the columns."""
    missing = [name for name in ("input_ids", "labels") if name not in batch]
    known = inspect.signature(type(model).forward).parameters
    if missing:
        raise UsageError(f'a batch lacks {missing[0]}; it must have "input_ids" and "labels", (B, T) each.')
    n_rows = len(batch["input_ids"])
    for name, column in batch.items():
        fits = isinstance(column, Tensor) and column.dim() == 2 and len(column) == n_rows
        if not fits or name not in known:
            refuse(
                model,
                f"a batch has {name}, which its forward does not take, or which is no tensor (B, T) of the "
                f"{n_rows} rows of input_ids; leave it out.",
            )
    _refuse_ids_out_of_range(batch, model)
    return dict(batch)


def _refuse_ids_out_of_range(batch: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise UsageError for ids that the vocabulary lacks, and rows that are longer than a table of positions.
    Columns on a GPU are not looked at: that would wait for it."""
    n_ids = model.config.get_text_config().vocab_size
    for name in ("input_ids", "decoder_input_ids", "labels"):
        column = batch.get(name)
        if column is None or column.device.type != "cpu" or column.numel() == 0:
            continue
        low, high = int(column.min()), int(column.max())
        if high >= n_ids or (low < 0 and name != "labels"):
            refuse(model, f"{name} has ids from {low} to {high}, and its vocabulary is 0 to {n_ids - 1}.")
    longest = getattr(model.config, "max_position_embeddings", None)
    n_tokens = batch["input_ids"].shape[1]
    if longest is not None and n_tokens > longest:
        refuse(
            model,
            f"rows of {n_tokens} tokens are longer than its {longest} positions "
            "(max_position_embeddings); cut them.",
        )
