"""Say what a training step does on any number of GPUs, before anyone pays for them. It needs no GPU.

    python recipes/dryrun.py --model llama2-70b --gpus 512 --gpu a100-40gb --train.global-batch-size 1024
    python recipes/dryrun.py --model llama2-70b --gpus 512 --gpu a100-40gb --parallel.tp 8 --parallel.pp 4 \\
        --train.recompute full --train.global-batch-size 1024 --json 70b.json

The first command leaves the layout open: parallel/planner.py searches for the best one, says why the others
are slower, and the flags of the best one are printed to be copied. With a layout, any command line of
pretrain.py can be tried, and --lora.rank of sft.py. The model is built and stepped by the code that trains,
on tensors without memory (parallel/dry_run.py). The report has the mesh, where each parameter lies, what a
rank holds and when it holds most, what it sends on each axis, its FLOPs, the pipeline's schedule, and what
the step is predicted to take (parallel/cost.py).

--json names traffic by the axes of the mesh, with the same names in every layout: `tp` and `cp`
(activations), `pp` (between stages), `fsdp` (weights and gradients of ZeRO, over dp_shard and cp),
`dp_replicate` (gradients of whole copies of the model), `dp_cp` (gradients under ZeRO 0 with such copies),
and `loss` and `world` (sums of single numbers).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_llama import UsageError
from dtensor_llama.chat.lora import LoraConfig
from dtensor_llama.cli import AtLeast, FilePath, at_least, check_numbers, run_recipe
from dtensor_llama.data.reader import Batch
from dtensor_llama.hf_folder import Base
from dtensor_llama.schedule import check_schedule
from memory import MemoryConfig
from memory.auto import foresee
from parallel import ParallelConfig
from parallel.assemble import Training
from parallel.cluster import calibrate
from parallel.dry_run_report import check_outputs, gpus_of, report

# ---- What can be asked for: the flags of pretrain.py, so that its command can be explained -----------------


@dataclass(frozen=True)
class DataConfig:
    # Files and globs of text, compressed or not (data/sources.py); a file that is named twice is read once.
    # `a:0.7 b:0.3` mixes two sources in these shares.
    path: tuple[str, ...] = ()
    # A Hugging Face folder, a tokenizer.json or a SentencePiece .model; None takes the one of --model.
    tokenizer: FilePath | None = None
    seq_len: int | None = None  # tokens of a sequence; None: as many as the model was made for
    document_mask: bool = False  # keep a token from attending to other documents of its packed sequence
    # The field of a .jsonl line, or the column of a .parquet, that holds the text.
    # `a.b` is field b inside field a.
    text_field: str = "text"
    # A record without text ends the run, or is left out, counted, and listed in RUN/bad-records.jsonl.
    bad_records: Literal["refuse", "skip"] = "refuse"
    validation_share: float = 0.01  # share of the sequences that is held out
    cache_dir: str = "~/.cache/dtensor-llama"  # tokenized text, reused by every run on the same files


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    global_batch_size: int = 32  # sequences of one step, on all ranks together
    micro_batch_size: int = 1  # sequences of one forward of a rank: lower it first when memory runs out
    seed: int = 0  # decides the initial weights and the order of the sequences
    lr: float = 3e-4  # the peak; LLaMA-2 took 3e-4 for 7b and 13b and 1.5e-4 for 70b, at 4M tokens a step
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps, at most the 2,000 of LLaMA-2
    weight_decay: float = 0.1
    # Gradients are scaled down if their norm, over all parameters together, is larger than this.
    # inf turns this clipping off.
    max_grad_norm: float = 1.0
    # How many steps in a row may be skipped because their gradient is inf or nan; 0 stops at the first.
    skip_nonfinite: int = 0
    # The type of the computation. Master weights, moments and gradient reductions are float32 in any case.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False  # torch.compile each block: it takes a minute at the start and makes steps faster
    # Activation checkpointing: which activations are computed again in backward, to save memory.
    recompute: Literal["none", "selective", "full"] = "none"
    # The attention kernel. auto takes the fastest one that can run here, and prints why.
    # varlen keeps packed documents apart without a mask.
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"] = "auto"
    validate_every: int = 100  # steps between two validations; 0: none
    validation_rows: int = 64  # how many of the held-out sequences each validation reads


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

    # preset (llama2-7b, tiny-10m, ...) or a Hugging Face folder, of which the shape is taken
    model: FilePath | None = None
    random_init: bool = False  # weights are not read here
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # where optimizer states and block inputs live
    lora: LoraConfig = field(default_factory=LoraConfig)  # as for sft.py
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # no checkpoint is written here
    run_dir: FilePath = "runs/pretrain"  # nothing is written here
    gpus: int | None = None  # nodes x GPUs a node; None: as many as the axes that are given need
    # a100-40gb, a100-80gb, h100-80gb, h100-96gb-500w, h200-141gb or b200, in nodes of 8; or a .json file that
    # describes a cluster (parallel/cluster.py), such as --calibrate writes
    gpu: FilePath = "h100-80gb"
    rank: int = 0  # the rank whose place and parameters are drawn
    json: FilePath | None = None  # file to write the result to, as data
    # file for a picture of the search, .png, .svg, .pdf or .jpg: memory against throughput
    png: FilePath | None = None
    # measure this machine for a minute, write its rates to this .json file, and do nothing else
    calibrate: FilePath | None = None


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
    check_outputs(cfg)
    if cfg.calibrate:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print("measuring this machine for about a minute ...", flush=True)
        cluster = calibrate(device, max(1, torch.cuda.device_count()), seconds=40)
        Path(cfg.calibrate).write_text(cluster.to_json() + "\n", encoding="utf-8")
        print(f"{cluster.to_json()}\nwritten to {cfg.calibrate}; use it with --gpu {cfg.calibrate}")
        return
    check_numbers(cfg, [*NUMBERS, *at_least(1, "gpus"), AtLeast("lora.rank", 0)])
    check_schedule(cfg.train)
    cfg.memory.check()
    cfg.lora.check()
    if not cfg.model:
        raise UsageError("`model` is missing; name a preset, e.g. model=llama2-7b, or a folder.")
    Base(cfg.model, cfg.data.tokenizer, cfg.random_init).check()
    if not 0 <= cfg.rank < gpus_of(cfg):
        n_gpus = gpus_of(cfg)
        raise UsageError(f"--rank {cfg.rank} is not one of --gpus {n_gpus}; use 0 to {n_gpus - 1}.")

    def step(training: Training, microbatches: list[Batch]) -> None:
        n_targets = sum(batch.n_targets for batch in microbatches)
        train_step(training, microbatches, n_targets, cfg.train.lr, cfg.train.max_grad_norm)

    result = report(cfg, step, foresee, cfg.rank, cfg.png)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result) + "\n", encoding="utf-8")


# ---- The step: what pretrain.py does with a global batch ---------------------------------------------------


def train_step(
    training: Training, microbatches: list[Batch], n_targets: int, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Run forward and backward of one global batch, clip the gradients, and step the optimizer.

    Returns (loss, gradient norm), the same on every rank. microbatches: the sequences of this dp rank.
        n_targets: scored labels of the whole global batch, so that the sums over microbatches and ranks give
        the mean, and neither padding nor accumulation changes it.
    """
    optimizer, layout = training.optimizer, training.layout
    for group in optimizer.param_groups:
        group["lr"] = lr  # before backward: without clipping the chunk manager steps as gradients arrive
    loss = forward_backward(training, [layout.own_tokens(batch) for batch in microbatches], n_targets)
    dist.all_reduce(loss, group=layout.loss_group)  # each rank has the share of its own tokens
    # This is one norm over all ranks and axes. The step below scales the gradients by it.
    # If the norm is inf or nan, that step changes nothing.
    grad_norm = optimizer.clip_grad_norm(max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def forward_backward(training: Training, microbatches: list[Batch], n_targets: int) -> Tensor:
    """Run forward and backward of all microbatches; their gradients add up.

    Returns this rank's share of the mean loss."""
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


if __name__ == "__main__":
    run_recipe(main, DryrunConfig, stdout_is_result=True)
