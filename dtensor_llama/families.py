"""The families of models that are shaped like LLaMA: in what their config.json files differ, as a table.

family        a model_type of transformers. Its weights have LLaMA's names and its blocks LLaMA's arithmetic,
              but for what its row says
rope_scaling  what is done to the frequencies of RoPE for long contexts, under the names that config.json has

Every field of a config.json is used, carried on into the config.json of what is exported, or refused by name
because it would change the arithmetic in a way that model.py does not have. This file knows fields and their
values; config.py makes a LlamaConfig of them.
"""

from typing import Any, NamedTuple

from dtensor_llama.errors import UsageError, number, require


class Family(NamedTuple):
    """Describes what a model_type has beside LLaMA, and what its config.json means."""

    name: str  # transformers calls its classes LlamaConfig, LlamaForCausalLM, ... after it
    defaults: dict[str, Any]  # what transformers takes for a field that is not in the file
    # fields of its config.json that only some families have
    own_fields: tuple[str, ...] = ()
    # fields of its config.json with which model.py computes in one way only
    fixed_fields: tuple[str, ...] = ("hidden_act", "attention_dropout")
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have biases
    qk_norm: bool = False  # each head of q and of k is normalised before RoPE (arXiv:2302.05442)


_ENDS_OF_LLAMA = {"bos_token_id": 1, "eos_token_id": 2}
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
_ENDS_OF_SMOLLM3 = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}
_NO_BIASES = ("attention_bias", "mlp_bias")

FAMILIES = {
    # LLaMA 1 to 3.2, CodeLlama, TinyLlama, SmolLM 1 and 2, and most models that were trained from scratch
    "llama": Family(
        "Llama",
        {"max_position_embeddings": 2048, **_ENDS_OF_LLAMA},
        own_fields=("head_dim",),
        fixed_fields=("hidden_act", "attention_dropout", *_NO_BIASES),
    ),
    # arXiv:2310.06825. In every layer a token sees only the last `sliding_window` ones
    "mistral": Family(
        "Mistral",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            **_ENDS_OF_LLAMA,
        },
        own_fields=("head_dim", "sliding_window"),
    ),
    # Qwen2, arXiv:2407.10671, and Qwen2.5, arXiv:2412.15115
    "qwen2": Family(
        "Qwen2",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            **_NO_ENDS,
        },
        own_fields=("use_sliding_window", "sliding_window", "layer_types"),
        qkv_bias=True,
    ),
    # arXiv:2505.09388
    "qwen3": Family(
        "Qwen3",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            **_NO_ENDS,
        },
        own_fields=("head_dim", "use_sliding_window", "sliding_window", "layer_types"),
        fixed_fields=("hidden_act", "attention_dropout", "attention_bias"),
        qk_norm=True,
    ),
    # huggingface.co/blog/smollm3. Every fourth layer does without RoPE (arXiv:2501.18795)
    "smollm3": Family(
        "SmolLM3",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            **_ENDS_OF_SMOLLM3,
        },
        own_fields=("use_sliding_window", "sliding_window", "layer_types", "no_rope_layers"),
        fixed_fields=("hidden_act", "attention_dropout", *_NO_BIASES),
    ),
}

# What the fixed fields hold.
FIXED_VALUES = {"hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False}

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What these fields may hold without changing the arithmetic of model.py. Absent and null are always fine, and
# a family's own fields are read below.
# fmt: off
_SWITCHES = (
    "attention_bias", "mlp_bias", "qkv_bias", "bias", "use_qk_norm", "qk_norm", "rope_interleaved",
    "use_mrope", "use_sliding_window", "is_encoder_decoder", "add_cross_attention",
)
_DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")
_FACTORS = (
    "partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MECHANISMS = (
    "sliding_window", "attention_chunk_size", "quantization_config", "quantization",
    "attn_logit_softcapping", "final_logit_softcapping",
)
# fmt: on
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(_SWITCHES, (False,)),
    **dict.fromkeys(_DROPOUTS, (0,)),
    **dict.fromkeys(_FACTORS, (1,)),
    **dict.fromkeys(_EXPERTS, (0, 1)),
    **dict.fromkeys(_MECHANISMS, ()),
}

# Fields of a config.json that would contradict what is exported: family, rotation and dtype,
# which are written anew, and statements about the files and the program that the base model came from.
# fmt: off
_NOT_CARRIED = (
    "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype",
    "_name_or_path", "transformers_version", "auto_map", "architectures", "model_type",
)
# fmt: on

# ---- RoPE scaling ------------------------------------------------------------------------------------------

ROPE_SCALINGS = {  # rope_type -> its numbers and the least that each may be
    "linear": {"factor": 1},
    "dynamic": {"factor": 1},
    "llama3": {
        "factor": 1,
        "low_freq_factor": 1e-6,
        "high_freq_factor": 1e-6,
        "original_max_position_embeddings": 1,
    },
}


