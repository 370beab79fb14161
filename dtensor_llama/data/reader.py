"""Reads the microbatches of one dp rank ahead, in a thread. The position is the whole state of the reader."""

import itertools
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtensor_llama.data.sequences import Sequences
from dtensor_llama.errors import UsageError
from dtensor_llama.loss import IGNORE

STEPS_AHEAD = 4  # this many steps are held ready, enough to hide a slow read from disk
STEPS_PERMUTED = 64  # so many steps are permuted at once: numpy takes 1 ms for one or for 64


class Batch(NamedTuple):
    """Holds B sequences of T tokens.

    positions: position ids, counted from the start of each document; None without a document mask"""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, or IGNORE
    positions: Tensor | None  # (B, T) int64

    @property
    def n_targets(self) -> int:
        """Return how many labels count in the loss, that is, are not IGNORE."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return a batch whose tokens and labels are on the device.

        The positions stay on the host: there the starts of documents can be found without waiting for the
        device. The model copies the positions itself."""
        tokens = self.tokens.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return Batch(tokens, labels, self.positions)


@dataclass(frozen=True)
class Batching:
    """Decides how the sequences of a step become the microbatches of one dp rank.

    Each rank takes a contiguous slice of the sequences of a step, so that which sequences a step has depends
    neither on dp_size nor on micro_batch_size. Raises UsageError if they cannot be divided evenly.
    """

    global_batch_size: int  # sequences of a step, over all ranks
    micro_batch_size: int  # sequences of one microbatch
    dp_rank: int = 0
    dp_size: int = 1
    document_mask: bool = False  # no token attends to another document or is predicted from one
    pin_memory: bool = False  # faster copies to a GPU

    def __post_init__(self):
        stride = self.dp_size * self.micro_batch_size
        if min(self.global_batch_size, self.micro_batch_size) < 1 or self.global_batch_size % stride:
            raise UsageError(
                f"global_batch_size={self.global_batch_size} cannot be shared by {self.dp_size} dp rank(s) "
                f"in microbatches of micro_batch_size={self.micro_batch_size} sequences; use a multiple "
                f"of {max(stride, self.dp_size)}."
            )

    @property
    def own_sequences(self) -> np.ndarray:
        """Return which sequences of a step this rank reads, (microbatches, micro_batch_size), from 0."""
        n_own = self.global_batch_size // self.dp_size
        return self.dp_rank * n_own + np.arange(n_own).reshape(-1, self.micro_batch_size)


def make_batch(
    sequences: Sequences, numbers: np.ndarray, document_mask: bool, pin_memory: bool = False
) -> Batch:
    """Read the sequences with these numbers, an array (B,), as one batch on the host.

    Labels that are not to be trained on are IGNORE. With document_mask so are those of the next document."""
    both = sequences.tokens_of(numbers)  # (B, T + 1)
    trained = sequences.trained_of(numbers)
    tokens, labels, positions = both[:, :-1].copy(), both[:, 1:].copy(), None
    if trained is not None:
        labels[~trained[:, 1:]] = IGNORE
    if document_mask:
        positions = np.tile(np.arange(sequences.seq_len), (len(numbers), 1))
        for b, number in enumerate(numbers):
            starts = sequences.document_starts_of(int(number))
            labels[b, starts - 1] = IGNORE
            for start in starts[starts < sequences.seq_len]:
                positions[b, start:] = np.arange(sequences.seq_len - start)
    batch = [None if array is None else torch.from_numpy(array) for array in (tokens, labels, positions)]
    if pin_memory:
        batch = [None if tensor is None else tensor.pin_memory() for tensor in batch]
    return Batch(*batch)


class SequenceReader:
    """Yields one list of microbatches for each step of one dp rank, epoch after epoch, without an end.

    A step takes the next `global_batch_size` sequences of the global order. `position` counts those of the
    steps that were handed out, not those that the thread has read ahead. A new reader that starts at this
    position continues exactly there, on any number of ranks.
    """

    def __init__(self, sequences: Sequences, batching: Batching, position: int = 0):
        self.position, self.global_batch_size = position, batching.global_batch_size
        self._ready, self._error, stop = queue.Queue(maxsize=STEPS_AHEAD), None, threading.Event()
        thread = threading.Thread(
            target=_read_ahead,
            args=(_steps(sequences, batching, position), self._ready, stop),
            name="sequence-reader",
            daemon=True,
        )
        # The finalizer also runs when the interpreter exits. A thread that is inside torch at that moment
        # would abort the process ("terminate called without an active exception").
        self._close = weakref.finalize(self, _stop_reading, self._ready, stop, thread)
        thread.start()

    def __iter__(self) -> "SequenceReader":
        return self

    def __next__(self) -> list[Batch]:
        """Return the microbatches of the next step. An error in the thread is raised here."""
        if not self._close.alive:
            raise RuntimeError("this SequenceReader is closed")
        if self._error is None:
            step = self._ready.get()
            if not isinstance(step, BaseException):
                self.position += self.global_batch_size
                return step
            self._error = step
        raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it. It is safe to call this twice."""
        self._close()


def _steps(sequences: Sequences, batching: Batching, position: int) -> Iterator[list[Batch]]:
    how = batching.document_mask, batching.pin_memory
    to_step = batching.global_batch_size * np.arange(STEPS_PERMUTED)[:, None, None]
    for first in itertools.count(position, STEPS_PERMUTED * batching.global_batch_size):
        for step in sequences.sequences_at(first + to_step + batching.own_sequences):
            yield [make_batch(sequences, numbers, *how) for numbers in step]


def _read_ahead(steps: Iterator[list[Batch]], ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for step in steps:
            ready.put(step)  # blocks while STEPS_AHEAD are waiting
            if stop.is_set():
                return
    except BaseException as error:
        ready.put(error)


def _stop_reading(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while thread.is_alive():
        try:
            ready.get_nowait()  # frees a thread that waits in put
        except queue.Empty:
            pass
        thread.join(timeout=0.01)


def validation_batches(
    sequences: Sequences, batching: Batching, max_sequences: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's share of the first `max_sequences` held-out sequences (None: of all), in whole
    microbatches.

    Each rank gets the same number of batches, because a sharded forward is a collective. Where sequences are
    missing, others whose labels are all IGNORE take their place, so that the sums of losses and of labels
    over the ranks do not depend on dp_size.
    """
    held_out = sequences.validation_sequences()[:max_sequences]
    size, stride = batching.micro_batch_size, batching.dp_size * batching.micro_batch_size
    for first in range(batching.dp_rank * size, -(-len(held_out) // stride) * stride, stride):
        numbers = held_out[first : first + size]
        filled = np.concatenate([numbers, np.repeat(held_out[:1], size - len(numbers))])
        batch = make_batch(sequences, filled, batching.document_mask)
        batch.labels[len(numbers) :] = IGNORE
        yield batch
