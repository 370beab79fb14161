"""Fine-tune a causal model of transformers on text, spread over any mesh by the Booster.

    python recipes/finetune_hf.py --model gpt2-folder --text notes.txt --out runs/notes
    torchrun --nproc-per-node 8 recipes/finetune_hf.py --model opt-folder --text 'corpus/**/*.jsonl' \
        --out runs/opt --parallel.tp 2 --train.dtype bfloat16

This recipe is for families that our own Llama class does not cover: GPT-2, OPT, BLOOM, GLM, and those for
which transformers has a tensor-parallel plan (parallel/plans/README.md). The model stays transformers' own,
module for module. For LLaMA, pretrain.py and sft.py offer more options.
OUT becomes a folder that transformers opens.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

from dtensor_llama import UsageError
from dtensor_llama.cli import AtLeast, FilePath, at_least, check_numbers, run_recipe
from dtensor_llama.data.sources import expand_paths, read_chunks
from dtensor_llama.errors import listed
from dtensor_llama.places import first_writable
from dtensor_llama.schedule import check_schedule, learning_rate
from memory import MemoryConfig
from parallel import Booster, ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Decides how long, on what sequences and with which learning rate to train."""

    steps: int = 100
    rows: int = 8  # sequences per step, over all ranks
    seq_len: int = 512  # tokens per sequence; the texts are joined and cut into sequences
    lr: float = 5e-5  # the peak of the learning rate
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps
    weight_decay: float = 0.01  # for matrices only
    max_grad_norm: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and moments are float32
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile each block
    seed: int = 0  # for the order of the sequences, and for dropout


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a causal model of transformers on text."""

    model: FilePath  # a Hugging Face folder: config.json, safetensors and a tokenizer
    # One file or a glob, which may contain `**`, of any kind that pretrain.py reads (data/sources.py).
    text: FilePath
    out: FilePath  # a new folder, which gets the model, its tokenizer and losses.jsonl
    # The field of a .jsonl line, or the column of a .parquet, that holds the text.
    # `a.b` is field b inside field a.
    text_field: str = "text"
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(zero_stage=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)


NUMBERS = [
    *at_least(1, "train.steps", "train.rows"),
    *at_least(2, "train.seq_len"),  # the first token of a sequence is not predicted
    *at_least(0, "train.min_lr", "train.warmup_steps", "train.weight_decay"),
    AtLeast("train.lr", 0, exclusive=True),
    AtLeast("train.max_grad_norm", 0, exclusive=True, may_be_infinite=True),
    AtLeast("train.seed", 0, below=2**63),  # torch takes no larger one
]


def main(cfg: FinetuneConfig) -> None:
    # 1. Check what was asked for. If it is not possible, one line says why.
    check_numbers(cfg, NUMBERS)
    check_schedule(cfg.train)
    if Path(cfg.out).exists() and (not Path(cfg.out).is_dir() or any(Path(cfg.out).iterdir())):
        raise UsageError(f"out={cfg.out} is there and not empty; name a new folder, so that nothing is lost.")
    booster = Booster(
        cfg.parallel,
        cfg.memory,
        dtype=getattr(torch, cfg.train.dtype),
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        seed=cfg.train.seed,
    )
    tokenizer, model = open_base(cfg.model)
    model.train()  # from_pretrained turns dropout off
    sequences = sequences_of(cfg, tokenizer, model.config.get_text_config().vocab_size)

    # 2. Make an ordinary training set-up, which the Booster then spreads over the ranks. Every rank makes the
    # same one, with the same order of sequences, and the Booster gives each dp rank its share of every batch.
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, fused=True)
    order = torch.Generator().manual_seed(cfg.train.seed)
    dataloader = DataLoader(sequences, cfg.train.rows, shuffle=True, generator=order, collate_fn=as_batch)
    model, optimizer, dataloader, _ = booster.boost(model, optimizer, dataloader)
    try:
        first_writable([cfg.out])  # so that this is found before the training, and not after it
    except OSError as error:
        raise UsageError(f"out={error}; name a folder that you can write.") from None

    # 3. Train. Nothing in this loop knows how many ranks there are.
    losses = []
    for step, batch in enumerate(endlessly(dataloader)):
        if step == cfg.train.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.train, step)
        loss = booster.step(batch)
        grad_norm = booster.clip_grad_norm(cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        # Reading the numbers makes the host wait for the device, once a step. pretrain.py reads them later.
        losses.append({"step": step + 1, "loss": loss.item(), "grad_norm": grad_norm.item()})
        # Where the norm of the gradients is not finite, the optimizer has changed nothing.
        if not all(map(math.isfinite, losses[-1].values())):
            raise UsageError(
                f"step {step + 1} has the loss {losses[-1]['loss']} and the gradient norm "
                f"{losses[-1]['grad_norm']}, which must be finite; nothing is saved. Use a smaller `lr`."
            )
        if dist.get_rank() == 0:
            print(f"step {step + 1:5}  loss {losses[-1]['loss']:.4f}  norm {losses[-1]['grad_norm']:.3f}")

    # 4. Save what transformers opens: the weights of all ranks, the config, and the tokenizer.
    booster.save_hf(model, cfg.out)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(cfg.out)
        lines = [json.dumps(line) + "\n" for line in losses]
        Path(cfg.out, "losses.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{cfg.out}: transformers opens it")


def open_base(folder: str) -> tuple[Any, Any]:
    """Return the tokenizer and the causal model of a Hugging Face folder.

    Raises UsageError if one of them cannot be opened, or if transformers would make up what the folder lacks:
    it gives missing weights random values, and a missing tokenizer an empty vocabulary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = Path(folder)
    if not (home / "config.json").is_file():
        raise UsageError(f"model={folder} has no config.json; give a local Hugging Face folder.")
    if not {*home.glob("tokenizer*"), *home.glob("vocab*"), *home.glob("*.model")}:
        raise UsageError(f"model={folder} has no tokenizer; copy the files of the model's tokenizer into it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # for example, no weights
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"model={folder} is not opened by transformers: {first_line}") from None
    problems = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    for name, stored, needed in found["mismatched_keys"]:
        problems.append(f"{name}: is {list(stored)}, must be {list(needed)}")
    if problems:
        raise UsageError(
            f"model={folder}: the weights do not fit its config.json: {listed(problems)}; give the whole "
            "folder of one model."
        )
    return tokenizer, model