def check_rope_scaling(scaling: dict, name: str = "rope_scaling") -> None:
    """Raise UsageError unless model.py has this scaling and all its numbers make sense.

    name: the field of config.json that holds it, for the message."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise UsageError(
            f"{name}: rope_type {kind!r} is not supported; supported are default, "
            f"{', '.join(ROPE_SCALINGS)}. A model with another scaling would compute other angles, so it is "
            "refused rather than ignored."
        )
    least = ROPE_SCALINGS[kind]
    wrong = (scaling.keys() - {"rope_type"}) ^ least.keys()
    if wrong:
        raise UsageError(
            f"{name}={scaling!r}: rope_type {kind} needs {', '.join(least)} and nothing else; "
            f"{', '.join(sorted(wrong))} is missing or not used."
        )
    for key, low in least.items():
        number(f"{name}: {key}", scaling[key], low, 1e9, f"a number from {low:g} to 1e9, without quotes")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UsageError(f"{name}={scaling!r}: low_freq_factor must be below high_freq_factor.")


def _read_rope(fields: dict, default_theta: float) -> tuple[Any, dict | None]:
    """Return rope_theta, and rope_scaling with its rope_type (None: RoPE as it is).

    Older files have rope_theta and rope_scaling at top level, newer ones (transformers 5) rope_parameters,
    which holds both. Where a file has both forms they must agree, because readers differ in which they take.
    """
    thetas, found = [fields.get("rope_theta")], []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None or rope == {}:
            continue
        require(isinstance(rope, dict), name, rope, "an object")
        rope = {key: value for key, value in rope.items() if value is not None}
        thetas.append(rope.pop("rope_theta", None))
        kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", kind)
        require(isinstance(kind, str), f"{name}: rope_type", kind, f"one of {', '.join(ROPE_SCALINGS)}")
        if rope.get("partial_rotary_factor") == 1:
            del rope["partial_rotary_factor"]
        if kind == "default" and rope:
            raise UsageError(
                f"not supported: {name}={fields[name]!r}: only rope_theta is known beside default."
            )
        original = "original_max_position_embeddings"
        if original in ROPE_SCALINGS.get(kind, {}):  # transformers takes that of the file first
            rope[original] = fields.get(original, rope.get(original, fields.get("max_position_embeddings")))
        scaling = None if kind == "default" else {"rope_type": kind, **rope}
        if scaling:
            check_rope_scaling(scaling, name)
        found.append(scaling)
    thetas = [theta for theta in thetas if theta is not None]
    if any(theta != thetas[0] for theta in thetas[1:]):
        raise UsageError(
            f"rope_theta is {' and '.join(map(repr, thetas))}, at top level and inside rope_parameters or "
            "rope_scaling; they contradict each other, so leave one of them out."
        )
    if len(found) == 2 and found[0] != found[1]:
        raise UsageError(
            f"rope_scaling={fields['rope_scaling']!r} and rope_parameters={fields['rope_parameters']!r} "
            "contradict each other; leave one of them out."
        )
    return thetas[0] if thetas else default_theta, found[0] if found else None


# ---- The layers of a model that differ ---------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_FIELDS = {"sliding_window", "layer_types", "no_rope_layers"}  # of the families that have them


def _read_windows(fields: dict, family: Family) -> dict:
    """Return the sliding_window, layer_types and no_rope_layers of a file, as far as its family has them."""
    n_layers, types = fields["num_hidden_layers"], fields.get("layer_types")
    names = LAYER_FIELDS & {*family.own_fields}
    own = {name: fields.get(name, family.defaults.get(name)) for name in names}
    if "no_rope_layers" in own and own["no_rope_layers"] is None:
        interval = fields.get("no_rope_layer_interval", 4)
        is_count = type(interval) is int and interval >= 1
        require(is_count, "no_rope_layer_interval", interval, "a whole number above 0")
        own["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    if "layer_types" not in own:
        if types is not None and types != [FULL] * n_layers:
            raise UsageError(f"not supported: layer_types={types!r}, which {family.name} does not have.")
        return own
    uses = fields.get("use_sliding_window", False)
    require(isinstance(uses, bool | None), "use_sliding_window", uses, "true or false, without quotes")
    window = own["sliding_window"] if uses else None
    if types is None and window is not None:
        first = fields.get("max_window_layers", 28)
        require(type(first) is int, "max_window_layers", first, "a whole number")
        slides = [layer >= first for layer in range(n_layers)]
        if isinstance(own.get("no_rope_layers"), list):
            # In this family the layers without RoPE have the window.
            slides = [not rotates for rotates in own["no_rope_layers"][:n_layers]]
        types = [SLIDING if slide else FULL for slide in slides]
    if window is None and types == [FULL] * n_layers:
        types = None
    return own | {"sliding_window": window, "layer_types": types}


# ---- Reading and writing a file ----------------------------------------------------------------------------


def read_fields(fields: dict, known: set[str]) -> dict:
    """Return the arguments of LlamaConfig for the content of a config.json; UsageError names what is wrong.

    known: the names of LlamaConfig's fields
    """
    family = _family_of(fields)
    _check_shape(fields)
    _check_arithmetic(fields, family)
    same_in_both = known - LAYER_FIELDS  # fields that mean the same in a file and in LlamaConfig
    settings = _read_plain_fields(fields, family, same_in_both)
    theta = family.defaults.get("rope_theta", 10_000.0)
    settings["rope_theta"], settings["rope_scaling"] = _read_rope(fields, theta)
    settings |= _read_windows(fields, family)
    # What is left changes nothing in this family, and is carried on into the config.json of what is exported.
    read = {*same_in_both, *family.fixed_fields, *family.own_fields, *_NOT_CARRIED}
    settings["other_fields"] = {name: value for name, value in fields.items() if name not in read}
    return settings


def _family_of(fields: dict) -> Family:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(
            f"model_type is {model_type!r}, and these are shaped like LLaMA and supported: "
            f"{', '.join(FAMILIES)} (LLaMA 1 to 3.2, CodeLlama, TinyLlama and SmolLM2 are llama, Qwen2.5 is "
            "qwen2)."
        )
    return FAMILIES[model_type]


def _check_shape(fields: dict) -> None:
    """Raise UsageError unless the file has the fields without which a model has no shape."""
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} missing; the file is not a whole config.json of a model.")
    n_layers = fields["num_hidden_layers"]
    require(type(n_layers) is int, "num_hidden_layers", n_layers, "a whole number")


def _read_plain_fields(fields: dict, family: Family, names: set[str]) -> dict:
    """Return {name: value} of the fields that need no translation: the file's value, or else the default that
    transformers has for the family. A name that neither has is left to the default of LlamaConfig."""
    # LlamaConfig has 1e-5, as LLaMA-2 does, and transformers takes 1e-6 where a file has nothing.
    settings = {"rms_norm_eps": 1e-6}
    settings |= {name: value for name, value in family.defaults.items() if name in names}
    # A null says the same as an absent field, but not in these: there it means that no such token exists, or
    # that there are as many key/value heads as query heads.
    may_be_null = ("bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads")
    for name in names & fields.keys():
        if fields[name] is not None or name in may_be_null:
            settings[name] = fields[name]
    return settings


def _check_arithmetic(fields: dict, family: Family) -> None:
    """Raise UsageError for fields that ask for arithmetic which the family or model.py does not have."""
    in_all_layers = {"no_rope_layers": ([1] * fields["num_hidden_layers"],)}
    refused = [
        f"{name}={fields[name]!r}"
        for name, neutral in (_NEUTRAL | in_all_layers).items()
        if name not in family.own_fields and fields.get(name) is not None and fields[name] not in neutral
    ]
    architectures = fields.get("architectures") or [f"{family.name}ForCausalLM"]
    possible = (f"{family.name}ForCausalLM", f"{family.name}Model", "LLaMAForCausalLM")
    if not isinstance(architectures, list) or not any(name in architectures for name in possible):
        refused.append(f"architectures={architectures!r}")
    if refused:
        raise UsageError(
            f"not supported: {'; '.join(refused)}. Each would change the arithmetic, so it is "
            "refused rather than ignored (supported: silu, no dropout, biases on q, k, v of qwen2 alone)."
        )


def write_fields(settings: dict) -> dict:
    """Return the content of a config.json that transformers opens as the family it is, from the fields of a
    LlamaConfig; old and new readers find RoPE where they look for it."""
    fields = dict(settings)
    family = FAMILIES[fields["model_type"]]
    other_fields, scaling = fields.pop("other_fields"), fields.pop("rope_scaling")
    if fields["head_dim"] == fields["hidden_size"] // fields["num_attention_heads"]:
        if "head_dim" not in family.own_fields:
            del fields["head_dim"]
    for name in LAYER_FIELDS - {*family.own_fields}:
        del fields[name]
    if "layer_types" in family.own_fields:
        window = fields["sliding_window"]
        fields["use_sliding_window"] = window is not None
        if fields["layer_types"] is None:
            kind = FULL if window is None else SLIDING
            fields["layer_types"] = [kind] * fields["num_hidden_layers"]
    fields |= {name: FIXED_VALUES[name] for name in family.fixed_fields}
    fields["architectures"] = [f"{family.name}ForCausalLM"]
    fields["use_cache"] = other_fields.get("use_cache", True)
    # Readers before transformers 5 know rope_theta (among the fields) and rope_scaling; later ones prefer
    # rope_parameters, which holds both.
    if scaling:
        fields["rope_scaling"] = scaling
    rope = scaling or {"rope_type": "default"}
    fields["rope_parameters"] = {**rope, "rope_theta": fields["rope_theta"]}
    return fields | {name: value for name, value in other_fields.items() if name not in fields}
