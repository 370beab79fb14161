"""The sizes that people train: model x GPU x number of GPUs -> flags of pretrain.py and sft.py. Every
launcher in this folder asks this file.

    python recipes/launch/sizes.py pretrain 70b h100-80gb 256         prints the flags, on one line
    python recipes/launch/sizes.py pretrain 70b h100-80gb 256 --why   also prints the memory of a rank

The numbers come from the following, for N parameters on nodes of 8 GPUs and rows of 4,096 tokens:
- 7b and 13b use ZeRO 3 inside a node and whole copies between nodes (HSDP). ZeRO 3 sends 8N bytes per
  microbatch (parallel/zero.py): 54 GB for 7b, which take 0.12 s over NVLink at 450 GB/s, hidden behind 0.4 s
  of arithmetic per row on an H100; over one 400 Gbit/s link per GPU they would take 1.1 s. Between nodes only
  gradients travel, once a step: 2 x 4N/8 bytes a rank, which are 6.7 GB. A rank keeps 16N/8 bytes: 13 GB for
  7b, and 26 GB for 13b, which leaves too little of 40 GB, so there two nodes share them (13 GB).
- 70b has 16N bytes of 1.1 TB. It uses tp 8 inside a node (its traffic is per layer and must stay on NVLink),
  pp between nodes (it sends one hidden state per microbatch), and ZeRO 1 over what is left. Under pp weights
  and gradients stay whole through a step, in 6N/(tp pp) bytes: 26 GB at pp 2 and 13 GB at pp 4, plus 12N/(tp
  pp S).
- 7b-lora, 13b-lora and 70b-lora have frozen weights of 2N bytes, and adapters of rank 16 that are 0.6 to 0.3
  % of N, with 16 bytes each. 70b takes 17 GB a rank under ZeRO 3 on a node of 8, and 4.5 GB for gathered
  weights. A row gathers 4N bytes, which take 0.5 s over NVLink, beside 6N FLOPs a token, which take 3.4 s at
  half of the peak of an H100. No gradients of N travel, and tp would only add traffic.
- 7b-offload, 13b-offload and 70b-offload train all weights, and --memory.placement auto finds the best place
  for their states. 2N bytes of weights must be on the GPUs; up to 18N may be on the host, or 14N where
  gradients come once a step and need no sum there. 70b on a node of 8 x 40 GB uses tp 8, so that a rank has
  17 GB of weights and gathers nothing. One microbatch of 16 rows is the step, and its block inputs wait on
  the host, where 14N bytes are 900 of the 1,152 GiB of the node. An update moves 32N bytes in DRAM, which
  takes 7 s at 300 GB/s, beside 65,536 tokens of 8N FLOPs, which take 29 s at half of the peak of an A100.
  HOST is the memory of the p4d, p4de, p5 and p5en nodes of Amazon; where there is less, use
  --memory.host-budget-gib.
- A microbatch is as large as fits; above 8,192 tokens a rank nothing gets faster. A step of pretraining has
  the 4M tokens of LLaMA-2, 1,024 rows of 4,096 (arXiv:2307.09288, sec. 2.2). A step of fine-tuning has 128
  rows, and more only where there are more ranks than that.
"""

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tyro.conf import Positional

from dtensor_llama import LlamaConfig, UsageError  # only --why imports torch
from dtensor_llama.cli import run_recipe
from dtensor_llama.metrics import GIB
from parallel.apply import Computation

if TYPE_CHECKING:
    from memory.placement import Plan
    from parallel import ParallelConfig

GPUS = {"a100-40gb": 39, "a100-80gb": 79, "h100-80gb": 79, "h200-141gb": 139}  # GiB that a program gets
# GiB of a node's memory for each GPU, with an eighth left free
HOST = {"a100-40gb": 128, "a100-80gb": 128, "h100-80gb": 224, "h200-141gb": 224}
T = 4096  # tokens a row: the context of LLaMA-2
ROWS = {"pretrain": 1024, "sft": 128}  # rows a step
LR = {"7b": 3e-4, "13b": 3e-4, "70b": 1.5e-4}
LORA_RANK = 16
# memory.tracer.MachineRates of an eighth of an A100 node, roughly
RATES = (25e9, 25e9, 50e9, 40e9, 40e9, 1.2e9, 50e9)


class Size(NamedTuple):
    """Holds how one model is trained on one kind of GPU."""

    least: int  # GPUs that it fits on
    tp: int
    pp: int
    shard: int  # dp ranks that share by ZeRO, at most; the rest hold copies
    micro_rows: int  # at most
    recompute: str
    # a step is one microbatch of each dp rank, with its block inputs on the host
    one_microbatch: bool = False


