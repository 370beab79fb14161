"""One adapter for every causal model that transformers has a tensor-parallel plan for.

transformers names a style per module ("colwise", "rowwise", ...) in `config.base_model_tp_plan` and, for the
head, in `model._tp_plan`. Here each style becomes a row. What the plan does not name (norms, biases of norms)
is whole on every rank; the embedding is split by tokens of the vocabulary, as in our own tables.
"""

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
# fmt: on
# Families whose forward does nothing to its input before the first block but what their modules do, so that a
# stage can be given hidden states in the place of embeddings. Each of them is in tests/test_plans.py.
WITH_STAGES = ("mistral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2", "olmo2")


def adapted(model: nn.Module) -> Family | None:
    """Return the family of a causal model that transformers has a plan for; None if it has none.

    UsageError if the plan has styles that are not translated (experts, for example)."""
    config, prefix = model.config, getattr(model, "base_model_prefix", "")
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan or not type(model).__name__.endswith("ForCausalLM"):
        return None
    unknown = sorted(set(plan.values()) - set(STYLES))
    if unknown:
        refuse(model, f"its plan in transformers has the style {unknown[0]}, which is not translated yet.")
    if not plan.keys() <= {key for key in plan if key.startswith("layers.*.")}:
        refuse(model, "its plan in transformers has rows outside `layers`, which are not translated yet.")
    names = {module: name for name, module in model.named_modules()}
    embedding, head = (names.get(end()) for end in (model.get_input_embeddings, model.get_output_embeddings))
    if not embedding or not head:
        refuse(model, "it has no embedding or no head by which the adapter could split the vocabulary.")
    named = {key.removeprefix("layers.*."): STYLES[style] for key, style in plan.items()}
    ends = {embedding: EMBEDDING, head: HEAD_ROW, "token_loss": TOKEN_LOSS}
    has_stages = config.model_type in WITH_STAGES and getattr(config, "base_model_pp_plan", None)
    return Family(
        architecture=type(model).__name__,
        blocks=(f"{prefix}.layers",),
        block=_once_for_each_input(named) | _rest(model, f"{prefix}.layers.0.", named),
        ends=ends | {name: REST for name in _with_parameters(model) if _is_outside(name, prefix, ends)},
        embedding=embedding,
        head=head,
        stages=Stages(first=(embedding,), last=(f"{prefix}.norm",)) if has_stages else None,
        splits_kv_heads=any(style == "colwise" for key, style in plan.items() if "att" in key),
    )


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


def _rest(model: nn.Module, block: str, named: TensorPlan) -> TensorPlan:
    """Return rows for the modules of a block that have parameters and that the plan leaves out. They are
    whole on every rank, and so is what they compute; a convolution mixes what others split: it is refused."""
    rest = {}
    for name in _with_parameters(model):
        inside = name.removeprefix(block)
        if not name.startswith(block) or any(matches(inside, pattern) for pattern in named):
            continue
        if any(parameter.dim() > 2 for parameter in model.get_submodule(name).parameters(recurse=False)):
            refuse(model, f"its plan in transformers leaves out {name}, which is no norm and no matrix.")
        rest[inside] = REST
    return rest


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._parameters]


def _is_outside(name: str, prefix: str, ends: TensorPlan) -> bool:
    return not name.startswith(f"{prefix}.layers.") and name not in ends
