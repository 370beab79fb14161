"""Pretrain a LLaMA, from scratch or from the weights of a Hugging Face folder (continual pretraining).

    python recipes/pretrain.py --model tiny-10m --data.path 'text/**/*.txt' --data.tokenizer tokenizer.json
    torchrun --nproc-per-node 8 recipes/pretrain.py --model llama2-7b --data.path 'corpus/*.parquet' \
        --data.tokenizer llama2/tokenizer.model --train.global-batch-size 1024 --train.compile

This file is a whole run, in the order in which things happen: the flags, what is refused, the parts, the
loop. The run folder then holds config.json, metrics.jsonl, tensorboard/, loss.png, tokenizer/, checkpoints/
and hf/, which transformers opens as it is.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.checkpoint import Checkpointer, training_state
from dtensor_llama.cli import (
    AtLeast,
    FilePath,
    at_least,
    check_numbers,
    read_launch,
    refuse_compile_without_compiler,
    run_recipe,
    values_by_flag,
)
from dtensor_llama.data.mix import open_sequences
from dtensor_llama.data.reader import Batch, Batching, SequenceReader, validation_batches
from dtensor_llama.data.sequences import Packing, log_skipped
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.hf_folder import Base, export
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.places import cache_folders, readable
from dtensor_llama.run import (
    CONTENT,
    RunFacts,
    RunRecord,
    StopSignal,
    claim_run_dir,
    end_run,
    keep_tokenizer,
    open_report,
    resume,
)
from dtensor_llama.schedule import check_schedule, is_due, learning_rate
from dtensor_llama.weights import check_hf
from memory import MemoryConfig
from memory.auto import foresee
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation, attention_in_words, check_seams
from parallel.assemble import Offload, Training, adamw, assemble, check_skips, settle_memory
from parallel.config import AXES, check_parallel
from parallel.dry_run_report import report
from parallel.mesh import Layout, start_process_group, stop_process_group
from parallel.planner import plan_settings
from parallel.step_pictures import StepPictures

# ---- 1. What can be asked for: each field is a flag --------------------------------------------------------


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
class PretrainConfig:
    """Pretrain a LLaMA from scratch, or continue from the weights of a Hugging Face folder."""

    model: FilePath  # preset (llama2-7b, tiny-10m, ...) or a Hugging Face folder
    random_init: bool = False  # take only config.json of the folder, not its weights
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # where optimizer states and block inputs live
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run_dir: FilePath = "runs/pretrain"  # everything this run writes
    # Train nothing: say what a step of this command would hold, send and take on the GPUs below (dryrun.py).
    dry_run: bool = False
    gpus: int | None = None  # of a dry run; None: as many as the axes that are given need
    gpu: FilePath = "h100-80gb"  # of a dry run: a known one, or a .json file that describes a cluster


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


def main(cfg: PretrainConfig) -> None:
    launch = read_launch()
    is_main, say = launch.is_main, launch.say
    device, dtype = launch.take_device(), getattr(torch, cfg.train.dtype)
    run_dir, cache_dirs = Path(cfg.run_dir), cache_folders(cfg.data.cache_dir, cfg.run_dir)

    # ---- 2. What is refused, before anything starts --------------------------------------------------------
    check_numbers(cfg, NUMBERS)
    check_schedule(cfg.train)
    cfg.memory.check()
    base = Base(cfg.model, cfg.data.tokenizer, cfg.random_init)
    base.check()
    if cfg.dry_run:
        return say_what_a_step_does(cfg)
    if cfg.gpus is not None:
        raise UsageError(f"gpus={cfg.gpus} is for a dry run; add dry_run=True, or start as many processes.")
    if not cfg.data.path:
        raise UsageError("`path` is missing; name the files to train on, e.g. path='text/*.txt'.")
    tokenizer = load_tokenizer(base.tokenizer_path)
    model_config = base.read_config(tokenizer)
    seq_len = cfg.data.seq_len or model_config.max_position_embeddings
    if cfg.parallel.auto:  # the planner chooses the layout, before anything is built
        cfg, why_layout = plan_settings(cfg, model_config, seq_len, launch, foresee)
        say(f"layout    {why_layout}")
    # Now every axis has its size: an axis of -1 takes the processes that the others leave over.
    resolved = cfg.parallel.resolve(launch.world_size)
    kernel, why = choose_attention(
        cfg.train.attention, device, dtype, merges_blocks=resolved.is_ring, documents=cfg.data.document_mask
    )
    computation = Computation(device, dtype, cfg.train.recompute, cfg.train.compile, kernel)
    job = computation.job(model_config, seq_len, cfg.train.global_batch_size, cfg.train.micro_batch_size)
    n_microbatches = check_parallel(resolved, job)
    memory, memory_note = settle_memory(cfg.memory, model_config, resolved, n_microbatches, computation)
    check_skips(cfg.train.skip_nonfinite, cfg.train.max_grad_norm, memory)
    cfg = replace(cfg, memory=memory)
    with torch.device("meta"):
        model = Llama(model_config)  # names and shapes only: no memory yet
    model.generation_config = base.generation_config(model_config)
    if base.weights:
        check_hf(model, base.weights)  # reads the headers of the files
    check_seams(model, resolved, computation)
    refuse_compile_without_compiler(cfg.train.compile, device)
    if is_main:
        run_lock = claim_run_dir(run_dir, fresh=cfg.checkpoint.resume == "never")  # held until the run ends

    # ---- 3. The parts --------------------------------------------------------------------------------------
    text = TextOptions(cfg.data.text_field, cfg.data.bad_records)
    packing = Packing(seq_len, cfg.data.validation_share, cfg.train.seed)
    sequences = open_sequences(cfg.data.path, tokenizer, cache_dirs, text, packing)
    record = run_record(cfg, model_config, sequences, model.generation_config)
    record.refuse_early(cfg.checkpoint.resume, run_dir)
    start_process_group(device, launch.world_size, attempt=launch.attempt)
    record.refuse_other_ranks(cfg, resolved)
    if memory_note:
        say(f"memory    {memory_note}")
    layout = Layout(resolved, build_mesh(resolved, device.type), n_microbatches)
    offload = Offload(
        cfg.memory,
        cfg.train.micro_batch_size,
        seq_len,
        clips=cfg.train.max_grad_norm < math.inf,
        ranks_per_host=launch.ranks_per_host,
        rates_file=readable(cache_dirs)[0] / "rates.json",
    )
    training = assemble(model, layout, computation, adamw(cfg.train.lr, cfg.train.weight_decay), offload, say)
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=cfg.checkpoint.keep)
    step, position = resume(cfg.checkpoint.resume, checkpoints, model, training.optimizer, record, say)
    if step == 0:
        weights = training.fp32_weights()
        if base.weights:
            load_hf(weights, base.weights)
        else:
            init_weights(weights, cfg.train.seed)

    batching = Batching(
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        layout.dp_rank,
        resolved.dp,
        cfg.data.document_mask,
        pin_memory=device.type == "cuda",
    )
    reader = SequenceReader(sequences, batching, position)
    facts = RunFacts(
        model_config,
        sequences,
        sequences.contents,
        resolved,
        AXES,
        n_microbatches,
        device,
        attention_in_words(model, kernel, why),
    )
    if is_main:
        keep_tokenizer(run_dir, tokenizer)
    report = open_report(run_dir, step, asdict(cfg), facts, lines_on_data(cfg, sequences, run_dir), launch)

    # ---- 4. The loop ---------------------------------------------------------------------------------------
    stop = StopSignal(launch.launcher_pid, say=report.say)
    stopped = False
    pictures = StepPictures(training, run_dir, step, cfg.train.steps, cfg.memory.draw)
    while step < cfg.train.steps and not stopped:
        report.begin_step()
        lr = learning_rate(cfg.train, step)
        microbatches = next(reader)  # n_microbatches batches of (micro_batch_size, T)
        # How many labels count in the whole global batch, and whether any rank was asked to stop: one
        # reduction for both. It goes over gloo, from host to host, so that nothing waits for the device.
        counts = torch.tensor([sum(batch.n_targets for batch in microbatches), int(stop.asked)])
        dist.all_reduce(counts)
        n_targets, stopped = max(1, int(counts[0]) // layout.ranks_per_batch), bool(counts[1])
        pictures.before(step)
        loss, grad_norm = train_step(training, microbatches, n_targets, lr, cfg.train.max_grad_norm)
        step += 1

        # ---- below here nothing changes the weights ----
        pictures.after(step, report.say if is_main else None)
        report.end_step(step, lr, reader.position * seq_len, loss, grad_norm)
        at_end = step == cfg.train.steps
        is_last = stopped or at_end
        saves = is_due(step, cfg.checkpoint.every, is_last)
        validates = sequences.n_validation and is_due(step, cfg.train.validate_every, at_end)
        # The loss is read while the device computes the next step.
        # Before a checkpoint or a validation we wait for it, so that a bad step is found first.
        finished = report.finished(wait=bool(is_last or saves or validates))
        validation_losses = {}
        if validates:
            held_out = {"": sequences}  # all of them together, and below each source of a mix
            held_out |= {name: source for name, source, _ in sequences.parts(0) if name}
            for name, source in held_out.items():
                batches = validation_batches(source, batching, cfg.train.validation_rows)
                validation_losses[name] = training.evaluate(list(batches))
        report.write(finished, validation_losses)
        if saves:
            state = training_state(model, training.optimizer, step, reader.position, record.to_meta())
            waited_s = checkpoints.save(step, state, wait=is_last)
            stage = "written" if is_last else "under way"
            report.say(f"step {step}: checkpoint {stage}; training waited {waited_s:.2f} s")

    # ---- 5. The end ----------------------------------------------------------------------------------------
    reader.close()
    checkpoints.close()
    if cfg.checkpoint.export_hf and not stopped:
        export(training.fp32_weights(), run_dir / "hf", dtype, tokenizer)
    if is_main:
        end_run(report.log, run_dir, step, cfg.train.steps, stopped)
        run_lock.close()
    stop_process_group()


# ---- The step: one global batch ----------------------------------------------------------------------------


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


def say_what_a_step_does(cfg: PretrainConfig) -> None:
    """Run the step above on tensors without memory, for GPUs that need not be here.

    Prints what each rank holds and sends, how long the step is predicted to take, and, where no layout was
    given, what the planner would choose."""

    def step(training: Training, microbatches: list[Batch]) -> None:
        n_targets = sum(batch.n_targets for batch in microbatches)
        train_step(training, microbatches, n_targets, cfg.train.lr, cfg.train.max_grad_norm)

    report(cfg, step, foresee, is_own_run=True)


# ---- What a checkpoint records, what is printed ------------------------------------------------------------


def run_record(cfg: PretrainConfig, model_config: LlamaConfig, sequences, generation: dict) -> RunRecord:
    """Return what a checkpoint records about its run.

    `fixed` is what a run that resumes from it must have too: with other values the saved data position and
    weights would not fit. `may_change` may differ, and the resumed run prints how."""
    fixed = {
        "--model": asdict(model_config),
        "--data.seq-len": sequences.seq_len,
        **values_by_flag(cfg, ("train.seed", "data.validation_share")),
        "--data.path and --data.tokenizer": sequences.contents,
        CONTENT: sequences.content_hash,
    }
    may_change = (
        "train.steps",
        "train.lr",
        "train.min_lr",
        "train.warmup_steps",
        "train.global_batch_size",
        "train.weight_decay",
        "train.max_grad_norm",
        "train.dtype",
        "data.document_mask",
        # These decide the content of the data. A refusal of other content names those that have changed.
        "data.text_field",
        "data.bad_records",
    )
    return RunRecord(fixed, values_by_flag(cfg, may_change), generation)


def lines_on_data(cfg: PretrainConfig, sequences, run_dir: Path) -> list[str]:
    """Describe each source of the data: its tokens and its sequences, and how often this run reads them."""
    lines = []
    sources = sequences.parts(cfg.train.steps * cfg.train.global_batch_size)
    for name, source, n_read in sources:
        lines.append(
            f"data      {name + ': ' if name else ''}{source.corpus.n_tokens:,} tokens: {source.n_train:,} "
            f"sequences of {sequences.seq_len} to train on, {source.n_validation:,} held out; this run reads "
            f"them {n_read / source.n_train:.2f} times"
        )
    log_skipped([source.corpus for _, source, _ in sources], run_dir, lines.append)
    return lines


if __name__ == "__main__":
    run_recipe(main, PretrainConfig)
