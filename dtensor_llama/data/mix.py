"""Several corpora as one stream of sequences, each with its share.

source: the packed sequences of one argument, as in data.path = web/*.jsonl:0.7 books/*.txt:0.3; its epochs
    and its held-out sequences are its own
share: its part of the sequences, and so of the tokens, since all sequences have one length. It is dealt and
    not drawn by chance: any stretch of n sequences has n x share of them, give or take one per source, so
    that each step sees the mixture that was asked for.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dtensor_llama.data.sequences import PackedSequences, Packing, Sequences
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

UNITS = 2**30  # of a share: integers, so that positions up to 2^33 are dealt exactly


def open_sequences(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path | Sequence[str | Path],
    text: TextOptions,
    packing: Packing,
) -> "PackedSequences | MixedSequences":
    """Return the sequences of `paths`: of all of them together, or mixed if they have weights.

    What is not tokenized yet is tokenized now."""
    mixture = parse_mixture(paths)
    if mixture is None:
        return PackedSequences(prepare_corpus(paths, tokenizer, cache_dir, text), packing)
    sources = {}
    for path, weight in mixture.items():
        try:
            sources[path] = (
                PackedSequences(prepare_corpus([path], tokenizer, cache_dir, text), packing),
                weight,
            )
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return MixedSequences(sources)


def parse_mixture(paths: Sequence[str]) -> dict[str, float] | None:
    """Return {path: weight} of arguments like "a.txt:0.7"; None if none has a weight.

    Only the proportions of weights count. If a file with the whole name exists, the argument is a path
    without a weight. Raises UsageError for weights that are not possible."""
    weights, plain = {}, []
    for argument in map(str, paths):
        path, _, text = argument.rpartition(":")
        weight = None if not path or Path(argument).exists() else _weight(text, path)
        if weight is None:
            plain.append(argument)
        elif not 0 < weight < math.inf:
            raise UsageError(
                f"data.path={argument}: the weight {text} is not possible; use a number above 0, or leave "
                "the path out."
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
    """Deals the sequences of several sources, {name: (sequences, weight)}, by weight, as one Sequences.

    Which row stands at a position is a pure function, as in PackedSequences. The numbers of a source's rows
    come after those of the sources before it. Raises UsageError if a weight is so small that it would never
    be dealt.
    """

    def __init__(self, sources: dict[str, tuple[Sequences, float]]):
        self.names, self.sources = list(sources), [sequences for sequences, _ in sources.values()]
        weights = [weight for _, weight in sources.values()]
        self.shares = [weight / sum(weights) for weight in weights]
        self.seq_len = self.sources[0].seq_len
        self.n_train = sum(source.n_train for source in self.sources)
        held_out = np.array([source.n_validation for source in self.sources])
        sizes = [source.n_train + source.n_validation for source in self.sources]
        self._first = np.cumsum([0, *sizes])  # the number of each source's first row
        # Of what is dealt to the sources 0 .. k, the part that goes to 0 .. k - 1, in UNITS.
        dealt_to = [sum(self.shares[:k]) for k in range(len(self.shares) + 1)]
        self._before = [round(UNITS * dealt_to[k] / dealt_to[k + 1]) for k in range(len(self.shares))]
        for name, share, before in zip(self.names[1:], self.shares[1:], self._before[1:], strict=True):
            if before in (0, UNITS):
                raise UsageError(
                    f"data.path={name}: its share of {share:.1e} of the sequences is too small, or too "
                    "large beside the others, to be dealt; use weights closer together."
                )
        # Sequences are held out in the same proportions, until one source has no more.
        source, index = self._deal(np.arange(held_out.sum()))
        missing = np.flatnonzero(index >= held_out[source])
        self.n_validation = int(missing[0]) if len(missing) else len(index)

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, position in the source's own order) for each position.

        The last source is split off the others, then the last of those, and so on. Of n rows floor(n x part)
        go to the others, so row n goes there if that number grows by one."""
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
        self, positions: np.ndarray, rows_of: Callable[[Sequences, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the rows at positions, each by rows_of(source, positions in the source's own order)."""
        source, index = self._deal(np.asarray(positions, dtype=np.int64))
        rows = np.empty_like(index)
        for k, own in enumerate(self.sources):
            rows[source == k] = self._first[k] + rows_of(own, index[source == k])
        return rows

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at positions, as PackedSequences.rows_at does."""
        return self._gather(positions, lambda own, index: own.rows_at(index))

    def validation_rows(self) -> np.ndarray:
        """Return the held-out rows in the proportions of training, (n_validation,)."""
        return self._gather(np.arange(self.n_validation), lambda own, index: own.validation_rows()[index])

    def parts(self, n_rows: int) -> list[tuple[str, Sequences, int]]:
        """Return (name, sequences, how many of the first n_rows come from it) of each source."""
        counts, left = [], n_rows
        for before in reversed(self._before):
            others = left * before // UNITS
            counts.append(left - others)
            left = others
        return list(zip(self.names, self.sources, reversed(counts), strict=True))

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the (N, T + 1) int64 token ids of (N,) rows."""
        return np.concatenate([source.tokens_of(np.array([own])) for source, own in map(self._find, rows)])

    def trained_of(self, rows: np.ndarray) -> None:
        """Return None: every token counts, as in PackedSequences."""

    def document_starts_of(self, row: int) -> np.ndarray:
        """Return the offsets within the row at which another document begins."""
        source, own = self._find(row)
        return source.document_starts_of(own)

    def _find(self, row: int) -> tuple[Sequences, int]:
        k = int(np.searchsorted(self._first, row, side="right")) - 1
        return self.sources[k], int(row - self._first[k])

    @property
    def contents(self) -> str:
        """Describe the data in words: the same for the same sequences in the same order."""
        parts = zip(self.shares, self.sources, strict=True)
        return " + ".join(f"{share:.6g} x ({sequences.contents})" for share, sequences in parts)

    @property
    def content_hash(self) -> str:
        """Return the hashes of all sources."""
        return " + ".join(sequences.content_hash for sequences in self.sources)
