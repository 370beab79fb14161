"""Spread a model of transformers over a mesh by the table of its family, module for module."""

import copy
import functools
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtensor_llama.errors import UsageError
from dtensor_llama.weights import plain_name
from parallel.apply import Computation, apply_compile
from parallel.config import ParallelConfig
from parallel.plans.family import Family, matches, refuse, shape_problem
from parallel.plans.stages import split_family
from parallel.plans.styles import Boundary, SplitExperts
from parallel.recompute import apply_recompute
from parallel.zero import apply_zero

# Some blocks of transformers return a view. Nothing writes into it, of which the warning speaks.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def check_family(
    model: nn.Module, family: Family, config: ParallelConfig, computation: Computation
) -> Computation:
    """Refuse by name what a model of this family cannot do; config: resolved. Return how it computes, with
    the attention kernel that its own config chose."""
    if config.cp > 1:
        refuse(
            model, f"cp={config.cp} splits sequences, and only our own Llama attends to split ones; use cp=1."
        )
    if config.pp > 1 and family.stages is None:
        refuse(model, f"pp={config.pp} is for decoders whose plan says where to cut them; use pp=1.")
    if config.pp > 1 and config.stages_per_rank > 1:
        refuse(model, f"schedule={config.schedule} has several stages per rank; use schedule=1f1b or gpipe.")
    if problem := shape_problem(model, family, config.tp):
        raise UsageError(problem)
    _check_experts(model, family, config.tp, computation)
    if computation.compile and config.tp > 1 and has_dropout(model):
        # The state of a generator is changed where such a region begins and ends, which a graph cannot do.
        refuse(
            model,
            "compile=True cannot draw the dropout that differs between tp ranks; set the dropout of its "
            "config to 0, or leave `compile` out.",
        )
    is_eager = model.config._attn_implementation == "eager"
    on_cpu = computation.device.type == "cpu"
    if computation.compile and config.tp > 1 and computation.recompute == "full" and on_cpu and not is_eager:
        # The rule on `compile` of parallel/rules.py says why, and proposes a kernel of our own Llama.
        refuse(
            model,
            f"compile=True with recompute=full and tp={config.tp} fails inside torch on a CPU; use "
            "recompute=selective, or make the model with attn_implementation=eager.",
        )
    if getattr(model.config, "layerdrop", 0) and config.gradient_ranks * config.pp > 1:
        refuse(
            model, "config.layerdrop skips other layers on each rank, which then wait for each other; set 0."
        )
    return replace(computation, attention="math" if is_eager else "sdpa")


def _check_experts(model: nn.Module, family: Family, tp: int, computation: Computation) -> None:
    """Refuse a share of experts that torch's product of all of them at once cannot take."""
    for module, row in family.rows(model):
        grouped = getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm"
        if tp == 1 or row.style.kind is not SplitExperts or not grouped:
            continue
        for name, (parts, dim) in row.style.dims.items():
            width = module.get_parameter(name).shape[dim] // parts // tp
            if width * computation.dtype.itemsize % 16:
                refuse(
                    model,
                    f"with tp={tp} a rank has {width} features of each expert, and torch's grouped_mm wants "
                    "a multiple of 16 bytes; call model.set_experts_implementation('eager'), or use another "
                    "tp.",
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
    shell.convert_to_save = functools.partial(_names_of_the_hub, shell)
    shell.config.architectures = [type(model).__name__]
    shell.save_pretrained = _refuse_save_pretrained  # it would write this rank's slices, packed ones unpacked
    return shell


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that transformers loads and saves with the weights (what DeepSeek's router adds to
    its scores), by name. No forward changes them: family_of refuses statistics that do change."""
    in_state = {plain_name(name) for name in model.state_dict(keep_vars=True)}
    buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
    return {name: buffer for name, buffer in buffers.items() if name in in_state}


def _names_of_the_hub(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as transformers saves them, which is not always as its modules have them: the experts of
    Mixtral are one tensor in a module, and a matrix each in a file."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what its modules have
        return tensors
    return revert_weight_conversion(model, tensors)


def _refuse_save_pretrained(*args, **kwargs) -> None:
    raise UsageError(
        "a boosted model holds this rank's slices, which save_pretrained cannot write; use "
        "booster.save_hf(model, folder), which transformers opens."
    )


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
    others = ("summary_", "classifier_")  # of heads that language models do not have
    named = any(
        ("drop" in key or "jitter" in key)  # of routers
        and not key.startswith(others)
        and isinstance(value, (int, float))
        and value > 0
        for key, value in model.config.to_dict().items()
    )
    return named or any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))


def spread_family(
    model: nn.Module, family: Family, mesh: DeviceMesh, config: ParallelConfig, computation: Computation
) -> list[nn.Module]:
    """Change a shell in place into this rank's share of it, as parallelize does with a Llama; return its one
    stage: the model itself, or with pp what runs of it here."""
    draws = has_dropout(model)
    part = split_family(model, family, mesh["pp"]) if config.pp > 1 else model
    part.boundary = None
    if config.tp > 1:
        apply_plan(part, family, mesh["tp"], draws)
    blocks = [block for block in family.blocks_of(part) if list(block.parameters())]
    apply_recompute(blocks, computation.recompute, draws)
    if computation.compile:
        apply_compile(blocks)
        if computation.recompute != "none":
            # The kinds of styles.py change attributes while a module runs, and change them back before it
            # ends: nothing is left that recomputation, which is a part of the graph, would have to repeat.
            allowed = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
            for block in blocks:
                block.forward = allowed(block.forward)
    apply_zero(part, blocks, mesh, config.zero_stage, computation.dtype, _shard_dim)
    return [part]


def _shard_dim(parameter: nn.Parameter, n_ranks: int) -> int:
    """Return the dim that ZeRO shards: the last of a packed (2, F, D), whose first is short; else 0."""
    is_packed = parameter.dim() == 3 and parameter.shape[0] < parameter.shape[1]
    return 2 if is_packed and parameter.shape[2] % n_ranks == 0 else 0


def apply_plan(model: nn.Module, family: Family, tp_mesh: DeviceMesh, draws: bool = False) -> None:
    """Split a model, or a stage of it, by the rows of its family. All its parameters become DTensors."""
    tied = places_of(model)
    boundary = Boundary(tp_mesh, draws)
    head = dict(model.named_modules()).get(family.head)
    if head is not None and head._parameters:  # it is here, and may have more rows than there are tokens
        boundary.n_tokens = head.weight.shape[0]
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
