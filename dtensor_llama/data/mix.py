"""Several corpora as one stream of rows, each with its share: `--data.path web/*.jsonl:0.7 books/*.txt:0.3`.

source: the packed rows of one argument; its epochs and its held-out rows are its own
share: of the rows, and so of the tokens, since all rows are of one length. Not drawn by chance but dealt: any
    stretch of n rows has n x share rows of a source, give or take one per source. So each step sees the
    mixture that was asked for.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtensor_llama.data.sequences import PackedRows
from dtensor_llama.data.sources import TextOptions
from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

UNITS = 2**30  # of a share: integers, so that positions up to 2^33 are dealt exactly


def open_rows(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path | Sequence[str | Path],
    text_field: str | TextOptions,
    seq_len: int,
    validation_share: float,
    seed: int,
) -> "PackedRows | MixedRows":
    """The rows of `paths`, tokenized now if need be: of all of them together, or mixed if they have
    weights."""
    mixture = parse_mixture(paths)
    if mixture is None:
        return PackedRows(
            prepare_corpus(paths, tokenizer, cache_dir, text_field), seq_len, validation_share, seed
        )
    sources = {}
    for path, weight in mixture.items():
        try:
            corpus = prepare_corpus([path], tokenizer, cache_dir, text_field)
            sources[path] = PackedRows(corpus, seq_len, validation_share, seed), weight
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return MixedRows(sources)


def parse_mixture(paths: Sequence[str]) -> dict[str, float] | None:
    """{path: weight} of arguments like "a.txt:0.7"; None if none has a weight. Only the proportions of
    weights count.

    A file that is really called so is a path without weight. UsageError for weights that cannot be."""
    weights, plain = {}, []
    for argument in map(str, paths):
        path, colon, text = argument.rpartition(":")
        try:
            weight = float(text) if colon and not Path(argument).exists() else None
        except ValueError:
            if Path(path).exists():
                raise UsageError(
                    f"--data.path {argument}: {text!r} is no weight; use a number above 0, like 0.5."
                ) from None
            weight = None
        if weight is None:
            plain.append(argument)
        elif not 0 < weight < math.inf:
            raise UsageError(
                f"--data.path {argument}: the weight {text} is not possible; use a number above 0, or leave the "
                "path out."
            )
        elif path in weights:
            raise UsageError(
                f"--data.path {path} is there twice, with the weights {weights[path]:g} and {weight:g}; use one."
            )
        else:
            weights[path] = weight
    if weights and plain:
        raise UsageError(
            f"--data.path {plain[0]} has no weight and {next(iter(weights))} has one; give all of them one, like "
            f"{plain[0]}:{min(weights.values()):g}, or none."
        )
    return weights or None


class MixedRows:
    """Rows of several sources (name -> (rows, weight)) dealt by weight; used as PackedRows is.

    Which row stands at a position is a pure function, as there. A row's number says its source too: those of
    a source come after those of the sources before it. Raises UsageError if a weight is so small that it
    would never be dealt."""

    def __init__(self, sources: dict[str, tuple[PackedRows, float]]):
        self.names, self.sources = list(sources), [rows for rows, _ in sources.values()]
        total = sum(weight for _, weight in sources.values())
        self.shares = [weight / total for _, weight in sources.values()]
        self.seq_len = self.sources[0].seq_len
        # row number at which a source begins
        self._first = np.cumsum([0, *(rows.n_rows for rows in self.sources)])
        # Of what is dealt to the sources 0 .. k, the part that goes to 0 .. k - 1, in UNITS.
        self._before = [
            round(UNITS * sum(self.shares[:k]) / sum(self.shares[: k + 1])) for k in range(len(self.shares))
        ]
        for name, share, before in zip(self.names[1:], self.shares[1:], self._before[1:], strict=True):
            if before in (0, UNITS):
                raise UsageError(
                    f"--data.path {name}: its share of {share:.1e} of the rows is too small, or too large beside "
                    "the others, to be dealt; use weights closer together."
                )
        source, index = self._deal(np.arange(sum(rows.n_validation for rows in self.sources)))
        held_out = np.array([rows.n_validation for rows in self.sources])
        missing = np.flatnonzero(index >= held_out[source])
        self.n_validation = int(missing[0]) if len(missing) else len(index)
        self.n_train = sum(rows.n_train for rows in self.sources)

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, which of its rows in its own order) at positions. The last source is split off the others,
        then the last of those: of n rows, floor(n x part) go to the others, so row n does if that grows by
        one."""
        source, index = np.zeros_like(positions), positions.copy()
        undecided = np.ones(positions.shape, dtype=bool)
        for k in range(len(self.sources) - 1, 0, -1):
            others, after = (index * self._before[k] // UNITS, (index + 1) * self._before[k] // UNITS)
            mine = undecided & (after == others)
            source[mine] = k
            index = np.where(mine, index - others, np.where(undecided, others, index))
            undecided &= ~mine
        return source, index

    def parts(self, n_rows: int) -> list[tuple[str, PackedRows, int]]:
        """As PackedRows.parts."""
        dealt, left = [], n_rows
        for before in reversed(self._before[1:]):
            dealt.append(left - left * before // UNITS)
            left = left * before // UNITS
        return list(zip(self.names, self.sources, [left, *reversed(dealt)], strict=True))

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """As PackedRows.rows_at."""
        source, index = self._deal(np.asarray(positions, dtype=np.int64))
        rows = np.empty_like(index)
        for k, own in enumerate(self.sources):
            rows[source == k] = self._first[k] + own.rows_at(index[source == k])
        return rows

    def validation_rows(self) -> np.ndarray:
        """Held-out rows in the proportions of training, (n_validation,): as many as there are until one
        source has no more."""
        source, index = self._deal(np.arange(self.n_validation))
        held_out = [own.validation_rows() for own in self.sources]
        return np.array(
            [self._first[k] + held_out[k][i] for k, i in zip(source, index, strict=True)], dtype=np.int64
        )

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """(N, T + 1) int64 token ids of (N,) rows."""
        return np.concatenate([source.tokens_of(np.array([row])) for source, row in map(self._find, rows)])

    def trained_of(self, rows: np.ndarray) -> None:
        """Every token counts, as in PackedRows of plain text."""

    def document_starts_of(self, row: int) -> np.ndarray:
        """As PackedRows.document_starts_of."""
        source, own = self._find(row)
        return source.document_starts_of(own)

    def _find(self, row: int) -> tuple[PackedRows, int]:
        k = int(np.searchsorted(self._first, row, side="right")) - 1
        return self.sources[k], int(row - self._first[k])

    @property
    def contents(self) -> str:
        """What is read, in words: the same for the same rows in the same order."""
        return " + ".join(
            f"{share:.6g} x ({rows.contents})" for share, rows in zip(self.shares, self.sources, strict=True)
        )

    @property
    def content_hash(self) -> str:
        """As PackedRows.content_hash: of each source in turn."""
        return " + ".join(rows.content_hash for rows in self.sources)
