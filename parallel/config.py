"""ParallelConfig: how many ways each mesh axis splits the work, and the one place that says what is impossible."""

from dataclasses import dataclass, replace

from dtensor_llama.errors import UsageError


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, outermost first."""

    dp_shard: int = -1   # ranks that read different rows and share parameters and optimizer state; -1: all there are

    def resolve(self, world_size: int) -> "ParallelConfig":
        """The same with -1 replaced by what `world_size` processes leave for it; UsageError if they do not fit."""
        dp_shard = world_size if self.dp_shard == -1 else self.dp_shard
        if dp_shard < 1:
            raise UsageError(f"--parallel.dp-shard {dp_shard} is not possible; use a number of processes, or -1 for all.")
        if dp_shard != world_size:
            raise UsageError(f"--parallel.dp-shard {dp_shard} needs {dp_shard} processes and there "
                             f"{'is' if world_size == 1 else 'are'} {world_size}; launch with torchrun "
                             f"--nproc-per-node {dp_shard}, or use --parallel.dp-shard -1.")
        return replace(self, dp_shard=dp_shard)

    @property
    def dp(self) -> int:
        """How many ranks read rows of their own."""
        return self.dp_shard


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Micro-batches of `micro_batch_size` rows that one of `dp` ranks runs per step; UsageError if rows are left over."""
    stride = micro_batch_size * dp
    if global_batch_size % stride:
        lower = global_batch_size // stride * stride
        works = f"{lower} or {lower + stride}" if lower else f"{stride}"
        raise UsageError(f"--train.global-batch-size {global_batch_size} is not a multiple of --train.micro-batch-size "
                         f"{micro_batch_size} x {dp} data-parallel ranks = {stride}; use {works} rows a step.")
    return global_batch_size // stride
