"""One adapter for every causal model that transformers has a tensor-parallel plan for.

transformers names a style per module ("colwise", "rowwise", ...) in `config.base_model_tp_plan` and, for the
head, in `model._tp_plan`. Here each style becomes a row. What the plan does not name (norms, biases of norms)
is whole on every rank; the embedding is split by tokens of the vocabulary, as in our own tables.
"""

import re
from collections.abc import Iterable

from torch import nn

from parallel.plans.family import Family, Stages, matches, refuse
from parallel.plans.styles import (
    AG,
    AR,
    AR3,
    COLUMNS,
    COLUMNS_GATHER,
    EMBED,
    HEAD,
    NONE,
    ROWS,
    ROWS_SLICE,
    SHARE,
    WHOLE,
    WHOLE_BELOW,
    OnWhole,
    SplitExperts,
    Style,
    StyleByName,
    WholeWithSharedTail,
)
from parallel.tensor import Row, TensorPlan

# fmt: off
STYLES = {                                                                       # forward, backward
    "colwise":               Row(COLUMNS,        "S(0)", "(B, T, D) -> (B, T, F/tp)",    NONE, AR),
    "rowwise":               Row(ROWS,           "S(1)", "(B, T, F/tp) -> (B, T, D)",    AR, NONE),
    "colwise_gather_output": Row(COLUMNS_GATHER, "S(0)", "(B, T, D) -> (B, T, F)",       AG, AR),
    "rowwise_split_input":   Row(ROWS_SLICE,     "S(1)", "(B, T, F) -> (B, T, D)",       AR, AG),
    "replicated_with_grad_allreduce": Row(SHARE, "R",    "(B, T, H/tp, E), as it was",   NONE, AR),
}
EMBEDDING, HEAD_ROW = Row(EMBED, "S(0)", "(B, T) -> (B, T, D)", AR, NONE), Row(
                          HEAD,  "S(0)", "(B, T, D) -> (B, T, V/tp)", NONE, AR)
TOKEN_LOSS =              Row(None,  "",     "(B, T, V/tp) -> scalar", AR3, NONE)
REST =                    Row(WHOLE, "R",    "as it was", NONE, NONE)
REST_AND_BELOW =          Row(WHOLE_BELOW, "R", "as it was", NONE, NONE)
# Styles of modules that compute with parameters of their own, which the plan names one by one: experts, and
# attention with sinks. In place of the style stands the kind.
OWNERS = {
    "moe_tp_experts": Row(SplitExperts, "", "(N, D) -> (N, D)", AR, {"all-reduce": 2}),
    "local_params":   Row(OnWhole,      "", "as it was",        NONE, NONE),
}
# fmt: on
# How each of these parameters is split: into how many parts it falls first, and along which dim.
DIMS = {"colwise": (1, -2), "rowwise": (1, -1), "packed_colwise": (2, -2), "packed_rowwise": (2, -1)}
LAYERS = "layers.*."  # what the names of a plan of transformers begin with
# Model types with a pipeline plan in transformers whose forward does nothing to its input before the first
# block but what their modules do, so that a stage can be given hidden states in the place of embeddings. Each
# of them is compared with one process in tests/test_plans.py.
WITH_STAGES = set(
    """afmoe apertus arcee aria_text axk1 axk2 beam cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3
    deepseek_v32 dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2
    gemma3_text gemma4_unified_text glm4_moe glm4_moe_lite granite granite_swa helium hy_v3 hyperclovax
    jais2 kolibri1 laguna mellum minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral olmo olmo2 olmo3 olmo_hybrid phi3 qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
    qwen3_next seed_oss smollm3 solar_open starcoder2 vaultgemma youtu""".split()
)
# Model types whose plan transformers itself cannot compute with.
BROKEN = {"doge": "splits the features that dt_proj reads, of which attention needs those of all heads"}


def adapted(model: nn.Module) -> Family | None:
    """Return the family of a causal model that transformers has a plan for; None if it has none.

    UsageError if the plan has styles that are not translated."""
    config, prefix = model.config, _prefix(model)
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan or not type(model).__name__.endswith("ForCausalLM"):
        return None
    if config.model_type in BROKEN:
        refuse(model, f"its plan in transformers {BROKEN[config.model_type]}.")
    if getattr(config, "output_router_logits", False):
        refuse(
            model,
            "config.output_router_logits adds a loss of the routers to the model's own, which the Booster "
            "does not compute; set it to False.",
        )
    names = {module: name for name, module in model.named_modules()}
    embedding, head = (names.get(end()) for end in (model.get_input_embeddings, model.get_output_embeddings))
    if not embedding or not head:
        refuse(model, "it has no embedding or no head by which the adapter could split the vocabulary.")
    for key, style in plan.items():
        is_embedding = (f"{prefix}.{key}", style) == (embedding, "embedding_rowwise")
        if not key.startswith(LAYERS) and not is_embedding:
            refuse(model, f"its plan in transformers splits {key}, outside `layers`; that is not translated.")
    inside = {key.removeprefix(LAYERS): style for key, style in plan.items() if key.startswith(LAYERS)}
    named = _named_rows(model, inside)
    ends = {embedding: EMBEDDING, head: HEAD_ROW, "token_loss": TOKEN_LOSS}
    if any(block._parameters for block in model.get_submodule(f"{prefix}.layers")):
        ends[f"{prefix}.layers.*"] = REST  # a block with parameters of its own, beside those of its modules
    has_stages = config.model_type in WITH_STAGES and getattr(config, "base_model_pp_plan", None)
    return Family(
        architecture=type(model).__name__,
        blocks=(f"{prefix}.layers",),
        block=_once_for_each_input(named) | _rest(model, named),
        ends=ends | {name: REST for name in _with_parameters(model) if _is_outside(name, prefix, ends)},
        embedding=embedding,
        head=head,
        stages=Stages(first=(embedding,), last=(f"{prefix}.norm",)) if has_stages else None,
        splits_kv_heads=any(style == "colwise" for key, style in plan.items() if "att" in key),
    )


