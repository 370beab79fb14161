"""Time the training step: the one of pretrain.py, same flags, on synthetic rows. Prints one JSON line at the
end.

    python recipes/benchmark.py --model tiny-5m --data.seq-len 256 --train.global-batch-size 16
    torchrun --nproc-per-node 8 recipes/benchmark.py --model llama2-7b --train.compile --train.recompute selective

With --data.document-mask the rows are packed documents of 512 tokens on average. With --data.path it also
answers whether reading costs training time: steps on real rows and on synthetic ones take turns in one run,
and `real_over_synthetic` is the ratio of their median times (1.0: reading is free).
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
# its neighbours, also as `python -m recipes.benchmark`
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from pretrain import (
    PretrainConfig,
    TrainConfig,
    check_numbers,
    count_scored,
    fp32_weights,
    set_up,
    settle_memory,
    tokenizer_path,
    train_step,
)
from step_pictures import StepPictures

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.attention import choose_attention
from dtensor_llama.cli import read_launch, run_recipe
from dtensor_llama.data.reader import Batch, RowReader
from dtensor_llama.data.rows import PackedRows
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token, peak_flops
from dtensor_llama.metrics import GIB, LateReader, MemoryPeaks, PeakMemory
from dtensor_llama.model import init_weights
from dtensor_llama.places import cache_folders
from memory import ChunkManager
from parallel.config import check_parallel
from parallel.mesh import reads_alone, start_process_group, stop_process_group


@dataclass(frozen=True)
class BenchmarkConfig(PretrainConfig):
    """Time the training step on synthetic rows; with --data.path also on real ones, taking turns."""

    # steps: how many of each kind are timed
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=20))
    warmup: int = 3  # steps before the clock starts


def main(cfg: BenchmarkConfig) -> None:
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(torch, cfg.train.dtype)
    check_numbers(cfg)
    cfg.memory.check()
    config = LlamaConfig.from_hf(cfg.model) if Path(cfg.model).exists() else LlamaConfig.preset(cfg.model)
    seq_len = cfg.data.seq_len or config.max_position_embeddings
    ring = cfg.parallel.cp > 1 and cfg.parallel.cp_method == "ring"
    kernel, _ = choose_attention(
        cfg.train.attention, device, dtype, merges_blocks=ring, documents=cfg.data.document_mask
    )
    layout = cfg.parallel.resolve(world_size)
    n_micros = check_parallel(
        layout,
        config,
        seq_len,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        attention=kernel,
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        device_type=device.type,
    )
    cfg, chosen = settle_memory(cfg, config, layout, n_micros, device, world_size)
    rows = None
    if cfg.data.path:
        corpus = prepare_corpus(
            cfg.data.path,
            load_tokenizer(tokenizer_path(cfg)),
            cache_folders(cfg.data.cache_dir, cfg.run_dir),
            TextOptions(cfg.data.text_field, cfg.data.bad_records),
        )
        rows = PackedRows(corpus, seq_len, cfg.data.validation_share, cfg.train.seed)

    if rank == 0 and chosen:
        print(f"memory    {chosen}", flush=True)
    start_process_group(device, world_size)
    with torch.device("meta"):
        model = Llama(config)
    mesh, runner, optimizer = set_up(
        cfg, model, layout, n_micros, kernel, device, seq_len, say=print if rank == 0 else None
    )
    dp_rank = mesh["dp"].get_local_rank()
    init_weights(fp32_weights(model, optimizer), cfg.train.seed)

    synthetic = torch.randint(
        config.vocab_size,
        (n_micros, cfg.train.micro_batch_size, seq_len + 1),
        generator=torch.Generator().manual_seed(dp_rank),
    )
    positions = [None] * n_micros
    if cfg.data.document_mask:
        positions = synthetic_positions(synthetic[:, :, 1:].shape, seed=dp_rank)
    sources = {
        "synthetic": lambda: [
            Batch(micro[:, :-1], micro[:, 1:], where)
            for micro, where in zip(synthetic, positions, strict=True)
        ]
    }
    reader = None
    if rows:
        reader = RowReader(
            rows,
            cfg.train.global_batch_size,
            cfg.train.micro_batch_size,
            dp_rank,
            layout.dp,
            cfg.data.document_mask,
            pin_memory=device.type == "cuda",
        )
        sources["real"] = lambda: next(reader)
    all_steps = replace(cfg.train, steps=cfg.warmup + cfg.train.steps)
    pictures = StepPictures(replace(cfg, train=all_steps), layout, mesh, optimizer, device, first_step=0)
    if rank == 0 and (cfg.memory.draw or layout.draw_schedule):
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    peak, peak_source = peak_flops(device, dtype)
    memory, wait_s = PeakMemory(device), []
    reading, done = LateReader(device), []
    for i in range(cfg.warmup + cfg.train.steps):
        for name, next_step in sources.items():  # turn by turn, so that a slow minute slows both
            if len(sources) > 1:
                dist.barrier()
            reading.begin()
            began = time.perf_counter()
            micros = next_step()
            waited = time.perf_counter() - began
            n_scored = torch.tensor(count_scored(micros) * reads_alone(mesh))
            dist.all_reduce(n_scored)
            recorder = pictures.before(i) if name == "synthetic" else None
            loss, grad_norm = train_step(
                runner,
                model,
                optimizer,
                micros,
                int(n_scored),
                cfg.train.lr,
                mesh,
                layout,
                cfg.train.max_grad_norm,
                recorder,
            )
            reading.put({"source": name, "i": i}, loss, grad_norm)
            # As in training the loss is read while the next step is computed, but for steps that take turns.
            done += reading.take(all=len(sources) > 1 or i + 1 in (cfg.warmup, cfg.warmup + cfg.train.steps))
            if i >= cfg.warmup and name == "real":
                wait_s.append(waited)
            if name == "synthetic":
                pictures.after(i + 1, print if rank == 0 else None)
    step_s = {name: [] for name in sources}
    for row in done:
        if row["i"] >= cfg.warmup:
            step_s[row["source"]].append(row["step_seconds"])
    largest = torch.tensor(memory.take(), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    peaks = MemoryPeaks(*largest.tolist())

    if rank == 0:
        median_s = statistics.median(step_s["synthetic"])
        tokens_per_s = cfg.train.global_batch_size * seq_len / median_s
        share = tokens_per_s / world_size / peak  # of the peak, per FLOP and token
        result = {
            "model": cfg.model,
            "n_parameters": config.n_parameters,
            "world_size": world_size,
            "device": _device_name(device),
            "torch": torch.__version__,
            "dtype": cfg.train.dtype,
            "attention": kernel,
            "compile": cfg.train.compile,
            "recompute": cfg.train.recompute,
            "memory": cfg.memory.placement,
            "seq_len": seq_len,
            "global_batch_size": cfg.train.global_batch_size,
            "micro_batch_size": cfg.train.micro_batch_size,
            "step_seconds": median_s,
            "step_seconds_min": min(step_s["synthetic"]),
            "tokens_per_second": tokens_per_s,
            "tokens_per_second_per_device": tokens_per_s / world_size,
            "mfu": share * model_flops_per_token(config, seq_len),
            "mfu_6n": share * model_flops_per_token(config, seq_len, "6n"),
            "mfu_causal": share * model_flops_per_token(config, seq_len, "causal"),
            "hfu": share * hardware_flops_per_token(config, seq_len, cfg.train.recompute),
            "peak_flops": peak,
            "peak_flops_source": peak_source,
            "device_memory_gib": peaks.device / GIB,
            "device_reserved_gib": peaks.device_reserved / GIB,
            "host_memory_gib": peaks.host / GIB,
            "host_pinned_gib": peaks.host_pinned / GIB,
            "loss": done[-1]["loss"],
        }
        if cfg.memory.placement == "auto":
            result["memory_plan"] = plan_facts(optimizer.manager)
        if reader:
            result["real_over_synthetic"] = statistics.median(step_s["real"]) / median_s
            result["data_wait_seconds_per_step"] = statistics.median(wait_s)
        print(json.dumps(result), flush=True)
    if reader:
        reader.close()
    stop_process_group()


def synthetic_positions(shape: torch.Size, seed: int, mean_document: int = 512) -> torch.Tensor:
    """(..., T) positions of tokens in packed rows whose documents have `mean_document` tokens on average: any
    token may begin one, and where it does the positions restart at 0."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    begins = draw < 1 / mean_document
    at = torch.arange(shape[-1]).expand(shape)
    began_at = torch.where(begins, at, 0).cummax(-1).values
    return at - began_at


def plan_facts(manager: ChunkManager) -> dict:
    """What placement auto decided and predicted, and what the host's update took and moved."""
    plan = manager.plan
    return {
        "parameters": plan.split._asdict(),
        "seconds": plan.seconds,
        "bound": plan.bound,
        "host_update_seconds": manager.host_update_seconds(),
        "rates": manager.auto.rates.to_json(),
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
