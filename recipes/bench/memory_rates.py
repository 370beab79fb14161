"""Measure what the link, the DRAM and the cores of this machine can do: memory plans are made of these rates.

    python recipes/bench/memory_rates.py                     # one JSON line, in half a minute
    python recipes/bench/memory_rates.py --keep rates.json   # also keep the rates for plans, as training does

Copies from host to device (h2d), back (d2h) and both at once (duplex, summed) are measured by size, in GB/s,
with pinned memory. The host's DRAM is measured under an in-place stream of all cores, and under our AdamW
together with the link both ways, as in an update. Our AdamW is measured on the host by number of threads, and
on the device, in G parameters/s and in bytes/s (28 a parameter on the host, 26 on the device). A figure is
null where the machine lacks the part. Without a GPU the link is a copy within RAM, which says nothing about a
wire.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed
from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError
from memory.lanes import host_threads
from memory.tracer import (
    HOST_ADAM_BYTES,
    MIB,
    Link,
    adam_rate,
    dram_rate_in_update,
    load_rates,
    machine_key,
    per_second,
)

DEVICE_BYTES = 26  # that AdamW moves on the device for a parameter, where the master is split


@dataclass(frozen=True)
class Config:
    sizes_mib: tuple[int, ...] = (1, 4, 16, 64, 256)  # sizes of one copy over the link
    dram_mib: int = 2048  # size of the streamed array: several times the last-level cache
    adam_mi_elements: int = 64  # parameters that the host's AdamW steps, in 2^20, of 14 bytes each
    seconds: float = 1.0  # each figure is measured for so long, and the best call counts
    kernel: Literal["auto", "compiled", "blocks"] = "auto"  # our AdamW, as in --memory.kernel
    keep: str | None = None  # a JSON file for this machine's rates, which are measured if it has none


def main(cfg: Config) -> None:
    if min(*cfg.sizes_mib, cfg.dram_mib, cfg.adam_mi_elements) < 1 or cfg.seconds <= 0:
        raise UsageError("--sizes-mib, --dram-mib, --adam-mi-elements and --seconds must be above 0.")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    link = Link(device, max(cfg.sizes_mib) * MIB)
    n_cores = len(os.sched_getaffinity(0))
    counts = sorted({n_cores, *(2**i for i in range(n_cores.bit_length()))})  # 1, 2, 4 ... and all
    gb_s = lambda rate: round(rate / 1e9, 3)
    n_parameters = cfg.adam_mi_elements * MIB
    host = torch.device("cpu")
    host_adam = {n: adam_rate(host, n, n_parameters, cfg.seconds, cfg.kernel) for n in counts}
    device_adam = None
    if device.type == "cuda":
        device_adam = adam_rate(device, n_cores, 256 * MIB, cfg.seconds, cfg.kernel)
    result = {"machine": machine_key(device), "link_is_a_wire": device.type == "cuda"}
    for direction in ("h2d", "d2h", "duplex"):
        rates = {mib: link.rate(direction, cfg.seconds, mib * MIB) for mib in cfg.sizes_mib}
        result[f"{direction}_gb_s_by_mib"] = {mib: gb_s(rate) for mib, rate in rates.items()}
    result |= {
        "dram_gb_s": gb_s(per_second(dram_stream(cfg.dram_mib * MIB), cfg.seconds)),
        "dram_in_update_gb_s": gb_s(
            dram_rate_in_update(link, host_threads(device, 1), n_parameters, cfg.seconds, cfg.kernel)
        ),
        "host_adam_g_parameters_s_by_threads": {n: gb_s(rate) for n, rate in host_adam.items()},
        "host_adam_gb_s": gb_s(HOST_ADAM_BYTES * max(host_adam.values())),
        "device_adam_g_parameters_s": device_adam and gb_s(device_adam),
        "device_adam_gb_s": device_adam and gb_s(DEVICE_BYTES * device_adam),
    }
    print(json.dumps(result), flush=True)
    if cfg.keep:
        kept = load_rates(Path(cfg.keep), device, cfg.kernel)
        print(json.dumps({"kept_in": cfg.keep, "rates": asdict(kept)}), flush=True)


def dram_stream(n_bytes: int) -> Callable[[], int]:
    """Return a function that lets all cores add to an array in place, which is the least that any update of
    states does to DRAM, and returns how many bytes that moved. n_bytes: of the array, larger than the
    caches."""
    array = torch.zeros(n_bytes // 4)
    return lambda: 2 * array.add_(1).nbytes


if __name__ == "__main__":
    run_recipe(main, Config)
