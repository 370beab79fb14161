"""Chooses the flags of pretrain.py and sft.py for a model, a kind of GPU and a number of GPUs.

Every launcher in this folder asks this file.

    python recipes/launch/sizes.py pretrain 70b h100-80gb 256         prints the flags, on one line
    python recipes/launch/sizes.py pretrain 70b h100-80gb 256 --why   also prints what a rank needs

The numbers come from the following, for N parameters on nodes of 8 GPUs and sequences of 4,096 tokens:
- 7b and 13b use ZeRO 3 inside a node and whole copies between nodes (HSDP). ZeRO 3 sends 8N bytes per
  microbatch (parallel/zero.py). For 7b these are 54 GB, which take 0.12 s over NVLink at 450 GB/s and are
  hidden behind 0.4 s of arithmetic per sequence on an H100; over one 400 Gbit/s link per GPU they would
  take 1.1 s. Between nodes only gradients travel, once a step: 2 x 4N/8 bytes a rank, which are 6.7 GB. A
  rank keeps 16N/8 bytes, 13 GB for 7b and 26 GB for 13b. 26 GB would leave too little of a 40 GB GPU, so on
  those GPUs two nodes share the states of 13b (13 GB a rank).
- 70b has 16N bytes of states, 1.1 TB, and shares them by ZeRO 3 over all GPUs, with full recomputation. Its
  collectives use all network cards of a node at once, in rings, and are hidden behind 8,192 tokens per GPU:
  0.55 TB a microbatch take 1.6 s at 8 x 400 Gbit/s a node, beside 7 s of arithmetic on an H100. Others have
  measured this layout on 64 A100 at 353 to 410 tokens a second and GPU (docs/planning.md). tp 8 x pp 2 is
  predicted to be 40 % slower on an H100, since the traffic of tp cannot be hidden behind anything.
- 7b-lora, 13b-lora and 70b-lora have frozen weights of 2N bytes. Their adapters of rank 16 have 0.6 to 0.3 %
  of N parameters, with 16 bytes each. 70b takes 17 GB a rank under ZeRO 3 on a node of 8, and 4.5 GB for
  gathered weights. A sequence gathers 4N bytes, which take 0.5 s over NVLink, beside 6N FLOPs a token, which
  take 3.4 s at half of the peak of an H100. No gradients of the N weights travel, and tp would only add
  traffic.
- 7b-offload, 13b-offload and 70b-offload train all weights, and --memory.placement auto finds the best place
  for their states. 2N bytes of weights must be on the GPUs. Up to 18N bytes may be on the host, or 14N if
  gradients arrive once a step and need not be summed there. 70b on a node of 8 x 40 GB uses tp 8, so that a
  rank has 17 GB of weights and gathers nothing. A step is one microbatch of 16 sequences. Its block inputs
  wait on the host, where the 14N bytes take 900 of the 1,152 GiB of the node. An update moves 32N bytes in
  DRAM, which takes 7 s at 300 GB/s, beside 65,536 tokens of 8N FLOPs, which take 29 s at half of the peak
  of an A100. The host's memory is that of Amazon's p4d, p4de, p5 and p5en nodes; if yours has less, use
  --memory.host-budget-gib.
- A microbatch is as large as fits, but above 8,192 tokens a rank nothing gets faster. A step of pretraining
  has the 4M tokens of LLaMA-2, 1,024 sequences of 4,096 (arXiv:2307.09288, sec. 2.2). A step of fine-tuning
  has 128 sequences, and more only if there are more ranks than that.
"""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from tyro.conf import Positional

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.cli import run_recipe
from dtensor_llama.metrics import GIB, amount
from parallel.cluster import NODES

if TYPE_CHECKING:
    from parallel.cost import Account

GPUS = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb")
T = 4096  # tokens a sequence: the context of LLaMA-2
SEQUENCES = {"pretrain": 1024, "sft": 128}  # of a step
LR = {"7b": 3e-4, "13b": 3e-4, "70b": 1.5e-4}
LORA_RANK = 16


class Size(NamedTuple):
    """Says how one model is trained on one kind of GPU."""

    least: int  # the fewest GPUs that it fits on
    tp: int
    pp: int
    shard: int  # at most this many dp ranks share the states by ZeRO; the others hold copies
    micro_batch_size: int  # at most this many sequences in a microbatch
    recompute: str
    # True: a step is one microbatch of each dp rank, and the inputs of its blocks wait on the host.
    one_microbatch: bool = False


