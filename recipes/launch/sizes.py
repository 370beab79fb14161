"""The sizes people train: model x GPU x number of GPUs -> flags of pretrain.py and sft.py. Every launcher
here asks this file.

    python recipes/launch/sizes.py pretrain 70b h100-80gb 256         the flags, on one line
    python recipes/launch/sizes.py pretrain 70b h100-80gb 256 --why   and the memory of a rank behind them

What the numbers come from, for N parameters on nodes of 8 GPUs, rows of 4,096 tokens:
- 7b and 13b: ZeRO 3 inside a node, whole copies between nodes (HSDP). ZeRO 3 sends 8N bytes per microbatch (parallel/zero.py):
  54 GB for 7b, 0.12 s over NVLink at 450 GB/s, under 0.4 s of arithmetic per row on an H100; over one 400 Gbit/s link per
  GPU it would be 1.1 s. Between nodes only gradients go, once a step: 2 x 4N/8 bytes a rank, 6.7 GB. 16N/8 bytes stay on a
  rank: 13 GB for 7b, 26 GB for 13b, which on 40 GB leaves too little, so there two nodes share (13 GB).
- 70b: 16N bytes are 1.1 TB. tp 8 inside a node (its traffic is per layer and must stay on NVLink), pp between nodes (one
  hidden state per microbatch), ZeRO 1 over what is left: under pp weights and gradients stay whole through a step, 6N/(tp pp)
  bytes: 26 GB at pp 2, 13 GB at pp 4, plus 12N/(tp pp S).
- 7b-lora, 13b-lora, 70b-lora: frozen weights are 2N bytes; adapters of rank 16 are 0.6 to 0.3 % of N, 16 bytes each. 70b on a
  node of 8: 17 GB a rank under ZeRO 3, and 4.5 GB of what is gathered. A row gathers 4N bytes, 0.5 s over NVLink, beside 6N
  FLOPs a token, 3.4 s at half of an H100's peak. No gradients of N travel, and tp would only add traffic.
- 7b-offload, 13b-offload, 70b-offload: all weights train; --memory.placement auto finds where their states are best. 2N bytes
  of weights must be on the GPUs; up to 18N may be on the host, or 14N where gradients come once a step and need no sum there.
  70b on a node of 8 x 40 GB: tp 8, 17 GB of weights a rank and nothing to gather; one microbatch of 16 rows is the step, and
  its block inputs wait on the host; 14N bytes are 900 of the node's 1,152 GiB. An update moves 32N bytes in DRAM, 7 s at 300
  GB/s, beside 65,536 tokens of 8N FLOPs, 29 s at half of an A100's peak. HOST is that of Amazon's p4d, p4de, p5 and p5en; where
  there is less, --memory.host-budget-gib says so.
- microbatch: as large as fits; above 8,192 tokens a rank nothing gets faster. Batches: LLaMA-2's 4M tokens, 1,024 rows of
  4,096, to pretrain (arXiv:2307.09288, sec. 2.2); 128 rows to fine-tune, more only where there are more ranks than that.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from tyro.conf import Positional

from dtensor_llama import LlamaConfig, UsageError  # torch is imported by --why alone
from dtensor_llama.cli import run_recipe
from parallel.apply import Computation

if TYPE_CHECKING:
    from memory.placement import Plan as Placements
    from parallel import ParallelConfig

GIB = 2**30
GPUS = {"a100-40gb": 39, "a100-80gb": 79, "h100-80gb": 79, "h200-141gb": 139}  # GiB that a program gets
# GiB of a node for each GPU, an eighth left
HOST = {"a100-40gb": 128, "a100-80gb": 128, "h100-80gb": 224, "h200-141gb": 224}
T = 4096  # tokens a row: LLaMA-2's context
ROWS = {"pretrain": 1024, "sft": 128}  # a step
LR = {"7b": 3e-4, "13b": 3e-4, "70b": 1.5e-4}
LORA_RANK = 16
# memory.tracer.Rates of an eighth of an A100 node, about
RATES = (25e9, 25e9, 50e9, 40e9, 40e9, {12: 1.2e9}, 50e9)


class Plan(NamedTuple):
    least: int  # GPUs it fits on
    tp: int
    pp: int
    shard: int  # dp ranks that share by ZeRO, at most; the rest are copies
    micro_rows: int  # at most
    recompute: str
    # a step: its rows are one microbatch of each dp rank, with block inputs on the host
    one_micro: bool = False


# fmt: off
TABLE = {                        # least tp pp shard micro recompute
    ("7b", "a100-40gb"):     Plan(8, 1, 1, 8, 1, "selective"),
    ("7b", "a100-80gb"):     Plan(8, 1, 1, 8, 2, "selective"),
    ("7b", "h100-80gb"):     Plan(8, 1, 1, 8, 2, "selective"),
    ("7b", "h200-141gb"):    Plan(8, 1, 1, 8, 4, "selective"),
    ("13b", "a100-40gb"):    Plan(8, 1, 1, 16, 1, "full"),
    ("13b", "a100-80gb"):    Plan(8, 1, 1, 8, 1, "selective"),
    ("13b", "h100-80gb"):    Plan(8, 1, 1, 8, 1, "selective"),
    ("13b", "h200-141gb"):   Plan(8, 1, 1, 8, 2, "selective"),
    ("70b", "a100-40gb"):    Plan(64, 8, 4, 512, 1, "full"),
    ("70b", "a100-80gb"):    Plan(32, 8, 2, 512, 1, "full"),
    ("70b", "h100-80gb"):    Plan(32, 8, 2, 512, 1, "full"),
    ("70b", "h200-141gb"):   Plan(16, 8, 2, 512, 1, "selective"),

    ("7b-lora", "a100-40gb"):      Plan(1, 1, 1, 8, 2, "full"),
    ("7b-lora", "a100-80gb"):      Plan(1, 1, 1, 8, 2, "selective"),
    ("7b-lora", "h100-80gb"):      Plan(1, 1, 1, 8, 2, "selective"),
    ("7b-lora", "h200-141gb"):     Plan(1, 1, 1, 8, 4, "selective"),
    ("13b-lora", "a100-40gb"):     Plan(1, 1, 1, 8, 1, "full"),
    ("13b-lora", "a100-80gb"):     Plan(1, 1, 1, 8, 1, "selective"),
    ("13b-lora", "h100-80gb"):     Plan(1, 1, 1, 8, 1, "selective"),
    ("13b-lora", "h200-141gb"):    Plan(1, 1, 1, 8, 2, "selective"),
    ("70b-lora", "a100-40gb"):     Plan(8, 1, 1, 8, 1, "full"),
    ("70b-lora", "a100-80gb"):     Plan(4, 1, 1, 8, 2, "full"),
    ("70b-lora", "h100-80gb"):     Plan(4, 1, 1, 8, 2, "full"),
    ("70b-lora", "h200-141gb"):    Plan(4, 1, 1, 8, 1, "selective"),

    ("7b-offload", "a100-40gb"):   Plan(1, 1, 1, 8, 2, "full"),
    ("7b-offload", "a100-80gb"):   Plan(1, 1, 1, 8, 2, "selective"),
    ("7b-offload", "h100-80gb"):   Plan(1, 1, 1, 8, 2, "selective"),
    ("7b-offload", "h200-141gb"):  Plan(1, 1, 1, 8, 2, "selective"),
    ("13b-offload", "a100-40gb"):  Plan(2, 1, 1, 8, 2, "full"),
    ("13b-offload", "a100-80gb"):  Plan(2, 1, 1, 8, 2, "full"),
    ("13b-offload", "h100-80gb"):  Plan(1, 1, 1, 8, 2, "full"),
    ("13b-offload", "h200-141gb"): Plan(1, 1, 1, 8, 2, "full"),
    ("70b-offload", "a100-40gb"):  Plan(8, 8, 1, 2, 16, "full", one_micro=True),
    ("70b-offload", "a100-80gb"):  Plan(8, 8, 1, 2, 16, "full", one_micro=True),
    ("70b-offload", "h100-80gb"):  Plan(8, 8, 1, 2, 16, "full", one_micro=True),
    ("70b-offload", "h200-141gb"): Plan(8, 8, 1, 2, 16, "full", one_micro=True),
}
# fmt: on


@dataclass(frozen=True)
class SizesConfig:
    """Print the flags of a recipe for a model on so many GPUs."""

    recipe: Positional[Literal["pretrain", "sft"]]
    # 7b, 13b, 70b; for sft also 7b-lora, 7b-offload ...; own: no flags, all of them are yours
    size: Positional[str]
    gpu: Positional[str]  # a100-40gb, a100-80gb, h100-80gb or h200-141gb
    gpus: Positional[int]  # in all
    why: bool = False  # print the memory of a rank too


def flags(recipe: str, size: str, gpu: str, gpus: int) -> dict[str, object]:
    """{flag: value}. UsageError if it would not fit, with what would."""
    model, _, kind = size.partition("-")
    if kind and recipe != "sft":
        raise UsageError(
            f"{size} is for sft, and {recipe} has 4M tokens a step; use the size {model}, or `own`."
        )
    plan = find(size, gpu, gpus)
    dp = gpus // (plan.tp * plan.pp)
    shard = min(plan.shard, dp)
    rows = max(ROWS[recipe], dp * plan.pp)  # 1f1b needs a microbatch for each stage
    if plan.one_micro:
        rows = dp * plan.micro_rows
    micro_rows = min(plan.micro_rows, rows // (dp * plan.pp))
    if rows % (dp * micro_rows) or dp % shard:
        raise UsageError(f"{gpus} GPUs cannot share {rows} rows a step evenly; use a power of 2 of them.")
    lr = LR[model] if recipe == "pretrain" else 2e-4 if kind == "lora" else 2e-5  # LLaMA-2-Chat's (sec. 3.1)
    more = {
        "": {"--train.compile": None},  # with adapters or a manager it has not been tried
        "lora": {"--lora.rank": LORA_RANK},
        # 2: NCCL, context
        "offload": {
            "--memory.placement": "auto",
            "--memory.device-budget-gib": GPUS[gpu] - 2,
            "--memory.host-budget-gib": HOST[gpu],
            **({"--memory.activations": None} if plan.one_micro else {}),
        },
    }
    return {
        "--data.seq-len": T,
        "--train.global-batch-size": rows,
        "--train.micro-batch-size": micro_rows,
        "--train.lr": lr,
        "--train.dtype": "bfloat16",
        "--train.recompute": plan.recompute,
        **more[kind],
        "--parallel.tp": plan.tp,
        "--parallel.pp": plan.pp,
        "--parallel.dp-shard": shard,
        "--parallel.dp-replicate": dp // shard,
        "--parallel.zero-stage": 1 if plan.pp > 1 else 3,
    }


def find(size: str, gpu: str, gpus: int) -> Plan:
    if gpu not in GPUS:
        raise UsageError(f"{gpu} is not a GPU in the table; it has {', '.join(GPUS)}.")
    if (size, gpu) not in TABLE:
        raise UsageError(
            f"{size} is not in the table; it has {', '.join(dict.fromkeys(size for size, _ in TABLE))} and own."
        )
    plan = TABLE[size, gpu]
    if gpus < plan.least or gpus % (plan.tp * plan.pp):
        roomier = [other for other in GPUS if GPUS[other] > GPUS[gpu] and TABLE[size, other].least <= gpus]
        lighter = [
            kin
            for kin in (f"{size}-lora", f"{size}-offload")
            if (kin, gpu) in TABLE and TABLE[kin, gpu].least <= gpus
        ]
        unit = plan.tp * plan.pp
        ways = [
            f"{max(plan.least, -(-gpus // unit) * unit)} of them",
            *roomier[:1],
            *(f"for sft the size {kin}" for kin in lighter),
            "the size `own` and flags of your own",
        ]
        raise UsageError(
            f"{size} on {gpu} needs at least {plan.least} GPUs, and a multiple of {unit}; there are {gpus}. Use "
            f"{', or '.join(ways)}."
        )
    return plan


def activation_gib(config: LlamaConfig, plan: Plan, micro_rows: int) -> float:
    """What forward keeps on the fullest rank, and what the block at work needs beside it.

    Per token and layer: selective keeps the outputs of the matrix products and of attention, full the input
    of the block. The first pipeline stage holds as many microbatches as there are stages, each of its share
    of the layers: all layers' worth."""
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    products = (2 * config.hidden_size + 2 * (H + K) * E + 2 * config.intermediate_size) / plan.tp
    kept = products if plan.recompute == "selective" else config.hidden_size / plan.tp
    # memory/activations.py: never more than two on the device
    n_kept = 2 if plan.one_micro else config.num_hidden_layers
    working = 4 * products  # its products, their gradients, and fp32 between them
    return 2 * micro_rows * T * (n_kept * kept + working) / 2**30


