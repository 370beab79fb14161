"""Time the training step of pretrain.py on synthetic sequences, with the same flags, and print one JSON line.

    python recipes/benchmark.py --model tiny-5m --data.seq-len 256 --train.global-batch-size 16
    torchrun --nproc-per-node 8 recipes/benchmark.py --model llama2-7b --train.compile --train.recompute full

With --data.document-mask each sequence is packed with documents of 512 tokens on average. With --data.path it
also measures whether reading the data costs training time: steps on real and on synthetic sequences take
turns in one run, and `real_over_synthetic` is the ratio of their median times (1.0: reading costs nothing).
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.attention import choose_attention
from dtensor_llama.cli import (
    AtLeast,
    FilePath,
    Launch,
    at_least,
    check_numbers,
    read_launch,
    refuse_compile_without_compiler,
    run_recipe,
)
from dtensor_llama.data.reader import Batch, Batching, SequenceReader
from dtensor_llama.data.sequences import PackedSequences, Packing
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token, peak_flops
from dtensor_llama.hf_folder import Base
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.metrics import GIB, LateReader, MemoryPeaks, PeakMemory
from dtensor_llama.places import cache_folders, readable
from memory import ChunkManager, MemoryConfig
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Offload, Training, adamw, assemble, check_skips, settle_memory
from parallel.config import check_parallel
from parallel.mesh import Layout, start_process_group, stop_process_group
from parallel.step_pictures import StepPictures

# ---- 1. What can be asked for: the flags of pretrain.py, so that its command can be timed ------------------


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
    steps: int = 20  # how many steps of each kind are timed, after the warm-up
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
class BenchmarkConfig:
    """Time the training step on synthetic sequences; with --data.path also on real ones, taking turns."""

    model: FilePath  # preset (llama2-7b, tiny-10m, ...) or a Hugging Face folder, of which the shape is taken
    warmup: int = 3  # steps before the clock starts
    random_init: bool = False  # the weights are random in any case
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()  # where optimizer states and block inputs live
    checkpoint: CheckpointConfig = CheckpointConfig()  # no checkpoint is written here
    run_dir: FilePath = "runs/benchmark"  # for the pictures that are asked for


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


def main(cfg: BenchmarkConfig) -> None:
    launch = read_launch()
    device = launch.take_device()
    start = Start(launch.say)
    start.ended("imports")
    cache_dirs = cache_folders(cfg.data.cache_dir, cfg.run_dir)
    setting = settle(cfg, launch, device)
    cfg = setting.cfg

    # ---- 3. The parts --------------------------------------------------------------------------------------
    sequences = read_sequences(setting, cache_dirs) if cfg.data.path else None
    if setting.memory_note:
        launch.say(f"memory    {setting.memory_note}")
    start_process_group(device, launch.world_size)
    training = build(setting, launch, readable(cache_dirs)[0] / "rates.json")
    start.ended("building")
    init_weights(training.fp32_weights(), cfg.train.seed)
    start.ended("initial weights")
    layout = training.layout
    synthetic = synthetic_microbatches(setting, layout.dp_rank)
    sources = {"synthetic": lambda: synthetic}
    if sequences:
        batch_sizes, pins = (cfg.train.global_batch_size, cfg.train.micro_batch_size), device.type == "cuda"
        batching = Batching(*batch_sizes, layout.dp_rank, layout.config.dp, cfg.data.document_mask, pins)
        reader = SequenceReader(sequences, batching)
        sources["real"] = lambda: next(reader)

    # ---- 4. The steps, and what they come to ---------------------------------------------------------------
    if launch.is_main and (cfg.memory.draw or layout.config.draw_schedule):
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    peak = peak_flops(device, setting.computation.dtype)
    measured = measure(cfg, training, sources, start)
    if launch.is_main:
        print(json.dumps(result_of(setting, training, measured, peak, start.seconds)), flush=True)
    if sequences:
        reader.close()
    stop_process_group()


# ---- 2. What is refused, before anything starts ------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Holds what is timed, with nothing left open."""

    cfg: BenchmarkConfig
    model: LlamaConfig
    seq_len: int
    layout: ParallelConfig  # every axis has its size
    n_microbatches: int
    computation: Computation
    memory_note: str  # which placement was chosen and why, if it was left open


