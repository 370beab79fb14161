"""Adds LoRA: weights W are frozen, and some get a trained product as well: y = W x + (alpha / rank) B A x.

A (rank, inputs) starts with random values and B (outputs, rank) with zeros, so that training starts from the
unchanged model. Source: Hu et al. 2021, arXiv:2106.09685. Files and initial values are those of the peft
package. There is no dropout on x before A, since the model has none either; the file adapter_config.json
therefore says lora_dropout 0.

The adapter of `q_proj` is a module beside it, `q_proj_lora` (lora_A, lora_B). A hook adds its output to that
of q_proj. q_proj itself does not change, so weights are loaded, split and saved under their own names. Apply
LoRA first, before any parallelism: the passes of parallel/ then find the adapters like any other module.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtensor_llama.atomic import on_all_ranks, own_rank
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.initial_weights import random_stream
from dtensor_llama.model import Llama
from dtensor_llama.weights import ADAPTER, copy_own_part, hf_parameters, local_boxes, values_to_write


@dataclass(frozen=True)
class LoraConfig:
    """Decides which layers get LoRA adapters, and their size."""

    rank: int = 0  # the rank of the product, which has no dropout; 0: no LoRA, and all weights are trained
    alpha: float | None = None  # the product is multiplied by alpha / rank; None: twice the rank
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @property
    def scale(self) -> float:
        """Return alpha / rank, the factor of the product."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def check(self) -> None:
        """Raise UsageError for settings of adapters where there shall be none."""
        asked = [f"lora.alpha={self.alpha}"] if self.alpha is not None else []
        if self.targets != LoraConfig.targets:
            asked.append(f"lora.targets={' '.join(self.targets)}")
        if asked and not self.rank:
            raise UsageError(
                f"{' '.join(asked)} is for LoRA adapters, and with lora.rank=0 there are none: all weights "
                "are trained. Use lora.rank=16, or leave it out."
            )


class Lora(nn.Module):
    """Maps x (..., inputs) to scale B A x (..., outputs).

    Both matrices are modules, because tensor parallelism splits modules."""

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        super().__init__()
        device, self.scale = linear.weight.device, config.scale
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, linear.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x)) * self.scale


def apply_lora(model: Llama, config: LoraConfig, frozen_dtype: torch.dtype | None = None) -> None:
    """Freeze `model` and give each linear layer named in config.targets an adapter.

    The model must be whole, on one device or on `meta`. The adapters are float32. Call init_lora as soon as
    they have memory.
    frozen_dtype: the dtype that the frozen weights get (bfloat16 takes 2 bytes each); None: they keep theirs
    Raises UsageError for a rank below 1, an alpha that is not above 0, and targets that do not exist."""
    if config.rank < 1 or not 0 < config.scale < math.inf:  # the rank comes first, since scale divides by it
        raise UsageError(
            f"lora.rank={config.rank} lora.alpha={config.alpha} is not possible; use a rank of at least 1 "
            "and an alpha above 0."
        )
    # The head is a linear layer too, but the loss multiplies by its weight directly, so that an adapter there
    # would have no effect.
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    existing = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    wrong = [target for target in config.targets if target not in existing]
    if wrong or not config.targets:
        raise UsageError(
            f"lora.targets={' '.join(wrong) or 'none'}: the model has no linear layer of that name in its "
            f"blocks; there are {', '.join(existing)}."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if frozen_dtype is not None:
            parameter.data = parameter.data.to(frozen_dtype)
    for name, linear in linears.items():
        parent, _, own_name = name.rpartition(".")
        if own_name in config.targets:
            adapter = Lora(linear, config)
            model.model.get_submodule(parent).add_module(own_name + "_lora", adapter)
            linear.add_adapter = linear.register_forward_hook(partial(_add, adapter))


def _add(adapter: Lora, linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + adapter(args[0])


@torch.no_grad()
def init_lora(model: nn.Module, seed: int) -> None:
    """Give all adapters their initial values, which depend on the seed and the name, never on the layout.

    B is zero, and A is uniform within 1 / sqrt(inputs).
    This is Kaiming's rule with a = sqrt(5), which peft and nn.Linear use too."""
    for name, parameter in adapter_parameters(model).items():
        whole = torch.zeros(parameter.shape)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            whole.uniform_(-bound, bound, generator=random_stream(f"{seed}/{name}"))
        with values_to_write(model, name, parameter) as values:
            copy_own_part(whole, values)


def n_adapter_parameters(model: LlamaConfig, config: LoraConfig) -> int:
    """Return the number of parameters in all adapters of a whole model."""
    matrices = {name: shape for name, shape in model.block_weights().items() if len(shape) == 2}
    targets = [shape for name, shape in matrices.items() if name.split(".")[-2] in config.targets]
    return model.num_hidden_layers * config.rank * sum(map(sum, targets))  # inputs + outputs of each layer


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' matrices by name, e.g. model.layers.0.self_attn.q_proj_lora.lora_A.weight."""
    parameters = hf_parameters(model, adapters=True)
    return {name: parameter for name, parameter in parameters.items() if ADAPTER in name}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add scale B A to each W in place, and remove the adapters, so that the answers stay the same.

    This is a collective: all ranks call it. Each rank adds what belongs to its own shard of W, and only the
    thin matrices A and B are gathered. The sum is computed in fp32 and rounded to W's dtype once."""
    for name, adapter in list(model.named_modules()):
        if not isinstance(adapter, Lora):
            continue
        parent, _, own_name = name.rpartition(".")
        parent = model.get_submodule(parent)
        linear = getattr(parent, own_name.removesuffix("_lora"))
        a, b = (_whole(matrix.weight).float() for matrix in (adapter.lora_A, adapter.lora_B))
        for (row, column), (rows, columns), local in local_boxes(linear.weight):
            delta = b[row : row + rows] @ a[:, column : column + columns] * adapter.scale
            local.copy_(local.float() + delta)
        linear.add_adapter.remove()
        delattr(parent, own_name)


def _whole(parameter: nn.Parameter) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft opens over the base model.

    This is a collective: all ranks call it. Rank 0 gets each matrix from the first owner, and writes it.
    base_model: the name or path of the base model, which goes into adapter_config.json"""
    folder, rank = Path(folder), own_rank()
    whole = {name: _whole(parameter).float().cpu() for name, parameter in adapter_parameters(model).items()}
    first_rank = {}
    for other, names in enumerate(on_all_ranks(f"saving {folder}", lambda: list(whole))):
        first_rank = dict.fromkeys(names, other) | first_rank
    whole = {name: matrix for name, matrix in whole.items() if first_rank[name] == rank}
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(whole, gathered)
        for other in gathered or []:
            whole |= other
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(config.targets),
        "inference_mode": True,
    }

    def write():
        folder.mkdir(parents=True, exist_ok=True)
        matrices = {
            f"base_model.model.{name.replace(ADAPTER, '.lora_')}": whole[name] for name in sorted(whole)
        }
        save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    on_all_ranks(f"saving {folder}", write if rank == 0 else lambda: None)
