"""Chooses the settings of a fine-tuning that the user left open, from the data and the hardware.

Each choice has a sentence of its own, which the recipe prints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dtensor_llama.chat.corpus import ChatCorpus
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.config import LlamaConfig
from dtensor_llama.host import free_host_memory
from parallel.cluster import cluster_here
from parallel.config import ParallelConfig
from parallel.cost import States
from parallel.planner import choose_open
from parallel.rules import Job

EXAMPLES_PER_STEP = 32  # as in other fine-tuning recipes, if there is enough data
STEPS_PER_EPOCH = 10  # at least: with little data batches become smaller, and steps not fewer
VALIDATIONS = 10  # how many a run has


@dataclass(frozen=True)
class OpenSettings:
    """Holds the settings of a fine-tuning that may be None, which means that they are left open."""

    epochs: float
    steps: int | None
    validate_every: int | None
    seq_len: int | None
    global_batch_size: int | None
    micro_batch_size: int | None
    recompute: str | None
    compile: bool  # never open; it decides what fits and what can run, as does the next
    attention: str

    @classmethod
    def of(cls, train: Any, seq_len: int | None) -> "OpenSettings":
        """Take all but seq_len from the attributes of these names."""
        others = {field.name: getattr(train, field.name) for field in fields(cls) if field.name != "seq_len"}
        return cls(seq_len=seq_len, **others)


@dataclass(frozen=True)
class Chosen:
    """Holds the settings with nothing left open, the layout, the sequences, and a reason for each choice."""

    settings: dict[str, int | str]  # steps, validate_every, global_batch_size, micro_batch_size, recompute
    layout: ParallelConfig
    sequences: PackedExamples
    reasons: list[str]


def choose_settings(
    asked: OpenSettings,
    model: LlamaConfig,
    corpus: ChatCorpus,
    pack: Callable[[int], PackedExamples],
    layout: tuple[ParallelConfig, bool],
    hardware: tuple[Any, States, Callable],
) -> Chosen:
    """Choose what was left open; UsageError if nothing fits the memory.

    pack: makes sequences of so many tokens from the corpus. layout: resolved, and whether the user left it
        open, so that data-parallel ranks may become tensor-parallel ones. hardware: the recipe's launch,
        which says what a rank runs on, what decides how many bytes it needs, and memory.auto.foresee.
    """
    resolved, is_open = layout
    reasons = []
    seq_len, lengths = asked.seq_len, np.diff(corpus.document_starts, append=corpus.n_tokens)
    if seq_len is None:
        longest = int(lengths.max())
        seq_len = min(model.max_position_embeddings, max(256, 1 << (longest - 1).bit_length()))
        reasons.append(
            f"sequences of {seq_len} tokens: the longest example has {longest:,}, the model's context is "
            f"{model.max_position_embeddings:,}"
        )
    sequences = pack(seq_len)
    batch = asked.global_batch_size
    if batch is None:
        per_sequence = sequences.n_examples / sequences.n_sequences
        # A sequence, or a microbatch of the size that was asked for, for each dp rank and pipeline stage.
        least = resolved.dp * resolved.pp * (asked.micro_batch_size or 1)
        wanted = min(EXAMPLES_PER_STEP / per_sequence, sequences.n_train / STEPS_PER_EPOCH)
        batch = max(1, math.ceil(wanted / least)) * least
        reasons.append(f"batch     {batch} sequences a step: about {batch * per_sequence:.0f} examples")
    launch, states, foresee = hardware
    cluster = cluster_here(launch, free_host_memory())
    lengths = np.minimum(lengths, seq_len)
    job = Job(
        model,
        seq_len,
        batch,
        asked.micro_batch_size,
        attention=asked.attention,
        recompute=asked.recompute,
        compile=asked.compile,
        device_type=launch.take_device().type,
        # A token attends to its own document, and long documents have more tokens.
        document_tokens=round((lengths**2).sum() / lengths.sum()),
    )
    is_open = is_open or resolved.auto
    job, resolved, why = choose_open(job, resolved, cluster, states, is_open, foresee)
    if asked.recompute is None or asked.micro_batch_size is None or is_open:
        reasons.append(f"memory    {why}")
    steps = asked.steps or max(1, math.ceil(asked.epochs * sequences.n_train / batch))
    every = max(1, steps // VALIDATIONS) if asked.validate_every is None else asked.validate_every
    settings = {
        "steps": steps,
        "validate_every": every,
        "global_batch_size": batch,
        "micro_batch_size": job.micro_batch_size,
        "recompute": job.recompute,
    }
    return Chosen(settings, resolved, sequences, reasons)
