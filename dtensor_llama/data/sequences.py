"""Packed rows over a tokenized corpus: which tokens make row i, which rows train, and in what order.

row: T + 1 consecutive tokens, T inputs and T labels shifted by one; the last token is also the next row's
    first
position: how far a run has come, in rows of the global order; it never wraps, epoch = position // training
    rows Everything is a pure function of (corpus, seq_len, seed): no list of rows is stored, however long the
    corpus.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dtensor_llama.errors import UsageError

ROUNDS = 6  # of the Feistel network: 4 make a pseudo-random permutation (Luby and Rackoff 1988), 2 to spare


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
            mix_bits(np.array([seed % 2**64], dtype=np.uint64)),
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
        return self._split(
            permute(index, self.n_train, mix_bits(self._key + mix_bits(epochs.astype(np.uint64))))
        )

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
            noise = mix_bits(mix_bits(keys[outside] + np.uint64(round_number)) ^ right)
            left, right = right, left ^ (noise & mask)
        image[outside] = left << half_bits | right
        outside = image >= np.uint64(n)
    return image.astype(np.int64)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def say_skipped(corpora: Iterable[TokenCorpus], run_dir: Path | None, say) -> None:
    """How many bad records were left out and why. They are listed in RUN/bad-records.jsonl, if there is a run
    folder."""
    skipped, lists = Counter(), []
    for corpus in corpora:
        skipped += Counter(corpus.skipped)
        lists += [corpus.bad_records] if corpus.skipped else []
    listed_in = [str(one) for one in lists]
    if lists and run_dir is not None:
        listed_in = [str(run_dir / SKIPPED)]
        (run_dir / SKIPPED).write_bytes(b"".join(one.read_bytes() for one in lists))
    if skipped:
        reasons = ", ".join(reasons_in_order(skipped))
        say(f"skipped   {sum(skipped.values()):,} bad records: {reasons}; listed in {', '.join(listed_in)}")


def reasons_in_order(skipped: dict[str, int]) -> Iterable[str]:
    """ "2 no assistant turn", the most frequent first."""
    return (f"{n:,} {reason}" for reason, n in sorted(skipped.items(), key=lambda pair: -pair[1]))
