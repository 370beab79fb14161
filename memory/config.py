"""MemoryConfig: what the chunk manager is asked for, and the one function that says what is impossible."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn, optim

from dtensor_llama.errors import UsageError

if TYPE_CHECKING:
    from memory.manager import ChunkManager


@dataclass(frozen=True)
class MemoryConfig:
    """Where master weights and Adam's moments live. One number is enough: placement auto and a device
    budget."""

    # off: torch's AdamW on the device; auto: the fastest plan in the budget; None: on one GPU that computes
    # in bfloat16 static with all states resident, elsewhere off
    placement: Literal["off", "static", "auto"] | None = None
    # static: fraction of the parameters stepped on the device, from the first layer on
    resident: float | None = None
    stream: float | None = None  #         fraction that lives on the host and passes through the device
    cpu: float | None = None  #         fraction stepped by the host's cores; the three sum to 1
    device_budget_gib: float | None = None  # per rank, never passed; None: what the device has
    host_budget_gib: float | None = None  # per rank; None: this rank's share of what is free
    activations: bool = False  # keep block inputs on the host between forward and backward
    draw: bool = False  # draw one measured step: who moved and computed what when
    # AdamW by torch.compile, or torch's fused one in blocks
    kernel: Literal["auto", "compiled", "blocks"] = "auto"

    def check(self) -> None:
        """UsageError for what cannot be done, in words; looks at the settings only, so call it before
        anything is made."""
        fractions = {"resident": self.resident, "stream": self.stream, "cpu": self.cpu}
        given = {
            f"--memory.{name} {value:g}": value for name, value in fractions.items() if value is not None
        }
        budgets = {
            f"--memory.{name.replace('_', '-')} {value:g}": value
            for name in ("device_budget_gib", "host_budget_gib")
            if (value := getattr(self, name)) is not None
        }
        if self.placement == "off":
            kernel = [] if self.kernel == "auto" else [f"--memory.kernel {self.kernel}"]
            idle = [*given, *budgets, *["--memory.draw"] * self.draw, *kernel]
            if idle:
                raise UsageError(
                    f"{' '.join(idle)} would do nothing, as --memory.placement is off; use --memory.placement "
                    f"{'static' if given and not budgets else 'auto'}, or leave it out."
                )
        for said, value in given.items():
            if not 0 <= value <= 1:
                raise UsageError(f"{said} is not a fraction; use 0 to 1.")
        for said, value in budgets.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{said} is not possible; use GiB above 0.")
        if self.placement is None and given:
            raise UsageError(
                f"{' '.join(given)} would do nothing without --memory.placement; use --memory.placement static."
            )
        if self.placement == "auto" and given:
            raise UsageError(
                f"{' '.join(given)} fixes what --memory.placement auto is to find; use --memory.placement static, "
                "or leave it out and give --memory.device-budget-gib."
            )
        if self.placement == "static":
            if len(given) < 3:
                missing = [f"--memory.{name}" for name, value in fractions.items() if value is None]
                raise UsageError(
                    f"--memory.placement static needs {' and '.join(missing)}: fractions of the parameters that "
                    "sum to 1, such as --memory.resident 0.5 --memory.stream 0.2 --memory.cpu 0.3."
                )
            if abs(sum(given.values()) - 1) > 1e-6:
                rest = 1 - self.resident - self.stream
                works = (
                    f"--memory.cpu {rest:.6g}"
                    if rest >= 0
                    else f"--memory.stream {1 - self.resident:.6g} --memory.cpu 0"
                )
                raise UsageError(
                    f"{' '.join(given)} sum to {sum(given.values()):.6g} and must sum to 1; use {works}."
                )

    @property
    def is_on(self) -> bool:
        return self.placement in ("static", "auto")

    def settle(self, device: torch.device, dtype: torch.dtype, world_size: int) -> tuple["MemoryConfig", str]:
        """The same with a placement, and in words what was chosen for whoever left it open; "" if nothing
        was. UsageError if it is off and something was asked for that only a manager does.

        On one GPU nothing is shared, but FSDP still copies every weight to the type that computes, for each
        microbatch: 172 bytes a parameter and step of four microbatches move for it, against 36 where bfloat16
        weights stay as they are and the lower halves of their float32 masters lie beside the moments. dtype:
        of the computation.
        """
        if self.placement is not None:
            return self, ""
        if device.type == "cuda" and dtype == torch.bfloat16 and world_size == 1:
            resident = replace(self, placement="static", resident=1.0, stream=0.0, cpu=0.0)
            return resident, (
                "on one GPU bfloat16 weights compute as they are, and the chunk manager keeps the rest of "
                "their float32 masters and the moments beside them; --memory.placement off for FSDP and AdamW"
            )
        off = replace(self, placement="off")
        off.check()  # a budget would do nothing
        return off, ""

    def device_bytes_per_parameter(self, itemsize: int, n_micros: int) -> float:
        """What weights, gradients and states take of the device at least. itemsize: of the numbers that
        compute; n_micros: forwards and backwards of a step."""
        if not self.is_on:
            return 16.0  # float32: weight, gradient and two moments
        grad = itemsize if n_micros == 1 else 4
        states = 8 if itemsize == 4 else 10  # of a bfloat16 weight the lower half of the master too
        return itemsize + (self.resident or 0) * (states + grad) + (self.stream or 0) * grad

    def manage(self, model: nn.Module, optimizer: optim.AdamW, **kwargs) -> "ChunkManager":
        """The manager of this configuration, with `manager.optimizer` in the place of `optimizer`; arguments
        as ChunkManager. For those who are handed a MemoryConfig and may not import memory."""
        from memory.manager import ChunkManager

        return ChunkManager(model, optimizer, self, **kwargs)