# fmt: off
TABLE = {                        # least tp pp shard micro recompute
    ("7b", "a100-40gb"):     Size(8, 1, 1, 8, 1, "selective"),
    ("7b", "a100-80gb"):     Size(8, 1, 1, 8, 2, "selective"),
    ("7b", "h100-80gb"):     Size(8, 1, 1, 8, 2, "selective"),
    ("7b", "h200-141gb"):    Size(8, 1, 1, 8, 4, "selective"),
    ("13b", "a100-40gb"):    Size(8, 1, 1, 16, 1, "full"),
    ("13b", "a100-80gb"):    Size(8, 1, 1, 8, 1, "selective"),
    ("13b", "h100-80gb"):    Size(8, 1, 1, 8, 1, "selective"),
    ("13b", "h200-141gb"):   Size(8, 1, 1, 8, 2, "selective"),
    ("70b", "a100-40gb"):    Size(64, 8, 4, 512, 1, "full"),
    ("70b", "a100-80gb"):    Size(32, 8, 2, 512, 1, "full"),
    ("70b", "h100-80gb"):    Size(32, 8, 2, 512, 1, "full"),
    ("70b", "h200-141gb"):   Size(16, 8, 2, 512, 1, "selective"),

    ("7b-lora", "a100-40gb"):      Size(1, 1, 1, 8, 2, "full"),
    ("7b-lora", "a100-80gb"):      Size(1, 1, 1, 8, 2, "selective"),
    ("7b-lora", "h100-80gb"):      Size(1, 1, 1, 8, 2, "selective"),
    ("7b-lora", "h200-141gb"):     Size(1, 1, 1, 8, 4, "selective"),
    ("13b-lora", "a100-40gb"):     Size(1, 1, 1, 8, 1, "full"),
    ("13b-lora", "a100-80gb"):     Size(1, 1, 1, 8, 1, "selective"),
    ("13b-lora", "h100-80gb"):     Size(1, 1, 1, 8, 1, "selective"),
    ("13b-lora", "h200-141gb"):    Size(1, 1, 1, 8, 2, "selective"),
    ("70b-lora", "a100-40gb"):     Size(8, 1, 1, 8, 1, "full"),
    ("70b-lora", "a100-80gb"):     Size(4, 1, 1, 8, 2, "full"),
    ("70b-lora", "h100-80gb"):     Size(4, 1, 1, 8, 2, "full"),
    ("70b-lora", "h200-141gb"):    Size(4, 1, 1, 8, 1, "selective"),

    ("7b-offload", "a100-40gb"):   Size(1, 1, 1, 8, 2, "full"),
    ("7b-offload", "a100-80gb"):   Size(1, 1, 1, 8, 2, "selective"),
    ("7b-offload", "h100-80gb"):   Size(1, 1, 1, 8, 2, "selective"),
    ("7b-offload", "h200-141gb"):  Size(1, 1, 1, 8, 2, "selective"),
    ("13b-offload", "a100-40gb"):  Size(2, 1, 1, 8, 2, "full"),
    ("13b-offload", "a100-80gb"):  Size(2, 1, 1, 8, 2, "full"),
    ("13b-offload", "h100-80gb"):  Size(1, 1, 1, 8, 2, "full"),
    ("13b-offload", "h200-141gb"): Size(1, 1, 1, 8, 2, "full"),
    ("70b-offload", "a100-40gb"):  Size(8, 8, 1, 2, 16, "full", one_microbatch=True),
    ("70b-offload", "a100-80gb"):  Size(8, 8, 1, 2, 16, "full", one_microbatch=True),
    ("70b-offload", "h100-80gb"):  Size(8, 8, 1, 2, 16, "full", one_microbatch=True),
    ("70b-offload", "h200-141gb"): Size(8, 8, 1, 2, 16, "full", one_microbatch=True),
}
# fmt: on


@dataclass(frozen=True)
class SizesConfig:
    """Print the flags of a recipe for a model on a number of GPUs."""

    recipe: Positional[Literal["pretrain", "sft"]]
    # 7b, 13b or 70b; for sft also 7b-lora, 7b-offload and so on; own: no flags, so that all of them are yours
    size: Positional[str]
    gpu: Positional[str]  # a100-40gb, a100-80gb, h100-80gb or h200-141gb
    gpus: Positional[int]  # on all nodes together
    why: bool = False  # print the memory of a rank too