def settle(cfg: BenchmarkConfig, launch: Launch, device: torch.device) -> Setting:
    """Choose what was left open. Raises UsageError for what cannot run, as pretrain.py does."""
    check_numbers(cfg, [*NUMBERS, AtLeast("warmup", 0)])
    cfg.memory.check()
    model = LlamaConfig.from_hf(cfg.model) if Path(cfg.model).exists() else LlamaConfig.preset(cfg.model)
    seq_len, dtype = cfg.data.seq_len or model.max_position_embeddings, getattr(torch, cfg.train.dtype)
    layout = cfg.parallel.resolve(launch.world_size)
    kernel, _ = choose_attention(
        cfg.train.attention, device, dtype, merges_blocks=layout.is_ring, documents=cfg.data.document_mask
    )
    computation = Computation(device, dtype, cfg.train.recompute, cfg.train.compile, kernel)
    job = computation.job(model, seq_len, cfg.train.global_batch_size, cfg.train.micro_batch_size)
    n_microbatches = check_parallel(layout, job)
    memory, memory_note = settle_memory(cfg.memory, model, layout, n_microbatches, computation)
    check_skips(cfg.train.skip_nonfinite, cfg.train.max_grad_norm, memory)
    refuse_compile_without_compiler(cfg.train.compile, device)
    cfg = replace(cfg, memory=memory)
    return Setting(cfg, model, seq_len, layout, n_microbatches, computation, memory_note)


# ---- 3. The parts: what computes, and what it computes on --------------------------------------------------


def build(setting: Setting, launch: Launch, rates_file: Path) -> Training:
    """Return the model, spread over the ranks, with its optimizer. The weights have no values yet."""
    cfg, layout = setting.cfg, setting.layout
    with torch.device("meta"):
        model = Llama(setting.model)
    offload = Offload(
        cfg.memory,
        cfg.train.micro_batch_size,
        setting.seq_len,
        clips=cfg.train.max_grad_norm < math.inf,
        ranks_per_host=launch.ranks_per_host,
        rates_file=rates_file,
    )
    mesh = build_mesh(layout, setting.computation.device.type)
    return assemble(
        model,
        Layout(layout, mesh, setting.n_microbatches),
        setting.computation,
        adamw(cfg.train.lr, cfg.train.weight_decay),
        offload,
        launch.say,
    )


def read_sequences(setting: Setting, cache_dirs: list[Path]) -> PackedSequences:
    """Return the sequences of the files that were given, tokenized if no cache has them."""
    cfg = setting.cfg
    tokenizer = load_tokenizer(Base(cfg.model, cfg.data.tokenizer).tokenizer_path)
    text = TextOptions(cfg.data.text_field, cfg.data.bad_records)
    corpus = prepare_corpus(cfg.data.path, tokenizer, cache_dirs, text)
    return PackedSequences(corpus, Packing(setting.seq_len, cfg.data.validation_share, cfg.train.seed))


def synthetic_microbatches(setting: Setting, dp_rank: int) -> list[Batch]:
    """Return the microbatches of a step, of random tokens that are other ones on each dp rank. Every
    synthetic step takes the same ones."""
    cfg, draw = setting.cfg, torch.Generator().manual_seed(dp_rank)
    shape = setting.n_microbatches, cfg.train.micro_batch_size, setting.seq_len + 1
    tokens = torch.randint(setting.model.vocab_size, shape, generator=draw)
    positions = [None] * setting.n_microbatches
    if cfg.data.document_mask:
        positions = synthetic_positions(tokens[:, :, 1:].shape, seed=dp_rank)
    return [Batch(ids[:, :-1], ids[:, 1:], where) for ids, where in zip(tokens, positions, strict=True)]


def synthetic_positions(shape: torch.Size, seed: int, mean_document: int = 512) -> torch.Tensor:
    """Return the positions (..., T) of tokens in packed sequences, whose documents have `mean_document`
    tokens on average. Any token may begin a document, and positions restart at 0 there."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    begins = draw < 1 / mean_document
    at = torch.arange(shape[-1]).expand(shape)
    began_at = torch.where(begins, at, 0).cummax(-1).values
    return at - began_at


# ---- 4. The steps, timed -----------------------------------------------------------------------------------


class Start:
    """Times the phases before the first steps, counted from the start of the process.

    Each is printed as it ends, so that a run that is killed early has shown what it was waiting for."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.seconds, self.began = say, {}, psutil.Process().create_time()

    def ended(self, phase: str) -> None:
        now = time.time()
        self.seconds[phase], self.began = now - self.began, now
        self.say(f"start     {self.seconds[phase]:.1f} s for {phase}")


class Measured(NamedTuple):
    """Holds what the steps after the warm-up took, and what was highest in all of them."""

    step_s: dict[str, list[float]]  # of each step, by the source of its sequences
    wait_s: list[float]  # how long each real step waited for its sequences
    losses: list[float]  # of each step, the warm-up's too; real steps take turns with synthetic ones
    peaks: MemoryPeaks  # over all ranks


