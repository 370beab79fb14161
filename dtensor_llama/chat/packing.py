"""Packed conversations: which of them stand in which sequence."""

import numpy as np

from dtensor_llama.chat.corpus import ChatCorpus
from dtensor_llama.data.sequences import PackedRows, mix_bits
from dtensor_llama.errors import UsageError


class PackedExamples(PackedRows):
    """Rows of whole conversations, one behind the other, the rest of a row filled with `pad_id`; no row has a
    part of one.

    A row is `seq_len` tokens here (one more, always padding, completes PackedRows' T + 1), so an example fits
    if it has at most that many. overlong: "drop" leaves longer ones out, "truncate" keeps their first
    `seq_len` tokens, unless none of those is trained. packing False: one example a row. Raises UsageError if
    no row is left to train on.

    n_examples, n_dropped, n_truncated: conversations in rows, too long and left out, too long and cut.
    """

    def __init__(
        self,
        corpus: ChatCorpus,
        seq_len: int,
        validation_share: float,
        seed: int,
        pad_id: int = 0,
        overlong: str = "drop",
        packing: bool = True,
    ):
        self.corpus, self.seq_len, self.pad_id = corpus, seq_len, pad_id
        self._key = mix_bits(np.array([seed % 2**64], dtype=np.uint64))
        starts = np.asarray(corpus.document_starts)
        lengths = np.diff(starts, append=corpus.n_tokens)
        is_long = lengths > seq_len
        # trained tokens before each offset, so that a cut example that has none left is seen; int64, 8 bytes
        # a token, briefly
        before = np.concatenate([[0], np.cumsum(corpus.trained, dtype=np.int64)]) if is_long.any() else None
        fits = ~is_long
        if overlong == "truncate" and before is not None:
            fits |= before[starts + np.minimum(lengths, seq_len)] > before[starts]
        self.n_examples, self.n_dropped, self.n_truncated = map(
            int, (fits.sum(), (~fits).sum(), (fits & is_long).sum())
        )
        if not self.n_examples:
            raise UsageError(
                f"--data.seq-len {seq_len}: every example is longer (the shortest has {lengths.min()} tokens), "
                f"and --data.overlong {overlong} leaves nothing to train on; use --data.seq-len {lengths.max()} "
                f"to keep all" + (", or --data.overlong truncate." if overlong == "drop" else ".")
            )
        self.starts, self.lengths = starts[fits], np.minimum(lengths, seq_len)[fits]
        self.examples, self.row_ends = (
            pack(self.lengths, seq_len)
            if packing
            else (np.arange(self.n_examples), np.arange(1, self.n_examples + 1))
        )
        self.n_rows = len(self.row_ends)
        self.n_validation = max(1, round(self.n_rows * validation_share)) if validation_share > 0 else 0
        self.n_train = self.n_rows - self.n_validation
        if self.n_train < 1:
            raise UsageError(
                f"--data.path: {self.n_examples} examples make {self.n_rows} row(s) of {seq_len} tokens, and with "
                f"{self.n_validation} held out none is left to train on; use --data.validation-share 0, a smaller "
                "--data.seq-len, or more data."
            )

    def examples_of(self, row: int) -> np.ndarray:
        """The examples in a row, in order."""
        return self.examples[self.row_ends[row - 1] if row else 0 : self.row_ends[row]]

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        return self._gather(self.corpus.tokens, rows, self.pad_id).astype(np.int64)

    def trained_of(self, rows: np.ndarray) -> np.ndarray:
        return self._gather(self.corpus.trained, rows, 0).astype(bool)

    def _gather(self, source: np.ndarray, rows: np.ndarray, fill: int) -> np.ndarray:
        out = np.full((len(rows), self.seq_len + 1), fill, dtype=source.dtype)
        for b, row in enumerate(rows):
            parts = [
                source[self.starts[i] : self.starts[i] + self.lengths[i]] for i in self.examples_of(int(row))
            ]
            joined = np.concatenate(parts)
            out[b, : len(joined)] = joined
        return out

    def document_starts_of(self, row: int) -> np.ndarray:
        """Offsets within the row, 1 .. T, at which another example begins, or the padding."""
        return np.cumsum(self.lengths[self.examples_of(row)])


def pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of `lengths` tokens, none above seq_len, into few rows: (examples in the order of rows, end of
    each row there).

    Best fit, longest first: each goes where it leaves the least room. Which rooms there are is a number's
    bits, the number of tokens that fit being the bit: finding the smallest that suffices is one shift, at any
    number of rows.
    """
    rows, with_room, rooms = [], [[] for _ in range(seq_len + 1)], 0
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(example)
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])
