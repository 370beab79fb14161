"""Explain a layout before running it: mesh, placements, bytes per rank, traffic per step, pipeline. It needs
no GPU.

    python recipes/explain.py --model llama2-7b --gpus 64 --parallel.tp 8 --parallel.pp 2 \\
        --train.global-batch-size 64

It takes any command line of pretrain.py, and the number of processes that the command line is for. The facts
come from parallel/explain.py; this file prints them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.cli import AtLeast, FilePath, at_least, check_numbers, run_recipe
from memory import MemoryConfig
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.config import AXES, check_parallel
from parallel.explain import Run, explain
from parallel.schedule_clock import DURATION, draw

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
class ExplainConfig:
    """Explain what a layout means for one rank."""

    model: FilePath  # preset (llama2-7b, tiny-10m, ...) or a Hugging Face folder, of which the shape is taken
    random_init: bool = False  # weights are not read here
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # with a placement it is refused here
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # no checkpoint is written here
    run_dir: FilePath = "runs/pretrain"  # nothing is written here
    gpus: int = 1  # number of processes that the layout is for: nodes x processes per node
    rank: int = 0  # the rank to explain: the first and the last pipeline stage have more than the others
    json: FilePath | None = None  # file to write the same facts to, as data


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


def main(cfg: ExplainConfig) -> None:
    check_numbers(cfg, [*NUMBERS, AtLeast("gpus", 1)])
    if cfg.memory.is_on or cfg.memory.activations:
        raise UsageError(
            f"--memory.placement {cfg.memory.placement} with --memory.activations {cfg.memory.activations} "
            "is not explained here: these bytes are all on the device. The plan is printed where training "
            "starts."
        )
    if not 0 <= cfg.rank < cfg.gpus:
        raise UsageError(f"--rank {cfg.rank} is not one of --gpus {cfg.gpus}; use 0 to {cfg.gpus - 1}.")
    train, layout = cfg.train, cfg.parallel.resolve(cfg.gpus)
    config = LlamaConfig.from_hf(cfg.model) if Path(cfg.model).exists() else LlamaConfig.preset(cfg.model)
    seq_len = cfg.data.seq_len or config.max_position_embeddings
    kernel = "sdpa" if train.attention == "auto" else train.attention
    computation = Computation(
        torch.device("cuda"), getattr(torch, train.dtype), train.recompute, train.compile, kernel
    )
    job = computation.job(config, seq_len, train.global_batch_size, train.micro_batch_size)
    n_microbatches = check_parallel(layout, job)
    facts = explain(Run(layout, job, getattr(torch, train.dtype)), cfg.rank)
    print(
        f"{cfg.model}, {config.n_parameters / 1e9:.2f}B parameters, on {cfg.gpus} ranks with ZeRO stage "
        f"{layout.zero_stage}\n"
        f"{facts['tokens_per_step']:,} tokens a step: {layout.dp} dp ranks x {n_microbatches} microbatches x "
        f"{train.micro_batch_size} rows x {seq_len} tokens",
        *mesh(facts),
        *parameters(facts),
        *traffic(facts),
        *pipeline(facts),
        sep="\n",
    )
    if cfg.json:
        Path(cfg.json).write_text(json.dumps({"model": cfg.model, **facts}) + "\n", encoding="utf-8")


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
    return [
        *lines,
        "\nits bytes, without activations and buffers",
        *(f"  {name.replace('_', ' '):18}{size / 2**30:10.3f} GiB" for name, size in facts["bytes"].items()),
    ]


def traffic(facts: dict) -> list[str]:
    lines = [f"\nits traffic in a step\n  {'axis':14}{'kind':16}{'count':>7}{'sent':>14}"]
    for row in facts["collectives"]:
        sent = f"{row['sent_bytes'] / 2**20:>14,.1f} MiB"
        lines.append(f"  {row['axis']:14}{row['kind']:16}{row['count']:>7}{sent}   {row['what']}")
    return lines


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
    run_recipe(main, ExplainConfig, stdout_is_result=True)
