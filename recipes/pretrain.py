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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
# its neighbours, also as `python -m recipes.pretrain`
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from step_pictures import StepPictures
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.checkpoint import Checkpointer, restore_training_state, training_state
from dtensor_llama.cli import FilePath, read_launch, run_recipe
from dtensor_llama.config import generation_config, read_generation_config
from dtensor_llama.data.mix import open_rows
from dtensor_llama.data.preview import say_skipped
from dtensor_llama.data.reader import Batch, RowReader, validation_batches
from dtensor_llama.data.rows import PackedRows
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.flops import hardware_flops_per_token, matmul_flops, model_flops_per_token, peak_flops
from dtensor_llama.loss import choose_loss
from dtensor_llama.metrics import GIB, LateReader, PeakMemory, RunLog, SkippedSteps, draw_loss_curve
from dtensor_llama.model import init_weights
from dtensor_llama.optim import build_adamw
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
from memory import ChunkManager, Machine, MemoryConfig, TrainingLoop
from memory.activations import offload_block_inputs
from memory.optimizer import ChunkOptimizer
from memory.tracer import load_rates
from parallel import ParallelConfig, build_mesh, parallelize
from parallel.clip import clip_grad_norm
from parallel.config import AXES, check_parallel
from parallel.context import shard_batch
from parallel.fit import check_states
from parallel.mesh import reads_alone, start_process_group, stop_process_group
from parallel.pipeline import Accumulation, Pipeline, make_step_runner
from parallel.schedule_picture import Recorder
from parallel.zero import gradient_arrivals

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
    layout = cfg.parallel.resolve(world_size)
    n_micros = check_parallel(
        layout,
        model_config,
        seq_len,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        attention=kernel,
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        device_type=device.type,
    )
    cfg, chosen = settle_memory(cfg, model_config, layout, n_micros, device, world_size)
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
    mesh, runner, optimizer = set_up(
        cfg, model, layout, n_micros, kernel, device, seq_len, say=print if is_main else None
    )
    checkpoints = Checkpointer(Path(cfg.run_dir, "checkpoints"), keep=cfg.checkpoint.keep)
    meta = checkpoint_meta(cfg, model_config, rows) | {GENERATION: model.generation_config}
    step, position = resume(cfg.checkpoint.resume, model, optimizer, checkpoints, meta, is_main)
    if step == 0:
        whole = fp32_weights(model, optimizer)
        load_hf(whole, weights) if weights else init_weights(whole, cfg.train.seed)

    dp_rank = mesh["dp"].get_local_rank()
    reader = RowReader(
        rows,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        dp_rank,
        layout.dp,
        cfg.data.document_mask,
        position,
        pin_memory=device.type == "cuda",
    )
    step_tokens = cfg.train.global_batch_size * seq_len
    peak, peak_source = peak_flops(device, compute_dtype)
    memory = PeakMemory(device)
    log = None
    if is_main:
        log = RunLog(Path(cfg.run_dir), step, cfg.train.steps)
        keep_tokenizer(Path(cfg.run_dir), tokenizer)
        describe_run(
            cfg, model_config, layout, rows, n_micros, f"{kernel} ({why})", peak, peak_source, device, log
        )

    # ---- 4. The loop ---------------------------------------------------------------------------------------
    stop = StopSignal(launch.launcher_pid, say=log.say if log else lambda text: None)
    stopped = False
    pictures = StepPictures(cfg, layout, mesh, optimizer, device, first_step=step)
    reading, skipped = LateReader(device), SkippedSteps(cfg.train.skip_nonfinite)
    if log:  # rows of before a resumption go on counting
        skipped.total = max((row.get("skipped_steps") or 0 for row in log.rows), default=0)
    while step < cfg.train.steps and not stopped:
        reading.begin()
        lr = learning_rate(cfg.train, step)
        micros = next(reader)  # n_micros batches of (micro_batch_size, T)
        # How many labels count in the whole global batch, and whether any rank was asked to stop: one
        # reduction for both. It goes over gloo, from host to host: nobody waits for the device.
        counts = torch.tensor([count_scored(micros) * reads_alone(mesh), int(stop.asked)])
        dist.all_reduce(counts)
        n_scored, stopped = max(1, int(counts[0])), bool(counts[1])
        loss, grad_norm = train_step(
            runner,
            model,
            optimizer,
            micros,
            n_scored,
            lr,
            mesh,
            layout,
            cfg.train.max_grad_norm,
            pictures.before(step),
        )
        step += 1
        # ---- below here nothing changes the weights ----
        pictures.after(step, log.say if log else None)
        # of the step's launches: the allocator is the host's
        peaks = torch.tensor(memory.take(), dtype=torch.float64)
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
            losses = {
                name: evaluate(runner, own, cfg.train, cfg.data.document_mask, mesh, layout, device)
                for name, own in held_out.items()
            }
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
        export(fp32_weights(model, optimizer), tokenizer, Path(cfg.run_dir, "hf"), compute_dtype, is_main)
    if is_main:
        log.close()
        if log.rows:
            draw_loss_curve(log.rows, Path(cfg.run_dir, "loss.png"))
        say_where_things_are(Path(cfg.run_dir), log.rows, step, cfg.train.steps, stopped)
        run_lock.close()
    stop_process_group()