def main(cfg: SizesConfig) -> None:
    if cfg.size == "own":
        print("")
        return
    chosen = flags(cfg.recipe, cfg.size, cfg.gpu, cfg.gpus)
    print(*(word for flag, value in chosen.items() for word in ((flag,) if value is None else (flag, value))))
    if cfg.why:
        print(f"{memory_gib(cfg.size, cfg.gpu, cfg.gpus, chosen)} of {GPUS[cfg.gpu]} GiB", file=sys.stderr)


def memory_gib(size: str, gpu: str, gpus: int, chosen: dict) -> dict[str, float]:
    """GiB of the first rank: states and gathered weights as they are in the built model, activations."""
    from parallel import ParallelConfig
    from parallel.explain import Run, explain

    model, _, kind = size.partition("-")
    config, plan, layout = LlamaConfig.preset(f"llama2-{model}"), TABLE[size, gpu], ParallelConfig()
    layout = replace(
        layout,
        **{
            axis: chosen[f"--parallel.{axis.replace('_', '-')}"]
            for axis in ("tp", "pp", "dp_shard", "dp_replicate", "zero_stage")
        },
    )
    micro_rows = chosen["--train.micro-batch-size"]
    n_micros = chosen["--train.global-batch-size"] // (micro_rows * layout.dp)
    activations = activation_gib(config, plan, micro_rows)
    if kind == "":
        facts = explain(Run(config, layout, T, n_micros, micro_rows, recompute=chosen["--train.recompute"]))
        gib = {name: size_in_bytes / GIB for name, size_in_bytes in facts["bytes"].items() if name != "total"}
    else:
        n = elements(config, layout, gpus, lora=kind == "lora")
        gib = {"gathered_weights": 2 * n["gathered"] / GIB}
    if kind == "lora":
        gib |= {"frozen": 2 * n["frozen"] / GIB, "adapters": 16 * n["trained"] / GIB}
    if kind == "offload":
        # FSDP reduces them in fp32
        gib["gradients_under_way"] = (6 if layout.dp_shard > 1 else 2) * n["unit"] / GIB + 0.5
        placed = offload_plan(
            n["trained"],
            chosen,
            n_micros,
            other_gib=sum(gib.values()) + activations,
            inputs_gib=2 * micro_rows * T * config.hidden_size * config.num_hidden_layers / layout.tp / GIB,
        )
        gib |= {name: n_bytes / GIB for name, n_bytes in placed.device_bytes.items() if name != "other"}
    gib["activations"] = activations
    gib = {name: round(value, 1) for name, value in gib.items()}
    gib["total"] = round(sum(gib.values()), 1)
    return gib | (
        {"of the host": round(sum(placed.host_bytes.values()) / GIB, 1)} if kind == "offload" else {}
    )


