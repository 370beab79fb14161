"""Packs a tokenized corpus into sequences: which tokens each one has, and in what order they are read.

sequence: T + 1 consecutive tokens, which make T inputs and T labels shifted by one. Its last token is also
    the first one of the next sequence.
position: how far a run has come in the global order of sequences. It keeps growing over all epochs:
    epoch = position // n_train.

Everything is a pure function of (corpus, seq_len, seed). No list of sequences is stored, so memory does not
depend on the size of the corpus.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dtensor_llama.errors import UsageError
from dtensor_llama.terminal import Say

# Rounds of the Feistel network. 4 give a pseudo-random permutation (Luby and Rackoff 1988); 2 are a reserve.
ROUNDS = 6
SKIPPED = "bad-records.jsonl"  # has one line for each record that bad_records="skip" left out


class Sequences(Protocol):
    """Describes what data of your own must provide: numbered token sequences of one length.

    n_train: the number of sequences to train on in an epoch
    n_validation: the number of held-out sequences
    contents, content_hash: they identify the data. A checkpoint resumes only on data with the same two."""

    seq_len: int
    n_train: int
    n_validation: int
    contents: str
    content_hash: str

    # Positions, an array of any shape -> the numbers of the sequences to train on there, in the same shape.
    def sequences_at(self, positions: np.ndarray) -> np.ndarray: ...

    # (n_validation,): the numbers of the held-out sequences.
    def validation_sequences(self) -> np.ndarray: ...

    # Sequence numbers (N,) -> token ids (N, seq_len + 1) int64.
    def tokens_of(self, numbers: np.ndarray) -> np.ndarray: ...

    # Sequence numbers (N,) -> (N, seq_len + 1) bool: which tokens count as labels. None: all of them.
    def trained_of(self, numbers: np.ndarray) -> np.ndarray | None: ...

    # The offsets above 0, in one sequence, at which a document begins.
    def document_starts_of(self, number: int) -> np.ndarray: ...

    # See Shuffled.parts.
    def parts(self, n_sequences: int) -> list[tuple[str, "Sequences", int]]: ...


class TokenCorpus:
    """Maps a folder that `prepare_corpus` wrote into memory. Opening it reads no tokens.

    tokens: (n_tokens,) uint16 or uint32
    document_starts: (n_documents,) int64, offsets into `tokens`
    content_hash: equal for equal tokens, documents and masks, and only for those; "" in folders of older
        versions, which have none
    skipped: {what is wrong: the number of records that were left out for it}
    bad_records: the path of the file that lists those records
    Raises UsageError if a file is missing, unreadable or of the wrong size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.bad_records = self.folder / SKIPPED
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.n_tokens, self.n_documents = self.meta["n_tokens"], self.meta["n_documents"]
            self.tokens = self._mapped("tokens.bin", self.meta["dtype"])
            self.document_starts = self._mapped("documents.bin", np.int64)
            damage = (len(self.tokens), len(self.document_starts)) != (self.n_tokens, self.n_documents)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = error
        if damage:
            raise UsageError(
                f"{self.folder}: these tokens are damaged (a file is missing, unreadable or not of the "
                f"size that meta.json says); delete the folder, and the next run writes it again."
            )
        self.content_hash = self.meta.get("content_hash", "")
        self.skipped = self.meta.get("skipped", {})

    def _mapped(self, name: str, dtype) -> np.memmap:
        return np.memmap(self.folder / name, np.dtype(dtype), mode="r")


@dataclass(frozen=True)
class Packing:
    """Decides how the tokens of a corpus become sequences, and which of them are held out."""

    seq_len: int  # T
    validation_share: float = 0.0  # the part of the sequences that is held out, at least one; 0: none
    seed: int = 0  # decides the order of the sequences, and which of them are held out

    def __post_init__(self):
        if self.seq_len < 1 or not 0 <= self.validation_share < 1:
            raise UsageError(
                f"seq_len={self.seq_len} must be at least 1, and validation_share={self.validation_share} "
                "at least 0 and below 1."
            )


