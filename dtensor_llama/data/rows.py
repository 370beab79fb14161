"""Packed rows over a tokenized corpus: which tokens make row i, which rows train, and in what order.

row: T + 1 consecutive tokens, T inputs and T labels shifted by one; the last token is also the next row's
    first
position: how far a run has come, in rows of the global order; it never wraps, epoch = position // training
    rows Everything is a pure function of (corpus, seq_len, seed): no list of rows is stored, however long the
    corpus.
"""

import json
from pathlib import Path

import numpy as np

from dtensor_llama.errors import UsageError

ROUNDS = 6  # of the Feistel network: 4 make a pseudo-random permutation (Luby and Rackoff 1988), 2 to spare


# Records that are no conversation to train on are counted as these, and left out.
EMPTY_ANSWER = "with an empty answer"
NOTHING_TRAINED = "in which no answer is to be trained"
SKIPPED = "bad-records.jsonl"  # those that --data.bad-records skip left out, one a line


class TokenCorpus:
    """A folder written by `prepare_corpus`, mapped into memory: opening it reads nothing.

    tokens: (n_tokens,) uint16 or uint32. document_starts: (n_documents,) int64, offsets into `tokens`.
    content_hash: the same for the same tokens, documents and masks, and for no others; "" if whoever wrote it
        made none.
    skipped: how many records were left out by what is wrong with them; bad_records: the file that lists them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.n_tokens, self.n_documents, dtype = (
                meta["n_tokens"],
                meta["n_documents"],
                np.dtype(meta["dtype"]),
            )
            self.content_hash = meta.get("content_hash", "")
            self.skipped, self.bad_records = meta.get("skipped", {}), self.folder / SKIPPED
            self.tokens = np.memmap(self.folder / "tokens.bin", dtype, mode="r")
            self.document_starts = np.memmap(self.folder / "documents.bin", np.int64, mode="r")
            damage = (len(self.tokens), len(self.document_starts)) != (self.n_tokens, self.n_documents)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = error
        if damage:
            raise UsageError(
                f"{self.folder}: these tokens are damaged (a file is missing, unreadable or not of the "
                f"size that meta.json says); delete the folder, and the next run writes it again."
            )


class ChatCorpus(TokenCorpus):
    """A folder written by `prepare_chat`: documents are conversations.

    trained: (n_tokens,) uint8, 1 where a token is trained. counts: records of each format, and those left
    out.
    unread: fields that nothing reads, and in how many records they stand. end_ids: the tokens that end an
    answer, at which generation has to stop.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.counts, self.unread, self.end_ids = meta["counts"], meta["unread"], meta["end_ids"]
        self.trained = np.memmap(self.folder / "trained.bin", np.uint8, mode="r")


class PackedRows:
    """Rows of `seq_len` tokens, split by `seed` into training rows and a held-out share.

    Raises UsageError if the corpus is too small to leave a training row.
    """

    def __init__(self, corpus: TokenCorpus, seq_len: int, validation_share: float, seed: int):
        if seq_len < 1 or not 0 <= validation_share < 1:
            raise UsageError(
                f"--data.seq-len {seq_len} must be at least 1, the validation share {validation_share} at "
                f"least 0 and below 1."
            )
        self.corpus, self.seq_len, self._key = (
            corpus,
            seq_len,
            _mix(np.array([seed % 2**64], dtype=np.uint64)),
        )
        # the tokens after the last whole row are dropped
        self.n_rows = max(0, corpus.n_tokens - 1) // seq_len
        self.n_validation = max(1, round(self.n_rows * validation_share)) if validation_share > 0 else 0
        self.n_train = self.n_rows - self.n_validation
        if self.n_train < 1:
            fitting = (corpus.n_tokens - 1) // (2 if validation_share > 0 else 1)
            advice = (
                f"use --data.seq-len {fitting} or less, or give more text"
                if fitting > 0
                else "give more text"
            )
            raise UsageError(
                f"--data.seq-len {seq_len}: the data has {corpus.n_tokens} tokens, {self.n_rows} rows of "
                f"{seq_len} + 1; with {self.n_validation} held out none is left to train on: {advice}."
            )

    @property
    def contents(self) -> str:
        """What is read, in words: the same for the same tokens."""
        return f"{self.corpus.n_tokens} tokens in {self.corpus.n_documents} documents"

    @property
    def content_hash(self) -> str:
        """The same for the same tokens in the same order, and for no others."""
        return self.corpus.content_hash

    def parts(self, n_rows: int) -> list[tuple[str, "PackedRows", int]]:
        """(name, rows, how many of the first n of the training order are of them): here of all, of MixedRows
        of each source."""
        return [("", self, n_rows)]

    def row_at(self, position: int) -> int:
        """The row that stands at `position` of the global training order."""
        return int(self.rows_at(np.array([position]))[0])

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions, an array of any shape: every epoch is a permutation of the training rows of its
        own."""
        epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), self.n_train)
        return self._split(permute(index, self.n_train, _mix(self._key + _mix(epochs.astype(np.uint64)))))

    def validation_rows(self) -> np.ndarray:
        """All held-out rows, (n_validation,), in an order that never changes."""
        return self._split(self.n_train + np.arange(self.n_validation))

    def _split(self, index: np.ndarray) -> np.ndarray:
        """One fixed shuffle of all rows: the first n_train of it train, the rest are held out."""
        return permute(index, self.n_rows, np.full(index.shape, self._key))

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """(N, T + 1) int64 token ids of (N,) rows."""
        T = self.seq_len
        return np.stack([self.corpus.tokens[row * T : row * T + T + 1] for row in rows]).astype(np.int64)

    def trained_of(self, rows: np.ndarray) -> np.ndarray | None:
        """(N, T + 1) bool: the tokens that count as labels; None: all of them."""
        return None

    def document_starts_of(self, row: int) -> np.ndarray:
        """Offsets within the row, 1 .. T, at which another document begins."""
        first = row * self.seq_len
        starts = self.corpus.document_starts
        low, high = np.searchsorted(starts, [first + 1, first + self.seq_len + 1])
        return np.asarray(starts[low:high]) - first


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
        self._key = _mix(np.array([seed % 2**64], dtype=np.uint64))
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


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Images of indices below n under the pseudo-random bijections of 0 .. n - 1 that uint64 keys of their
    shape name.

    A Feistel network permutes the 2^(2h) >= n numbers of 2h bits; an image not below n is fed in again until
    it is (cycle walking, Black and Rogaway 2002: fewer than 4 times on average), which leaves a bijection.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    image, outside = index.astype(np.uint64), np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = image[outside] >> half_bits, image[outside] & mask
        for round_number in range(ROUNDS):
            noise = _mix(_mix(keys[outside] + np.uint64(round_number)) ^ right)
            left, right = right, left ^ (noise & mask)
        image[outside] = left << half_bits | right
        outside = image >= np.uint64(n)
    return image.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