def elements(config: LlamaConfig, layout: "ParallelConfig", gpus: int, lora: bool) -> dict[str, int]:
    """How many numbers the first rank of the built model has: trained, frozen; of its largest unit; gathered
    at a time."""
    import torch

    from dtensor_llama import Llama
    from dtensor_llama.chat.lora import LoraConfig, apply_lora
    from dtensor_llama.shards import local
    from parallel import build_mesh, parallelize
    from parallel.explain import computing_shape, pretend, units

    with pretend(0, gpus):
        mesh = build_mesh(layout, "cpu")
        with torch.device("meta"):
            model = Llama(config)
        if lora:
            apply_lora(model, LoraConfig(rank=LORA_RANK), frozen_dtype=torch.bfloat16)
        parts, has = parallelize(model, mesh, layout, Computation(dtype=torch.bfloat16)), {True: 0, False: 0}
        for parameter in model.parameters():
            has[parameter.requires_grad] += local(parameter).numel()
        blocks, rests = (
            [sum(math.prod(computing_shape(p)) for p in unit) for unit in kind] for kind in units(parts)
        )
    # a block at work, and the next
    gathered = sum(sorted(blocks)[-2:]) + sum(rests) if layout.dp_shard > 1 else 0
    return {"trained": has[True], "frozen": has[False], "unit": max(blocks + rests), "gathered": gathered}


