"""ChunkOptimizer: the chunk manager as a torch Optimizer, so that schedulers, zero_grad and checkpoints work
as with AdamW.

A checkpoint holds what it would hold without the manager: as the model's weights the float32 masters, per
parameter `step`, `exp_avg`, `exp_avg_sq`, and the groups' settings. So it can be loaded under any plan, on
any layout, and by torch's AdamW.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtensor_llama.checkpoint import Deferred
from dtensor_llama.errors import UsageError
from dtensor_llama.shards import local
from dtensor_llama.weights import StandIn
from memory.chunk import Managed, like, placeholder, plain_name

if TYPE_CHECKING:
    from memory.manager import ChunkManager

STATES = ("step", "exp_avg", "exp_avg_sq")
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")  # fused: the chunk kernel is


def check_adamw(optimizer: torch.optim.Optimizer) -> None:
    """UsageError if it asks for anything but plain AdamW, or has state that would be lost."""
    if not isinstance(optimizer, torch.optim.AdamW) or type(optimizer).step is not torch.optim.AdamW.step:
        raise UsageError(
            f"the chunk manager steps torch.optim.AdamW, and was given {type(optimizer).__name__}; use AdamW, or "
            "--memory.placement off."
        )
    check_options(optimizer.param_groups)
    if optimizer.state:
        raise UsageError(
            "the optimizer has stepped already; give the chunk manager a new one, and load a checkpoint into "
            "manager.optimizer."
        )


def check_options(groups: list[dict[str, Any]]) -> None:
    """UsageError for an option that the kernel does not have."""
    for group in groups:
        asked = [name for name in REFUSED if group.get(name)]
        if asked:
            raise UsageError(
                f"AdamW({asked[0]}=True) is not possible with the chunk manager; leave it out, or use "
                "--memory.placement off."
            )


class ChunkOptimizer(torch.optim.Optimizer):
    """The face of a ChunkManager. Hyper-parameters are read from param_groups at each step."""

    def __init__(self, manager: "ChunkManager", adamw: torch.optim.AdamW):
        super().__init__(adamw.param_groups, adamw.defaults)
        self.manager = manager
        self.state = {one.parameter: ParameterState(manager, one) for one in manager.managed}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "manager"):
            raise UsageError("chunks are cut; give all parameters to AdamW before the chunk manager is made.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """As AdamW.step, with the factor of the last clip_grad_norm; gradients are used up. Returns before
        all is done."""
        check_options(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.manager.step()
        return loss

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """ChunkManager.clip_grad_norm."""
        return self.manager.clip_grad_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.manager.discard_gradients()
        super().zero_grad(set_to_none)

    def masters(self) -> StandIn:
        """ChunkManager.masters: what a checkpoint holds as the model's weights."""
        return self.manager.masters()

    def checkpoint_state(self) -> dict[str, Any]:
        """The sections of a checkpoint, dtensor_llama.checkpoint.training_state, that are the manager's to
        give.

        Weights are the float32 masters; the optimizer's state has the names that torch's AdamW would have in
        a flattened state dict; tensors are Deferred. `plan` is this rank's, for only the same plan gives the
        same bits.
        """
        manager, masters = self.manager, self.manager.masters()
        stages = manager.stages_checkpoints()

        def deferred(name: str, one: Managed) -> Deferred:
            return Deferred(
                placeholder(one.parameter),
                partial(manager.gather, name, one),
                partial(manager.scatter, name, one),
                stages,
            )

        weights = {}
        for name, value in masters.state_dict(keep_vars=True).items():
            if one := masters.managed_of(value):
                weights[name] = deferred("master", one)
            elif not isinstance(value, nn.Parameter):  # a buffer; frozen parameters are no state
                weights[name] = value
        names = {parameter: plain_name(name) for name, parameter in manager.model.named_parameters()}
        state = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                name, one = names[parameter], manager.of.get(parameter)
                state |= {
                    f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"
                }
                if one is not None:
                    state[f"state.{name}.step"] = torch.tensor(float(one.step))
                    state |= {f"state.{name}.{key}": deferred(key, one) for key in ("exp_avg", "exp_avg_sq")}
        return {"model": weights, "optimizer": state, "plan": {str(_rank()): self.saved_plan()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a loaded `checkpoint_state` into effect. Weights and moments are in the chunks already: they
        were written as they were read."""
        names = {parameter: plain_name(name) for name, parameter in self.manager.model.named_parameters()}
        loaded = state["optimizer"]
        for group in self.param_groups:
            for parameter in group["params"]:
                name, one = names[parameter], self.manager.of.get(parameter)
                group.update({key: loaded[f"param_groups.{name}.{key}"] for key in group if key != "params"})
                if one is not None:
                    one.step = int(loaded[f"state.{name}.step"])
        check_options(self.param_groups)
        self.manager.take_plan(*state["plan"].values())

    def saved_plan(self) -> str:
        """For the checkpoint: JSON, empty before placement auto has made its plan."""
        return "" if self.manager.auto and self.manager.auto.is_tracing else self.manager.plan.to_json()

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's; tensors are copies on the host, spread as their parameters."""
        self.manager.wait()
        index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        state = {index[p]: {name: of_one[name] for name in STATES} for p, of_one in self.state.items()}
        groups = [{**group, "params": [index[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy moments and settings in; written by this, or by AdamW, under any plan. Master weights:
        `masters().write`."""
        self.manager.wait()
        check_options(state_dict["param_groups"])
        both = state_dict["param_groups"], self.param_groups
        theirs, ours = ([len(group["params"]) for group in groups] for groups in both)
        if theirs != ours:
            raise ValueError("the state dict has other parameter groups than the optimizer")
        for saved, group in zip(*both, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                one, state = self.manager.of.get(parameter), state_dict["state"].get(key)
                if one is None:
                    continue
                one.step = int(state["step"]) if state else 0
                for name in ("exp_avg", "exp_avg_sq"):
                    shard = local(state[name]) if state else torch.zeros(local(parameter).numel())
                    self.manager.scatter(name, one, shard)


class ParameterState(Mapping):
    """step, exp_avg and exp_avg_sq of one parameter, gathered from its chunks when they are read."""

    def __init__(self, manager: "ChunkManager", one: Managed):
        self.manager, self.one = manager, one

    def __getitem__(self, name: str) -> Tensor:
        if name not in STATES:
            raise KeyError(name)
        self.manager.wait()
        if name == "step":
            return torch.tensor(float(self.one.step))
        return like(self.one.parameter, self.manager.gather(name, self.one))

    def __iter__(self) -> Iterator[str]:
        return iter(STATES)

    def __len__(self) -> int:
        return len(STATES)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
