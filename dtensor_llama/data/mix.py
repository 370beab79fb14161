"""Combines several corpora into one stream of sequences, in which each corpus has its share.

source: the packed sequences of one argument, such as web/*.jsonl:0.7 in data.path = web/*.jsonl:0.7
    books/*.txt:0.3. Each source has its own epochs and its own held-out sequences.
share: the part of all sequences that come from a source. It is its part of the tokens too, since all
    sequences are equally long. Nothing is drawn at random: any n consecutive sequences contain n x share of
    them, give or take one per source, so that each step sees the mixture that was asked for.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dtensor_llama.data.sequences import PackedSequences, Packing, Sequences
from dtensor_llama.data.sources import TextOptions, expand_paths
from dtensor_llama.data.tokenize import CacheDirs, prepare_corpus
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

UNITS = 2**30  # shares are counted in 1/UNITS, as integers, so that positions up to 2^33 are exact
LARGEST_WEIGHT = 1e100  # the sum of all weights must be a finite number, too


def open_sequences(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: CacheDirs,
    text: TextOptions,
    packing: Packing,
) -> "PackedSequences | MixedSequences":
    """Return the sequences of all `paths` as one corpus, or as a mixture if the paths have weights.

    Files that have not been tokenized yet are tokenized now. Raises UsageError for files, records or weights
    that cannot be used, and for a file that is in two sources of a mixture; the message begins with the path.
    """
    mixture = parse_mixture(paths)
    if mixture is None:
        return PackedSequences(prepare_corpus(paths, tokenizer, cache_dir, text), packing)
    sources, path_of = {}, {}
    for path, weight in mixture.items():
        try:
            for file in map(os.path.realpath, expand_paths([path])):
                if path_of.setdefault(file, path) != path:
                    raise UsageError(
                        f"{file} is in data.path={path_of[file]} too, which would train on what is held out "
                        "here; name it in one of them."
                    )
            sources[path] = (
                PackedSequences(prepare_corpus([path], tokenizer, cache_dir, text), packing),
                weight,
            )
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return MixedSequences(sources)


def parse_mixture(paths: Sequence[str]) -> dict[str, float] | None:
    """Return {path: weight} for arguments like "a.txt:0.7", or None if no argument has a weight.

    Only the proportions of the weights count. If a file has the whole argument as its name, colon included,
    the argument is a path without a weight. Raises UsageError for an impossible weight, for a path that comes
    twice, and if only some of the arguments have weights."""
    weights, plain = {}, []
    for argument in map(str, paths):
        path, _, text = argument.rpartition(":")
        weight = None if not path or Path(argument).exists() else _weight(text, path)
        if weight is None:
            plain.append(argument)
        elif not 0 < weight < LARGEST_WEIGHT:
            raise UsageError(
                f"data.path={argument}: the weight {text} is not possible; use a number above 0 and below "
                f"{LARGEST_WEIGHT:g}, or leave the path out."
            )
        elif path in weights:
            raise UsageError(
                f"data.path={path} is there twice, with the weights {weights[path]:g} and {weight:g}; use "
                "one."
            )
        else:
            weights[path] = weight
    if weights and plain:
        raise UsageError(
            f"data.path={plain[0]} has no weight and {next(iter(weights))} has one; give all of them one, "
            f"like {plain[0]}:{min(weights.values()):g}, or none."
        )
    return weights or None


def _weight(text: str, path: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        if Path(path).exists():
            raise UsageError(
                f"data.path={path}:{text}: {text!r} is no weight; use a number above 0, like 0.5."
            ) from None
        return None


class MixedSequences:
    """Mixes the sequences of several sources, {name: (sequences, weight)}, into one Sequences.

    Which sequence comes at a position is a pure function, as in PackedSequences. Sequences are numbered
    source by source, in the order of `sources`. Raises UsageError if a weight is so small that no sequence
    would ever be taken for it.
    """

    def __init__(self, sources: dict[str, tuple[Sequences, float]]):
        self.names, self.sources = list(sources), [sequences for sequences, _ in sources.values()]
        weights = [weight for _, weight in sources.values()]
        self.shares = [weight / sum(weights) for weight in weights]
        self.seq_len = self.sources[0].seq_len
        self.n_train = sum(source.n_train for source in self.sources)
        held_out = np.array([source.n_validation for source in self.sources])
        sizes = [source.n_train + source.n_validation for source in self.sources]
        self._first = np.cumsum([0, *sizes])  # the number of each source's first sequence
        # Of every UNITS sequences that go to the sources 0 .. k, this many go to the sources 0 .. k - 1.
        dealt_to = [sum(self.shares[:k]) for k in range(len(self.shares) + 1)]
        self._before = [round(UNITS * dealt_to[k] / dealt_to[k + 1]) for k in range(len(self.shares))]
        for name, share, before in zip(self.names[1:], self.shares[1:], self._before[1:], strict=True):
            if before in (0, UNITS):
                raise UsageError(
                    f"data.path={name}: its share of the sequences, {share:.1e}, is too small, or too large "
                    "compared with the others; use weights that are closer together."
                )
        # Held-out sequences are taken in the same proportions, until one source has no more of them.
        source, index = self._deal(np.arange(held_out.sum()))
        missing = np.flatnonzero(index >= held_out[source])
        self.n_validation = int(missing[0]) if len(missing) else len(index)

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (index of the source, position in the source's own order) for each position.

        First the last source is separated from all others, then the last of those, and so on. Of the first n
        sequences floor(n x part) belong to the others, so that sequence n belongs to them if this number
        grows by one."""
        source, index = np.zeros_like(positions), positions.copy()
        undecided = np.ones(positions.shape, dtype=bool)
        for k in range(len(self.sources) - 1, 0, -1):
            others, after = index * self._before[k] // UNITS, (index + 1) * self._before[k] // UNITS
            mine = undecided & (after == others)
            source[mine] = k
            index = np.where(mine, index - others, np.where(undecided, others, index))
            undecided &= ~mine
        return source, index

    def _gather(
        self, positions: np.ndarray, numbers_of: Callable[[Sequences, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the numbers of the sequences at `positions`.

        numbers_of(source, positions in the source's own order): finds those within one source"""
        source, index = self._deal(np.asarray(positions, dtype=np.int64))
        numbers = np.empty_like(index)
        for k, own in enumerate(self.sources):
            numbers[source == k] = self._first[k] + numbers_of(own, index[source == k])
        return numbers

    def sequences_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the sequences at `positions`, as PackedSequences.sequences_at does."""
        return self._gather(positions, lambda own, index: own.sequences_at(index))

    def validation_sequences(self) -> np.ndarray:
        """Return the numbers of the held-out sequences in the proportions of training, (n_validation,)."""
        return self._gather(
            np.arange(self.n_validation), lambda own, index: own.validation_sequences()[index]
        )

    def parts(self, n_sequences: int) -> list[tuple[str, Sequences, int]]:
        """Return (name, sequences, how many of the first n_sequences come from it) for each source."""
        counts, left = [], n_sequences
        for before in reversed(self._before):
            others = left * before // UNITS
            counts.append(left - others)
            left = others
        return list(zip(self.names, self.sources, reversed(counts), strict=True))

    def tokens_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token ids (N, T + 1) int64 of the sequences with these numbers (N,)."""
        return np.concatenate([source.tokens_of(np.array([own])) for source, own in map(self._find, numbers)])

    def trained_of(self, numbers: np.ndarray) -> None:
        """Return None, which means that every token counts as a label, as in PackedSequences."""

    def document_starts_of(self, number: int) -> np.ndarray:
        """Return the offsets within the sequence at which another document begins."""
        source, own = self._find(number)
        return source.document_starts_of(own)

    def _find(self, number: int) -> tuple[Sequences, int]:
        k = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.sources[k], int(number - self._first[k])

    @property
    def contents(self) -> str:
        """Describe the data in words, which are the same for the same sequences in the same order."""
        parts = zip(self.shares, self.sources, strict=True)
        return " + ".join(f"{share:.6g} x ({sequences.contents})" for share, sequences in parts)

    @property
    def content_hash(self) -> str:
        """Return the content hashes of all sources, joined by " + "."""
        return " + ".join(sequences.content_hash for sequences in self.sources)
