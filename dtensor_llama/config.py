"""LlamaConfig: the shape of a LLaMA, from a preset or from any Hugging Face `config.json` of the family.

Field names are Hugging Face's. Every field of a `config.json` is used, carried on into the `config.json` of
what is exported, or refused by name because it would change the arithmetic in a way `model.py` does not
implement.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from dtensor_llama.errors import UsageError
from dtensor_llama.places import expanded, refuse_hub_name

# ---- Types and ranges of the fields ------------------------------------------------------------------------


def whole_number(name: str, value) -> int:
    """Return `value` if it is a whole number of at least 1; 16.0 is refused, as in transformers."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    return value


def number(name: str, value, low: float, high: float, rule: str) -> float:
    """Return `value` as a float if it is a number from `low` to `high`; `rule` states this in words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be {rule}.")
    return float(value)


def true_or_false(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be true or false, without quotes.")
    return value


def epsilon(name: str, value) -> float:
    return number(name, value, 0, 1, "a number from 0 to 1, without quotes (LLaMA-2 has 1e-5)")


def base_of_frequencies(name: str, value) -> float:
    # Beyond these bounds the frequencies, which are float32, become 0 or infinite.
    return number(name, value, 1e-30, 1e30, "a finite number above 0, without quotes (LLaMA-2 has 10000)")


def deviation(name: str, value) -> float:
    return number(name, value, 0, 1, "a number from 0 to 1, without quotes (LLaMA-2 has 0.02)")


def check_token_ids(name: str, value, vocab_size: int) -> None:
    """Raise UsageError unless `value` is None, a token of the vocabulary or, for EOS, a list of them. A
    pad_token_id of -1 means none in the first conversions of LLaMA, and is carried on as it is."""
    if value is None or (name == "pad_token_id" and type(value) is int and value == -1):
        return
    ids = value if isinstance(value, list) and value and name == "eos_token_id" else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocab_size:
            several = ", or a list of them" if name == "eos_token_id" else ""
            raise UsageError(
                f"{name} is {value!r}; it must be null or one of the ids 0 to {vocab_size - 1} that "
                f"vocab_size allows{several}."
            )


_CHECKS = {
    "vocab_size": whole_number,
    "hidden_size": whole_number,
    "intermediate_size": whole_number,
    "num_hidden_layers": whole_number,
    "num_attention_heads": whole_number,
    "num_key_value_heads": whole_number,
    "head_dim": whole_number,
    "max_position_embeddings": whole_number,
    "rms_norm_eps": epsilon,
    "rope_theta": base_of_frequencies,
    "tie_word_embeddings": true_or_false,
    "initializer_range": deviation,
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
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
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
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        # This holds even where head_dim is given, because transformers refuses it.
        if self.hidden_size % self.num_attention_heads:
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

    @property
    def n_parameters(self) -> int:
        """The number of trainable numbers; a tied matrix counts once."""
        block = sum(prod(shape) for shape in self.block_weights().values())
        matrices = 1 if self.tie_word_embeddings else 2
        return (
            self.num_hidden_layers * block + self.hidden_size + matrices * self.vocab_size * self.hidden_size
        )

    def block_weights(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of a block, by its name inside the block."""
        D, F = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (queries, D),
            "self_attn.k_proj.weight": (keys, D),
            "self_attn.v_proj.weight": (keys, D),
            "self_attn.o_proj.weight": (D, queries),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }

    @staticmethod
    def preset(name: str) -> "LlamaConfig":
        """Return the shape called `name`, for example llama2-7b or tiny-10m. The UsageError for others lists
        all."""
        if name not in PRESETS:
            refuse_hub_name(name, "model")
            raise UsageError(f"model={name} is neither a preset nor a folder. Presets: {', '.join(PRESETS)}.")
        return PRESETS[name]

    @staticmethod
    def from_hf(folder: str | Path) -> "LlamaConfig":
        """Read `config.json` of a Hugging Face folder (or that file itself), in both generations of its
        format.

        The older one has rope_theta, rope_scaling and torch_dtype at top level, the newer one (transformers
        5) rope_parameters and dtype. Raises UsageError if the file is missing, cut short, of another family,
        or asks for arithmetic that model.py does not have.
        """
        path = Path(expanded(str(folder), "model"))
        refuse_hub_name(str(folder), "model")
        if path.is_dir():
            refuse_adapter(path)
            path = path / "config.json"
        if not path.is_file():
            raise UsageError(f"{path} does not exist; a Hugging Face model folder has a config.json.")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not complete JSON ({error}); copy the file again.") from None
        if not isinstance(fields, dict):
            raise UsageError(
                f"{path} holds a {type(fields).__name__}, not a model's settings; copy the file again."
            )
        return config_from_fields(fields, path)

    def to_hf(self) -> dict:
        """Return a `config.json` that old and new transformers open, without the dtype of the weights."""
        fields = asdict(self)
        other_fields = fields.pop("other_fields")
        fields |= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_cache": other_fields.get("use_cache", True),
            # Readers before transformers 5 know rope_theta (above) alone, later ones prefer rope_parameters.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        return fields | {name: value for name, value in other_fields.items() if name not in fields}

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        return ends_of(self.eos_token_id)

    def also_ending_at(self, token_ids: list[int]) -> "LlamaConfig":
        """Add tokens that end a text; each is listed once, in the order in which they came."""
        ends = list(dict.fromkeys([*ends_of(self.eos_token_id), *token_ids]))
        return replace(self, eos_token_id=ends if len(ends) > 1 else (ends or [None])[0])

    def without_token_fields(self) -> "LlamaConfig":
        """Leave out carried fields that name tokens, which mean nothing for another tokenizer."""
        kept = {name: value for name, value in self.other_fields.items() if not _names_tokens(name)}
        return replace(self, other_fields=kept)


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM")

