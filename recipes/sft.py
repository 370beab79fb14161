"""Fine-tune a LLaMA on conversations: all of its weights, or LoRA adapters beside them.

    python recipes/sft.py --model SmolLM2-135M/ --data.path chat.jsonl
    torchrun --nproc-per-node 8 recipes/sft.py --model llama2-7b/ --data.path 'chats/*.parquet' --lora.rank 16
    python recipes/sft.py --model llama2-7b/ --data.path chat.jsonl --preview 3        # what would be trained, in colour

pretrain.py with other data: it imports the step, the evaluation and the set-up from there; where the two
differ, fine-tuning differs. Rows are whole conversations, only what the assistant says is scored, and what
the user leaves open (None below) is chosen from the data and the hardware, and said. The run folder holds
what pretrain's does and, with LoRA, hf-adapter/ beside the merged hf/.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
# its neighbours, also as `python -m recipes.sft`
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import numpy as np
import psutil
import torch
import torch.distributed as dist
from pretrain import (
    CheckpointConfig,
    check_numbers,
    count_targets,
    evaluate,
    generation_settings,
    learning_rate,
    read_model_config,
    resume,
    settings_of,
    tokenizer_path,
    train_step,
)

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.chat.answers import answer, held_out_prompts
from dtensor_llama.chat.conversations import ChatOptions
from dtensor_llama.chat.corpus import ChatCorpus, prepare_chat
from dtensor_llama.chat.lora import (
    LoraConfig,
    apply_lora,
    init_lora,
    merge_lora,
    n_adapter_parameters,
    save_adapter,
)
from dtensor_llama.chat.neftune import Neftune
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.chat.preview import preview, say_data
from dtensor_llama.chat.template import ChatTemplate, RawTemplate, template_of
from dtensor_llama.checkpoint import Checkpointer, training_state
from dtensor_llama.cli import FilePath, read_launch, run_recipe
from dtensor_llama.data.reader import RowReader, validation_batches
from dtensor_llama.data.sequences import say_skipped
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.flops import hardware_flops_per_token, model_flops_per_token, peak_flops
from dtensor_llama.loss import choose_loss
from dtensor_llama.metrics import GIB, LateReader, PeakMemory, RunLog, SkippedSteps, draw_loss_curve
from dtensor_llama.model import init_weights
from dtensor_llama.places import cache_folders, readable
from dtensor_llama.run import (
    CONTENT,
    GENERATION,
    SETTINGS,
    StopSignal,
    claim_run_dir,
    keep_tokenizer,
    made_with,
    refuse_below,
    say_where_things_are,
)
from dtensor_llama.weights import check_hf
from memory import MemoryConfig
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Offload, adamw, assemble, check_skips
from parallel.config import AXES, check_parallel
from parallel.fit import fit
from parallel.mesh import Layout, start_process_group, stop_process_group
from parallel.step_pictures import StepPictures

# ---- 1. What can be asked for: each field is a flag --------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    # files and globs of conversations: .json .jsonl .parquet .arrow .csv, packed or not
    path: tuple[str, ...] = ()
    # Hugging Face folder, tokenizer.json or SentencePiece .model; None: --model's
    tokenizer: FilePath | None = None
    # tokens per row; None: what the longest example needs, within the model's context
    seq_len: int | None = None
    overlong: Literal["drop", "truncate"] = "drop"  # examples longer than a row: left out, or cut
    # A record that cannot be trained on: end the run, or leave it out, count it and list it in
    # RUN/bad-records.jsonl.
    bad_records: Literal["refuse", "skip"] = "refuse"
    # Trained are the answers of the assistant, the last one of each conversation, or every token; flags in a
    # turn count.
    train_on: Literal["answers", "last-answer", "all"] = "answers"
    # How a conversation is written: auto: the tokenizer's template, else LLaMA-2's; none: prompt and
    # completion as they are.
    template: Literal["auto", "none"] = "auto"
    packing: bool = True  # several examples to a row; none of them sees another
    validation_share: float = 0.02  # of the rows, held out
    # tokenized conversations, reused by every run on the same files
    cache_dir: str = "~/.cache/dtensor-llama"


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 2.0  # how often the data is read, if steps is None
    steps: int | None = None  # optimizer steps; None: as epochs says
    global_batch_size: int | None = None  # rows per step, over all ranks; None: about 32 examples
    micro_batch_size: int | None = None  # rows per rank and forward; None: what fits the memory
    seed: int = 0  # of the adapters, of the order of rows, of the noise
    lr: float | None = None  # peak; None: 2e-5 as LLaMA-2 (arXiv:2307.09288, sec. 3.1), with LoRA 2e-4
    min_lr: float | None = None  # where the cosine ends; None: a tenth of lr
    warmup_steps: int | None = None  # None: 2 % of the steps, at most LLaMA-2's 2,000
    weight_decay: float = 0.1
    # gradients longer than this, over all parameters together, are scaled to it; inf: none
    max_grad_norm: float = 1.0
    skip_nonfinite: int = 0  # steps in a row left out for a gradient that is inf or nan; 0: stop at the first
    neftune_alpha: float = 0.0  # noise on the embeddings in training (NEFTune): 5 is usual; 0: none
    # of the computation; None: bfloat16 on a GPU, float32 without
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool = False  # torch.compile each block: a minute at the start, faster steps after
    # None: none if the memory allows, else full
    recompute: Literal["none", "selective", "full"] | None = None
    # The kernel; auto: the fastest that can run here, printed with the reason. varlen: documents without a
    # mask.
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"] = "auto"
    validate_every: int | None = None  # steps between validation losses; None: ten times a run; 0: never
    validation_rows: int = 64  # rows of the held-out share that are used each time
    answers: int = 3  # held-out prompts answered at each validation, printed and in TensorBoard; 0: none
    answer_tokens: int = 48  # of each, at most


@dataclass(frozen=True)
class SftConfig:
    """Fine-tune the model in a Hugging Face folder on conversations."""

    model: FilePath  # Hugging Face folder with config.json, safetensors and tokenizer; or a preset
    random_init: bool = False  # take only config.json of the folder, not its weights
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # where optimizer states and block inputs live
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: int = 0  # print so many rows, trained tokens bright, and end
    # write them here as {"tokens", "labels"} (all rows without --preview), and end
    preview_json: FilePath | None = None
    run_dir: FilePath = "runs/sft"  # everything this run writes


def main(cfg: SftConfig) -> None:
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    is_main = rank == 0
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # few CPUs are fast at bfloat16
    dtype = cfg.train.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    compute_dtype, cfg = getattr(torch, dtype), replace(cfg, train=replace(cfg.train, dtype=dtype))

    # ---- 2. What is refused, before anything starts; and what was left open --------------------------------
    check_numbers(cfg)
    check_more_numbers(cfg)
    cfg.memory.check()
    memory, chosen = cfg.memory.settle(device, compute_dtype, world_size)
    check_skips(cfg.train.skip_nonfinite, cfg.train.max_grad_norm, memory)
    cfg = replace(cfg, memory=memory)
    if not cfg.data.path:
        raise UsageError(
            "--data.path is missing; name the conversations to train on, e.g. --data.path chat.jsonl."
        )
    tokenizer = load_tokenizer(tokenizer_path(cfg))
    model_config = read_model_config(cfg, tokenizer)
    with torch.device("meta"):
        model = Llama(model_config)  # names and shapes only: no memory yet
    weights = Path(cfg.model) if Path(cfg.model).is_dir() and not cfg.random_init else None
    if weights:
        check_hf(model, weights)  # reads the headers of the files
    if cfg.lora.rank:
        # before the passes, which find adapters like any module
        apply_lora(model, cfg.lora, frozen_dtype=compute_dtype)
    if (
        cfg.train.compile
        and device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise UsageError(
            "--train.compile needs a C++ compiler on a CPU and there is none; install g++, or leave it out."
        )
    chat = ChatOptions(cfg.data.bad_records, cfg.data.train_on, cfg.data.template)
    template = template_of(tokenizer, chat)
    corpus = prepare_chat(
        cfg.data.path, tokenizer, cache_folders(cfg.data.cache_dir, cfg.run_dir), options=chat
    )
    # A base model's config.json may know another end than the chat template has; what is exported must stop
    # at both.
    ends = (
        model_config.eos_token_id
        if isinstance(model_config.eos_token_id, list)
        else [model_config.eos_token_id]
    )
    ends = [end for end in dict.fromkeys([*ends, *corpus.end_ids]) if end is not None]
    model.config = model_config = replace(model_config, eos_token_id=ends if len(ends) > 1 else ends[0])
    model.generation_config = generation_settings(cfg, model_config)
    cfg, resolved, rows, reasons = settle(cfg, model_config, corpus, tokenizer, device, world_size)
    if cfg.preview or cfg.preview_json:
        if is_main:
            say_data(rows, template.name, print)
            say_skipped([corpus], None, print)
            preview(rows, tokenizer, cfg.preview, cfg.preview_json)
        return
    seq_len = rows.seq_len
    ring = resolved.cp > 1 and resolved.cp_method == "ring"
    kernel, why = choose_attention(
        cfg.train.attention, device, compute_dtype, merges_blocks=ring, documents=True
    )
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
    if is_main:  # the claim is held until the run ends
        run_lock = claim_run_dir(Path(cfg.run_dir), fresh=cfg.checkpoint.resume == "never")

    # ---- 3. The parts --------------------------------------------------------------------------------------
    start_process_group(device, world_size, attempt=launch.attempt)
    if is_main and chosen:
        print(f"memory    {chosen}", flush=True)
    computation = Computation(device, compute_dtype, cfg.train.recompute, cfg.train.compile, kernel)
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
    optimizer, noise = training.optimizer, None
    if cfg.train.neftune_alpha and model.model.embed_tokens is not None:
        noise = Neftune(cfg.train.neftune_alpha, cfg.train.seed, share=layout.embedded_tokens)
        noise.add_to(model.model.embed_tokens)
    checkpoints = Checkpointer(Path(cfg.run_dir, "checkpoints"), keep=cfg.checkpoint.keep)
    # also before a resumption: a LoRA checkpoint has no frozen weights
    whole = training.fp32_weights()
    load_hf(whole, weights) if weights else init_weights(whole, cfg.train.seed)
    init_lora(whole, cfg.train.seed)
    meta = checkpoint_meta(cfg, model_config, corpus, seq_len) | {GENERATION: model.generation_config}
    step, position = resume(cfg.checkpoint.resume, model, optimizer, checkpoints, meta, is_main)

    reader = RowReader(
        rows,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        layout.dp_rank,
        resolved.dp,
        document_mask=True,
        position=position,
        pin_memory=device.type == "cuda",
    )
    step_tokens = cfg.train.global_batch_size * seq_len
    peak, peak_source = peak_flops(device, compute_dtype)
    peak_memory = PeakMemory(device)
    log = None
    if is_main:
        log = RunLog(Path(cfg.run_dir), step, cfg.train.steps)
        keep_tokenizer(Path(cfg.run_dir), tokenizer, template.source)
        describe_run(
            cfg,
            model_config,
            resolved,
            rows,
            n_microbatches,
            f"{kernel} ({why})",
            template.name,
            peak,
            peak_source,
            device,
            log,
        )
        for reason in reasons:
            log.say(reason)
    asked = held_out_prompts(rows, cfg.train.answers, cfg.train.answer_tokens)
    if asked and resolved.pp * resolved.cp > 1:
        asked = []
        if is_main:
            log.say(
                "answers   none are sampled in training: no rank of a pipeline or of cp sees whole rows in a whole model"
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
        if noise:
            noise.next_step(step, layout.dp_rank * cfg.train.global_batch_size // resolved.dp, microbatches)
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
            batches = validation_batches(
                rows, cfg.train.micro_batch_size, layout.dp_rank, resolved.dp, True, cfg.train.validation_rows
            )
            done[-1]["validation_loss"] = evaluate(training, list(batches))
            answers = answer(model, asked, cfg.train.answer_tokens, ends, tokenizer, resolved.tp, device)
            if is_main:
                log.say(f"step {step}: validation loss {done[-1]['validation_loss']:.4f}")
                log.text("answers", step, answers)
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
        whole = training.fp32_weights()  # waits for the last update, which adapters need too
        export(model if cfg.lora.rank else whole, cfg, tokenizer, template, compute_dtype, is_main)
    if is_main:
        log.close()
        if log.rows:
            draw_loss_curve(log.rows, Path(cfg.run_dir, "loss.png"))
        say_where_things_are(
            Path(cfg.run_dir), log.rows, step, cfg.train.steps, stopped, chat=cfg.data.template != "none"
        )
        run_lock.close()
    stop_process_group()


# ---- What is refused ---------------------------------------------------------------------------------------


def check_more_numbers(cfg: SftConfig) -> None:
    """As pretrain's check_numbers, of what only fine-tuning has."""
    train = cfg.train
    refuse_below(0, {"--train.epochs": train.epochs}, exclusive=True)
    refuse_below(1, {"--train.answer-tokens": train.answer_tokens})
    refuse_below(
        0,
        {
            "--train.neftune-alpha": train.neftune_alpha,
            "--lora.rank": cfg.lora.rank,
            "--train.answers": train.answers,
            "--preview": cfg.preview,
        },
    )


