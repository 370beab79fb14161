"""Micro-batches for one dp rank, read ahead in a thread, at a position that is the whole state of the
reader."""

import itertools
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtensor_llama.data.sequences import PackedRows
from dtensor_llama.errors import UsageError

NOT_SCORED = -100  # the label that cross-entropy leaves out
STEPS_AHEAD = 4  # held ready: enough to ride out a slow read from disk
STEPS_PERMUTED = 64  # whose rows are looked up at once: 1 ms of numpy calls, whether for one step or for 64


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, or NOT_SCORED
    positions: Tensor | None  # (B, T) int64, counted from the document's start; None without document_mask

    def to(self, device: torch.device) -> "Batch":
        """Copy tokens and labels to the device. Positions stay on the host, where the starts of documents are
        found without waiting for the device; the model copies them itself."""
        tokens = self.tokens.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return Batch(tokens, labels, self.positions)


def make_batch(rows: PackedRows, indices: np.ndarray, document_mask: bool, pin_memory: bool = False) -> Batch:
    """The rows `indices` as one batch. Under document_mask a label of another document than its token isn't
    scored."""
    both = rows.tokens_of(indices)  # (B, T + 1)
    tokens, labels, positions = both[:, :-1].copy(), both[:, 1:].copy(), None
    if (trained := rows.trained_of(indices)) is not None:
        labels[~trained[:, 1:]] = NOT_SCORED
    if document_mask:
        positions = np.tile(np.arange(rows.seq_len), (len(indices), 1))
        for b, row in enumerate(indices):
            starts = rows.document_starts_of(int(row))
            labels[b, starts - 1] = NOT_SCORED
            for start in starts[starts < rows.seq_len]:
                positions[b, start:] = np.arange(rows.seq_len - start)
    arrays = [torch.from_numpy(a) if a is not None else None for a in (tokens, labels, positions)]
    return Batch(*(a.pin_memory() if pin_memory and a is not None else a for a in arrays))


class RowReader:
    """Per step, the list of micro-batches of one dp rank; endless, epoch after epoch.

    Step s takes the next `global_batch_size` rows of the global order; each dp rank a contiguous slice of
    them. So the rows of a step depend on neither dp_size nor micro_batch_size. `position` counts the rows of
    the steps handed out, not what the thread has read ahead: a reader made with it goes on exactly there, on
    any number of ranks.
    """

    def __init__(
        self,
        rows: PackedRows,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        document_mask: bool = False,
        position: int = 0,
        pin_memory: bool = False,
    ):
        if min(global_batch_size, micro_batch_size) < 1 or global_batch_size % (dp_size * micro_batch_size):
            raise UsageError(
                f"--train.global-batch-size {global_batch_size} cannot be dealt to {dp_size} dp rank(s) "
                f"in micro-batches of --train.micro-batch-size {micro_batch_size} rows; use a multiple of "
                f"{dp_size * max(1, micro_batch_size)}."
            )
        self.position, self.global_batch_size = position, global_batch_size
        self._error, ready, stop = None, queue.Queue(maxsize=STEPS_AHEAD), threading.Event()
        rank_batch_size = global_batch_size // dp_size
        # (micros, B)
        own = dp_rank * rank_batch_size + np.arange(rank_batch_size).reshape(-1, micro_batch_size)

        def steps() -> Iterator[list[Batch]]:
            for first in itertools.count(position, STEPS_PERMUTED * global_batch_size):
                firsts = first + global_batch_size * np.arange(STEPS_PERMUTED)
                for micros in rows.rows_at(firsts[:, None, None] + own):
                    yield [make_batch(rows, micro, document_mask, pin_memory) for micro in micros]

        thread = threading.Thread(
            target=_read_ahead, args=(steps(), ready, stop), name="row-reader", daemon=True
        )
        # also at interpreter exit: a thread in the middle of torch then aborts the process ("terminate called
        # ...")
        self._ready, self._close = ready, weakref.finalize(self, _stop_reading, ready, stop, thread)
        thread.start()

    def __iter__(self) -> "RowReader":
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches. What went wrong in the thread is raised here."""
        if not self._close.alive:
            raise RuntimeError("this RowReader is closed")
        if self._error is None:
            step = self._ready.get()
            if not isinstance(step, BaseException):
                self.position += self.global_batch_size
                return step
            self._error = step
        raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call twice."""
        self._close()


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
    rows: PackedRows,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    document_mask: bool = False,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """This dp rank's share of the first `max_rows` held-out rows, in whole micro-batches.

    Every rank gets the same number of batches, because a sharded forward is a collective; what is missing is
    filled with rows without a scored label, so that the sums over ranks of loss and scored labels don't
    depend on dp_size.
    """
    held_out = rows.validation_rows()[:max_rows]
    stride = dp_size * micro_batch_size
    for first in range(dp_rank * micro_batch_size, -(-len(held_out) // stride) * stride, stride):
        indices = held_out[first : first + micro_batch_size]
        n_filled = micro_batch_size - len(indices)
        batch = make_batch(rows, np.concatenate([indices, np.repeat(held_out[:1], n_filled)]), document_mask)
        batch.labels[len(indices) :] = NOT_SCORED
        yield batch