def measure(
    cfg: BenchmarkConfig,
    training: Training,
    sources: dict[str, Callable[[], list[Batch]]],
    start: Start,
) -> Measured:
    """Take the warm-up and the steps that were asked for, on each source of sequences. All ranks enter."""
    device, is_main = training.device, dist.get_rank() == 0
    n_steps, takes_turns = cfg.warmup + cfg.train.steps, len(sources) > 1
    pictures = StepPictures(training, Path(cfg.run_dir), 0, n_steps, cfg.memory.draw)
    peak_memory, reading = PeakMemory(device), LateReader(device)
    wait_s, done = [], []
    for i in range(n_steps):
        for name, next_step in sources.items():  # turn by turn, so that a slow minute slows both
            if takes_turns:
                dist.barrier()
            reading.begin()
            began = time.perf_counter()
            microbatches = next_step()
            waited = time.perf_counter() - began
            n_targets = torch.tensor(sum(batch.n_targets for batch in microbatches))
            dist.all_reduce(n_targets)
            if name == "synthetic":
                pictures.before(i)
            n_targets = int(n_targets) // training.layout.ranks_per_batch
            loss, grad_norm = train_step(
                training, microbatches, n_targets, cfg.train.lr, cfg.train.max_grad_norm
            )
            reading.put({"source": name, "i": i}, loss, grad_norm)
            # As in training, the loss is read while the device computes the next step. Where real and
            # synthetic steps take turns, each is read at once.
            done += reading.take(all=takes_turns or i + 1 in (cfg.warmup, n_steps))
            if i >= cfg.warmup and name == "real":
                wait_s.append(waited)
            if name == "synthetic":
                pictures.after(i + 1, print if is_main else None)
            if i == 0:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start.ended(f"first step, {name}")
        if i + 1 == cfg.warmup:
            start.ended("the rest of the warm-up")
    step_s = {name: [] for name in sources}
    for row in done:
        if row["i"] >= cfg.warmup:
            step_s[row["source"]].append(row["step_seconds"])
    largest = torch.tensor(peak_memory.take(), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return Measured(step_s, wait_s, [row["loss"] for row in done], MemoryPeaks(*largest.tolist()))


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


# ---- 5. The result -----------------------------------------------------------------------------------------


def result_of(
    setting: Setting,
    training: Training,
    measured: Measured,
    peak: tuple[float, str],
    start_seconds: dict[str, float],
) -> dict:
    """Return what is printed as JSON. peak: the FLOP/s of one device at best, and who says so."""
    cfg, config, seq_len = setting.cfg, setting.model, setting.seq_len
    world_size, median_s = dist.get_world_size(), statistics.median(measured.step_s["synthetic"])
    tokens_per_s = cfg.train.global_batch_size * seq_len / median_s
    share = tokens_per_s / world_size / peak[0]  # times the FLOPs of a token: a share of the peak
    result = {
        "model": cfg.model,
        "n_parameters": config.n_parameters,
        "world_size": world_size,
        "device": _device_name(training.device),
        "torch": torch.__version__,
        "dtype": cfg.train.dtype,
        "attention": setting.computation.attention,
        "compile": cfg.train.compile,
        "recompute": cfg.train.recompute,
        "memory": cfg.memory.placement,
        "seq_len": seq_len,
        "global_batch_size": cfg.train.global_batch_size,
        "micro_batch_size": cfg.train.micro_batch_size,
        "step_seconds": median_s,
        "step_seconds_min": min(measured.step_s["synthetic"]),
        "tokens_per_second": tokens_per_s,
        "tokens_per_second_per_device": tokens_per_s / world_size,
        "mfu": share * model_flops_per_token(config, seq_len),
        "mfu_6n": share * model_flops_per_token(config, seq_len, "6n"),
        "mfu_causal": share * model_flops_per_token(config, seq_len, "causal"),
        "hfu": share * hardware_flops_per_token(config, seq_len, cfg.train.recompute),
        "peak_flops": peak[0],
        "peak_flops_source": peak[1],
        "device_memory_gib": measured.peaks.device / GIB,
        "device_reserved_gib": measured.peaks.device_reserved / GIB,
        "host_memory_gib": measured.peaks.host / GIB,
        "host_pinned_gib": measured.peaks.host_pinned / GIB,
        "losses": measured.losses,
        "start_seconds": start_seconds,
    }
    if cfg.memory.placement == "auto":
        result["memory_plan"] = plan_facts(training.optimizer.manager)
    if "real" in measured.step_s:
        result["real_over_synthetic"] = statistics.median(measured.step_s["real"]) / median_s
        result["data_wait_seconds_per_step"] = statistics.median(measured.wait_s)
    return result


def plan_facts(manager: ChunkManager) -> dict:
    """Return what placement auto decided and predicted, and what the host's update took and moved."""
    plan = manager.plan
    return {
        "parameters": plan.split._asdict(),
        "seconds": plan.seconds,
        "bound": plan.bound,
        "host_update_seconds": manager.host_update_s,
        "rates": asdict(manager.auto.rates),
        "host_dram_bytes": plan.host_dram_bytes,
    }


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    run_recipe(main, BenchmarkConfig, stdout_is_result=True)