def settle(
    cfg: SftConfig,
    model: LlamaConfig,
    corpus: ChatCorpus,
    tokenizer: Tokenizer,
    device: torch.device,
    world_size: int,
) -> tuple[SftConfig, ParallelConfig, PackedExamples, list[str]]:
    """What the user left open, chosen from the data and the hardware: (settled config, resolved layout, rows,
    the reasons)."""
    train, layout, reasons = cfg.train, cfg.parallel.resolve(world_size), []
    lengths = np.diff(corpus.document_starts, append=corpus.n_tokens)
    seq_len = cfg.data.seq_len
    if seq_len is None:
        seq_len = min(model.max_position_embeddings, max(256, 1 << (int(lengths.max()) - 1).bit_length()))
        reasons.append(
            f"rows      of {seq_len} tokens: the longest example has {lengths.max():,}, the model's context is "
            f"{model.max_position_embeddings:,}"
        )
    rows = PackedExamples(
        corpus,
        seq_len,
        cfg.data.validation_share,
        train.seed,
        pad_id=tokenizer.eos_id or 0,
        overlong=cfg.data.overlong,
        packing=cfg.data.packing,
    )
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        device_bytes = psutil.virtual_memory().available // read_launch().ranks_per_host
    batch = train.global_batch_size
    # 32 examples a step, but at least 10 steps an epoch, and a row for each rank and pipeline stage
    if batch is None:
        per_row, least = rows.n_examples / rows.n_rows, layout.dp * layout.pp * (train.micro_batch_size or 1)
        batch = max(1, math.ceil(min(32 / per_row, rows.n_train / 10) / least)) * least
        reasons.append(f"batch     {batch} rows a step: about {batch * per_row:.0f} examples")
    open_layout = replace(cfg.parallel, dp_shard=-1) == ParallelConfig() and world_size > 1
    layout, recompute, micro, why = fit(
        model,
        layout,
        device_bytes,
        seq_len,
        max(1, batch // layout.pp),
        tries_tp=open_layout,
        recompute=train.recompute,
        micro_batch_size=train.micro_batch_size,
        itemsize=getattr(torch, train.dtype).itemsize,
        n_adapter=n_adapter_parameters(model, cfg.lora) if cfg.lora.rank else 0,
        offloads=cfg.memory.is_on and cfg.memory.resident != 1,
    )
    if train.recompute is None or train.micro_batch_size is None or open_layout:
        reasons.append(f"memory    {why}")
    steps = train.steps or max(1, math.ceil(train.epochs * rows.n_train / batch))
    every = max(1, steps // 10) if train.validate_every is None else train.validate_every
    train = replace(
        train,
        steps=steps,
        global_batch_size=batch,
        micro_batch_size=micro,
        recompute=recompute,
        lr=train.lr or (2e-4 if cfg.lora.rank else 2e-5),
        validate_every=every,
    )
    if train.min_lr is not None and train.min_lr > train.lr:
        raise UsageError(
            f"--train.min-lr {train.min_lr} is above the peak of {train.lr}; the cosine ends at the lower."
        )
    return replace(cfg, train=train, data=replace(cfg.data, seq_len=seq_len)), layout, rows, reasons


# ---- Resuming ----------------------------------------------------------------------------------------------


def checkpoint_meta(cfg: SftConfig, model_config: LlamaConfig, corpus: ChatCorpus, seq_len: int) -> dict:
    """What must be the same for a checkpoint's data position and weights to mean the same: {flag: value}."""
    return {
        "--model": asdict(model_config),
        "--data.seq-len": seq_len,
        "--train.seed": cfg.train.seed,
        "--data.validation-share": cfg.data.validation_share,
        # a list, as JSON gives it back
        "--lora": {**asdict(cfg.lora), "targets": list(cfg.lora.targets)},
        "--data.overlong and --data.packing": f"{cfg.data.overlong}, {'packed' if cfg.data.packing else 'not packed'}",
        "--data.path and --data.tokenizer": f"{corpus.n_tokens} tokens in {corpus.n_documents} conversations",
        CONTENT: corpus.content_hash,
        SETTINGS: settings_of(cfg),
    }


# ---- Telling -----------------------------------------------------------------------------------------------


def describe_run(
    cfg,
    model_config,
    layout,
    rows: PackedExamples,
    n_micros: int,
    attention: str,
    template_name: str,
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
        "corpus": str(rows.corpus.folder),
    }
    Path(cfg.run_dir, "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    epochs = cfg.train.steps * cfg.train.global_batch_size / rows.n_train
    log.say(
        f"model     {cfg.model}: {model_config.n_parameters / 1e6:,.1f}M parameters, attention {attention}"
    )
    say_data(rows, template_name, log.say)
    say_skipped([rows.corpus], Path(cfg.run_dir), log.say)
    log.say(f"epochs    {epochs:.2f}: {cfg.train.steps} steps of {cfg.train.global_batch_size} rows")
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


def export(
    model: Llama,
    cfg: SftConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | RawTemplate,
    dtype: torch.dtype,
    is_main: bool,
) -> None:
    """Write hf/, which transformers opens, template and all, and with LoRA hf-adapter/, which peft opens over
    --model. All ranks enter: each writes the shards it owns."""
    hf, adapter = Path(cfg.run_dir, "hf"), Path(cfg.run_dir, "hf-adapter")
    if cfg.lora.rank:
        save_adapter(model, adapter, cfg.lora, base_model=cfg.model)
        merge_lora(model)
    save_hf(model, hf, dtype=dtype)
    if is_main:
        for folder in [hf, adapter] if cfg.lora.rank else [hf]:
            tokenizer.save(folder, chat_template=template.source)
    dist.barrier()


if __name__ == "__main__":
    run_recipe(main, SftConfig)
