"""A decoder of transformers as pipeline stages: its own forward, with other stages' modules handed past.

A stage is the model with some of its modules replaced: blocks of other stages, and on later stages the
embedding, hand on what they get; positions that are added to embeddings are 0 there. Its forward is called
with hidden states in the place of embeddings, `inputs_embeds`.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.pipeline import Pipeline, split_layers
from parallel.plans.family import Family, shape_of
from parallel.plans.loss import HfBatch, sum_of_losses
from parallel.plans.styles import own_columns


class HandsOn(nn.Module):
    """Returns its input in the place of a module of another stage, whose plain settings it keeps."""

    def __init__(self, absent: nn.Module, in_tuple: bool = False):
        super().__init__()
        for name, value in vars(absent).items():
            if isinstance(value, (str, int, float)) and name != "training":
                setattr(self, name, value)
        self.in_tuple = in_tuple

    def forward(self, x: Tensor, *args, **kwargs):
        return (x, None) if self.in_tuple else x


class Zero(nn.Module):
    """Returns 0 in the place of a module whose output is added to the embeddings."""

    def forward(self, *args, **kwargs) -> Tensor:
        return torch.zeros(())


def split_family(model: nn.Module, family: Family, pp_mesh: DeviceMesh) -> nn.Module:
    """Return what runs of the model on this pp rank. Afterwards `model` has the parameters of this rank, by
    their names, and shares all modules with the stage, but for a tied head: see pipeline.split_stages."""
    pp, pp_rank, stages = pp_mesh.size(), pp_mesh.get_local_rank(), family.stages
    layers = split_layers(shape_of(model, family), pp)[pp_rank]
    is_first, is_last = pp_rank == 0, pp_rank == pp - 1
    is_tied = model.get_submodule(family.head).weight is model.get_submodule(family.embedding).weight
    embedding, head = model.get_submodule(family.embedding), model.get_submodule(family.head)
    (blocks,) = family.blocks
    for i, block in enumerate(model.get_submodule(blocks)):
        if i not in layers:
            model.set_submodule(f"{blocks}.{i}", HandsOn(block, stages.block_returns_tuple))
    absent = [] if is_first else stages.first
    absent = [*absent, *([] if is_last else (*stages.last, family.head))]
    for name in absent:
        if (module := getattr_path(model, name)) is not None:
            model.set_submodule(name, HandsOn(module))
    for name in [] if is_first else stages.added:
        model.set_submodule(name, Zero())
    if not is_first and hasattr(
        base_of(model), "embedding_dropout"
    ):  # StarCoder2 draws it in its own forward
        base_of(model).embedding_dropout = 0.0
    part = copy.copy(model)  # the root alone: everything below it is shared
    part._modules = dict(model._modules)
    if is_tied:
        model._modules[family.head] = embedding if is_first else HandsOn(head)
        if is_last:
            weight = head.weight
            copied = nn.Linear(
                weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype
            )
            copied.weight.requires_grad_(weight.requires_grad)
            part._modules[family.head] = copied
    part.tied_ends = (
        embedding if is_tied and is_first else None,
        part._modules[family.head] if is_tied and is_last else None,
    )
    part.forward = StageForward(part, family, is_first, is_last, part.forward)
    return part


def getattr_path(model: nn.Module, name: str) -> nn.Module | None:
    """Return a submodule, or None where the model has none (OPT without projections)."""
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def base_of(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix)


@dataclass(frozen=True)
class StageForward:
    """Takes the place of a stage's forward: it is called with tokens, or with hidden states (B, T, D), and
    returns hidden states, or on the last stage the sum of the losses."""

    part: nn.Module
    family: Family
    is_first: bool
    is_last: bool
    whole_forward: Callable  # of the model's class

    def __call__(self, x: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        inputs["input_ids" if self.is_first else "inputs_embeds"] = x
        if not self.is_last:
            return base_of(self.part)(**inputs, use_cache=False, return_dict=True).last_hidden_state
        part, head = self.part, self.part.get_submodule(self.family.head)
        keeps_own = own_columns(head) if part.criterion is None else nullcontext()
        with keeps_own:
            logits = self.whole_forward(**inputs, use_cache=False, return_dict=True).logits
        return sum_of_losses(logits, labels, self.family, part.boundary, part.criterion)


class FamilyPipeline(Pipeline):
    """Runs stages of a family: every one of them is given the other columns, too."""

    def _arguments(self, microbatches: list[HfBatch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        tokens, inputs = super()._arguments(microbatches)
        for name in microbatches[0].others:
            inputs[name] = torch.cat([batch.others[name] for batch in microbatches]).to(self.device)
        return tokens, inputs

    def tied_ends(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        owner, copied = self.stages[0].tied_ends
        return (
            None if owner is None else owner.weight,
            None if copied is None else copied.weight,
        )
