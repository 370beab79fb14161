"""Pretrain a LLaMA, from scratch or from the weights of a Hugging Face folder (continual pretraining).

    python recipes/pretrain.py --model tiny-10m --data.path 'text/**/*.txt' --data.tokenizer tokenizer.json
    torchrun --nproc-per-node 8 recipes/pretrain.py --model llama2-7b --data.path 'corpus/*.parquet' \
        --data.tokenizer llama2/tokenizer.model --train.global-batch-size 1024 --train.compile

One file, in the order things happen: what can be asked for, what is refused, the parts, the loop. The run
folder then holds config.json, metrics.jsonl, tensorboard/, loss.png, tokenizer/, checkpoints/ and hf/, which
transformers opens as it is.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.checkpoint import Checkpointer, restore_training_state, training_state
from dtensor_llama.cli import FilePath, read_launch, run_recipe
from dtensor_llama.config import generation_config, read_generation_config
from dtensor_llama.data.mix import open_rows
from dtensor_llama.data.reader import Batch, RowReader, validation_batches
from dtensor_llama.data.sequences import PackedRows, say_skipped
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token, peak_flops
from dtensor_llama.loss import IGNORE, choose_loss
from dtensor_llama.metrics import GIB, LateReader, PeakMemory, RunLog, SkippedSteps, draw_loss_curve
from dtensor_llama.model import init_weights
from dtensor_llama.places import cache_folders, readable
from dtensor_llama.run import (
    CONTENT,
    GENERATION,
    SETTINGS,
    StopSignal,
    changed_settings,
    claim_run_dir,
    keep_tokenizer,
    made_with,
    refuse_below,
    refuse_other_run,
    say_where_things_are,
)
from dtensor_llama.schedule import cosine_lr
from dtensor_llama.weights import check_hf
from memory import MemoryConfig
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Offload, Training, adamw, assemble, check_skips, settle_memory
from parallel.config import AXES, check_parallel
from parallel.mesh import Layout, start_process_group, stop_process_group
from parallel.step_pictures import StepPictures

# ---- 1. What can be asked for: each field is a flag --------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    # files and globs of text, packed or not (data/sources.py); mixed if a:0.7 b:0.3
    path: tuple[str, ...] = ()
    # Hugging Face folder, tokenizer.json or SentencePiece .model; None: --model's
    tokenizer: FilePath | None = None
    seq_len: int | None = None  # tokens per row; None: the context of the model
    document_mask: bool = False  # no token sees another document of its packed row
    # of a .jsonl line, or column of a .parquet, that holds the text; a.b: b inside a
    text_field: str = "text"
    # A record that has no text: end the run, or leave it out, count it and list it in RUN/bad-records.jsonl.
    bad_records: Literal["refuse", "skip"] = "refuse"
    validation_share: float = 0.01  # of the rows, held out
    cache_dir: str = "~/.cache/dtensor-llama"  # tokenized text, reused by every run on the same files


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    global_batch_size: int = 32  # rows per step, over all ranks
    micro_batch_size: int = 1  # rows per rank and forward: first thing to lower when memory runs out
    seed: int = 0  # of the initial weights and of the order of rows
    lr: float = 3e-4  # peak; LLaMA-2: 3e-4 for 7b and 13b, 1.5e-4 for 70b, at 4M tokens a step
    min_lr: float | None = None  # where the cosine ends; None: a tenth of lr
    warmup_steps: int | None = None  # None: 2 % of the steps, at most LLaMA-2's 2,000
    weight_decay: float = 0.1
    # gradients longer than this, over all parameters together, are scaled to it; inf: none
    max_grad_norm: float = 1.0
    skip_nonfinite: int = 0  # steps in a row left out for a gradient that is inf or nan; 0: stop at the first
    # of the computation; masters, moments and reductions are fp32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False  # torch.compile each block: a minute at the start, faster steps after
    # activations computed again in backward: memory for time
    recompute: Literal["none", "selective", "full"] = "none"
    # The kernel; auto: the fastest that can run here, printed with the reason. varlen: documents without a
    # mask.
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"] = "auto"
    validate_every: int = 100  # steps between validation losses; 0: never
    validation_rows: int = 64  # rows of the held-out share that are used each time


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; 0: none
    keep: int = 3  # newest ones to keep; 0: all
    export_hf: bool = True  # write hf/ at the end, in --train.dtype
    resume: FilePath = "auto"  # auto: go on where this run folder stands, else start; never; or a checkpoint


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


def main(cfg: PretrainConfig) -> None:
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    is_main = rank == 0
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    compute_dtype = getattr(torch, cfg.train.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # ---- 2. What is refused, before anything starts --------------------------------------------------------
    check_numbers(cfg)
    if not cfg.data.path:
        raise UsageError("--data.path is missing; name the files to train on, e.g. --data.path 'text/*.txt'.")
    cfg.memory.check()
    tokenizer = load_tokenizer(tokenizer_path(cfg))
    model_config = read_model_config(cfg, tokenizer)
    seq_len = cfg.data.seq_len or model_config.max_position_embeddings
    ring = cfg.parallel.cp > 1 and cfg.parallel.cp_method == "ring"
    kernel, why = choose_attention(
        cfg.train.attention, device, compute_dtype, merges_blocks=ring, documents=cfg.data.document_mask
    )
    resolved = cfg.parallel.resolve(world_size)
    n_microbatches = check_parallel(
        resolved,
        model_config,
        seq_len,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        attention=kernel,
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        device_type=device.type,
    )
    computation = Computation(device, compute_dtype, cfg.train.recompute, cfg.train.compile, kernel)
    memory, chosen = settle_memory(cfg.memory, model_config, resolved, n_microbatches, computation)
    check_skips(cfg.train.skip_nonfinite, cfg.train.max_grad_norm, memory)
    cfg = dataclasses.replace(cfg, memory=memory)
    with torch.device("meta"):
        model = Llama(model_config)  # names and shapes only: no memory yet
    model.generation_config = generation_settings(cfg, model_config)
    weights = Path(cfg.model) if Path(cfg.model).is_dir() and not cfg.random_init else None
    if weights:
        check_hf(model, weights)  # reads the headers of the files
    if (
        cfg.train.compile
        and device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise UsageError(
            "--train.compile needs a C++ compiler on a CPU and there is none; install g++, or leave it out."
        )
    if is_main:  # the claim is held until the run ends
        run_lock = claim_run_dir(Path(cfg.run_dir), fresh=cfg.checkpoint.resume == "never")

    # ---- 3. The parts --------------------------------------------------------------------------------------
    text = TextOptions(cfg.data.text_field, cfg.data.bad_records)
    rows = open_rows(
        cfg.data.path,
        tokenizer,
        cache_folders(cfg.data.cache_dir, cfg.run_dir),
        text,
        seq_len,
        cfg.data.validation_share,
        cfg.train.seed,
    )
    start_process_group(device, world_size, attempt=launch.attempt)
    if is_main and chosen:
        print(f"memory    {chosen}", flush=True)
    offload = Offload(
        cfg.memory,
        cfg.train.micro_batch_size,
        seq_len,
        clips=cfg.train.max_grad_norm < math.inf,
        ranks_per_host=launch.ranks_per_host,
        rates_file=readable(cache_folders(cfg.data.cache_dir, cfg.run_dir))[0] / "rates.json",
    )
    layout = Layout(resolved, build_mesh(resolved, device.type), n_microbatches)
    training = assemble(
        model,
        layout,
        computation,
        adamw(cfg.train.lr, cfg.train.weight_decay),
        offload,
        say=print if is_main else lambda text: None,
    )
    optimizer = training.optimizer
    checkpoints = Checkpointer(Path(cfg.run_dir, "checkpoints"), keep=cfg.checkpoint.keep)
    meta = checkpoint_meta(cfg, model_config, rows) | {GENERATION: model.generation_config}
    step, position = resume(cfg.checkpoint.resume, model, optimizer, checkpoints, meta, is_main)
    if step == 0:
        whole = training.fp32_weights()
        load_hf(whole, weights) if weights else init_weights(whole, cfg.train.seed)

    reader = RowReader(
        rows,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        layout.dp_rank,
        resolved.dp,
        cfg.data.document_mask,
        position,
        pin_memory=device.type == "cuda",
    )
    step_tokens = cfg.train.global_batch_size * seq_len
    peak, peak_source = peak_flops(device, compute_dtype)
    peak_memory = PeakMemory(device)
    log = None
    if is_main:
        log = RunLog(Path(cfg.run_dir), step, cfg.train.steps)
        keep_tokenizer(Path(cfg.run_dir), tokenizer)
        describe_run(
            cfg,
            model_config,
            resolved,
            rows,
            n_microbatches,
            f"{kernel} ({why})",
            peak,
            peak_source,
            device,
            log,
        )

    # ---- 4. The loop ---------------------------------------------------------------------------------------
    stop = StopSignal(launch.launcher_pid, say=log.say if log else lambda text: None)
    stopped = False
    pictures = StepPictures(training, Path(cfg.run_dir), step, cfg.train.steps, cfg.memory.draw)
    reading, skipped = LateReader(device), SkippedSteps(cfg.train.skip_nonfinite)
    if log:  # rows of before a resumption go on counting
        skipped.total = max((row.get("skipped_steps") or 0 for row in log.rows), default=0)
    while step < cfg.train.steps and not stopped:
        reading.begin()
        lr = learning_rate(cfg.train, step)
        microbatches = next(reader)  # n_microbatches batches of (micro_batch_size, T)
        # How many labels count in the whole global batch, and whether any rank was asked to stop: one reduction for
        # both. It goes over gloo, from host to host, so that nothing waits for the device.
        counts = torch.tensor([count_targets(microbatches), int(stop.asked)])
        dist.all_reduce(counts)
        n_targets, stopped = max(1, int(counts[0]) // layout.ranks_per_batch), bool(counts[1])
        pictures.before(step)
        loss, grad_norm = train_step(training, microbatches, n_targets, lr, cfg.train.max_grad_norm)
        step += 1
        # ---- below here nothing changes the weights ----
        pictures.after(step, log.say if log else None)
        # of the step's launches: the allocator is the host's
        peaks = torch.tensor(peak_memory.take(), dtype=torch.float64)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        device_gib, host_gib, reserved_gib, _ = (peaks / GIB).tolist()
        reading.put(
            {
                "step": step,
                "lr": lr,
                "tokens": reader.position * seq_len,
                "device_memory_gib": device_gib,
                "device_reserved_gib": reserved_gib,
                "host_memory_gib": host_gib,
            },
            loss,
            grad_norm,
        )
        last = stopped or step == cfg.train.steps
        saves = cfg.checkpoint.every and (step % cfg.checkpoint.every == 0 or last)
        validates = (
            rows.n_validation
            and cfg.train.validate_every
            and (step % cfg.train.validate_every == 0 or step == cfg.train.steps)
        )
        # The loss is read while the device computes the next step; what is saved or judged is of a step that
        # was read.
        done = [skipped.judge(row) for row in reading.take(all=bool(last or saves or validates))]
        if validates:
            # all, and each corpus of a mix
            held_out = {"": rows} | {name: own for name, own, _ in rows.parts(0) if name}
            losses = {}
            for name, own in held_out.items():
                batches = validation_batches(
                    own,
                    cfg.train.micro_batch_size,
                    layout.dp_rank,
                    resolved.dp,
                    cfg.data.document_mask,
                    cfg.train.validation_rows,
                )
                losses[name] = evaluate(training, list(batches))
            done[-1] |= {f"validation_loss/{name}".removesuffix("/"): loss for name, loss in losses.items()}
            if is_main:
                said = ", ".join(f"{name} {loss:.4f}".lstrip() for name, loss in losses.items())
                log.say(f"step {step}: validation loss {said}")
        for row in done if is_main else ():
            tokens_per_s = step_tokens / row["step_seconds"]
            per_device = tokens_per_s / world_size / peak
            log.step(
                {"step": row["step"], "loss": row["loss"], "grad_norm": row["grad_norm"]}
                | row
                | {
                    "tokens_per_second": tokens_per_s,
                    "mfu": per_device * model_flops_per_token(model_config, seq_len),
                    "hfu": per_device * hardware_flops_per_token(model_config, seq_len, cfg.train.recompute),
                }
            )
        if saves:
            stall_s = checkpoints.save(
                step, training_state(model, optimizer, step, reader.position, meta), wait=last
            )
            if is_main:
                log.say(
                    f"step {step}: checkpoint {'written' if last else 'under way'}; training waited {stall_s:.2f} s"
                )

    # ---- 5. The end ----------------------------------------------------------------------------------------
    reader.close()
    checkpoints.close()
    if cfg.checkpoint.export_hf and not stopped:
        export(training.fp32_weights(), tokenizer, Path(cfg.run_dir, "hf"), compute_dtype, is_main)
    if is_main:
        log.close()
        if log.rows:
            draw_loss_curve(log.rows, Path(cfg.run_dir, "loss.png"))
        say_where_things_are(Path(cfg.run_dir), log.rows, step, cfg.train.steps, stopped)
        run_lock.close()
    stop_process_group()


# ---- The step: one global batch ----------------------------------------------------------------------------


def train_step(
    training: Training, microbatches: list[Batch], n_targets: int, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one global batch, clip, step. Returns (loss, gradient norm), the same on every rank.

    microbatches: the rows of this dp rank. n_targets: scored labels of the whole global batch, so that the sums over
    microbatches and ranks give the mean, and neither padding nor accumulation changes it.
    """
    optimizer, layout = training.optimizer, training.layout
    for group in optimizer.param_groups:
        group["lr"] = lr  # before backward: without clipping the chunk manager steps as gradients arrive
    loss = forward_backward(training, [layout.own_tokens(batch) for batch in microbatches], n_targets)
    dist.all_reduce(loss, group=layout.loss_group)  # each rank has the share of its own tokens
    # One norm over all ranks and axes. The step scales the gradients; if they are not finite it changes nothing.
    grad_norm = optimizer.clip_grad_norm(max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def forward_backward(training: Training, microbatches: list[Batch], n_targets: int) -> Tensor:
    """Forward and backward of all microbatches; gradients add up. Returns this rank's share of the mean loss."""
    if training.pipeline:  # stages and schedules: parallel/pipeline.py
        return training.pipeline.step(microbatches, n_targets)
    loss = torch.zeros((), device=training.device)
    for i, batch in enumerate(microbatches):
        training.sync_gradients(last=i == len(microbatches) - 1)  # ZeRO: reduce gradients once, or each time
        tokens, labels, positions = batch.to(training.device)
        loss_i = (
            training.model(tokens, labels=labels, positions=positions) / n_targets
        )  # (): sum of token losses
        (
            loss_i * training.layout.gradient_ranks
        ).backward()  # FSDP averages over these ranks; we want the sum
        loss += loss_i.detach()
    return loss


@torch.no_grad()
def evaluate(training: Training, batches: list[Batch]) -> float:
    """Mean loss of held-out batches. All ranks enter: a sharded forward gathers weights."""
    layout = training.layout
    own = [layout.own_tokens(batch) for batch in batches]
    if training.pipeline:
        nats = training.pipeline.evaluate(own)
    else:
        nats = torch.zeros((), dtype=torch.float64, device=training.device)
        for batch in own:
            tokens, labels, positions = batch.to(training.device)
            nats += training.model(tokens, labels=labels, positions=positions)
        training.reshard()
    dist.all_reduce(nats, group=layout.loss_group)
    n_targets = torch.tensor(count_targets(batches), device=training.device)
    dist.all_reduce(n_targets, group=layout.mesh["dp"].get_group())
    return (nats / n_targets).item()


def count_targets(batches: list[Batch]) -> int:
    return sum(int((batch.labels != IGNORE).sum()) for batch in batches)


def learning_rate(train: TrainConfig, step: int) -> float:
    warmup = min(2000, train.steps // 50) if train.warmup_steps is None else train.warmup_steps
    return cosine_lr(
        step, train.steps, warmup, train.lr, train.lr / 10 if train.min_lr is None else train.min_lr
    )


# ---- What is refused ---------------------------------------------------------------------------------------


def check_numbers(cfg: PretrainConfig) -> None:
    """Refuse numbers that no run can have."""
    train, data = cfg.train, cfg.data
    refuse_below(
        1,
        {
            "--train.steps": train.steps,
            "--train.global-batch-size": train.global_batch_size,
            "--train.micro-batch-size": train.micro_batch_size,
            "--train.validation-rows": train.validation_rows,
            "--data.seq-len": data.seq_len,
        },
    )
    clip = {} if train.max_grad_norm == math.inf else {"--train.max-grad-norm": train.max_grad_norm}
    refuse_below(0, {"--train.lr": train.lr, **clip}, exclusive=True)
    refuse_below(
        0,
        {
            "--train.warmup-steps": train.warmup_steps,
            "--train.weight-decay": train.weight_decay,
            "--train.min-lr": train.min_lr,
            "--train.validate-every": train.validate_every,
            "--train.skip-nonfinite": train.skip_nonfinite,
            "--train.seed": train.seed,
            "--checkpoint.every": cfg.checkpoint.every,
            "--checkpoint.keep": cfg.checkpoint.keep,
        },
    )
    if train.min_lr is not None and train.lr is not None and train.min_lr > train.lr:
        raise UsageError(
            f"--train.min-lr {train.min_lr} is above --train.lr {train.lr}; the cosine ends at the lower."
        )
    if not 0 <= data.validation_share < 1:
        raise UsageError(
            f"--data.validation-share {data.validation_share} is not a share; use 0 (none) to below 1."
        )
    if cfg.random_init and not Path(cfg.model).is_dir():
        raise UsageError(
            f"--random-init takes the shape of a Hugging Face folder, and --model {cfg.model} is none; a "
            "preset starts from random weights anyway."
        )


def tokenizer_path(cfg: PretrainConfig) -> Path:
    if cfg.data.tokenizer is not None:
        return Path(cfg.data.tokenizer)
    if Path(cfg.model).is_dir():
        return Path(cfg.model)
    LlamaConfig.preset(cfg.model)  # an unknown name is the first thing to say
    raise UsageError(
        f"--data.tokenizer is missing, and the preset --model {cfg.model} has none of its own; give a Hugging "
        "Face folder, a tokenizer.json or a SentencePiece .model."
    )


def read_model_config(cfg: PretrainConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The shape to train, with the tokenizer's ids of begin and end."""
    looks_like_path = os.sep in cfg.model or Path(cfg.model).exists()
    config = LlamaConfig.from_hf(cfg.model) if looks_like_path else LlamaConfig.preset(cfg.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"--data.tokenizer has {tokenizer.vocab_size} tokens and --model {cfg.model} a vocabulary of "
            f"{config.vocab_size}; use the tokenizer the model was made for, or a model with a vocabulary of "
            f"at least {tokenizer.vocab_size}."
        )
    if Path(cfg.model).is_dir() and cfg.data.tokenizer is None:
        return config  # the folder's own: its config.json says it already, and may list several
    return dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def generation_settings(cfg: PretrainConfig, model_config: LlamaConfig) -> dict:
    """The generation_config.json of what is exported: the base model's, if there is one, with the ends of
    `model_config`."""
    continues = Path(cfg.model).is_dir() and not cfg.random_init
    base = read_generation_config(cfg.model) if continues else {}
    return generation_config(base, model_config, same_tokens=cfg.data.tokenizer is None)


# ---- Resuming ----------------------------------------------------------------------------------------------


def checkpoint_meta(cfg: PretrainConfig, model_config: LlamaConfig, rows: PackedRows) -> dict:
    """What must be the same for a checkpoint's data position and weights to mean the same: {flag: value}.
    SETTINGS beside it may change, and a resumed run says so."""
    return {
        "--model": asdict(model_config),
        "--data.seq-len": rows.seq_len,
        "--train.seed": cfg.train.seed,
        "--data.validation-share": cfg.data.validation_share,
        "--data.path and --data.tokenizer": rows.contents,
        CONTENT: rows.content_hash,
        SETTINGS: settings_of(cfg),
    }


def settings_of(cfg: PretrainConfig) -> dict:
    """{flag: value} of what changes the numbers of a run and may be otherwise when it goes on; the schedule
    comes first."""
    train = cfg.train
    settings = {
        "--train.steps": train.steps,
        "--train.lr": train.lr,
        "--train.min-lr": train.min_lr,
        "--train.warmup-steps": train.warmup_steps,
        "--train.global-batch-size": train.global_batch_size,
        "--train.weight-decay": train.weight_decay,
        "--train.max-grad-norm": train.max_grad_norm,
        "--train.dtype": train.dtype,
    }
    if isinstance(cfg, PretrainConfig):  # sft.py always masks, and may have noise
        return settings | {"--data.document-mask": cfg.data.document_mask}
    return settings | {"--train.neftune-alpha": train.neftune_alpha}


def rate_at(step: int, settings: dict) -> float:
    """The learning rate of a step under the schedule of other `settings`."""
    schedule = TrainConfig(
        steps=settings["--train.steps"],
        lr=settings["--train.lr"],
        min_lr=settings["--train.min-lr"],
        warmup_steps=settings["--train.warmup-steps"],
    )
    return learning_rate(schedule, step)


def resume(
    asked: str, model: nn.Module, optimizer: Optimizer, checkpoints: Checkpointer, meta: dict, is_main: bool
) -> tuple[int, int]:
    """Load what --checkpoint.resume says; returns (steps done, rows read), zeros for a fresh start. meta: of
    this run, which must be the checkpoint's."""
    path = checkpoints.latest() if asked == "auto" else None if asked == "never" else Path(asked)
    if path is None:
        return 0, 0
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    state = training_state(model, optimizer)
    checkpoints.load(path, state)
    progress = restore_training_state(state, model, optimizer)
    refuse_other_run(path, progress["meta"], meta)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)  # decay and the like are what was asked for now, not what was saved
    if is_main:
        print(f"resuming from {path}: {progress['step']} steps done", flush=True)
        rate_of = partial(rate_at, progress["step"])
        for change in changed_settings(progress["meta"], meta, progress["step"], rate_of):
            print(f"resuming  {change}", flush=True)
    return progress["step"], progress["position"]


# ---- Telling -----------------------------------------------------------------------------------------------


def describe_run(
    cfg,
    model_config,
    layout,
    rows: PackedRows,
    n_micros: int,
    attention: str,
    peak: float,
    peak_source: str,
    device,
    log: RunLog,
) -> None:
    """Print what is about to happen and write config.json."""
    record = {
        **asdict(cfg),
        "model_config": model_config.to_hf(),
        "layout": asdict(layout),
        "device": str(device),
        "attention_kernel": attention,
        "n_parameters": model_config.n_parameters,
        **made_with(),
        "peak_flops_per_device": peak,
        "peak_flops_source": peak_source,
        "n_training_rows": rows.n_train,
        "n_validation_rows": rows.n_validation,
        "corpus": rows.contents,
    }
    Path(cfg.run_dir, "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log.say(
        f"model     {cfg.model}: {model_config.n_parameters / 1e6:,.1f}M parameters, attention {attention}"
    )
    for name, own, n_read in rows.parts(cfg.train.steps * cfg.train.global_batch_size):
        log.say(
            f"data      {name and name + ': '}{own.corpus.n_tokens:,} tokens: {own.n_train:,} rows of {rows.seq_len} to "
            f"train on, {own.n_validation:,} held out; this run reads them {n_read / own.n_train:.2f} times"
        )
    say_skipped([own.corpus for _, own, _ in rows.parts(0)], Path(cfg.run_dir), log.say)
    axes = (
        " x ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1)
        or "one process"
    )
    log.say(
        f"layout    {axes} on {device.type}, ZeRO stage {layout.zero_stage}; {n_micros} micro-batches of "
        f"{cfg.train.micro_batch_size} rows per rank and step"
    )
    log.say(
        f"numbers   {cfg.train.dtype} compute, float32 masters; MFU against {peak / 1e12:.2f} TFLOP/s ({peak_source})"
    )
    log.say("loss      {}: {}".format(*choose_loss(device)))


def export(model: Llama, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, is_main: bool) -> None:
    """Write the folder that transformers opens. All ranks enter: each writes the shards it owns."""
    save_hf(model, folder, dtype=dtype)
    if is_main:
        tokenizer.save(folder)
    dist.barrier()


if __name__ == "__main__":
    run_recipe(main, PretrainConfig)
