"""The sizes people train: model x GPU x number of GPUs -> flags of pretrain.py and sft.py. Every launcher here asks this file.

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
- microbatch: as large as fits; above 8,192 tokens a rank nothing gets faster. Batches: LLaMA-2's 4M tokens, 1,024 rows of
  4,096, to pretrain (arXiv:2307.09288, sec. 2.2); 128 rows to fine-tune, more only where there are more ranks than that.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))      # a clone works without being installed

from tyro.conf import Positional

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.cli import run_recipe

GPUS = {"a100-40gb": 39, "a100-80gb": 79, "h100-80gb": 79, "h200-141gb": 139}      # GiB that a program gets
T = 4096                                    # tokens a row: LLaMA-2's context
ROWS = {"pretrain": 1024, "sft": 128}       # a step
LR = {"7b": 3e-4, "13b": 3e-4, "70b": 1.5e-4}


class Plan(NamedTuple):
    least: int            # GPUs it fits on
    tp: int
    pp: int
    shard: int            # dp ranks that share by ZeRO, at most; the rest are copies
    micro_rows: int       # at most
    recompute: str


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
}


@dataclass(frozen=True)
class SizesConfig:
    """Print the flags of a recipe for a model on so many GPUs."""

    recipe: Positional[Literal["pretrain", "sft"]]
    size: Positional[Literal["7b", "13b", "70b", "own"]]     # own: no flags, all of them are yours
    gpu: Positional[str]                                     # a100-40gb, a100-80gb, h100-80gb or h200-141gb
    gpus: Positional[int]                                    # in all
    why: bool = False                                        # print the memory of a rank too


def flags(recipe: str, size: str, gpu: str, gpus: int) -> dict[str, object]:
    """{flag: value}. UsageError if it would not fit, with what would."""
    plan = find(size, gpu, gpus)
    dp = gpus // (plan.tp * plan.pp)
    shard = min(plan.shard, dp)
    rows = max(ROWS[recipe], dp * plan.pp)                           # 1f1b needs a microbatch for each stage
    micro_rows = min(plan.micro_rows, rows // (dp * plan.pp))
    if rows % (dp * micro_rows) or dp % shard:
        raise UsageError(f"{gpus} GPUs cannot share {rows} rows a step evenly; use a power of 2 of them.")
    lr = LR[size] if recipe == "pretrain" else 2e-5                  # LLaMA-2-Chat's (sec. 3.1)
    return {"--data.seq-len": T, "--train.global-batch-size": rows, "--train.micro-batch-size": micro_rows, "--train.lr": lr,
            "--train.dtype": "bfloat16", "--train.recompute": plan.recompute, "--train.compile": None,
            "--parallel.tp": plan.tp, "--parallel.pp": plan.pp, "--parallel.dp-shard": shard,
            "--parallel.dp-replicate": dp // shard, "--parallel.zero-stage": 1 if plan.pp > 1 else 3}


def find(size: str, gpu: str, gpus: int) -> Plan:
    if gpu not in GPUS:
        raise UsageError(f"{gpu} is not a GPU in the table; it has {', '.join(GPUS)}.")
    plan = TABLE[size, gpu]
    if gpus < plan.least or gpus % (plan.tp * plan.pp):
        roomier = [other for other in GPUS if GPUS[other] > GPUS[gpu] and TABLE[size, other].least <= gpus]
        unit = plan.tp * plan.pp
        raise UsageError(f"{size} on {gpu} needs at least {plan.least} GPUs, and a multiple of {unit}; there are {gpus}. Use "
                         f"{max(plan.least, -(-gpus // unit) * unit)}{f' of them, or {roomier[0]}' if roomier else ''}, or the "
                         "size `own` and flags of your own, like --memory.placement auto.")
    return plan


def activation_gib(config: LlamaConfig, plan: Plan, micro_rows: int) -> float:
    """What forward keeps on the fullest rank, and what the block at work needs beside it.

    Per token and layer: selective keeps the outputs of the matrix products and of attention, full the input of the block. The
    first pipeline stage holds as many microbatches as there are stages, each of its share of the layers: all layers' worth."""
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    products = (2 * config.hidden_size + 2 * (H + K) * E + 2 * config.intermediate_size) / plan.tp
    kept = products if plan.recompute == "selective" else config.hidden_size / plan.tp
    working = 4 * products                                            # its products, their gradients, and fp32 between them
    return 2 * micro_rows * T * (config.num_hidden_layers * kept + working) / 2**30


def main(cfg: SizesConfig) -> None:
    if cfg.size == "own":
        print("")
        return
    chosen = flags(cfg.recipe, cfg.size, cfg.gpu, cfg.gpus)
    print(*(word for flag, value in chosen.items() for word in ((flag,) if value is None else (flag, value))))
    if cfg.why:
        print(f"{memory_gib(cfg.size, cfg.gpu, cfg.gpus, chosen)} of {GPUS[cfg.gpu]} GiB", file=sys.stderr)


def memory_gib(size: str, gpu: str, gpus: int, chosen: dict) -> dict[str, float]:
    """GiB of the first rank: states and gathered weights as parallel/explain.py finds them in the built model, activations."""
    from parallel import ParallelConfig
    from parallel.explain import Run, explain

    config, layout = LlamaConfig.preset(f"llama2-{size}"), ParallelConfig()
    layout = replace(layout, **{axis: chosen[f"--parallel.{axis.replace('_', '-')}"]
                                for axis in ("tp", "pp", "dp_shard", "dp_replicate", "zero_stage")})
    micro_rows = chosen["--train.micro-batch-size"]
    n_micros = chosen["--train.global-batch-size"] // (micro_rows * layout.dp)
    facts = explain(Run(config, layout, T, n_micros, micro_rows, recompute=chosen["--train.recompute"]))
    gib = {name: round(size_in_bytes / 2**30, 1) for name, size_in_bytes in facts["bytes"].items() if name != "total"}
    gib["activations"] = round(activation_gib(config, TABLE[size, gpu], micro_rows), 1)
    return {**gib, "total": round(sum(gib.values()), 1)}


if __name__ == "__main__":
    run_recipe(main, SizesConfig)
