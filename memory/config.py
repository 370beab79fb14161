"""MemoryConfig: what a user asks of the chunk manager, and the rules that say which settings are
impossible."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dtensor_llama.errors import UsageError
from memory.home import Home, StateFormat


@dataclass(frozen=True)
class MemoryConfig:
    """Asks where master weights and Adam's moments shall live. One number is enough: placement auto and a
    device budget."""

    # off: torch's AdamW on the device; auto: the fastest plan within the budget; None: on one GPU that
    # computes in bfloat16 it is static with all states resident, elsewhere off
    placement: Literal["off", "static", "auto"] | None = None
    # static: the fraction of the parameters that is stepped on the device, from the first layer on
    resident: float | None = None
    stream: float | None = None  # static: the fraction that lives on the host and passes through the device
    cpu: float | None = None  # static: the fraction that the host's cores step; the three sum to 1
    device_budget_gib: float | None = None  # per rank, never exceeded; None: what the device has
    host_budget_gib: float | None = None  # per rank; None: this rank's share of the host's free memory
    activations: bool = False  # keep the inputs of blocks on the host between forward and backward
    draw: bool = False  # draw one measured step: what was moved and computed, and when
    # AdamW compiled by torch.compile, or torch's fused AdamW in blocks
    kernel: Literal["auto", "compiled", "blocks"] = "auto"

    def _given(self, *names: str) -> dict[str, float]:
        """Return {name=value: value} of those of the settings that are not left open."""
        values = {name: getattr(self, name) for name in names}
        return {f"{name}={value:g}": value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Raise UsageError for what is impossible. It looks at the settings alone, so it can be called before
        anything is made."""
        given = self._given("resident", "stream", "cpu")
        given_budgets = self._given("device_budget_gib", "host_budget_gib")
        if self.placement == "off":
            idle = [*given, *given_budgets, *["draw=True"] * self.draw]
            idle += [] if self.kernel == "auto" else [f"kernel={self.kernel}"]
            if idle:
                instead = "static" if given and not given_budgets else "auto"
                raise UsageError(
                    f"{' '.join(idle)} would do nothing, because placement=off; use placement={instead}, or "
                    "leave it out."
                )
        for text, value in given.items():
            if not 0 <= value <= 1:
                raise UsageError(f"{text} is not a fraction; use a number from 0 to 1.")
        for text, value in given_budgets.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{text} is not possible; use a number of GiB above 0.")
        if self.placement != "static" and given:
            raise UsageError(
                f"{' '.join(given)} is for placement=static alone; use placement=static, or leave it out and "
                "set `device_budget_gib`."
            )
        if self.placement == "static":
            if len(given) < 3:
                raise UsageError(
                    "placement=static needs `resident`, `stream` and `cpu`: fractions of the parameters that "
                    "sum to 1, for example resident=0.5 stream=0.2 cpu=0.3."
                )
            if abs(sum(given.values()) - 1) > 1e-6:
                rest = 1 - self.resident - self.stream
                works = f"cpu={rest:.6g}" if rest >= 0 else f"stream={1 - self.resident:.6g} cpu=0"
                raise UsageError(
                    f"{' '.join(given)} sum to {sum(given.values()):.6g} and must sum to 1; use {works}."
                )

    @property
    def is_on(self) -> bool:
        return self.placement in ("static", "auto")

    def settle(self, device: torch.device, dtype: torch.dtype, world_size: int) -> tuple["MemoryConfig", str]:
        """Return this configuration with a placement, and a sentence on what was chosen if the placement was
        left open, else "". Raise UsageError if it becomes off although something was asked for that needs a
        manager.

        One GPU shares nothing with another, but FSDP still copies every weight to the dtype of the
        computation for each microbatch. That moves 172 bytes per parameter in a step of four microbatches. It
        is 36 bytes where bfloat16 weights stay as they are and the lower halves of their float32 masters lie
        beside the moments. dtype: of the computation.
        """
        if self.placement is not None:
            return self, ""
        if device.type == "cuda" and dtype == torch.bfloat16 and world_size == 1:
            resident = replace(self, placement="static", resident=1.0, stream=0.0, cpu=0.0)
            return resident, (
                "on one GPU the bfloat16 weights are what computes, and the chunk manager keeps the lower "
                "halves of their float32 masters and the moments beside them; placement=off chooses FSDP and "
                "AdamW"
            )
        off = replace(self, placement="off")
        off.check()  # a budget would do nothing
        return off, ""

    def device_bytes_per_parameter(self, itemsize: int, n_microbatches: int) -> float:
        """Return how many bytes weights, gradients and states take on the device at least. itemsize: of the
        dtype that computes. n_microbatches: forwards and backwards per step."""
        if not self.is_on:
            return 16.0  # float32: weight, gradient and two moments
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        state = StateFormat(dtype, accumulates=n_microbatches > 1)
        on_device = lambda home: state.bytes_per_parameter(home)["device"]
        resident, stream = self.resident or 0, self.stream or 0
        return itemsize + resident * on_device(Home.RESIDENT) + stream * on_device(Home.STREAM)
