"""ChunkOptimizer: the chunk manager in the form of a torch Optimizer, so that schedulers, zero_grad and
checkpoints work as with AdamW.

A checkpoint holds what it would hold without the manager: the float32 masters as the model's weights; `step`,
`exp_avg` and `exp_avg_sq` of each parameter; the settings of the groups. So it can be loaded under any plan,
on any layout, and by torch's AdamW.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dtensor_llama.atomic import own_rank
from dtensor_llama.checkpoint import Deferred
from dtensor_llama.errors import UsageError
from dtensor_llama.optim import StateDict
from dtensor_llama.shards import local
from dtensor_llama.weights import StandIn
from memory.chunk import ParamGroup, ParamState, from_local_like, names_of, placeholder
from memory.home import MOMENTS

if TYPE_CHECKING:
    from memory.manager import ChunkManager

REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")


def check_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError if the optimizer does anything but plain AdamW, or has state that would be lost."""
    # A subclass may add methods, but not step in its own way. torch wraps `step` where a class is first used.
    own_step, plain_step = (inspect.unwrap(kind.step) for kind in (type(optimizer), torch.optim.AdamW))
    if not isinstance(optimizer, torch.optim.AdamW) or own_step is not plain_step:
        raise UsageError(
            f"the chunk manager steps torch.optim.AdamW and was given {type(optimizer).__name__}; use AdamW, "
            "or placement=off."
        )
    check_options(optimizer.param_groups)
    if optimizer.state:
        raise UsageError(
            "the optimizer has stepped already; give the chunk manager a new one, and load a checkpoint into "
            "manager.optimizer."
        )


def check_options(groups: list[ParamGroup]) -> None:
    """Raise UsageError for an option that the kernel does not have."""
    for group in groups:
        for name in REFUSED:
            if group.get(name):
                raise UsageError(
                    f"AdamW({name}=True) is not possible with the chunk manager; leave it out, or use "
                    "placement=off."
                )


class ChunkOptimizer(torch.optim.Optimizer):
    """The face of a ChunkManager. Hyperparameters are read from param_groups at each step."""

    def __init__(self, manager: "ChunkManager", adamw: torch.optim.AdamW):
        super().__init__(adamw.param_groups, adamw.defaults)
        self.manager = manager
        self.state = {param.parameter: _StateOfParameter(manager, param) for param in manager.params}

    def add_param_group(self, param_group: ParamGroup) -> None:
        if hasattr(self, "manager"):
            raise UsageError(
                "chunks have been cut; give all parameters to AdamW before the chunk manager is made."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """Make one AdamW step, with the factor of the last clip_grad_norm; it uses the gradients up. It
        returns before all is done."""
        check_options(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.manager.step()
        return loss

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """See ChunkManager.clip_grad_norm."""
        return self.manager.clip_grad_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.manager.discard_gradients()
        super().zero_grad(set_to_none)

    def masters(self) -> StandIn:
        """See ChunkManager.masters: what a checkpoint holds as the model's weights."""
        return self.manager.masters()

    def checkpoint_state(self) -> StateDict:
        """Return the manager's sections of a checkpoint (dtensor_llama.checkpoint.training_state).

        Weights are the float32 masters. The optimizer's state has the names that torch's AdamW would have in
        a flattened state dict. Tensors are Deferred. `plan` is this rank's, because only the same plan gives
        the same bits; it is empty as long as placement auto has not made one.
        """
        manager, masters = self.manager, self.manager.masters()
        stages = manager.stages_checkpoints()

        def deferred(name: str, param: ParamState) -> Deferred:
            read, write = partial(manager.read_state, name, param), partial(manager.write_state, name, param)
            return Deferred(placeholder(param.parameter), read, write, stages)

        has_no_plan = manager.auto and manager.auto.is_tracing
        plan = "" if has_no_plan else manager.plan.to_json()
        weights = {}
        for name, value in masters.state_dict(keep_vars=True).items():
            if param := masters.param_of.get(value):
                weights[name] = deferred("master", param)
            elif not isinstance(value, nn.Parameter):  # a buffer; frozen parameters are not saved
                weights[name] = value
        state = {}
        for name, param, group in self._named_params():
            state |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
            if param is not None:
                state[f"state.{name}.step"] = torch.tensor(float(param.step))
                state |= {f"state.{name}.{key}": deferred(key, param) for key in MOMENTS}
        return {"model": weights, "optimizer": state, "plan": {str(own_rank()): plan}}

    def restore(self, state: StateDict) -> None:
        """Put a loaded `checkpoint_state` into effect. Weights and moments are in the chunks already: they
        were written as they were read."""
        loaded = state["optimizer"]
        for name, param, group in self._named_params():
            group.update({key: loaded[f"param_groups.{name}.{key}"] for key in group if key != "params"})
            if param is not None:
                param.step = int(loaded[f"state.{name}.step"])
        check_options(self.param_groups)
        if self.manager.auto:
            self.manager.auto.take_plan(*state["plan"].values())

    def _named_params(self) -> Iterator[tuple[str, ParamState | None, ParamGroup]]:
        """Yield the name, the state (None if frozen) and the group of each parameter."""
        names = names_of(self.manager.model)
        for group in self.param_groups:
            for parameter in group["params"]:
                yield names[parameter], self.manager.param_of.get(parameter), group

    def state_dict(self) -> StateDict:
        """Return what AdamW would return; tensors are copies on the host, sharded as their parameters."""
        packed = super().state_dict()
        packed["state"] = {i: dict(states) for i, states in packed["state"].items()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Copy in the moments and settings that this optimizer returned, under any plan, or that AdamW
        returned. Master weights are loaded by `masters().write`."""
        self.manager.wait()
        check_options(state_dict["param_groups"])
        both = state_dict["param_groups"], self.param_groups
        theirs, ours = ([len(group["params"]) for group in groups] for groups in both)
        if theirs != ours:
            raise ValueError("the state dict has other parameter groups than the optimizer")
        for saved, group in zip(*both, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                param, state = self.manager.param_of.get(parameter), state_dict["state"].get(key)
                if param is None:
                    continue
                param.step = int(state["step"]) if state else 0
                for name in MOMENTS:
                    shard = local(state[name]) if state else torch.zeros(local(parameter).numel())
                    self.manager.write_state(name, param, shard)


class _StateOfParameter(Mapping):
    """step, exp_avg and exp_avg_sq of one parameter, which are collected from its chunks when they are
    read."""

    def __init__(self, manager: "ChunkManager", param: ParamState):
        self.manager, self.param = manager, param
        self.readers = {"step": self._step, **{name: partial(self._moment, name) for name in MOMENTS}}

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

    def _step(self) -> Tensor:
        self.manager.wait()
        return torch.tensor(float(self.param.step))

    def _moment(self, name: str) -> Tensor:
        return from_local_like(self.param.parameter, self.manager.read_state(name, self.param))