class Shuffled:
    """Splits n_sequences sequences into those to train on and a held-out share, and shuffles both."""

    documents = "documents"  # what those of the corpus are called

    def __init__(self, corpus: TokenCorpus, n_sequences: int, packing: Packing):
        self.corpus = corpus
        self.n_sequences, self.seq_len, share = n_sequences, packing.seq_len, packing.validation_share
        self.n_validation = max(1, round(n_sequences * share)) if share > 0 else 0
        self.n_train = n_sequences - self.n_validation
        self._key = splitmix64(np.array([packing.seed % 2**64], dtype=np.uint64).view(np.int64))

    @property
    def contents(self) -> str:
        """Describe the data in words, which are the same for the same tokens."""
        return f"{self.corpus.n_tokens} tokens in {self.corpus.n_documents} {self.documents}"

    @property
    def content_hash(self) -> str:
        """Return a hash that is equal for equal tokens in the same order with the same mask."""
        return self.corpus.content_hash

    def parts(self, n_sequences: int) -> list[tuple[str, "Shuffled", int]]:
        """Return (name, sequences, how many of the first n_sequences come from it) for each source.

        The first are the first to train on. Here there is one source, and its name is empty. MixedSequences
        has several."""
        return [("", self, n_sequences)]

    def sequences_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the sequences at `positions`, an array of any shape.

        Each epoch is another permutation."""
        epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), self.n_train)
        return self._split(permute(index, self.n_train, splitmix64(self._key + splitmix64(epochs))))

    def validation_sequences(self) -> np.ndarray:
        """Return the numbers of all held-out sequences, (n_validation,), in an order that never changes."""
        return self._split(self.n_train + np.arange(self.n_validation))

    def _split(self, index: np.ndarray) -> np.ndarray:
        """Return the sequence numbers at `index` in one shuffled order; its first n_train are trained on."""
        return permute(index, self.n_sequences, np.full(index.shape, self._key))


class PackedSequences(Shuffled):
    """Cuts a corpus into sequences of consecutive tokens, and drops the tokens after the last whole one.

    Raises UsageError if the corpus is too small to leave a sequence to train on.
    """

    def __init__(self, corpus: TokenCorpus, packing: Packing):
        super().__init__(corpus, max(0, corpus.n_tokens - 1) // packing.seq_len, packing)
        T = packing.seq_len
        if self.n_train < 1 and self.n_sequences > 1:
            raise UsageError(
                f"validation_share={packing.validation_share} holds out all {self.n_sequences} sequences of "
                f"seq_len={T}, and none is left to train on: use a smaller share, such as 0.01."
            )
        if self.n_train < 1:
            fitting = (corpus.n_tokens - 1) // (2 if packing.validation_share > 0 else 1)
            shorter = f"use seq_len={fitting} or less, or " if fitting > 0 else ""
            raise UsageError(
                f"seq_len={T}: the data has {corpus.n_tokens} tokens, {self.n_sequences} sequences of {T} + "
                f"1; with {self.n_validation} held out none is left to train on: {shorter}give more text."
            )

    def tokens_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token ids (N, T + 1) int64 of the sequences with these numbers (N,)."""
        T = self.seq_len
        return np.stack([self.corpus.tokens[k * T : k * T + T + 1] for k in numbers]).astype(np.int64)

    def trained_of(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return (N, T + 1) bool, which tokens count as labels; None means all of them."""
        return None

    def document_starts_of(self, number: int) -> np.ndarray:
        """Return the offsets within the sequence, 1 .. T, at which another document begins."""
        first = number * self.seq_len
        starts = self.corpus.document_starts
        low, high = np.searchsorted(starts, [first + 1, first + self.seq_len + 1])
        return np.asarray(starts[low:high]) - first


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Map each index below n by a pseudo-random bijection of 0 .. n - 1 that its key chooses.

    index and keys are int64 arrays of one shape, and so is the result.
    A Feistel network permutes the 2^(2h) >= n numbers of 2h bits. A result that is not below n is fed in
    again until it is (cycle walking, Black and Rogaway 2002: fewer than 4 times on average), so that the
    whole map is a bijection.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    image, outside = index.astype(np.int64), np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = image[outside] >> half_bits, image[outside] & mask
        for round_number in range(ROUNDS):
            noise = splitmix64(splitmix64(keys[outside] + round_number) ^ right)
            left, right = right, left ^ (noise & mask)
        image[outside] = left << half_bits | right
        outside = image >= n
    return image


def splitmix64(x):
    """Mix the bits of an int64 array of numpy or torch, so that each input bit affects each output bit.

    Source: Steele, Lea and Flood 2014. The constants are 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and
    0x94D049BB133111EB, written as signed numbers because torch has no arithmetic on uint64. The masks turn
    the arithmetic shifts of signed numbers into logical ones.
    """
    x = x + -7046029254386353131
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def log_skipped(corpora: Iterable[TokenCorpus], run_dir: Path | None, log: Say) -> None:
    """Log how many bad records were left out, why, and where they are listed.

    With a run folder, the lists of all corpora are copied into RUN/bad-records.jsonl."""
    corpora = [corpus for corpus in corpora if corpus.skipped]
    if not corpora:
        return
    skipped, lists = Counter(), [corpus.bad_records for corpus in corpora]
    for corpus in corpora:
        skipped.update(corpus.skipped)
    if run_dir is not None:
        (run_dir / SKIPPED).write_bytes(b"".join(one.read_bytes() for one in lists))
        lists = [run_dir / SKIPPED]
    listed_in = ", ".join(map(str, lists))
    log(f"skipped   {skipped.total():,} bad records: {in_words(skipped)}; listed in {listed_in}")


def in_words(skipped: dict[str, int]) -> str:
    """Join counted reasons, the most frequent one first, as in "2 unknown format, 1 no assistant turn"."""
    return ", ".join(f"{n:,} {reason}" for reason, n in Counter(skipped).most_common())