# ---- The parts that benchmark.py and sft.py need too -------------------------------------------------------


def settle_memory(
    cfg: "PretrainConfig",
    model_config: LlamaConfig,
    layout: ParallelConfig,
    n_micros: int,
    device: torch.device,
    world_size: int,
) -> tuple["PretrainConfig", str]:
    """`cfg` with a memory placement, and in words what was chosen for whoever left it open.

    UsageError if the states alone are more than the GPU has: before anything starts, not out of memory a
    minute later."""
    dtype = getattr(torch, cfg.train.dtype)
    memory, chosen = cfg.memory.settle(device, dtype, world_size)
    check_skips(cfg.train, memory)
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
        check_states(
            model_config, layout, device_bytes, memory.device_bytes_per_parameter(dtype.itemsize, n_micros)
        )
    return dataclasses.replace(cfg, memory=memory), chosen


def check_skips(train: TrainConfig, memory: MemoryConfig) -> None:
    """UsageError if steps with a gradient that is not finite are to be left out, and could not be."""
    if train.skip_nonfinite and train.max_grad_norm == math.inf and memory.is_on:
        raise UsageError(
            f"--train.skip-nonfinite {train.skip_nonfinite} cannot leave out a step under a chunk manager "
            "with --train.max-grad-norm inf, which steps while gradients arrive; use a --train.max-grad-norm, "
            "however large, or --memory.placement off."
        )