def flags(recipe: str, size: str, gpu: str, gpus: int) -> dict[str, object]:
    """Return {flag: value}, with None for a flag without a value. UsageError says what fits if this does
    not."""
    model, _, kind = size.partition("-")
    if kind and recipe != "sft":
        raise UsageError(
            f"{size} is for sft, and {recipe} has 4M tokens a step; use the size {model}, or `own`."
        )
    chosen = find(size, gpu, gpus)
    dp = gpus // (chosen.tp * chosen.pp)
    shard = min(chosen.shard, dp)
    rows = max(ROWS[recipe], dp * chosen.pp)  # 1f1b needs a microbatch for each stage
    if chosen.one_microbatch:
        rows = dp * chosen.micro_rows
    micro_rows = min(chosen.micro_rows, rows // (dp * chosen.pp))
    if rows % (dp * micro_rows) or dp % shard:
        raise UsageError(f"{gpus} GPUs cannot share {rows} rows a step evenly; use a power of 2 of them.")
    lr = LR[model]
    if recipe == "sft":
        lr = 2e-4 if kind == "lora" else 2e-5  # 2e-5 is that of LLaMA-2-Chat (sec. 3.1)
    return {
        "--data.seq-len": T,
        "--train.global-batch-size": rows,
        "--train.micro-batch-size": micro_rows,
        "--train.lr": lr,
        "--train.dtype": "bfloat16",
        "--train.recompute": chosen.recompute,
        **flags_of_kind(kind, chosen, gpu),
        "--parallel.tp": chosen.tp,
        "--parallel.pp": chosen.pp,
        "--parallel.dp-shard": shard,
        "--parallel.dp-replicate": dp // shard,
        "--parallel.zero-stage": 1 if chosen.pp > 1 else 3,
    }


def flags_of_kind(kind: str, chosen: Size, gpu: str) -> dict[str, object]:
    """Return the flags that only this kind of training has: all weights, adapters, or all weights with
    offload."""
    if kind == "":
        return {"--train.compile": None}  # it has not been tried with adapters, nor with a chunk manager
    if kind == "lora":
        return {"--lora.rank": LORA_RANK}
    budgets = {
        "--memory.placement": "auto",
        "--memory.device-budget-gib": GPUS[gpu] - 2,  # 2 are for NCCL and the CUDA context
        "--memory.host-budget-gib": HOST[gpu],
    }
    return budgets | ({"--memory.activations": None} if chosen.one_microbatch else {})


def find(size: str, gpu: str, gpus: int) -> Size:
    """Return the row of the table. UsageError if there is none, or if it needs other numbers of GPUs."""
    if gpu not in GPUS:
        raise UsageError(f"{gpu} is not a GPU in the table; it has {', '.join(GPUS)}.")
    if (size, gpu) not in TABLE:
        known = dict.fromkeys(size for size, _ in TABLE)
        raise UsageError(f"{size} is not in the table; it has {', '.join(known)} and own.")
    chosen = TABLE[size, gpu]
    unit = chosen.tp * chosen.pp
    if gpus < chosen.least or gpus % unit:
        larger = [other for other in GPUS if GPUS[other] > GPUS[gpu] and TABLE[size, other].least <= gpus]
        kinds = [f"{size}-lora", f"{size}-offload"]
        lighter = [kind for kind in kinds if (kind, gpu) in TABLE and TABLE[kind, gpu].least <= gpus]
        ways = [
            f"{max(chosen.least, -(-gpus // unit) * unit)} of them",
            *larger[:1],
            *(f"for sft the size {kind}" for kind in lighter),
            "the size `own` and flags of your own",
        ]
        raise UsageError(
            f"{size} on {gpu} needs at least {chosen.least} GPUs, and a multiple of {unit}; there are "
            f"{gpus}. Use {', or '.join(ways)}."
        )
    return chosen


def main(cfg: SizesConfig) -> None:
    if cfg.size == "own":
        print("")
        return
    chosen = flags(cfg.recipe, cfg.size, cfg.gpu, cfg.gpus)
    print(" ".join(flag if value is None else f"{flag} {value}" for flag, value in chosen.items()))
    if cfg.why:
        print(f"{memory_gib(cfg.size, cfg.gpu, cfg.gpus, chosen)} of {GPUS[cfg.gpu]} GiB", file=sys.stderr)


# ---- The memory behind the table, which only --why and the tests compute -----------------------------------


def memory_gib(size: str, gpu: str, gpus: int, chosen: dict) -> dict[str, float]:
    """Return the GiB of the first rank: states and gathered weights as they are in the built model, and an
    estimate of the activations."""
    from parallel import ParallelConfig
    from parallel.explain import Run, explain
    from parallel.rules import Case, Job

    model, _, kind = size.partition("-")
    config, row = LlamaConfig.preset(f"llama2-{model}"), TABLE[size, gpu]
    group = "--parallel."
    layout = ParallelConfig(
        **{
            flag.removeprefix(group).replace("-", "_"): value
            for flag, value in chosen.items()
            if flag.startswith(group)
        }
    )
    micro_rows, rows = chosen["--train.micro-batch-size"], chosen["--train.global-batch-size"]
    job = Job(config, T, rows, micro_rows, recompute=chosen["--train.recompute"])
    activations = activation_gib(config, row, micro_rows)
    if kind == "":
        facts = explain(Run(layout, job))
        gib = {name: n_bytes / GIB for name, n_bytes in facts["bytes"].items() if name != "total"}
    else:
        n = elements(config, layout, gpus, lora=kind == "lora")
        gib = {"gathered_weights": 2 * n["gathered"] / GIB}
    if kind == "lora":
        gib |= {"frozen": 2 * n["frozen"] / GIB, "adapters": 16 * n["trained"] / GIB}
    host = {}
    if kind == "offload":
        bytes_each = 6 if layout.dp_shard > 1 else 2  # FSDP reduces gradients in fp32
        gib["gradients_under_way"] = bytes_each * n["unit"] / GIB + 0.5
        placed = offload_plan(
            n["trained"],
            chosen,
            sums=Case(layout, job).n_microbatches > 1,
            other_gib=sum(gib.values()) + activations,
            inputs_gib=2 * micro_rows * T * config.hidden_size * config.num_hidden_layers / layout.tp / GIB,
        )
        gib |= {name: n_bytes / GIB for name, n_bytes in placed.device_bytes.items() if name != "other"}
        host = {"of the host": round(sum(placed.host_bytes.values()) / GIB, 1)}
    gib["activations"] = activations
    gib = {name: round(value, 1) for name, value in gib.items()}
    return gib | {"total": round(sum(gib.values()), 1)} | host


def activation_gib(config: LlamaConfig, row: Size, micro_rows: int) -> float:
    """Return what forward keeps on the fullest rank, and what the block at work needs beside it.

    Per token and layer, selective keeps the outputs of the matrix products and of attention, and full keeps
    the input of the block. The first pipeline stage holds as many microbatches as there are stages, each for
    its share of the layers, which is as much as all layers for one microbatch.
    """
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    products = (2 * config.hidden_size + 2 * (H + K) * E + 2 * config.intermediate_size) / row.tp
    kept = products if row.recompute == "selective" else config.hidden_size / row.tp
    # memory/activations.py never has the inputs of more than two blocks on the device
    n_kept = 2 if row.one_microbatch else config.num_hidden_layers
    working = 4 * products  # its products, their gradients, and fp32 copies between them
    return 2 * micro_rows * T * (n_kept * kept + working) / GIB


def elements(config: LlamaConfig, layout: "ParallelConfig", gpus: int, lora: bool) -> dict[str, int]:
    """Return how many numbers the first rank of the built model has: trained, frozen, in its largest unit,
    and gathered at a time."""
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
        parts = parallelize(model, mesh, layout, Computation(dtype=torch.bfloat16))
        held = {True: 0, False: 0}
        for parameter in model.parameters():
            held[parameter.requires_grad] += local(parameter).numel()
        blocks, rests = (
            [sum(math.prod(computing_shape(p)) for p in unit) for unit in kind] for kind in units(parts)
        )
    two_blocks = sum(sorted(blocks)[-2:])  # one at work, and the next
    gathered = two_blocks + sum(rests) if layout.dp_shard > 1 else 0
    return {"trained": held[True], "frozen": held[False], "unit": max(blocks + rests), "gathered": gathered}


def offload_plan(n: int, chosen: dict, sums: bool, other_gib: float, inputs_gib: float) -> "Plan":
    """Return what --memory.placement auto would do with the n parameters of a rank.

    sums: whether a step has several microbatches, whose gradients are summed. other_gib: on the device, and
        not the manager's. inputs_gib: inputs of blocks. UsageError: nothing fits. What fits does not depend
        on RATES, nor on the times put in here; only the best place does.
    """
    from memory.chunk import CHUNK_ELEMENTS
    from memory.home import StateFormat
    from memory.placement import ChunkSizes, auto_plan
    from memory.tracer import MachineRates, StepTrace

    sizes = [CHUNK_ELEMENTS] * (n // CHUNK_ELEMENTS)
    if n % CHUNK_ELEMENTS:
        sizes.append(n % CHUNK_ELEMENTS)
    traced = StepTrace(
        int(other_gib * GIB),
        forward_seconds=5,
        backward_seconds=15,
        host_bytes=int(inputs_gib * GIB) if "--memory.activations" in chosen else 0,
    )
    budgets = {which: chosen[f"--memory.{which}-budget-gib"] * GIB for which in ("device", "host")}
    chunks = ChunkSizes(tuple(sizes), StateFormat(accumulates=sums))
    return auto_plan(chunks, budgets, MachineRates(*RATES), traced)


if __name__ == "__main__":
    run_recipe(main, SizesConfig)
