"""The homes that a chunk can have, and which tensors it has there.

account        "device" or "host": where bytes are counted. Without a GPU both are the same RAM
master         the float32 weight. RESIDENT and STREAM chunks keep only what the weight lacks of it: nothing
               if weights are float32; `master_low16`, its lower 16 bits, if they are bfloat16
grad_accum     the float32 sum of a step's gradients, where several arrive between two optimizer steps
grad_buffer    pinned host memory in which the gradients of a CPU chunk arrive, in the dtype of the weights
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

ByAccount = dict[str, int]  # bytes on the "device" and on the "host"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


class Home(StrEnum):
    """Names where the optimizer state of a chunk lives, and which processor steps it."""

    RESIDENT = "resident"  # on the device, which steps it there
    STREAM = "stream"  # on the host; it passes through the device, which steps it
    CPU = "cpu"  # on the host, whose cores step it


@dataclass(frozen=True)
class StateFormat:
    """The tensors of a chunk by home, and the bytes per parameter that follow from them.

    accumulates: several gradients arrive between two optimizer steps and are summed in float32.
    """

    weight_dtype: torch.dtype = torch.bfloat16
    accumulates: bool = False

    def tensors(self, home: Home) -> dict[str, tuple[str, torch.dtype]]:
        """Return {name: (account, dtype)}. The weight itself belongs to the model."""
        float32, is_split = torch.float32, self.weight_dtype != torch.float32
        if home is Home.CPU:
            names = ["master", *MOMENTS, *["grad_accum"] * self.accumulates]
            states = {name: ("host", float32) for name in names}
            return states | {"grad_buffer": ("host", self.weight_dtype)}
        account = "host" if home is Home.STREAM else "device"
        states = {name: (account, float32) for name in MOMENTS}
        if is_split:
            states["master_low16"] = account, torch.int16
        if is_split and self.accumulates:
            states["grad_accum"] = "device", float32
        return states

    def bytes_per_parameter(self, home: Home) -> ByAccount:
        """Return bytes by account, without the weight. A gradient that the device steps with waits there;
        where gradients accumulate in a tensor of their own, that one is counted instead."""
        tensors = self.tensors(home)
        waits = home is not Home.CPU and "grad_accum" not in tensors
        counted = {"device": self.weight_dtype.itemsize if waits else 0, "host": 0}
        for account, dtype in tensors.values():
            counted[account] += dtype.itemsize
        return counted

    @property
    def state_bytes(self) -> int:
        """Bytes of the states that the device steps: two moments, and what the weight lacks of the master."""
        return self.bytes_per_parameter(Home.STREAM)["host"]

    @property
    def cpu_dram_bytes(self) -> int:
        """Bytes that a step on the host moves in its DRAM: 12 read and 12 written for the states; gradient
        and new weight once by the cores and once over the link; the sum of the gradients, if there is one."""
        return 24 + 4 * self.weight_dtype.itemsize + 4 * self.accumulates