def sequences_of(cfg: FinetuneConfig, tokenizer, vocab_size: int) -> list[Tensor]:
    """Return sequences (T,) int64: all texts, each followed by the tokenizer's EOS token, joined and cut.

    Raises UsageError for files and records that cannot be read, for ids beyond the model's vocabulary, and if
    all texts together make fewer sequences than a step takes."""
    tokens = []
    try:
        for path in expand_paths([cfg.text]):
            for chunk in read_chunks(path, cfg.text_field, cutter=None):
                for text in chunk.documents(cfg.text_field):
                    tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
                    tokens += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    except UsageError as error:  # pretrain.py, for which the reader is made, has another name for the flag
        raise UsageError(str(error).replace("data.path", "text")) from None
    if max(tokens, default=0) >= vocab_size:
        raise UsageError(
            f"model={cfg.model}: its tokenizer gives the id {max(tokens)}, and config.json has a vocabulary "
            f"of {vocab_size}; give a folder in which they belong together."
        )
    seq_len, wanted = cfg.train.seq_len, cfg.train.rows
    n_sequences = len(tokens) // seq_len
    if n_sequences < wanted:
        raise UsageError(
            f"text={cfg.text} has {len(tokens)} tokens, fewer than one step takes: rows={wanted} of "
            f"seq_len={seq_len}. Use more text, a smaller `seq_len` or fewer `rows`."
        )
    if dist.get_rank() == 0:
        n_read = cfg.train.steps * wanted / n_sequences
        print(
            f"text      {len(tokens):,} tokens: {n_sequences:,} sequences of {seq_len}; each is read "
            f"{n_read:.2f} times"
        )
    return list(torch.tensor(tokens[: n_sequences * seq_len]).view(n_sequences, seq_len))


def as_batch(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Return sequences (T,) as a Hugging Face batch (B, T); labels equal tokens, as the model shifts them."""
    tokens = torch.stack(sequences)
    return {"input_ids": tokens, "labels": tokens}


def endlessly(dataloader) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of one pass over the data after another, without an end."""
    while True:
        yield from dataloader


if __name__ == "__main__":
    run_recipe(main, FinetuneConfig)
