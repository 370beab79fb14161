"""Starts and stops the processes of a lesson, and prints their output in a readable order."""

import gc
import sys
from dataclasses import make_dataclass

import torch.distributed as dist

from dtensor_llama.cli import read_launch, run_recipe
from dtensor_llama.errors import UsageError


def run_lesson(lesson, n_ranks: int) -> None:
    """Call lesson() in each of `n_ranks` gloo processes.

    If torchrun started another number of processes, print one line on stderr and exit with status 2.
    """

    def main(_no_flags) -> None:
        n_started = read_launch().world_size
        if n_started != n_ranks:
            raise UsageError(
                f"this lesson needs {n_ranks} processes and there {'is' if n_started == 1 else 'are'} "
                f"{n_started}; launch it with torchrun --nproc-per-node {n_ranks} {sys.argv[0]}"
            )
        dist.init_process_group("gloo")
        lesson()
        dist.barrier()  # no rank may close a connection from which another rank still reads
        gc.collect()  # frees the meshes: their gloo threads must not outlive the process group
        dist.destroy_process_group()

    run_recipe(main, make_dataclass("NoFlags", []))


def print_once(text: str) -> None:
    """Print the text on rank 0 and do nothing on the other ranks."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def print_each(text: str) -> None:
    """Print the text of every rank in rank order. This is a collective: every rank must call it."""
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    print_once("\n".join(f"  rank {rank}: {line}" for rank, line in enumerate(texts)))