# What these fields may hold without changing the arithmetic of model.py. Absent and null are always fine.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "resid_pdrop": (0, 0.0),
    "embd_pdrop": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "quantization": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}


# Fields of a config.json that would contradict what is exported: the rotation and the dtype, which are
# written anew, and statements about the files and the program that the base model came from.
_NOT_CARRIED = (
    *("rope_scaling", "dtype", "torch_dtype"),
    *("_name_or_path", "transformers_version", "auto_map"),
)


def config_from_fields(fields: dict, path: Path) -> LlamaConfig:
    """Make a LlamaConfig from the content of a `config.json`, whose path is named in errors."""
    family = fields.get("model_type")
    if family != "llama":
        raise UsageError(
            f"{path}: model_type is {family!r}; only 'llama' is supported (LLaMA 1 and 2, and models of "
            "their architecture)."
        )
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise UsageError(f"{path}: {', '.join(missing)} missing; the file is not a whole LLaMA config.json.")
    refused = [
        f"{name}={fields[name]!r}"
        for name, neutral in _NEUTRAL.items()
        if fields.get(name) is not None and fields[name] not in neutral
    ]
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or not any(name in architectures for name in _ARCHITECTURES):
        refused.append(f"architectures={architectures!r}")
    rope_theta = 10_000.0 if fields.get("rope_theta") is None else fields["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UsageError(f"{path}: {name} is {rope!r}; it must be an object.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        extra = {
            key: value
            for key, value in rope.items()
            if key not in ("rope_type", "type", "rope_theta")
            and not (key == "partial_rotary_factor" and value in (None, 1))
        }
        if kind != "default" or (name == "rope_parameters" and extra):
            refused.append(f"{name}={rope!r}")
        if rope.get("rope_theta") is not None:
            rope_theta = rope["rope_theta"]
    if refused:
        raise UsageError(
            f"{path}: not supported: {'; '.join(refused)}. Each would change the arithmetic, so it is "
            "refused rather than ignored (supported: silu, no biases, no dropout, plain RoPE)."
        )
    # Hugging Face's own defaults, which hold for an absent field or a null, where ours (LLaMA-2's) differ.
    known = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    known |= {name: fields[name] for name in LlamaConfig.__dataclass_fields__ if fields.get(name) is not None}
    # A null means no such token for these two; if they are absent, they have LLaMA's ids.
    known |= {
        name: None for name in ("bos_token_id", "eos_token_id") if name in fields and fields[name] is None
    }
    written = LlamaConfig().to_hf().keys() - {"use_cache"}
    known["other_fields"] = {
        name: value for name, value in fields.items() if name not in written and name not in _NOT_CARRIED
    }
    try:
        return LlamaConfig(**known | {"rope_theta": rope_theta})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_generation_config(folder: str | Path) -> dict:
    """Return the content of `generation_config.json` in a Hugging Face folder, empty if there is none. Raises
    UsageError if it is damaged."""
    path = Path(folder, "generation_config.json")
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not complete JSON ({error}); copy the file again.") from None
    if not isinstance(settings, dict):
        raise UsageError(
            f"{path} holds a {type(settings).__name__}, not settings of generation; copy the file again."
        )
    ends = settings.get("eos_token_id")
    if not all(type(end) is int for end in ends_of(ends)):
        raise UsageError(f"{path}: eos_token_id is {ends!r}; it must be a token id, a list of them, or null.")
    return settings


def ends_of(eos_token_id: int | list[int] | None) -> list[int]:
    """Return the tokens that end a text as a list, from any of the three forms that a file may have."""
    if eos_token_id is None:
        return []
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]


