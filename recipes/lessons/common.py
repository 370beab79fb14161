"""What every lesson needs and none is about: join the processes, leave them in order, print so that it can be
read."""

import gc
import sys
from dataclasses import make_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed
import torch.distributed as dist

from dtensor_llama.cli import read_launch, run_recipe
from dtensor_llama.errors import UsageError


def run_lesson(lesson, n_ranks: int) -> None:
    """Call lesson() in each of `n_ranks` gloo processes; another number of them is one clear line and exit
    status 2."""

    def main(_no_flags) -> None:
        n_here = read_launch().world_size
        if n_here != n_ranks:
            raise UsageError(
                f"this lesson is about {n_ranks} processes and there {'is' if n_here == 1 else 'are'} {n_here}; "
                f"launch it with torchrun --nproc-per-node {n_ranks} {sys.argv[0]}"
            )
        dist.init_process_group("gloo")
        lesson()
        dist.barrier()  # nobody closes a connection that another still reads from
        gc.collect()  # drops meshes, whose gloo threads must not outlive the group
        dist.destroy_process_group()

    run_recipe(main, make_dataclass("NoFlags", []))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def say_each(text: str) -> None:
    """Print what each rank has to say, in rank order. A collective: every rank must call it."""
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    say("\n".join(f"  rank {rank}: {line}" for rank, line in enumerate(texts)))
