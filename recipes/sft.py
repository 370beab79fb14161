"""Fine-tune a LLaMA on conversations: all of its weights, or LoRA adapters beside them.

    python recipes/sft.py --model SmolLM2-135M/ --data.path chat.jsonl
    torchrun --nproc-per-node 8 recipes/sft.py --model llama2-7b/ --data.path 'chats/*.parquet' --lora.rank 16
    python recipes/sft.py --model llama2-7b/ --data.path chat.jsonl --preview 3    # show what is trained

This is pretrain.py with other data, and with the same step. A sequence holds whole conversations, and only
what the assistant says is scored. What the user leaves open (None below) is chosen from the data and the
hardware, and the reason is printed. The run folder holds what pretrain.py's does. With LoRA it also has
hf-adapter/, beside the merged model in hf/.
"""

import math
from dataclasses import asdict, dataclass, replace
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
from dtensor_llama.chat.preview import log_conversations, preview
from dtensor_llama.chat.template import template_of
from dtensor_llama.checkpoint import Checkpointer, training_state
from dtensor_llama.cli import (
    FROZEN,
    AtLeast,
    FilePath,
    Launch,
    at_least,
    check_numbers,
    read_launch,
    refuse_compile_without_compiler,
    run_recipe,
    values_by_flag,
)
from dtensor_llama.data.reader import Batch, Batching, SequenceReader, validation_batches
from dtensor_llama.data.sequences import Packing, log_skipped
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.hf_folder import Base, export, save_tokenizer
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
from parallel.assemble import Offload, Training, adamw, assemble, check_skips
from parallel.config import AXES, check_parallel
from parallel.cost import States
from parallel.defaults import Chosen, OpenSettings, choose_settings
from parallel.mesh import Layout, start_process_group, stop_process_group
from parallel.step_pictures import StepPictures

# ---- 1. What can be asked for: each field is a flag --------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    # Files and globs of conversations, compressed or not: .json .jsonl .parquet .arrow .csv.
    path: tuple[str, ...] = ()
    # A Hugging Face folder, a tokenizer.json or a SentencePiece .model; None takes the one of --model.
    tokenizer: FilePath | None = None
    # Tokens of a sequence; None: as many as the longest example has, at most what the model was made for.
    seq_len: int | None = None
    overlong: Literal["drop", "truncate"] = "drop"  # what happens to longer examples
    # A record that cannot be trained on ends the run (refuse),
    # or is left out, counted, and listed in RUN/bad-records.jsonl (skip).
    bad_records: Literal["refuse", "skip"] = "refuse"
    # What is trained: all answers of the assistant, the last one of each conversation, or every token.
    # Fields of a turn that say so themselves (weight, train and the like) are obeyed in any case.
    train_on: Literal["answers", "last-answer", "all"] = "answers"
    # auto writes a conversation with the tokenizer's chat template, or with LLaMA-2's if it has none.
    # none writes prompt and completion as they are.
    template: Literal["auto", "none"] = "auto"
    packing: bool = True  # put several examples into a sequence; none of them attends to another
    validation_share: float = 0.02  # share of the sequences that is held out
    cache_dir: str = "~/.cache/dtensor-llama"  # tokenized data, reused by every run on the same files


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 2.0  # how often the data is read, if `steps` is None
    steps: int | None = None  # optimizer steps; None: as many as the epochs need
    global_batch_size: int | None = None  # sequences of one step, on all ranks; None: about 32 examples
    micro_batch_size: int | None = None  # sequences of one forward of a rank; None: as many as fit
    seed: int = 0  # decides the initial adapters, the order of the sequences and the noise
    lr: float | None = None  # the peak; None: 2e-5 as LLaMA-2 (arXiv:2307.09288, sec. 3.1), with LoRA 2e-4
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps, at most the 2,000 of LLaMA-2
    weight_decay: float = 0.1
    # Gradients are scaled down if their norm, over all parameters together, is larger than this.
    # inf turns this clipping off.
    max_grad_norm: float = 1.0
    # How many steps in a row may be skipped because their gradient is inf or nan; 0 stops at the first.
    skip_nonfinite: int = 0
    neftune_alpha: float = 0.0  # noise on the embeddings in training (NEFTune): 5 is usual; 0: none
    # The type of the computation; None: bfloat16 on a GPU, float32 without one.
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool = False  # torch.compile each block: it takes a minute at the start and makes steps faster
    # Activation checkpointing: which activations are computed again in backward.
    # None: none of them if the memory allows it, else full.
    recompute: Literal["none", "selective", "full"] | None = None
    # The attention kernel. auto takes the fastest one that can run here, and prints why.
    # varlen keeps packed documents apart without a mask.
    attention: Literal["auto", "flash", "varlen", "sdpa", "math"] = "auto"
    validate_every: int | None = None  # steps between two validations; None: ten in a run; 0: none
    validation_rows: int = 64  # how many of the held-out sequences each validation reads
    answers: int = 3  # held-out prompts that are answered at each validation, also in TensorBoard
    answer_tokens: int = 48  # tokens of each answer, at most


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps between two checkpoints; 0: none
    keep: int = 3  # how many of the newest are kept; 0: all
    export_hf: bool = True  # write hf/ at the end, in the type of the computation
    # auto: resume this run folder where it stopped, or start; never: start; else the folder of a checkpoint.
    resume: FilePath = "auto"


