"""Spread a model of transformers over a mesh by the table of its family, module for module, and compute its loss."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtensor_llama.errors import UsageError
from dtensor_llama.loss import IGNORE, Vocabulary, token_nll
from parallel.config import ParallelConfig
from parallel.plans.family import Family, matches, refuse, shape_problem
from parallel.plans.stages import HfBatch, split_family
from parallel.plans.styles import Boundary, own_columns
from parallel.recompute import apply_recompute
from parallel.tensor import SplitVocabulary
from parallel.zero import apply_zero

if TYPE_CHECKING:
    from parallel.apply import Computation


Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits and labels


@dataclass(frozen=True)
class Shape:
    """Holds what the rules of a layout ask about a model, by the names of LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    weights: dict[str, tuple]

    def block_weights(self) -> dict[str, tuple]:
        """Return {name: shape} of the weights of one block."""
        return self.weights


def shape_of(model: nn.Module, family: Family) -> Shape:
    """Return the shape of a model. Of several lists of blocks (T5), that of the first."""
    config, block = model.config, family.blocks_of(model)[0]
    widths = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim", "d_ff"))
    return Shape(
        vocab_size=model.get_submodule(family.embedding).num_embeddings,
        hidden_size=config.hidden_size,
        intermediate_size=next(filter(None, widths), 4 * config.hidden_size),
        num_hidden_layers=len(family.blocks_of(model)),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,  # family.py refuses what does not divide them
        weights={name: tuple(parameter.shape) for name, parameter in block.named_parameters()},
    )


def check_family(model: nn.Module, family: Family, config: ParallelConfig, compile: bool) -> None:
    """Refuse by name what a model of this family cannot do; config: resolved."""
    if config.cp > 1:
        refuse(model, f"cp={config.cp} splits rows, and only our own Llama attends to split rows; use cp=1.")
    if config.pp > 1 and family.stages is None:
        refuse(model, f"pp={config.pp} is for decoders whose plan says where to cut them; use pp=1.")
    if config.pp > 1 and config.stages_per_rank > 1:
        refuse(model, f"schedule={config.schedule} has several stages per rank; use schedule=1f1b or gpipe.")
    if problem := shape_problem(model, family, config.tp):
        raise UsageError(problem)
    if compile:
        refuse(model, "compile=True is not possible yet for models of transformers; leave `compile` out.")
    if getattr(model.config, "layerdrop", 0) and config.gradient_ranks * config.pp > 1:
        refuse(
            model, "config.layerdrop skips other layers on each rank, which then wait for each other; set 0."
        )


def shell_of(model: nn.Module, family: Family) -> nn.Module:
    """Return a copy of the model whose parameters are on `meta`, in float32, with packed ones unpacked.

    Its modules are of the same classes, with the same settings, ties and buffers; the model stays as it is.
    """
    memo = {}
    for parameter in model.parameters():
        on_meta = torch.empty_like(parameter, device="meta", dtype=torch.float32)
        memo[id(parameter)] = nn.Parameter(on_meta, requires_grad=parameter.requires_grad)
    shell = copy.deepcopy(model, memo)
    whole = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters()}
    for module, row in family.rows(shell):
        row.style.unpack(module)
    shell.whole_shapes = {
        name: whole[name] for name, one in shell.named_parameters() if tuple(one.shape) != whole[name]
    }
    shell.config.architectures = [type(model).__name__]
    return shell


def restore_buffers(shell: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Give each buffer its values again, which `to_empty` and a cast to another dtype have lost."""
    for name, buffer in model.named_buffers():
        *path, last = name.split(".")
        try:
            module = shell.get_submodule(".".join(path))
        except AttributeError:
            continue  # of a block of another stage
        if last in module._buffers:
            module._buffers[last] = buffer.to(device, copy=True)


def has_dropout(model: nn.Module) -> bool:
    """Return whether a forward may draw random numbers."""
    settings = model.config.to_dict().items()
    named = any("drop" in key and isinstance(value, (int, float)) and value > 0 for key, value in settings)
    return named or any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))


def spread_family(
    model: nn.Module, family: Family, mesh: DeviceMesh, config: ParallelConfig, computation: "Computation"
) -> list[nn.Module]:
    """Change a shell in place into this rank's share of it, as parallelize does with a Llama; return its one
    stage: the model itself, or with pp what runs of it here."""
    draws = has_dropout(model)
    part = split_family(model, family, mesh["pp"]) if config.pp > 1 else model
    part.boundary = None
    if config.tp > 1:
        apply_plan(part, family, mesh["tp"], draws)
    blocks = [block for block in family.blocks_of(part) if any(True for _ in block.parameters())]
    apply_recompute(blocks, computation.recompute, draws)
    apply_zero(part, blocks, mesh, config.zero_stage, computation.dtype)
    return [part]


def apply_plan(model: nn.Module, family: Family, tp_mesh: DeviceMesh, draws: bool = False) -> None:
    """Split a model, or a stage of it, by the rows of its family. All its parameters become DTensors."""
    tied = places_of(model)
    boundary = Boundary(tp_mesh, draws)
    boundary.n_tokens = model.config.vocab_size
    for block in family.blocks_of(model):
        for path, names in family.local_heads.items():
            _divide(block, path, names, tp_mesh.size())
    for module, row in family.rows(model):
        row.style._apply(module, tp_mesh)
        module.boundary = boundary
    for places in tied:
        split = [module._parameters[name] for module, name in places]
        split = [parameter for parameter in split if isinstance(parameter, DTensor)]
        for module, name in places if split else []:
            module._parameters[name] = split[0]
    unplanned = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if unplanned:
        refuse(
            model, f"its plan has no row for {unplanned[0]} (parallel/plans/README.md says how to add one)."
        )
    model.boundary = boundary


def places_of(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return, for each parameter, the modules that have it and its name there: a tied one has several."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    return list(places.values())


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give all parameters memory without values. (`to_empty` alone makes two of a tied one, without FSDP.)"""
    tied = places_of(model)
    model.to_empty(device=device)
    for (first, its_name), *others in tied:
        for module, name in others:
            module._parameters[name] = first._parameters[its_name]


def _divide(block: nn.Module, path: str, names: tuple[str, ...], tp: int) -> None:
    """Let attributes of one module (`layer.*.SelfAttention`: of several) count this rank's heads."""
    for name, module in block.named_modules():
        if matches(name, path):
            for attribute in names:
                setattr(module, attribute, getattr(module, attribute) // tp)


# ---- the loss ----


def loss_sum(model: nn.Module, family: Family, batch: HfBatch, criterion: Criterion | None = None) -> Tensor:
    """Return the sum of the token losses of a microbatch, float32, the same on all tp ranks.

    criterion: the user's, a mean over scored labels; it gets the whole logits, and the labels as they came."""
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
        n_targets = int((targets != IGNORE).sum())
        # A mean over nothing is nan; nothing scored adds nothing, but every rank must go through backward.
        return criterion(logits, labels) * n_targets if n_targets else logits.sum() * 0
    vocabulary = Vocabulary(logits.shape[-1])
    if boundary is not None:
        vocabulary = SplitVocabulary(boundary.n_tokens, boundary.mesh, sequence_parallel=False)
    targets = targets.flatten()
    losses = token_nll(logits.flatten(0, -2), targets.clamp(min=0), vocabulary)
    return (losses * (targets != IGNORE)).sum()


def targets_of(family: Family, labels: Tensor) -> Tensor:
    """Return for each position the label that is scored there."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE) if family.shifts_labels else labels