# fmt: off
TABLE = {                        # least tp pp shard micro recompute
    ("7b", "a100-40gb"):     Size(8, 1, 1, 8, 1, "selective"),
    ("7b", "a100-80gb"):     Size(8, 1, 1, 8, 2, "none"),
    ("7b", "h100-80gb"):     Size(8, 1, 1, 8, 2, "none"),
    ("7b", "h200-141gb"):    Size(8, 1, 1, 8, 4, "none"),
    ("13b", "a100-40gb"):    Size(8, 1, 1, 16, 2, "full"),
    ("13b", "a100-80gb"):    Size(8, 1, 1, 8, 2, "selective"),
    ("13b", "h100-80gb"):    Size(8, 1, 1, 8, 2, "selective"),
    ("13b", "h200-141gb"):   Size(8, 1, 1, 8, 4, "selective"),
    ("70b", "a100-40gb"):    Size(64, 1, 1, 512, 2, "full"),
    ("70b", "a100-80gb"):    Size(32, 1, 1, 512, 2, "full"),
    ("70b", "h100-80gb"):    Size(32, 1, 1, 512, 2, "full"),
    ("70b", "h200-141gb"):   Size(16, 1, 1, 512, 2, "full"),

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
# For these the planner (parallel/planner.py) predicts another layout to be more than 10 % faster, on the
# fewest GPUs or on 512. The text says why we do not use it. tests/test_planner.py checks that all other lines
# are within 10 % of the planner's best.
ONE_LAYOUT = (
    "one line of the table serves 8 to 512 GPUs, and what fits 8 recomputes more than 512 would have to"
)
SLACK = (
    "full recomputation leaves half of the GPU free, for longer sequences and for networks that are slower "
    "than planned for; selective, with tp 2 and pp, is predicted to be 10 to 27 % faster"
)
SLOWER = {
    ("7b", "a100-40gb"): ONE_LAYOUT,
    ("7b", "h100-80gb"): ONE_LAYOUT,
    ("13b", "a100-40gb"): ONE_LAYOUT,
    ("13b", "h100-80gb"): ONE_LAYOUT,
    ("13b", "h200-141gb"): ONE_LAYOUT,
    ("70b", "a100-80gb"): SLACK,
    ("70b", "h100-80gb"): SLACK,
    ("70b", "h200-141gb"): SLACK,
}


@dataclass(frozen=True)
class SizesConfig:
    """Print the flags of a recipe for a model on a number of GPUs."""

    recipe: Positional[Literal["pretrain", "sft"]]
    # 7b, 13b or 70b; for sft also 7b-lora, 7b-offload and so on; with `own` no flags are printed
    size: Positional[str]
    gpu: Positional[str]  # a100-40gb, a100-80gb, h100-80gb or h200-141gb
    gpus: Positional[int]  # on all nodes together
    why: bool = False  # print the memory of a rank too


def flags(recipe: str, size: str, gpu: str, gpus: int) -> dict[str, object]:
    """Return {flag: value}; the value is None for a flag that takes none.

    recipe: "pretrain" or "sft". size and gpu: a key of TABLE. gpus: their number on all nodes together.
    Raises UsageError, which says what would fit, if the model does not fit or cannot be divided evenly."""
    model, _, kind = size.partition("-")
    if kind and recipe != "sft" and (model, gpu) in TABLE:
        raise UsageError(
            f"{size} is for sft, and {recipe} has 4M tokens a step; use the size {model}, or `own`."
        )
    chosen = find(size, gpu, gpus)
    dp = gpus // (chosen.tp * chosen.pp)
    shard = min(chosen.shard, dp)
    batch = max(SEQUENCES[recipe], dp * chosen.pp)  # 1f1b needs a microbatch for each stage
    if chosen.one_microbatch:
        batch = dp * chosen.micro_batch_size
    per_microbatch = min(chosen.micro_batch_size, batch // (dp * chosen.pp))
    if batch % (dp * per_microbatch) or dp % shard:
        raise UsageError(
            f"{gpus} GPUs cannot share {batch} sequences a step, or the states, evenly; use a power of 2 of "
            "them."
        )
    lr = LR[model]
    if recipe == "sft":
        lr = 2e-4 if kind == "lora" else 2e-5  # LLaMA-2-Chat was trained with 2e-5 (sec. 3.1)
    return {
        "--data.seq-len": T,
        "--train.global-batch-size": batch,
        "--train.micro-batch-size": per_microbatch,
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
    """Return the flags that only this kind of training needs.

    kind: "" for all weights, "lora" for adapters, "offload" for all weights with their states on the host"""
    if kind == "":
        return {"--train.compile": None}  # not yet tried with adapters or with a chunk manager
    if kind == "lora":
        return {"--lora.rank": LORA_RANK}
    budgets = {
        "--memory.placement": "auto",
        "--memory.device-budget-gib": NODES[gpu].gpu.memory_gib - 2,  # 2 are for NCCL and the CUDA context
        "--memory.host-budget-gib": NODES[gpu].host_memory_gib,
    }
    return budgets | ({"--memory.activations": None} if chosen.one_microbatch else {})


def find(size: str, gpu: str, gpus: int) -> Size:
    """Return the line of the table for a size and a kind of GPU.

    Raises UsageError, which says what would fit, if there is none or if it needs another number of GPUs."""
    if gpu not in GPUS:
        raise UsageError(f"{gpu} is not a GPU in the table; it has {', '.join(GPUS)}.")
    if (size, gpu) not in TABLE:
        known = dict.fromkeys(size for size, _ in TABLE)
        raise UsageError(f"{size} is not in the table; it has {', '.join(known)} and own.")
    chosen = TABLE[size, gpu]
    unit = chosen.tp * chosen.pp
    if gpus < chosen.least or gpus % unit:
        memory = NODES[gpu].gpu.memory_gib
        power = 1 << (max(chosen.least, gpus) - 1).bit_length()  # other numbers may not share evenly
        works = [one for one, plan in TABLE.items() if plan.least <= gpus and gpus.bit_count() == 1]
        larger = [other for other in GPUS if NODES[other].gpu.memory_gib > memory and (size, other) in works]
        lighter = [kind for kind in (f"{size}-lora", f"{size}-offload") if (kind, gpu) in works]
        ways = [
            f"{power} of them",
            *larger[:1],
            *(f"for sft the size {kind}" for kind in lighter),
            "the size `own` and flags of your own",
        ]
        needs = f"at least {amount(chosen.least, 'GPU')}"
        needs += f", and a multiple of {unit}" if unit > 1 else ""
        raise UsageError(f"{size} on {gpu} needs {needs}; {gpus} were named. Use {', or '.join(ways)}.")
    return chosen


def main(cfg: SizesConfig) -> None:
    if cfg.size == "own":
        print("")
        return
    chosen = flags(cfg.recipe, cfg.size, cfg.gpu, cfg.gpus)
    print(" ".join(flag if value is None else f"{flag} {value}" for flag, value in chosen.items()))
    if cfg.why:
        account = account_of(cfg.size, cfg.gpu, cfg.gpus, chosen)
        kinds = {kind: round(n_bytes / GIB, 1) for kind, n_bytes in account.bytes.items()}
        memory, host = NODES[cfg.gpu].gpu.memory_gib, account.host_bytes / GIB
        print(
            f"{kinds}: {account.peak_gib:.1f} of {memory:g} GiB, and {host:.1f} of the host", file=sys.stderr
        )
        print(
            f"{account.tokens_per_second_per_gpu:,.0f} tokens a second and GPU, MFU {account.mfu:.0%}, are "
            "predicted",
            file=sys.stderr,
        )


# ---- The cost of a size, which only --why and the tests compute --------------------------------------------


def account_of(size: str, gpu: str, gpus: int, chosen: dict) -> "Account":
    """Return the bytes, traffic and time of a rank under the flags `chosen`, from parallel/cost.py."""
    from memory import MemoryConfig
    from memory.auto import foresee
    from parallel import ParallelConfig
    from parallel.cost import States, Work, account_for, account_with_offload
    from parallel.rules import Job

    model, _, kind = size.partition("-")
    config = LlamaConfig.preset(f"llama2-{model}")

    def of_group(group: str) -> dict:
        flags = {flag: value for flag, value in chosen.items() if flag.startswith(group)}
        named = {flag.removeprefix(group).replace("-", "_"): value for flag, value in flags.items()}
        return {name: value is None or value for name, value in named.items()}  # None: a flag without a value

    layout, memory = ParallelConfig(**of_group("--parallel.")), MemoryConfig(**of_group("--memory."))
    job = Job(
        config,
        T,
        chosen["--train.global-batch-size"],
        chosen["--train.micro-batch-size"],
        recompute=chosen["--train.recompute"],
        compile="--train.compile" in chosen,
        device_type="cuda",
    )
    n_adapter = 0
    if kind == "lora":
        from dtensor_llama.chat.lora import LoraConfig, n_adapter_parameters

        n_adapter = n_adapter_parameters(config, LoraConfig(rank=LORA_RANK))
    work = Work(job, layout, States.under(memory, itemsize=2, n_adapter=n_adapter))
    cluster = replace(NODES[gpu], n_gpus=gpus)
    if memory.is_on:
        return account_with_offload(work, cluster, foresee)
    return account_for(work, cluster)


if __name__ == "__main__":
    run_recipe(main, SizesConfig)
