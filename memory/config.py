"""MemoryConfig: what the chunk manager is asked for, and the one function that says what is impossible."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn, optim

from dtensor_llama.errors import UsageError

if TYPE_CHECKING:
    from memory.manager import ChunkManager


@dataclass(frozen=True)
class MemoryConfig:
    """Where master weights and Adam's moments live. One number is enough: placement auto and a device budget."""

    placement: Literal["off", "static", "auto"] = "off"    # off: torch's AdamW on the device; auto: fastest plan in the budget
    resident: float | None = None            # static: fraction of the parameters stepped on the device, from the first layer on
    stream: float | None = None              #         fraction that lives on the host and passes through the device
    cpu: float | None = None                 #         fraction stepped by the host's cores; the three sum to 1
    device_budget_gib: float | None = None   # per rank, never passed; None: what the device has
    host_budget_gib: float | None = None     # per rank; None: this rank's share of what is free
    activations: bool = False                # keep block inputs on the host between forward and backward
    draw: bool = False                       # draw one measured step: who moved and computed what when
    kernel: Literal["auto", "compiled", "blocks"] = "auto"    # AdamW by torch.compile, or torch's fused one in blocks

    def check(self) -> None:
        """UsageError for what cannot be done, in words; looks at the settings only, so call it before anything is made."""
        fractions = {"resident": self.resident, "stream": self.stream, "cpu": self.cpu}
        given = {f"--memory.{name} {value:g}": value for name, value in fractions.items() if value is not None}
        budgets = {f"--memory.{name.replace('_', '-')} {value:g}": value
                   for name in ("device_budget_gib", "host_budget_gib") if (value := getattr(self, name)) is not None}
        if self.placement == "off":
            kernel = [] if self.kernel == "auto" else [f"--memory.kernel {self.kernel}"]
            idle = [*given, *budgets, *["--memory.draw"] * self.draw, *kernel]
            if idle:
                raise UsageError(f"{' '.join(idle)} would do nothing, as --memory.placement is off; use --memory.placement "
                                 f"{'static' if given and not budgets else 'auto'}, or leave it out.")
        for said, value in given.items():
            if not 0 <= value <= 1:
                raise UsageError(f"{said} is not a fraction; use 0 to 1.")
        for said, value in budgets.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{said} is not possible; use GiB above 0.")
        if self.placement == "auto" and given:
            raise UsageError(f"{' '.join(given)} fixes what --memory.placement auto is to find; use --memory.placement static, "
                             "or leave it out and give --memory.device-budget-gib.")
        if self.placement == "static":
            if len(given) < 3:
                missing = [f"--memory.{name}" for name, value in fractions.items() if value is None]
                raise UsageError(f"--memory.placement static needs {' and '.join(missing)}: fractions of the parameters that "
                                 "sum to 1, such as --memory.resident 0.5 --memory.stream 0.2 --memory.cpu 0.3.")
            if abs(sum(given.values()) - 1) > 1e-6:
                rest = 1 - self.resident - self.stream
                works = f"--memory.cpu {rest:.6g}" if rest >= 0 else f"--memory.stream {1 - self.resident:.6g} --memory.cpu 0"
                raise UsageError(f"{' '.join(given)} sum to {sum(given.values()):.6g} and must sum to 1; use {works}.")

    @property
    def is_on(self) -> bool:
        return self.placement != "off"

    def manage(self, model: nn.Module, optimizer: optim.AdamW, **kwargs) -> "ChunkManager":
        """The manager of this configuration, with `manager.optimizer` in the place of `optimizer`; arguments as ChunkManager.
        For those who are handed a MemoryConfig and may not import memory."""
        from memory.manager import ChunkManager

        return ChunkManager(model, optimizer, self, **kwargs)