def set_up(
    cfg: "PretrainConfig",
    model: Llama,
    layout: ParallelConfig,
    n_micros: int,
    kernel: str,
    device: torch.device,
    seq_len: int,
    say: Callable[[str], None] | None = None,
) -> tuple[DeviceMesh, Pipeline | Accumulation, Optimizer]:
    """Spread `model` (on meta) over the mesh, this rank's shards still without values; returns (mesh, runner,
    optimizer).

    With a memory placement the parameters are what computes, in --train.dtype, and the float32 masters are
    the chunk manager's: see fp32_weights. say: prints plans, on one rank."""
    dtype, memory = getattr(torch, cfg.train.dtype), cfg.memory
    mesh = build_mesh(layout, device.type)
    if memory.is_on:
        model.to(dtype)
    parts = parallelize(
        model,
        mesh,
        layout,
        compute_dtype=dtype,
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        attention=kernel,
    )
    activations = []
    for part in parts:  # without pp: the model itself
        part.to_empty(device=device)
        if memory.activations:
            input_bytes = (
                cfg.train.micro_batch_size * seq_len // (layout.cp * layout.sequence_shards) * dtype.itemsize
            )
            blocks = [block for block in part.model.layers if block is not None]
            activations.append(
                offload_block_inputs(
                    blocks, device, input_bytes * model.config.hidden_size, n_micros if layout.pp > 1 else 1
                )
            )
    runner = make_step_runner(
        parts, mesh["pp"], layout.schedule, n_micros, device, dtype, layout.sequence_shards, layout.zero_stage
    )
    optimizer = build_adamw(model, cfg.train.lr, cfg.train.weight_decay)
    if memory.is_on:
        embedding = model.model.embed_tokens
        tied_over_stages = model.config.tie_word_embeddings and layout.pp > 1 and embedding is not None
        ranks_per_host = read_launch().ranks_per_host
        # measured once
        rates_file = readable(cache_folders(cfg.data.cache_dir, cfg.run_dir))[0] / "rates.json"
        # What a step will compute, as if at the speed of matrix products all through: placement auto measures
        # it later.
        seconds_per_flop = (
            cfg.train.global_batch_size * seq_len / dist.get_world_size() / matmul_flops(device, dtype)
        )
        forward_s = seconds_per_flop * model_flops_per_token(model.config, seq_len) / 3
        both_s = seconds_per_flop * hardware_flops_per_token(model.config, seq_len, cfg.train.recompute)
        say = say or (lambda text: None)
        rates = load_rates(rates_file, device, memory.kernel, ranks_per_host, say=say)
        machine = Machine(ranks_per_host, rates, compute_seconds=(forward_s, both_s - forward_s), say=say)
        loop = TrainingLoop(
            parts,
            accumulation=gradient_arrivals(model, layout.zero_stage, layout.pp > 1, n_micros),
            clips=cfg.train.max_grad_norm < math.inf,
            tied=[embedding.weight] if tied_over_stages else [],
            activations=activations,
        )
        optimizer = ChunkManager(model, optimizer, memory, loop, machine).optimizer
    return mesh, runner, optimizer


def fp32_weights(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """What to load, initialize or save as float32: the model or, with a chunk manager, its masters."""
    if not isinstance(optimizer, ChunkOptimizer):
        return model
    masters = optimizer.masters()
    masters.generation_config = model.generation_config
    return masters


# ---- The step: one global batch ----------------------------------------------------------------------------


def train_step(
    runner,
    model: nn.Module,
    optimizer: Optimizer,
    micros: list[Batch],
    n_scored: int,
    lr: float,
    mesh: DeviceMesh,
    layout: ParallelConfig,
    max_grad_norm: float,
    recorder: Recorder | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one global batch, clip, step. Returns (loss, gradient norm), the same on every
    rank.

    n_scored: scored labels of the whole global batch, so that sums over micro-batches and ranks give the
        mean.
    """
    micros = [shard_batch(micro, mesh["cp"], layout.cp_method) for micro in micros]
    for group in optimizer.param_groups:
        group["lr"] = lr  # before backward: without clipping the chunk manager steps as gradients arrive
    # FSDP averages gradients over the ranks that saw other tokens; we want their sum.
    loss = runner.step(
        micros, n_scored, grad_scale=layout.grad_ranks, **({"recorder": recorder} if recorder else {})
    )
    dist.all_reduce(loss, group=mesh["loss"].get_group())  # each rank has its own tokens' share
    # One norm over all ranks and axes. The step scales the gradients; if they are not finite, it changes
    # nothing.
    grad_norm = clip_grad_norm(model.parameters(), max_grad_norm, optimizer, in_step=True)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def count_scored(micros: list[Batch]) -> int:
    return sum(int((micro.labels != -100).sum()) for micro in micros)


def evaluate(
    runner,
    rows: PackedRows,
    train: TrainConfig,
    document_mask: bool,
    mesh: DeviceMesh,
    layout: ParallelConfig,
    device: torch.device,
) -> float:
    """Mean loss over the first held-out rows. All ranks enter: a sharded forward gathers weights."""
    batches = list(
        validation_batches(
            rows,
            train.micro_batch_size,
            mesh["dp"].get_local_rank(),
            layout.dp,
            document_mask,
            train.validation_rows,
        )
    )
    nats = runner.evaluate_step([shard_batch(batch, mesh["cp"], layout.cp_method) for batch in batches])
    dist.all_reduce(nats, group=mesh["loss"].get_group())
    n_scored = torch.tensor(count_scored(batches), device=device)
    dist.all_reduce(n_scored, group=mesh["dp"].get_group())
    return (nats / n_scored).item()


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
