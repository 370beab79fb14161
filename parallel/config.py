"""ParallelConfig, which says how many ways each axis of the mesh splits the work, and check_parallel, which
refuses what cannot run."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from parallel import rules
from parallel.context import n_slices
from parallel.pipeline import SCHEDULES
from parallel.rules import Case, Job

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # of the mesh, outermost first
DERIVED_AXES = {  # each is made of neighbours among AXES
    # ranks that read different sequences; the loss is summed over it (and cp)
    "dp": ("dp_replicate", "dp_shard"),
    "fsdp": ("dp_shard", "cp"),  # ranks that share parameters, gradients and optimizer state (ZeRO)
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),  # ranks whose gradients are averaged: they saw other tokens
    # ranks whose shares of the loss add up; tp ranks all have the same share, so tp is not among them
    "loss": ("pp", "dp_replicate", "dp_shard", "cp"),
}


@dataclass(frozen=True)
class ParallelConfig:
    """Holds the sizes of the mesh axes, outermost first, and how each axis works. The product of the sizes is
    the number of processes."""

    pp: int = 1  # pipeline: ranks that hold different layers
    # groups of ranks that hold whole copies of the model and read different sequences (HSDP)
    dp_replicate: int = 1
    # ranks that read different sequences and share parameters and optimizer state; -1: all that are left
    dp_shard: int = -1
    cp: int = 1  # context: ranks that hold different tokens of the same sequences
    tp: int = 1  # tensor: ranks that hold slices of each matrix
    # what the ranks of dp_shard x cp share: 1 optimizer state, 2 also gradients, 3 also weights
    zero_stage: Literal[0, 1, 2, 3] = 3
    # with tp: split the tokens between the matrices, where otherwise each rank would do the same work
    sequence_parallel: bool = True
    # with cp: exchange tokens for heads around attention (ulysses), or pass keys and values on (ring)
    cp_method: Literal["ulysses", "ring"] = "ulysses"
    # with pp: in which order a rank's forwards and backwards run
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"] = "1f1b"
    virtual_stages: int | None = None  # stages per pp rank; None: what the schedule needs, 1 or 2
    # with pp: measure one warm step and draw which rank did what when, in RUN_DIR/schedule.png
    draw_schedule: bool = False
    microbatches: int | None = None  # per dp rank and step; None: as many as the batch sizes make
    # let the planner choose all of the above, the size of a microbatch and what is recomputed (planner.py)
    auto: bool = False

    def resolve(self, world_size: int) -> "ParallelConfig":
        """Return this layout with -1 replaced by what `world_size` processes leave for it; UsageError if they
        do not fit."""
        rules.check(WORLD_RULES, Case(self, world_size=world_size))
        left_over = world_size // math.prod(size for size in self.sizes.values() if size != -1)
        return replace(self, **{axis: left_over for axis, size in self.sizes.items() if size == -1})

    @property
    def sizes(self) -> dict[str, int]:
        """Return {axis: number of ranks}, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def ranks(self, axis: str) -> int:
        """Return the number of ranks on an axis of the mesh, which may be a derived one."""
        return math.prod(getattr(self, one) for one in DERIVED_AXES.get(axis, (axis,)))

    @property
    def dp(self) -> int:
        """Return how many ranks read sequences of their own; those that share them count as one."""
        return self.ranks("dp")

    @property
    def fsdp(self) -> int:
        """Return how many ranks share parameters, gradients and optimizer state, as zero_stage says."""
        return self.ranks("fsdp")

    @property
    def gradient_ranks(self) -> int:
        """Return how many ranks FSDP averages gradients over: all with the same weights and other tokens."""
        return self.ranks("dp_cp")

    @property
    def is_ring(self) -> bool:
        """Return whether attention is a ring, whose kernel must return its log-sum-exp to merge blocks."""
        return self.cp > 1 and self.cp_method == "ring"

    @property
    def stages_per_rank(self) -> int:
        """Return the number of pipeline stages on each pp rank."""
        default = SCHEDULES[self.schedule].default_virtual_stages
        return default if self.virtual_stages is None else self.virtual_stages

    @property
    def token_slices(self) -> int:
        """Return how many slices cp, and tp under sequence parallelism, cut a sequence into."""
        slices = n_slices(self.cp_method, self.cp) if self.cp > 1 else 1
        return slices * self.sequence_shards

    @property
    def sequence_shards(self) -> int:
        """Return how many ranks share, between two blocks, the tokens of a sequence that one cp rank has."""
        return self.tp if self.sequence_parallel else 1


WORLD_RULES = rules.world_rules(AXES)  # what a number of processes must satisfy
RULES = [*rules.AUTO, *rules.axis_rules(AXES), *rules.BATCH, *rules.TENSOR, *rules.CONTEXT, *rules.PIPELINE]


def check_parallel(layout: ParallelConfig, job: Job) -> int:
    """Refuse every layout that cannot run its job, before any process group exists; return the microbatches
    per rank and step.

    layout: resolved. UsageError names the field, the values, the rule and what would work.
    """
    case = Case(layout, job)
    rules.check(RULES, case)
    return case.n_microbatches