def offload_plan(n: int, chosen: dict, n_micros: int, other_gib: float, inputs_gib: float) -> "Placements":
    """What --memory.placement auto would do with the n parameters of a rank. What fits does not depend on
    RATES and the times put in here, only where it is best. other_gib: of the device, not the manager's;
    inputs_gib: of blocks. UsageError: nothing fits."""
    from memory.chunk import CHUNK_ELEMENTS
    from memory.placement import Widths, auto_plan
    from memory.tracer import Rates, Traced

    sizes = [CHUNK_ELEMENTS] * (n // CHUNK_ELEMENTS) + [n % CHUNK_ELEMENTS] * (n % CHUNK_ELEMENTS > 0)
    traced = Traced(
        int(other_gib * GIB),
        forward_seconds=5,
        backward_seconds=15,
        host_bytes=int(inputs_gib * GIB) if "--memory.activations" in chosen else 0,
    )
    return auto_plan(
        sizes,
        device_budget_bytes=chosen["--memory.device-budget-gib"] * GIB,
        rates=Rates(*RATES),
        traced=traced,
        host_budget_bytes=chosen["--memory.host-budget-gib"] * GIB,
        widths=Widths.of(2, sums=n_micros > 1),
    )


if __name__ == "__main__":
    run_recipe(main, SizesConfig)