def _prefix(model: nn.Module) -> str:
    """Return the name of the part of a model that has its blocks. (Llama 4 names its own wrongly.)"""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if hasattr(model, prefix) else "model"


def _named_rows(model: nn.Module, plan: dict[str, str]) -> TensorPlan:
    """Return a row for each module of a block that the plan names. Where a module computes with parameters of
    its own, the plan also names these, and the row of their module says how they are split."""
    parameters = _first_in_blocks(model, dict(model.named_parameters()), plan)
    modules = _first_in_blocks(model, dict(model.named_modules()), plan)
    rows = {}
    for name, style in plan.items():
        if name not in modules:  # a parameter, or a module that blocks of other sizes have
            continue
        if style in OWNERS:
            dims = {}
            for key, parameter in parameters.items():
                if key.rpartition(".")[0] == name:
                    if plan[key] not in DIMS:
                        refuse(model, f"its plan in transformers has {key} {plan[key]}: not translated yet.")
                    parts, dim = DIMS[plan[key]]
                    dims[key.rpartition(".")[2]] = parts, max(dim, -parameter.dim())
            rows[name] = OWNERS[style]._replace(style=StyleByName(OWNERS[style].style, dims))
        elif style == "mla_kv_a_proj":
            n_tail = getattr(model.config, "qk_rope_head_dim", None)
            if n_tail is None:
                refuse(model, "config.qk_rope_head_dim is not one number for all its layers.")
            shared = Style(WholeWithSharedTail, n_tail=n_tail)
            rows[name] = Row(shared, "R", "(B, T, D) -> (B, T, C + R)", NONE, AR)
        elif style in STYLES:
            rows[name] = STYLES[style]
        else:
            refuse(model, f"its plan in transformers has the style {style}, which is not translated yet.")
    return rows


def _first_in_blocks(
    model: nn.Module, things: dict[str, object], patterns: Iterable[str]
) -> dict[str, object]:
    """Return, for each pattern of names inside a block, the first thing of the model that has it."""
    layers = f"{_prefix(model)}.{LAYERS}"
    return {
        pattern: thing
        for pattern in patterns
        for name, thing in reversed(things.items())
        if matches(name, layers + pattern)
    }


def _once_for_each_input(rows: TensorPlan) -> TensorPlan:
    """Return the rows with the all-reduce of a gradient at the first of the layers that read the same x: they
    have the same parent module (q, k and v; gate and up)."""
    entered, counted = set(), {}
    for name, row in rows.items():
        parent = name.rpartition(".")[0]
        if row.style in (COLUMNS, COLUMNS_GATHER):
            row = row._replace(backward=NONE if parent in entered else AR)
            entered.add(parent)
        counted[name] = row
    return counted


def _rest(model: nn.Module, named: TensorPlan) -> TensorPlan:
    """Return rows for the modules of the blocks that have parameters and that the plan leaves out.

    They are whole on every rank, and so is what they compute. A convolution beside modules that split may mix
    what those split, and is refused. Blocks may differ: the first ones of DeepSeek have no experts."""
    split = {name.rpartition(".")[0] for name, row in named.items() if row.style in (COLUMNS, ROWS)}
    rest, with_convolutions = {}, set()
    for name in _with_parameters(model):
        block = re.match(rf"({re.escape(_prefix(model))}\.layers\.\d+\.)?", name)[0]
        inside = name.removeprefix(block)
        if not block or any(matches(inside, pattern) for pattern in named):
            continue
        if any(one.dim() > 2 for one in model.get_submodule(name).parameters(recurse=False)):
            if inside.rpartition(".")[0] in split:
                refuse(model, f"its plan in transformers leaves out {name}, which is no norm and no matrix.")
            with_convolutions.add(inside.rpartition(".")[0])
        # An activation with parameters sees this rank's share of the features.
        between = inside.endswith("act_fn") and inside.rpartition(".")[0] in split
        rest[inside] = STYLES["replicated_with_grad_allreduce"] if between else REST
    # Such a module (Mamba, a gated delta net) also reads the weights of its convolution by itself.
    return rest | {name: REST_AND_BELOW for name in with_convolutions if name}


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._parameters]


def _is_outside(name: str, prefix: str, ends: TensorPlan) -> bool:
    return not name.startswith(f"{prefix}.layers.") and name not in ends