@dataclass(frozen=True)
class SftConfig:
    """Fine-tune the model in a Hugging Face folder on conversations.

    dryrun.py says before a run what each rank would hold and how long a step would take: give it --gpus,
    --gpu, --data.document-mask (sequences here are packed), and --model, --data.seq-len, --train.*,
    --parallel.*, --memory.* and --lora.* as here, with numbers for what is None below."""

    model: FilePath  # Hugging Face folder with config.json, safetensors and tokenizer; or a preset
    random_init: bool = False  # take only config.json of the folder, not its weights
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()  # where optimizer states and block inputs live
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    preview: int = 0  # print this many sequences, with trained tokens bright, and end
    # write these sequences to this file as {"tokens", "labels"} (without --preview: all), and end
    preview_json: FilePath | None = None
    run_dir: FilePath = "runs/sft"  # everything this run writes


# What each number must be at least.
NUMBERS = [
    *at_least(
        1,
        "train.steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.validation_rows",
        "train.answer_tokens",
        "data.seq_len",
    ),
    *at_least(0, "train.epochs", "train.lr", exclusive=True),
    AtLeast("train.max_grad_norm", 0, exclusive=True, may_be_infinite=True),
    AtLeast("data.validation_share", 0, below=1),
    *at_least(
        0,
        "train.warmup_steps",
        "train.weight_decay",
        "train.min_lr",
        "train.validate_every",
        "train.skip_nonfinite",
        "train.neftune_alpha",
        "train.answers",
        "train.seed",
        "lora.rank",
        "preview",
        "checkpoint.every",
        "checkpoint.keep",
    ),
]


