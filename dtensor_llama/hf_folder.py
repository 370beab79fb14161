"""The Hugging Face folder that a run starts from, and the one that it leaves.

A run starts from a preset (a shape alone) or from a folder, of which it takes the shape, the weights, the
tokenizer and the generation config. It exports such a folder again, and transformers opens that as it is.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dtensor_llama.atomic import on_all_ranks, on_first_rank
from dtensor_llama.config import LlamaConfig
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.generation_config import generation_config, read_generation_config, without_token_ids
from dtensor_llama.weights import fingerprint, save_hf


@dataclass(frozen=True)
class Base:
    """Names what a run starts from.

    model: a preset or a Hugging Face folder
    tokenizer: a Hugging Face folder, tokenizer.json or SentencePiece .model; None: that in the model's folder
    random_init: take only the shape from the folder, not its weights
    """

    model: str
    tokenizer: str | None = None
    random_init: bool = False

    def check(self) -> None:
        if self.random_init and not Path(self.model).is_dir():
            raise UsageError(
                f"random_init=True takes the shape of a Hugging Face folder, and model={self.model} is none; "
                "a preset starts from random weights anyway."
            )

    @property
    def weights(self) -> Path | None:
        """The folder that the weights are loaded from; None: they are initialized at random."""
        return Path(self.model) if Path(self.model).is_dir() and not self.random_init else None

    @property
    def fingerprint(self) -> str:
        """A hash of the weights, or a word where they are random and follow from the seed."""
        return fingerprint(self.weights) if self.weights else "random"

    @property
    def tokenizer_path(self) -> Path:
        if self.tokenizer is not None:
            return Path(self.tokenizer)
        if Path(self.model).is_dir():
            return Path(self.model)
        LlamaConfig.preset(self.model)  # refuses an unknown name first: it is the more important mistake
        raise UsageError(
            f"`tokenizer` is missing, and the preset model={self.model} has none of its own; give a Hugging "
            "Face folder, a tokenizer.json or a SentencePiece .model."
        )

    def read_config(self, tokenizer: Tokenizer) -> LlamaConfig:
        """Return the shape to train, with the tokenizer's ids of begin and end."""
        looks_like_path = os.sep in self.model or Path(self.model).exists()
        config = LlamaConfig.from_hf(self.model) if looks_like_path else LlamaConfig.preset(self.model)
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"`tokenizer` has {tokenizer.vocab_size} tokens and model={self.model} a vocabulary of "
                f"{config.vocab_size}; use the tokenizer the model was made for, or a model with a "
                f"vocabulary of at least {tokenizer.vocab_size}."
            )
        if Path(self.model).is_dir() and self.tokenizer is None:
            return config  # its config.json has the ids of its own tokenizer, of which several may end a text
        carried = without_token_ids(config.other_fields)
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return replace(config, other_fields=carried, **ends)

    def generation_config(self, config: LlamaConfig) -> dict:
        """Return the generation_config.json for the exported model.

        It is that of the base model, if there is one, with the end tokens of `config`, the trained shape."""
        base = read_generation_config(self.weights) if self.weights else {}
        return generation_config(base, config, same_tokens=self.tokenizer is None)


def export(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    generation: dict | None = None,
) -> None:
    """Write a folder that transformers opens. All ranks enter: each writes the shards that it holds.

    model: the module with the weights to save, which may be a StandIn
    generation: the content of generation_config.json; None: that of `model.generation_config`, if it has one
    """
    save_hf(model, folder, dtype=dtype, generation=generation)
    save_tokenizer(tokenizer, folder, chat_template)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None) -> None:
    """Write the tokenizer's files into a folder. All ranks enter, and return when rank 0 has written them."""
    everywhere = partial(on_all_ranks, f"saving the tokenizer in {folder}")
    on_first_rank(everywhere, lambda: tokenizer.save(folder, chat_template))
