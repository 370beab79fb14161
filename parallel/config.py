"""ParallelConfig: how many ways each mesh axis splits the work, and the one function that says what is
impossible."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from parallel.context import check_context_parallel
from parallel.pipeline import SCHEDULES, check_pipeline
from parallel.tensor import check_tensor_parallel

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # of the mesh, outermost first


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, outermost first, and how each axis works. Their product is the number of
    processes."""

    pp: int = 1  # pipeline: ranks that hold different layers
    # groups of ranks that hold whole copies of the model and read different rows (HSDP)
    dp_replicate: int = 1
    # ranks that read different rows and share parameters and optimizer state; -1: all left over
    dp_shard: int = -1
    cp: int = 1  # context: ranks that hold different tokens of the same rows
    tp: int = 1  # tensor: ranks that hold slices of each matrix
    # what ranks of dp_shard x cp share: 1 optimizer state, 2 + gradients, 3 + weights
    zero_stage: Literal[0, 1, 2, 3] = 3
    # with tp, split tokens between the matrices, where each rank would do the same
    sequence_parallel: bool = True
    cp_method: Literal["ulysses", "ring"] = "ulysses"
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"] = "1f1b"
    virtual_stages: int | None = None  # stages per pp rank; None: what the schedule needs, 1 or 2
    # with pp: measure one warm step and draw who did what when, RUN_DIR/schedule.png
    draw_schedule: bool = False
    microbatches: int | None = None  # per rank and step; None: as many as the batch sizes make

    def resolve(self, world_size: int) -> "ParallelConfig":
        """The same with -1 replaced by what `world_size` processes leave for it; UsageError if they do not
        fit."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UsageError(
                    f"{flag(axis)} {size} is not possible; use a number of processes, or -1 for all left over."
                )
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise UsageError(
                f"{' and '.join(map(flag, open_axes))} are both -1; only one of them can be what is left over."
            )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        asked = (
            " x ".join(f"{flag(axis)} {size}" for axis, size in sizes.items() if size > 1) or "one process"
        )
        if open_axes and world_size % fixed == 0:
            return replace(self, **{open_axes[0]: world_size // fixed})
        if open_axes or fixed != world_size:
            needed = f"a multiple of {fixed}" if open_axes else fixed
            launch = f"torchrun --nproc-per-node {fixed}" if fixed > 1 else "plain python"
            raise UsageError(
                f"{asked} needs {needed} processes and there {'is' if world_size == 1 else 'are'} {world_size}; "
                f"launch with {launch}, or make one axis -1."
            )
        return self

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of each pp rank."""
        return self.virtual_stages or SCHEDULES[self.schedule].default_virtual_stages

    @property
    def sequence_shards(self) -> int:
        """Ranks that share, between two blocks, the tokens that a cp rank has of a row."""
        return self.tp if self.sequence_parallel else 1

    @property
    def dp(self) -> int:
        """How many ranks, or groups of cp x tp x pp ranks, read rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def grad_ranks(self) -> int:
        """Ranks whose gradients FSDP averages: all that hold the same parameters and saw other tokens."""
        return self.dp * self.cp


def flag(axis: str) -> str:
    return "--parallel." + axis.replace("_", "-")


def check_parallel(
    layout: ParallelConfig,
    model: LlamaConfig,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    *,
    attention: str = "sdpa",
    recompute: str = "none",
    compile: bool = False,
    device_type: str = "cpu",
) -> int:
    """Refuse every layout that cannot run, before any process group exists; returns the micro-batches per
    rank and step.

    layout: resolved. UsageError names the flag, the numbers, the rule and what would work.
    """
    n_micros = check_batch(global_batch_size, micro_batch_size, layout.dp)
    if layout.microbatches not in (None, n_micros):
        raise UsageError(
            f"--parallel.microbatches {layout.microbatches} is not what --train.global-batch-size "
            f"{global_batch_size} / --train.micro-batch-size {micro_batch_size} / {layout.dp} data-parallel ranks "
            f"= {n_micros} make; leave it out, or change one of them."
        )
    if layout.tp > 1:
        check_tensor_parallel(model, layout.tp, seq_len, layout.sequence_parallel)
        _check_uneven_vocabulary(model.vocab_size, layout)
        if compile and recompute == "full" and attention in ("sdpa", "varlen") and device_type == "cpu":
            # torch 2.13: the compiler saves a random state with the CPU kernel, which it never uses, and
            # trips over the mesh
            raise UsageError(
                f"--train.compile with --train.recompute full and --parallel.tp {layout.tp} fails inside torch on "
                "a CPU; use --train.recompute selective, or --train.attention math."
            )
    if layout.cp > 1:
        check_context_parallel(
            model, layout.cp, layout.tp, seq_len, layout.cp_method, attention, layout.sequence_parallel
        )
    if layout.pp > 1:
        check_pipeline(
            model, layout.pp, layout.schedule, layout.stages_per_rank, n_micros, recompute, compile
        )
    elif layout.draw_schedule:
        raise UsageError(
            "--parallel.draw-schedule draws what pipeline ranks do when, and --parallel.pp is 1; leave it out, or "
            "use --parallel.pp 2."
        )
    elif layout.virtual_stages not in (None, 1):
        raise UsageError(
            f"--parallel.virtual-stages {layout.virtual_stages} splits pipeline ranks and --parallel.pp is 1; "
            "leave it out, or use --parallel.pp 2."
        )
    return n_micros


def _check_uneven_vocabulary(vocab_size: int, layout: ParallelConfig) -> None:
    """Refuse what DTensor misplaces: rows dealt to tp unevenly, and the shares then dealt to ranks of other
    sizes."""
    tp, shards = layout.tp, layout.dp_shard * layout.cp
    first = -(-vocab_size // tp)
    last = vocab_size - first * (tp - 1)
    uneven = shards > 1 and first != last and -(-first // shards) != -(-last // shards)
    if uneven and layout.zero_stage > 0 and (tp, shards) != (2, 2):  # 2 x 2 is placed right, as tests show
        raise UsageError(
            f"the vocabulary of {vocab_size} is not a multiple of --parallel.tp {tp}, and its slices of {first} "
            f"and {last} rows cannot be shared alike by {shards} ranks (dp-shard x cp); use another "
            "--parallel.tp, --parallel.zero-stage 0, or a vocabulary padded to a multiple."
        )


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Micro-batches of `micro_batch_size` rows that one of `dp` ranks runs per step; UsageError if rows are
    left over."""
    stride = micro_batch_size * dp
    if global_batch_size % stride:
        lower = global_batch_size // stride * stride
        works = f"{lower} or {lower + stride}" if lower else f"{stride}"
        raise UsageError(
            f"--train.global-batch-size {global_batch_size} is not a multiple of --train.micro-batch-size "
            f"{micro_batch_size} x {dp} data-parallel ranks = {stride}; use {works} rows a step."
        )
    return global_batch_size // stride
