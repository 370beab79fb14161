"""Run a training step for any number of GPUs on this computer, before anyone pays for them. It needs no GPU.

    python recipes/dryrun.py --model llama2-70b --gpus 512 --gpu a100-40gb --parallel.tp 8 --parallel.pp 4 \\
        --train.recompute full --train.global-batch-size 1024 --json 70b.json

It takes any command line of pretrain.py, and --lora.rank of sft.py. The model is built and stepped by the
code that trains, on tensors without memory (parallel/dry_run.py). Printed are the mesh, where each parameter
lies, what a rank holds and when it holds most, what it sends on each axis, its FLOPs, and the pipeline's
schedule.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.chat.lora import LoraConfig
from dtensor_llama.cli import AtLeast, FilePath, at_least, check_numbers, run_recipe
from dtensor_llama.data.reader import Batch
from dtensor_llama.metrics import GIB
from memory import MemoryConfig
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.assemble import Offload, Training
from parallel.config import AXES, check_parallel
from parallel.dry_run import Counted, RankCount, Setup, dry_run, settle_auto
from parallel.explain import Run, explain
from parallel.schedule_clock import DURATION, draw
from parallel.step_counter import HOST, KINDS

# GiB that a program finds on the device.
GPUS = {"a100-40gb": 39.4, "a100-80gb": 79.2, "h100-80gb": 79.6, "h200-141gb": 139.8}
# GiB that torch does not allocate: CUDA's context takes about half of it, NCCL's buffers the rest.
BESIDES_TORCH_GIB = 1.0
# torch's allocator reserves more than is allocated, as freed blocks do not fit what is needed next: 1 to 2 %
# more where parameters stay as they are, 6 to 10 % more where FSDP gathers and frees them.
RESERVED = (1.01, 1.10)
DOCUMENT_TOKENS = 512  # of each document, with --data.document-mask

# ---- What can be asked for: the flags of pretrain.py, so that its command can be explained -----------------


@dataclass(frozen=True)
class DataConfig:
    # Files and globs of text, compressed or not (data/sources.py). `a:0.7 b:0.3` mixes two sources by these
    # shares.
    path: tuple[str, ...] = ()
    # A Hugging Face folder, a tokenizer.json or a SentencePiece .model; None takes the one of --model.
    tokenizer: FilePath | None = None
    seq_len: int | None = None  # tokens of a row; None: as many as the model was made for
    document_mask: bool = False  # keep a token from attending to other documents of its packed row
    # The field of a .jsonl line, or the column of a .parquet, that holds the text; `a.b` is field b of field
    # a.
    text_field: str = "text"
    # A record without a text ends the run, or is left out, counted, and listed in RUN/bad-records.jsonl.
    bad_records: Literal["refuse", "skip"] = "refuse"
    validation_share: float = 0.01  # share of the rows that is held out
    cache_dir: str = "~/.cache/dtensor-llama"  # tokenized text, reused by every run on the same files


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    global_batch_size: int = 32  # rows of one step, on all ranks together
    micro_batch_size: int = 1  # rows of one forward of a rank: the first thing to lower when memory runs out
    seed: int = 0  # decides the initial weights and the order of the rows
    lr: float = 3e-4  # the peak; LLaMA-2 took 3e-4 for 7b and 13b and 1.5e-4 for 70b, at 4M tokens a step
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps, at most the 2,000 of LLaMA-2
    weight_decay: float = 0.1
    # If the gradient, over all parameters together, is longer than this, it is scaled to it; inf turns this
    # off.
    max_grad_norm: float = 1.0
    # How many steps in a row may be skipped because their gradient is inf or nan; 0 stops at the first.
    skip_nonfinite: int = 0
    # The type of the computation. Master weights, moments and gradient reductions are float32 in any case.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False  # torch.compile each block: it takes a minute at the start and makes steps faster
    # Activation checkpointing: which activations are computed again in backward, to save memory.
    recompute: Literal["none", "selective", "full"] = "none"
    # The attention kernel. auto takes the fastest that can run here and prints why; varlen needs no mask for
    # documents.
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"] = "auto"
    validate_every: int = 100  # steps between two validations; 0: none
    validation_rows: int = 64  # how many of the held-out rows each validation reads


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps between two checkpoints; 0: none
    keep: int = 3  # how many of the newest are kept; 0: all
    export_hf: bool = True  # write hf/ at the end, in the type of the computation
    # auto: resume this run folder where it stopped, or start; never: start; else the folder of a checkpoint.
    resume: FilePath = "auto"


@dataclass(frozen=True)
class DryrunConfig:
    """Count what a training step does on each rank of a cluster."""

    model: FilePath  # preset (llama2-7b, tiny-10m, ...) or a Hugging Face folder, of which the shape is taken
    random_init: bool = False  # weights are not read here
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # where optimizer states and block inputs live
    lora: LoraConfig = field(default_factory=LoraConfig)  # as for sft.py
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # no checkpoint is written here
    run_dir: FilePath = "runs/pretrain"  # nothing is written here
    gpus: int = 1  # number of GPUs that the layout is for: nodes x GPUs per node
    gpu: Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"] = "h100-80gb"  # what they have to hold
    gpus_per_node: int = 8  # these have fast wires between them
    rank: int = 0  # the rank whose place and parameters are drawn
    json: FilePath | None = None  # file to write the result to, as data


# What each number must be at least.
NUMBERS = [
    *at_least(1, "train.steps", "train.global_batch_size", "train.micro_batch_size", "data.seq_len"),
    *at_least(1, "train.validation_rows"),
    *at_least(0, "train.lr", exclusive=True),
    AtLeast("train.max_grad_norm", 0, exclusive=True, may_be_infinite=True),
    AtLeast("data.validation_share", 0, below=1),
    *at_least(0, "train.warmup_steps", "train.weight_decay", "train.min_lr", "train.validate_every"),
    *at_least(0, "train.skip_nonfinite", "train.seed", "checkpoint.every", "checkpoint.keep"),
]


def main(cfg: DryrunConfig) -> None:
    # ---- What is refused, before anything is built ----
    check_numbers(cfg, [*NUMBERS, *at_least(1, "gpus", "gpus_per_node"), AtLeast("lora.rank", 0)])
    cfg.memory.check()
    if not 0 <= cfg.rank < cfg.gpus:
        raise UsageError(f"--rank {cfg.rank} is not one of --gpus {cfg.gpus}; use 0 to {cfg.gpus - 1}.")
    setup, note = setup_of(cfg)
    layout, job = setup.layout, setup.job
    facts = explain(Run(layout, job, setup.computation.dtype), cfg.rank)
    print(
        f"{cfg.model}, {job.model.n_parameters / 1e9:.2f}B parameters, on {cfg.gpus} {cfg.gpu} with ZeRO "
        f"stage {layout.zero_stage}\n{setup.tokens_per_step:,} tokens a step: {layout.dp} dp ranks x "
        f"{setup.n_microbatches} microbatches x {job.micro_batch_size} rows x {job.seq_len} tokens",
        *([note] if note else []),
        *mesh(facts),
        *parameters(facts),
        *pipeline(facts),
        sep="\n",
        flush=True,
    )

    # ---- The step ----
    step = lambda training, microbatches: train_step(
        training, microbatches, setup.tokens_per_step, cfg.train.lr, cfg.train.max_grad_norm
    )
    say = lambda text: print(f"... {text}", flush=True)
    if cfg.memory.placement == "auto":
        budget_gib = cfg.memory.device_budget_gib or GPUS[cfg.gpu] - BESIDES_TORCH_GIB
        setup, chosen = settle_auto(setup, step, int(budget_gib * GIB))
        print(chosen)
    counted = dry_run(setup, step, say)
    times = predict_times(counted, cfg.gpu)
    print(
        *memory(counted, GPUS[cfg.gpu]),
        *traffic(counted, cfg.gpus_per_node),
        *computation(counted, times),
        sep="\n",
    )
    if cfg.json:
        result = {"model": cfg.model, **as_data(counted, cfg), **times, "mesh": facts}
        Path(cfg.json).write_text(json.dumps(result) + "\n", encoding="utf-8")


def setup_of(cfg: DryrunConfig) -> tuple[Setup, str]:
    """Return what is to be counted, and a sentence on what was chosen if --memory.placement was left open."""
    train, layout = cfg.train, cfg.parallel.resolve(cfg.gpus)
    config = LlamaConfig.from_hf(cfg.model) if Path(cfg.model).exists() else LlamaConfig.preset(cfg.model)
    seq_len = cfg.data.seq_len or config.max_position_embeddings
    device, dtype = torch.device("cuda"), getattr(torch, train.dtype)
    kernel = train.attention
    if kernel in (
        "auto",
        "flash",
    ):  # flash-attn holds what torch's kernels do, and need not be installed here
        merges_or_fp32 = layout.is_ring or dtype == torch.float32
        kernel = "varlen" if cfg.data.document_mask and not merges_or_fp32 else "sdpa"
    computation = Computation(device, dtype, train.recompute, train.compile, kernel)
    job = computation.job(config, seq_len, train.global_batch_size, train.micro_batch_size)
    check_parallel(layout, job)
    memory, note = cfg.memory.settle(device, dtype, cfg.gpus)
    clips = train.max_grad_norm < math.inf
    offload = Offload(memory, train.micro_batch_size, seq_len, clips, min(cfg.gpus, cfg.gpus_per_node))
    document_tokens = DOCUMENT_TOKENS if cfg.data.document_mask else None
    return Setup(layout, job, computation, cfg.lora, offload, document_tokens), note


def predict_times(counted: Counted, gpu: str) -> dict:
    """Return what a step takes. It is not predicted yet: parallel/cost.py will, from what was counted."""
    return dict.fromkeys(("step_seconds", "tokens_per_second_per_gpu", "mfu"))


# ---- The step: what pretrain.py does with a global batch ---------------------------------------------------


def train_step(
    training: Training, microbatches: list[Batch], n_targets: int, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one global batch, clip, step. Returns (loss, gradient norm), the same on every
    rank.

    microbatches: the rows of this dp rank. n_targets: scored labels of the whole global batch, so that the
        sums over microbatches and ranks give the mean, and neither padding nor accumulation changes it.
    """
    optimizer, layout = training.optimizer, training.layout
    for group in optimizer.param_groups:
        group["lr"] = lr  # before backward: without clipping the chunk manager steps as gradients arrive
    loss = forward_backward(training, [layout.own_tokens(batch) for batch in microbatches], n_targets)
    dist.all_reduce(loss, group=layout.loss_group)  # each rank has the share of its own tokens
    # One norm over all ranks and axes. The step scales the gradients; if they are not finite it changes
    # nothing.
    grad_norm = optimizer.clip_grad_norm(max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def forward_backward(training: Training, microbatches: list[Batch], n_targets: int) -> Tensor:
    """Forward and backward of all microbatches; gradients add up. Returns this rank's share of the mean
    loss."""
    if training.pipeline:  # stages and schedules: parallel/pipeline.py
        return training.pipeline.step(microbatches, n_targets)
    loss = torch.zeros((), device=training.device)
    for i, batch in enumerate(microbatches):
        training.sync_gradients(last=i == len(microbatches) - 1)  # ZeRO: reduce gradients once, or each time
        tokens, labels, positions = batch.to(training.device)
        # The model returns the sum of the token losses.
        loss_i = training.model(tokens, labels=labels, positions=positions) / n_targets
        # FSDP averages gradients over these ranks; we want their sum.
        (loss_i * training.layout.gradient_ranks).backward()
        loss += loss_i.detach()
    return loss


# ---- What is printed ---------------------------------------------------------------------------------------


def some(items: list, most: int) -> list:
    """Return at most that many of the items: the first ones and the last."""
    return items if len(items) <= most else [*items[: most - 1], "  ...", items[-1]]


def mesh(facts: dict) -> list[str]:
    """Draw the ranks: a line for each place on the outer axes in use, a column for each on the innermost."""
    sizes = {axis: facts["layout"][axis] for axis in AXES if facts["layout"][axis] > 1} or {AXES[-1]: 1}
    *outer, inner = sizes
    lines = []
    for first in range(0, facts["world_size"], sizes[inner]):
        line, rest = f"  {inner} |", first // sizes[inner]
        for axis in reversed(outer):
            line, rest = f"  {axis} {rest % sizes[axis]:<3}{line}", rest // sizes[axis]
        ranks = some(list(range(first, first + sizes[inner])), 8)
        lines.append(line + "".join(f"{rank:>5}" for rank in ranks))
    groups = [
        f"  {axis:13}{size:>3}   {' '.join(map(str, some(facts['groups'][axis], 9)))}"
        for axis, size in sizes.items()
    ]
    return [
        "\nranks by their place on each axis",
        *some(lines, 10),
        f"\nthe ranks that rank {facts['rank']} meets on each axis",
        *groups,
    ]


def parameters(facts: dict) -> list[str]:
    title = f"parameters of rank {facts['rank']}"
    lines = [f"\n{title:51}{'whole':>15}{'here':>15}   split over (S: dim, R: not)"]
    for row in facts["parameters"]:
        whole, here = (" x ".join(map(str, row[key])) for key in ("shape", "local_shape"))
        placed = " ".join(f"{axis} {placement}" for axis, placement in row["placements"].items())
        lines.append(f"{row['count']:>4} {row['name']:46}{whole:>15}{here:>15}   {placed}")
    return lines


def memory(counted: Counted, gpu_gib: float) -> list[str]:
    lines = []
    for rank in counted.ranks:
        title = f"pp rank {rank.pp_rank}" if len(counted.ranks) > 1 else "a rank"
        lines.append(f"\n{title} holds, in GiB {'between steps':>24}{'at the peak':>14}{'most':>10}")
        for kind in [*KINDS, HOST]:
            parts = [held.get(kind, 0) / GIB for held in (rank.held_bytes, rank.at_peak, rank.most)]
            if any(part >= 0.0005 for part in parts):
                name = "offloaded to the host" if kind == HOST else kind
                lines.append("  {:24}{:>14.3f}{:>14.3f}{:>10.3f}".format(name, *parts))
        lines.append(
            f"  its peak is {rank.peak_bytes / GIB:.2f} GiB: {rank.peak_moment}. A checkpoint adds "
            f"{rank.checkpoint_bytes / GIB:.2f} GiB on the host."
        )
    low, high = reserved_gib(counted.largest)
    needed = needed_gib(counted.largest)
    verdict = "it fits" if needed <= gpu_gib else "it does NOT fit"
    if needed <= gpu_gib < high + BESIDES_TORCH_GIB:
        verdict = "it fits, if torch reserves little more (PYTORCH_ALLOC_CONF=expandable_segments:True helps)"
    lines.append(
        f"\ntorch reserves {low:.1f} to {high:.1f} GiB, and CUDA and NCCL take about {BESIDES_TORCH_GIB:.0f} "
        f"more, of {gpu_gib:.1f} GiB: {verdict}"
    )
    return lines


def reserved_gib(rank: RankCount) -> tuple[float, float]:
    """Return between which numbers of GiB torch's allocator reserves."""
    low, high = (share * rank.peak_bytes / GIB for share in RESERVED)
    return low, high


def needed_gib(rank: RankCount) -> float:
    return reserved_gib(rank)[0] + BESIDES_TORCH_GIB


def traffic(counted: Counted, gpus_per_node: int) -> list[str]:
    rank = counted.largest
    between = rank.sent_between_nodes(gpus_per_node)
    lines = [f"\nits traffic in a step, in GiB\n  {'axis':14}{'sent':>12}{'between nodes':>16}   collectives"]
    for axis, sent in rank.sent_bytes().items():
        kinds = {}
        for one, count in rank.traffic.items():
            if one.axis == axis:
                kinds[one.kind] = kinds.get(one.kind, 0) + count
        what = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        lines.append(f"  {axis:14}{sent / GIB:>12.3f}{between[axis] / GIB:>16.3f}   {what}")
    return lines


def computation(counted: Counted, times: dict) -> list[str]:
    busiest = max(counted.ranks, key=lambda rank: rank.flops)
    lines = [
        f"\nthe busiest rank computes {busiest.flops / 1e12:,.1f} TFLOP in a step, recomputation included"
    ]
    if times["step_seconds"] is None:
        lines.append("how long that takes is not predicted yet")
    return lines


def as_data(counted: Counted, cfg: DryrunConfig) -> dict:
    """Return the result for --json: of the rank with the highest peak, and below `ranks` of every kind."""
    largest, layout = counted.largest, counted.setup.layout
    gib = lambda held: {kind.replace(" ", "_"): n_bytes / GIB for kind, n_bytes in held.items()}
    ranks = [
        {
            "pp_rank": rank.pp_rank,
            "held_gib": gib(rank.held_bytes),
            "at_peak_gib": gib(rank.at_peak),
            "most_gib": gib(rank.most),
            "peak_gib": rank.peak_bytes / GIB,
            "peak_moment": rank.peak_moment,
            "checkpoint_host_gib": rank.checkpoint_bytes / GIB,
            "flops": rank.flops,
            "traffic": [{**one._asdict(), "count": count} for one, count in rank.traffic.items()],
        }
        for rank in counted.ranks
    ]
    most = gib(largest.most)
    return {
        "fits": needed_gib(largest) <= GPUS[cfg.gpu],
        "layout": asdict(layout),
        "per_rank": {
            **{f"{kind}_gib": most.get(kind, 0.0) for kind in ("parameters", "gradients", "optimizer")},
            "activations_gib": most.get("activations", 0.0),
            "peak_gib": largest.peak_bytes / GIB,
            "reserved_gib": reserved_gib(largest),
            "host_gib": largest.host_bytes / GIB,
        },
        "traffic_gib_per_step": gib(largest.sent_bytes()),
        "between_nodes_gib_per_step": gib(largest.sent_between_nodes(cfg.gpus_per_node)),
        "flops_per_rank": max(rank.flops for rank in counted.ranks),
        "ranks": ranks,
    }


def pipeline(facts: dict) -> list[str]:
    if not (about := facts.get("pipeline")):
        return []
    lines = []
    width = min(28, max(work[-1][0] + DURATION[work[-1][1]] for work in about["work"]))
    for rank, (own, work) in enumerate(zip(about["stages_of_pp_ranks"], about["work"], strict=True)):
        layers = ", ".join("{}-{}".format(*about["layers_of_stages"][stage]) for stage in own)
        lines.append(f"  pp {rank:<3} layers {layers:13} |{draw(work, width)}")
    return [
        f"\nschedule {facts['layout']['schedule']}: {about['bubble']:.1%} bubbles, if backward takes as long "
        "as two forwards (F forward, B backward, I and W its halves)",
        *some(lines, 10),
    ]


if __name__ == "__main__":
    run_recipe(main, DryrunConfig, stdout_is_result=True)