def generation_config(base: dict, config: LlamaConfig, same_tokens: bool) -> dict:
    """Return the content of the `generation_config.json` of a model that was trained from another one.

    base: the content of the other model's file. Its settings stay, and generation stops at every token that
        ended a text for the base model or ends one for `config`
    same_tokens: whether the tokenizer is still the base model's; else settings that name tokens are left out
    """
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: value for name, value in ids.items() if value is not None}
    if not base:
        return {"_from_model_config": True, **ids}
    kept = {name: value for name, value in base.items() if name != "_from_model_config"}
    if not same_tokens:
        kept = {name: value for name, value in kept.items() if not _names_tokens(name)}
    ends = list(dict.fromkeys([*ends_of(kept.get("eos_token_id")), *ends_of(config.eos_token_id)]))
    one_or_several = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    return {**ids, **kept, **one_or_several}


def _names_tokens(name: str) -> bool:
    """Return whether the value of a setting consists of token ids."""
    endings = ("token_id", "token_ids", "_tokens", "words_ids", "decoder_ids", "sequence_bias")
    return name.endswith(endings) and not name.startswith(("max_", "min_"))


def refuse_adapter(folder: Path) -> None:
    """Raise UsageError if a folder holds a LoRA adapter in peft's format instead of a model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
                "base_model_name_or_path"
            )
        except (ValueError, AttributeError):
            base = None
        raise UsageError(
            f"{folder}: a LoRA adapter, not a whole model: a few matrices beside the weights of "
            f"{base or 'a base model'}. Give the folder of the merged model (hf/ of the run), or merge it "
            "with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )


def _llama1(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


def _tiny(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


_LLAMA2 = LlamaConfig()
PRESETS: dict[str, LlamaConfig] = {
    # arXiv:2307.09288 and the config.json files Meta published beside it; context 4096
    "llama2-7b": _LLAMA2,
    "llama2-13b": replace(
        _LLAMA2,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
    ),
    "llama2-70b": replace(
        _LLAMA2,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
    # arXiv:2302.13971, table 2; context 2048
    "llama1-7b": _llama1(4096, 11008, 32, 32),
    "llama1-13b": _llama1(5120, 13824, 40, 40),
    "llama1-33b": _llama1(6656, 17920, 60, 52),
    "llama1-65b": _llama1(8192, 22016, 80, 64),
    # for laptops and tests: the tied matrix is most of a small model, so the vocabulary is small too
    "tiny-1m": _tiny(1024, 128, 352, 4, 4, 2),
    "tiny-5m": _tiny(4096, 256, 704, 6, 8, 4),
    "tiny-10m": _tiny(4096, 320, 864, 8, 5, 5),
    "tiny-15m": _tiny(4096, 384, 1024, 8, 6, 2),
    "small-110m": LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    ),
}