def main(cfg: SftConfig) -> None:
    launch = read_launch()
    is_main, say, device = launch.is_main, launch.say, launch.take_device()
    # Few CPUs are fast at bfloat16.
    dtype_name = cfg.train.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype, cfg = getattr(torch, dtype_name), replace(cfg, train=replace(cfg.train, dtype=dtype_name))
    run_dir, cache_dirs = Path(cfg.run_dir), cache_folders(cfg.data.cache_dir, cfg.run_dir)

    # ---- 2. What is refused, before anything starts; and what was left open --------------------------------
    check_numbers(cfg, NUMBERS)
    check_schedule(cfg.train)
    cfg.memory.check()
    cfg.lora.check()
    if not cfg.data.path:
        raise UsageError("`path` is missing; name the conversations to train on, e.g. path=chat.jsonl.")
    memory, memory_note = cfg.memory.settle(device, dtype, launch.world_size)
    check_skips(cfg.train.skip_nonfinite, cfg.train.max_grad_norm, memory)
    cfg = replace(cfg, memory=memory)
    base = Base(cfg.model, cfg.data.tokenizer, cfg.random_init)
    base.check()
    tokenizer = load_tokenizer(base.tokenizer_path)
    model = model_to_train(cfg, base, base.read_config(tokenizer))
    refuse_compile_without_compiler(cfg.train.compile, device)
    chat = ChatOptions(cfg.data.bad_records, cfg.data.train_on, cfg.data.template)
    template = template_of(tokenizer, chat)
    corpus = prepare_chat(cfg.data.path, tokenizer, cache_dirs, options=chat)
    # The chat template may end an answer with another token than the config.json of a base model names.
    # The exported model must stop at both.
    model.config = model_config = model.config.also_ending_at(corpus.end_ids)
    model.generation_config = base.generation_config(model_config)
    cfg, chosen = choose(cfg, model_config, corpus, tokenizer, launch)
    train, resolved, sequences = cfg.train, chosen.layout, chosen.sequences
    check_schedule(train)  # once more, as the peak may have been open
    if cfg.preview or cfg.preview_json:
        if is_main:
            log_conversations(sequences, template.name, say)
            log_skipped([corpus], None, say)
            preview(sequences, tokenizer, cfg.preview, cfg.preview_json)
        return
    seq_len = sequences.seq_len
    kernel, why = choose_attention(
        train.attention, device, dtype, merges_blocks=resolved.is_ring, documents=True
    )
    computation = Computation(device, dtype, train.recompute, train.compile, kernel)
    job = computation.job(model_config, seq_len, train.global_batch_size, train.micro_batch_size)
    n_microbatches = check_parallel(resolved, job)
    check_seams(model, resolved, computation)
    record = run_record(cfg, base, model_config, sequences, model.generation_config)
    record.refuse_early(cfg.checkpoint.resume, run_dir)
    if is_main:
        run_lock = claim_run_dir(run_dir, fresh=cfg.checkpoint.resume == "never")  # held until the run ends

    # ---- 3. The parts --------------------------------------------------------------------------------------
    start_process_group(device, launch.world_size, attempt=launch.attempt)
    record.refuse_other_ranks(cfg, resolved)
    if memory_note:
        say(f"memory    {memory_note}")
    layout = Layout(resolved, build_mesh(resolved, device.type), n_microbatches)
    offload = Offload(
        cfg.memory,
        train.micro_batch_size,
        seq_len,
        clips=train.max_grad_norm < math.inf,
        ranks_per_host=launch.ranks_per_host,
        rates_file=readable(cache_dirs)[0] / "rates.json",
    )
    training = assemble(model, layout, computation, adamw(train.lr, train.weight_decay), offload, say)
    noise = None
    if train.neftune_alpha and model.model.embed_tokens is not None:  # not on later stages of a pipeline
        noise = Neftune(train.neftune_alpha, train.seed, share=layout.embedded_tokens)
        noise.add_to(model.model.embed_tokens)
    # The weights are loaded before a resumption too, since a LoRA checkpoint has no frozen ones.
    set_weights(training, base, train.seed)
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=cfg.checkpoint.keep)
    step, position = resume(cfg.checkpoint.resume, checkpoints, model, training.optimizer, record, say)

    batching = Batching(
        train.global_batch_size,
        train.micro_batch_size,
        layout.dp_rank,
        resolved.dp,
        document_mask=True,
        pin_memory=device.type == "cuda",
    )
    reader = SequenceReader(sequences, batching, position)
    facts = RunFacts(
        model_config,
        sequences,
        str(corpus.folder),
        resolved,
        AXES,
        n_microbatches,
        device,
        attention_in_words(model, kernel, why),
    )
    if is_main:
        keep_tokenizer(run_dir, tokenizer, template.source)
    report = open_report(
        run_dir, step, asdict(cfg), facts, lines_on_data(cfg, sequences, template.name), launch
    )
    for reason in chosen.reasons:
        report.say(reason)
    prompts = held_out_prompts(sequences, train.answers, train.answer_tokens)
    if prompts and resolved.pp * resolved.cp > 1:
        prompts = []
        report.say(
            "answers   none are sampled in training: no rank of a pipeline or of cp sees whole sequences in "
            "a whole model"
        )

    # ---- 4. The loop ---------------------------------------------------------------------------------------
    stop = StopSignal(launch.launcher_pid, say=report.say)
    stopped = False
    pictures = StepPictures(training, run_dir, step, train.steps, cfg.memory.draw)
    while step < train.steps and not stopped:
        report.begin_step()
        lr = learning_rate(train, step)
        microbatches = next(reader)  # n_microbatches batches of (micro_batch_size, T)
        # How many labels count in the whole global batch, and whether any rank was asked to stop: one
        # reduction for both. It goes over gloo, from host to host, so that nothing waits for the device.
        counts = torch.tensor([sum(batch.n_targets for batch in microbatches), int(stop.asked)])
        dist.all_reduce(counts)
        n_targets, stopped = max(1, int(counts[0]) // layout.ranks_per_batch), bool(counts[1])
        if noise:
            noise.next_step(step, layout.dp_rank, microbatches)
        pictures.before(step)
        loss, grad_norm = train_step(training, microbatches, n_targets, lr, train.max_grad_norm)
        step += 1

        # ---- below here nothing changes the weights ----
        pictures.after(step, report.say if is_main else None)
        report.end_step(step, lr, reader.position * seq_len, loss, grad_norm)
        at_end = step == train.steps
        is_last = stopped or at_end
        saves = is_due(step, cfg.checkpoint.every, is_last)
        validates = sequences.n_validation and is_due(step, train.validate_every, at_end)
        # The loss is read while the device computes the next step.
        # Before a checkpoint or a validation we wait for it, so that a bad step is found first.
        finished = report.finished(wait=bool(is_last or saves or validates))
        validation_losses, answers = {}, []
        if validates:
            batches = validation_batches(sequences, batching, train.validation_rows)
            validation_losses[""] = training.evaluate(list(batches))
            answers = answer(model, prompts, train.answer_tokens, model_config.ends, tokenizer, resolved.tp)
        report.write(finished, validation_losses, answers)
        if saves:
            state = training_state(model, training.optimizer, step, reader.position, record.to_meta())
            waited_s = checkpoints.save(step, state, wait=is_last)
            stage = "written" if is_last else "under way"
            report.say(f"step {step}: checkpoint {stage}; training waited {waited_s:.2f} s")

    # ---- 5. The end ----------------------------------------------------------------------------------------
    reader.close()
    checkpoints.close()
    if cfg.checkpoint.export_hf and not stopped:
        export_all(cfg, training, tokenizer, template.source)
    if is_main:
        end_run(report.log, run_dir, step, train.steps, stopped, chat=cfg.data.template != "none")
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


# ---- The model: before it is spread over the ranks, with values, and as it is exported ---------------------


def model_to_train(cfg: SftConfig, base: Base, config: LlamaConfig) -> Llama:
    """Return the model with its adapters, if it has any, on `meta`: names and shapes only, no memory yet.

    Raises UsageError if the files of weights do not have these names and shapes."""
    with torch.device("meta"):
        model = Llama(config)
    if base.weights:
        check_hf(model, base.weights)  # reads the headers of the files
    if cfg.lora.rank:  # before the passes, which find adapters like any module
        apply_lora(model, cfg.lora, frozen_dtype=getattr(torch, cfg.train.dtype))
    return model


def set_weights(training: Training, base: Base, seed: int) -> None:
    """Load the weights of the base model, or make initial ones, and initial adapters, from the seed."""
    weights = training.fp32_weights()
    if base.weights:
        load_hf(weights, base.weights)
    else:
        init_weights(weights, seed)
    init_lora(weights, seed)


def export_all(cfg: SftConfig, training: Training, tokenizer: Tokenizer, chat_template: str) -> None:
    """Write hf/, with the adapters merged into the weights, and hf-adapter/, which has them alone."""
    run_dir = Path(cfg.run_dir)
    weights = training.fp32_weights()  # waits for the last update, which adapters need too
    if cfg.lora.rank:
        save_adapter(training.model, run_dir / "hf-adapter", cfg.lora, cfg.model)
        save_tokenizer(tokenizer, run_dir / "hf-adapter", chat_template)
        merge_lora(training.model)
        weights = training.model
    export(weights, run_dir / "hf", training.computation.dtype, tokenizer, chat_template)


# ---- What is chosen, what a checkpoint records, what is printed --------------------------------------------


def choose(
    cfg: SftConfig, model: LlamaConfig, corpus: ChatCorpus, tokenizer: Tokenizer, launch: Launch
) -> tuple[SftConfig, Chosen]:
    """Choose what the user left open from the data and the hardware, with a reason for each choice.

    Returns the settings with nothing left open, and what was chosen."""
    train, data = cfg.train, cfg.data
    n_adapter = n_adapter_parameters(model, cfg.lora)
    states = States.under(cfg.memory, getattr(torch, train.dtype).itemsize, n_adapter)
    is_open = replace(cfg.parallel, dp_shard=-1) == ParallelConfig() and launch.world_size > 1

    def pack(seq_len: int) -> PackedExamples:
        packing = Packing(seq_len, data.validation_share, train.seed)
        return PackedExamples(corpus, packing, tokenizer.eos_id or 0, data.overlong, packed=data.packing)

    chosen = choose_settings(
        OpenSettings.of(train, data.seq_len),
        model,
        corpus,
        pack,
        (cfg.parallel.resolve(launch.world_size), is_open),
        (launch, states, foresee),
    )
    return replace(
        cfg,
        train=replace(train, **chosen.settings, lr=train.lr or (2e-4 if cfg.lora.rank else 2e-5)),
        data=replace(data, seq_len=chosen.sequences.seq_len),
    ), chosen


def run_record(
    cfg: SftConfig, base: Base, model_config: LlamaConfig, sequences: PackedExamples, generation: dict
) -> RunRecord:
    """Return what a checkpoint records about its run.

    `fixed` is what a run that resumes from it must have too: with other values the saved data position and
    weights would not fit. `may_change` may differ, and the resumed run prints how."""
    packing = "packed" if cfg.data.packing else "not packed"
    fixed = {
        "--model": asdict(model_config),
        **values_by_flag(cfg, ("data.seq_len", "train.seed", "data.validation_share")),
        "--lora": asdict(cfg.lora),
        "--data.overlong and --data.packing": f"{cfg.data.overlong}, {packing}",
        "--data.path and --data.tokenizer": sequences.contents,
        CONTENT: sequences.content_hash,
        FROZEN: cfg.lora.rank and base.fingerprint,  # a checkpoint of LoRA has no frozen weights
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
        "train.neftune_alpha",
        # These decide the content of the data. A refusal of other content names those that have changed.
        "data.train_on",
        "data.template",
        "data.bad_records",
    )
    return RunRecord(fixed, values_by_flag(cfg, may_change), generation)


def lines_on_data(cfg: SftConfig, sequences: PackedExamples, template_name: str) -> list[str]:
    """Describe the conversations, the records that were left out, and how often this run reads them."""
    lines = []
    log_conversations(sequences, template_name, lines.append)
    log_skipped([sequences.corpus], Path(cfg.run_dir), lines.append)
    steps, batch = cfg.train.steps, cfg.train.global_batch_size
    lines.append(f"epochs    {steps * batch / sequences.n_train:.2f}: {steps} steps of {batch} sequences")
    return lines


if __name__ == "__main__":
    run_recipe(main, SftConfig)
