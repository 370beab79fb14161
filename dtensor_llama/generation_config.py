"""The content of a generation_config.json: how to sample, and which tokens end a text."""

from pathlib import Path
from typing import Any

from dtensor_llama.errors import require
from dtensor_llama.places import read_settings

EosTokenId = int | list[int] | None  # the tokens that end a text, in the three forms that a file may have


def read_generation_config(folder: str | Path) -> dict:
    """Return the content of `generation_config.json` in a Hugging Face folder, empty if there is none. Raises
    UsageError if it is damaged."""
    path = Path(folder, "generation_config.json")
    settings = read_settings(path)
    ends = settings.get("eos_token_id")
    are_ids = all(type(end) is int for end in ends_of(ends))
    require(are_ids, f"{path}: eos_token_id", ends, "a token id, a list of them, or null")
    return settings


def generation_config(base: dict, config: Any, same_tokens: bool) -> dict:
    """Return the content of the `generation_config.json` of a model that was trained from another one, or,
    with an empty base, from scratch.

    base: the content of the other model's file. Its settings stay, and generation stops at every token that
        ended a text for the base model or ends one for `config`
    same_tokens: whether the tokenizer is still the base model's; else settings that name tokens are left out
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(config, name, None) for name in names}  # a config of transformers may lack some
    ids = {name: value for name, value in ids.items() if value is not None}
    if not base:
        return {"_from_model_config": True, **ids}
    kept = {name: value for name, value in base.items() if name != "_from_model_config"}
    if not same_tokens:
        kept = without_token_ids(kept)
    ends = joined_ends(kept.get("eos_token_id"), config.eos_token_id)
    return {**ids, **kept} | ({} if ends is None else {"eos_token_id": ends})


def ends_of(eos_token_id: EosTokenId) -> list[int]:
    """Return the tokens that end a text as a list."""
    if eos_token_id is None:
        return []
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]


def joined_ends(*eos_token_ids: EosTokenId) -> EosTokenId:
    """Return an eos_token_id with the tokens of all of them; each is listed once, in the order they came."""
    ends = list(dict.fromkeys(end for several in map(ends_of, eos_token_ids) for end in several))
    return ends if len(ends) > 1 else (ends or [None])[0]


def without_token_ids(settings: dict) -> dict:
    """Leave out settings whose values are token ids, which mean nothing for another tokenizer."""
    endings = ("token_id", "token_ids", "_tokens", "words_ids", "decoder_ids", "sequence_bias")
    counts = ("max_", "min_")  # max_new_tokens is a number of tokens
    return {
        name: value
        for name, value in settings.items()
        if name.startswith(counts) or not name.endswith(endings)
    }
