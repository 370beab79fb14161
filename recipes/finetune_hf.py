"""Fine-tune a causal model of transformers on text, spread over any mesh by the Booster.

    python recipes/finetune_hf.py --model gpt2-folder --text notes.txt --out runs/notes
    torchrun --nproc-per-node 8 recipes/finetune_hf.py --model opt-folder --text 'corpus/*.jsonl' \
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
from glob import glob
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from dtensor_llama import UsageError
from dtensor_llama.cli import AtLeast, FilePath, at_least, check_numbers, run_recipe
from dtensor_llama.schedule import check_schedule, learning_rate
from memory import MemoryConfig
from parallel import Booster, ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Decides how long, on what rows and with which learning rate to train."""

    steps: int = 100
    rows: int = 8  # rows per step, over all ranks
    seq_len: int = 512  # tokens per row; the texts are joined and cut into rows
    lr: float = 5e-5  # the peak of the learning rate
    min_lr: float | None = None  # where the cosine ends; None: a tenth of the peak
    warmup_steps: int | None = None  # None: 2 % of the steps
    weight_decay: float = 0.01  # for matrices only
    max_grad_norm: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and moments are float32
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile each block
    seed: int = 0  # for the order of the rows, and for dropout


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a causal model of transformers on text."""

    model: FilePath  # a Hugging Face folder: config.json, safetensors and a tokenizer
    text: FilePath  # .txt files, or .jsonl files of {"text": ...}; may contain a *
    out: FilePath  # a new folder, which gets the model, its tokenizer and losses.jsonl
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(zero_stage=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)


NUMBERS = [
    *at_least(1, "train.steps", "train.rows", "train.seq_len"),
    *at_least(0, "train.min_lr", "train.warmup_steps", "train.weight_decay"),
    AtLeast("train.lr", 0, exclusive=True),
    AtLeast("train.max_grad_norm", 0, exclusive=True, may_be_infinite=True),
]


def main(cfg: FinetuneConfig) -> None:
    # 1. Check what was asked for. If it is not possible, one line says why.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_numbers(cfg, NUMBERS)
    check_schedule(cfg.train)
    if not Path(cfg.model, "config.json").is_file():
        raise UsageError(f"model={cfg.model} has no config.json; give a local Hugging Face folder.")
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:  # no weights, no tokenizer, no causal model
        first_line = str(error).splitlines()[0]
        raise UsageError(f"model={cfg.model} is not opened by transformers: {first_line}") from None
    model.train()  # from_pretrained turns dropout off
    rows = rows_of(cfg, tokenizer)

    # 2. Make an ordinary training set-up, which the Booster then spreads over the ranks. Every rank makes the
    # same one, with the same order of rows, and the Booster gives each dp rank its share of every batch.
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, fused=True)
    order = torch.Generator().manual_seed(cfg.train.seed)
    dataloader = DataLoader(rows, cfg.train.rows, shuffle=True, generator=order, collate_fn=as_batch)
    model, optimizer, dataloader, _ = booster.boost(model, optimizer, dataloader)

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
        if not math.isfinite(losses[-1]["loss"]):
            raise UsageError(f"the loss of step {step + 1} is {losses[-1]['loss']}; use a smaller lr.")
        if dist.get_rank() == 0:
            print(f"step {step + 1:5}  loss {losses[-1]['loss']:.4f}  norm {losses[-1]['grad_norm']:.3f}")

    # 4. Save what transformers opens: the weights of all ranks, the config, and the tokenizer.
    booster.save_hf(model, cfg.out)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(cfg.out)
        lines = [json.dumps(line) + "\n" for line in losses]
        Path(cfg.out, "losses.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{cfg.out}: transformers opens it")


def rows_of(cfg: FinetuneConfig, tokenizer) -> list[Tensor]:
    """Return all texts, each followed by an end-of-sequence token, joined and cut into rows (T,) int64.

    Raises UsageError if there is no such file, or if all texts together are shorter than a row."""
    tokens = []
    for path in sorted(glob(cfg.text)) or [cfg.text]:
        if not Path(path).is_file():
            raise UsageError(f"text={cfg.text} names no file.")
        for text in texts_of(Path(path)):
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    n_rows = len(tokens) // cfg.train.seq_len
    if n_rows == 0:
        raise UsageError(f"text={cfg.text} has {len(tokens)} tokens, fewer than seq_len={cfg.train.seq_len}.")
    return list(torch.tensor(tokens[: n_rows * cfg.train.seq_len]).view(n_rows, cfg.train.seq_len))


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file: the whole of a .txt, or one text per line of a .jsonl.

    Raises UsageError for a line of a .jsonl that is not {"text": ...}."""
    whole = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [whole]
    try:
        return [json.loads(line)["text"] for line in whole.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} has a line that is not {{"text": ...}}: {error!r}.') from None


def as_batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Return rows (T,) as a Hugging Face batch (B, T). Labels equal tokens, since the model shifts them."""
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "labels": tokens}


def endlessly(dataloader) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of one pass over the data after another, without an end."""
    while True:
        yield from dataloader


if __name__ == "__main__":
    run_recipe(main, FinetuneConfig)
