"""LlamaConfig: the shape of a LLaMA or of another LLaMA-shaped family (families.py), from a preset or from a
Hugging Face `config.json`.

Field names are Hugging Face's. Every field of a `config.json` is used, carried on into the `config.json` of
what is exported, or refused by name, because it asks for arithmetic that `model.py` does not have.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from dtensor_llama.errors import UsageError, number, require
from dtensor_llama.families import (
    FAMILIES,
    FULL,
    LAYER_FIELDS,
    REQUIRED,
    SLIDING,
    Family,
    check_rope_scaling,
    read_fields,
    write_fields,
)
from dtensor_llama.generation_config import EosTokenId, ends_of, joined_ends
from dtensor_llama.places import find_config, read_settings, refuse_hub_name
from dtensor_llama.presets import PRESETS

# ---- Types and ranges of the fields ------------------------------------------------------------------------


def whole_number(name: str, value) -> int:
    """Return `value` if it is a whole number of at least 1; 16.0 is refused, as in transformers."""
    require(type(value) is int and value >= 1, name, value, "a whole number of at least 1")
    return value


def true_or_false(name: str, value) -> bool:
    require(isinstance(value, bool), name, value, "true or false, without quotes")
    return value


epsilon = partial(number, low=0, high=1, rule="a number from 0 to 1, without quotes (LLaMA-2 has 1e-5)")
deviation = partial(number, low=0, high=1, rule="a number from 0 to 1, without quotes (LLaMA-2 has 0.02)")
# Beyond these bounds the frequencies, which are float32, become 0 or infinite.
base_of_frequencies = partial(
    number, low=1e-30, high=1e30, rule="a finite number above 0, without quotes (LLaMA-2 has 10000)"
)


def check_token_ids(name: str, value, vocab_size: int) -> None:
    """Raise UsageError unless `value` is None, a token of the vocabulary or, for EOS, a list of them. A
    pad_token_id of -1 means none in the first conversions of LLaMA, and is carried on as it is."""
    if value is None or (name == "pad_token_id" and type(value) is int and value == -1):
        return
    ids = value if isinstance(value, list) and value and name == "eos_token_id" else [value]
    are_tokens = all(type(one) is int and 0 <= one < vocab_size for one in ids)
    several = ", or a list of them" if name == "eos_token_id" else ""
    rule = f"null or one of the ids 0 to {vocab_size - 1} that vocab_size allows{several}"
    require(are_tokens, name, value, rule)


_CHECKS = {
    **dict.fromkeys((*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), whole_number),
    "rms_norm_eps": epsilon,
    "rope_theta": base_of_frequencies,
    "tie_word_embeddings": true_or_false,
    "initializer_range": deviation,
    "sliding_window": whole_number,
}


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads (multi-head attention)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    # the context it was trained for; beyond it only the quality suffers
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False  # one matrix is both the embedding and the head
    initializer_range: float = 0.02  # standard deviation of the initial weights
    model_type: str = "llama"  # a row of families.py
    # What is done to the frequencies of RoPE, as config.json has it: rope_type linear, dynamic or llama3, and
    # its numbers. None: they stay as they are
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    sliding_window: int | None = None  # how many tokens a token sees, itself among them; None: all before it
    # "sliding_attention" or "full_attention" for each layer; None: all have the window, if there is one
    layer_types: list[str] | None = field(default=None, hash=False)
    # 1 for each layer that rotates queries and keys, 0 for one that does without RoPE; None: all do
    no_rope_layers: list[int] | None = field(default=None, hash=False)
    bos_token_id: int | None = 1
    eos_token_id: EosTokenId = field(default=2, hash=False)
    pad_token_id: int | None = None
    # Fields of a config.json that the arithmetic does not depend on. They are carried on into an export.
    other_fields: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            object.__setattr__(self, name, check(name, value))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            check_token_ids(name, getattr(self, name), self.vocab_size)
        rule = f"one of {', '.join(FAMILIES)}"
        require(self.model_type in FAMILIES, "model_type", self.model_type, rule)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        # LLaMA's own config refuses it even where head_dim is given.
        if self.hidden_size % self.num_attention_heads and (
            self.head_dim is None or self.model_type == "llama"
        ):
            raise UsageError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and transformers opens no such model; change one of them."
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; each key/value head serves a whole group of query heads."
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim {self.head_dim} is not even; RoPE rotates pairs of dims.")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)
        self._check_layers()

    def _check_layers(self) -> None:
        """Raise UsageError unless the settings of single layers fit the family and the number of layers."""
        for name in LAYER_FIELDS - {*self.family.own_fields}:
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}, and model_type={self.model_type} has no such field: "
                    "transformers would ignore it."
                )
        L, types, rotates = self.num_hidden_layers, self.layer_types, self.no_rope_layers
        if types is not None:
            fits = type(types) is list and len(types) == L and all(kind in (SLIDING, FULL) for kind in types)
            require(fits, "layer_types", types, f"a list of {L} times {SLIDING} or {FULL}")
            if SLIDING in types and self.sliding_window is None:
                raise UsageError(f"layer_types has {SLIDING}, and there is no sliding_window that is used.")
        if rotates is not None:
            fits = type(rotates) is list and len(rotates) >= L
            fits = fits and all(type(one) is int and one in (0, 1) for one in rotates)
            require(fits, "no_rope_layers", rotates, f"a list of {L} times 0 or 1")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def window(self, layer: int) -> int | None:
        """Return how many tokens a token sees in this layer, itself among them; None: all before it."""
        slides = self.layer_types is None or self.layer_types[layer] == SLIDING
        return self.sliding_window if slides else None

    def hides_tokens(self, n_tokens: int) -> bool:
        """Return whether in some layer a window hides tokens of a sequence of n_tokens."""
        return any((self.window(layer) or n_tokens) < n_tokens for layer in range(self.num_hidden_layers))

    def rotates(self, layer: int) -> bool:
        """Return whether this layer has RoPE."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    @property
    def n_parameters(self) -> int:
        """Return how many numbers the parameters have together; a tied matrix counts once."""
        block = sum(map(prod, self.block_weights().values()))
        matrices = 1 if self.tie_word_embeddings else 2
        return (
            self.num_hidden_layers * block + self.hidden_size + matrices * self.vocab_size * self.hidden_size
        )

    def block_weights(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a block, by its name inside the block."""
        from dtensor_llama.model import block_shapes  # which imports this file

        return block_shapes(self)

    @staticmethod
    def preset(name: str) -> "LlamaConfig":
        """Return the shape called `name`, for example llama2-7b or tiny-10m.

        Any other name is a UsageError that lists them all."""
        if name not in PRESETS:
            refuse_hub_name(name, "model")
            raise UsageError(f"model={name} is neither a preset nor a folder. Presets: {', '.join(PRESETS)}.")
        return LlamaConfig(**PRESETS[name])

    @staticmethod
    def from_hf(folder: str | Path) -> "LlamaConfig":
        """Read `config.json` of a Hugging Face folder (or that file itself), in its older or newer format.

        The older one has rope_theta, rope_scaling and torch_dtype at top level, the newer one (transformers
        5) rope_parameters and dtype. Raises UsageError if the file is missing, cut short, of another family,
        or asks for arithmetic that model.py does not have.
        """
        path = find_config(folder)
        return config_from_fields(read_settings(path), path)

    def to_hf(self) -> dict:
        """Return a `config.json` that old and new transformers open, without the dtype of the weights."""
        return write_fields(asdict(self))

    @property
    def ends(self) -> list[int]:
        """Return the ids of the tokens that end a text."""
        return ends_of(self.eos_token_id)

    def also_ending_at(self, token_ids: list[int]) -> "LlamaConfig":
        """Add tokens that end a text; each is listed once, in the order in which they came."""
        return replace(self, eos_token_id=joined_ends(self.eos_token_id, token_ids))


def config_from_fields(fields: dict, path: Path) -> LlamaConfig:
    """Make a LlamaConfig from the content of a `config.json`, whose path is named in errors."""
    try:
        return LlamaConfig(**read_fields(fields, {*LlamaConfig.__dataclass_fields__} - {"other_fields"}))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
