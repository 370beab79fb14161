"""What the wires, the DRAM and the cores of this machine can do: the rates that memory plans are made of.

    python recipes/bench/memory_rates.py                     # one JSON line, half a minute; --help lists the sizes
    python recipes/bench/memory_rates.py --keep rates.json   # and keeps the plan's own rates there, as training would

Host to device (h2d), back (d2h) and both at once (duplex, summed) by size, in GB/s, pinned memory; the host's
DRAM under an in-place stream of all cores, alone and with the link busy both ways; our AdamW on the host by
threads and on the device, in G parameters/s, with the bytes/s that makes (28 a parameter on the host, 26 on
the device). Figures of what is not there are null. Without a GPU the link is a copy between two accounts of
the same RAM: of use to plan on this machine, not a wire.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed
from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError
from memory.tracer import (
    MIB,
    DramStream,
    Link,
    device_adam_rate,
    host_adam_rate,
    load_rates,
    machine_key,
)

# of Adam per parameter: bfloat16 gradient and weight; the device's master is split
HOST_BYTES, DEVICE_BYTES = 28, 26


@dataclass(frozen=True)
class Config:
    sizes_mib: tuple[int, ...] = (1, 4, 16, 64, 256)  # of one copy over the link
    dram_mib: int = 2048  # the streamed array: several times the last-level cache
    adam_mi_elements: int = 64  # parameters of the host's Adam, in 2^20: 14 bytes each
    seconds: float = 1.0  # per figure, of which the best go counts
    kernel: Literal["auto", "compiled", "blocks"] = "auto"  # our AdamW, as --memory.kernel
    keep: str | None = None  # a JSON file for this machine's rates; measured anew if not in it


def main(cfg: Config) -> None:
    if min(*cfg.sizes_mib, cfg.dram_mib, cfg.adam_mi_elements) < 1 or cfg.seconds <= 0:
        raise UsageError("--sizes-mib, --dram-mib, --adam-mi-elements and --seconds must be above 0.")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    link, stream = Link(device, max(cfg.sizes_mib) * MIB), DramStream(cfg.dram_mib * MIB)
    n_cores = len(os.sched_getaffinity(0))
    counts = sorted({n_cores, *(2**i for i in range(n_cores.bit_length()))})  # 1, 2, 4 ... and all
    gb_s = lambda rate: round(rate / 1e9, 3)
    host_adam = {n: host_adam_rate(n, cfg.adam_mi_elements * MIB, cfg.seconds, cfg.kernel) for n in counts}
    device_adam = (
        device_adam_rate(device, 256 * MIB, cfg.seconds, cfg.kernel) if device.type == "cuda" else None
    )
    print(
        json.dumps(
            {
                "machine": machine_key(device),
                "link_is_a_wire": device.type == "cuda",
                **{
                    f"{direction}_gb_s_by_mib": {
                        mib: gb_s(link.rate(direction, cfg.seconds, mib * MIB)) for mib in cfg.sizes_mib
                    }
                    for direction in ("h2d", "d2h", "duplex")
                },
                "dram_gb_s": gb_s(stream.rate(cfg.seconds)),
                "dram_under_dma_gb_s": gb_s(stream.rate_under(link, cfg.seconds)),
                "host_adam_g_parameters_s_by_threads": {n: gb_s(rate) for n, rate in host_adam.items()},
                "host_adam_gb_s": gb_s(HOST_BYTES * max(host_adam.values())),
                "device_adam_g_parameters_s": device_adam and gb_s(device_adam),
                "device_adam_gb_s": device_adam and gb_s(DEVICE_BYTES * device_adam),
            }
        ),
        flush=True,
    )
    if cfg.keep:
        print(
            json.dumps(
                {"kept_in": cfg.keep, "rates": load_rates(Path(cfg.keep), device, cfg.kernel).to_json()}
            ),
            flush=True,
        )


if __name__ == "__main__":
    run_recipe(main, Config)
