"""Which chunk lives where."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Placement(str, Enum):  # noqa: UP042
    RESIDENT = "resident"      # on the device, stepped there
    STREAM = "stream"          # home on the host, passes through the device ring to be stepped there
    CPU = "cpu"                # on the host, stepped by its cores


@dataclass(frozen=True)
class Plan:
    placements: tuple[Placement, ...]        # one per chunk, in forward order

    def to_json(self) -> str:
        return json.dumps({"placements": self.placements})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        return cls(tuple(map(Placement, json.loads(text)["placements"])))


def static_plan(n_elements: Sequence[int], resident: float, stream: float, cpu: float) -> Plan:
    """Fractions by layer order: residents first, then STREAM spread evenly among CPU."""
    n_resident = round(resident * len(n_elements))
    n_tail = len(n_elements) - n_resident
    n_stream = round(n_tail * stream / (stream + cpu)) if stream + cpu else 0
    tail = (Placement.STREAM if (i + 1) * n_stream // n_tail > i * n_stream // n_tail else Placement.CPU for i in range(n_tail))
    return Plan((Placement.RESIDENT,) * n_resident + tuple(tail))
