"""Packs conversations into sequences."""

from typing import Literal

import numpy as np

from dtensor_llama.chat.corpus import ChatCorpus
from dtensor_llama.data.sequences import Packing, Shuffled
from dtensor_llama.errors import UsageError


class PackedExamples(Shuffled):
    """Packs whole conversations (examples) into sequences, and fills the rest of each with `pad_id`.

    A sequence has `seq_len` tokens and one more, which is always padding. So an example fits if it has at
    most seq_len tokens.

    overlong: "drop" leaves out longer examples; "truncate" keeps their first seq_len tokens, if at least one
        of these counts in the loss
    packed: False puts each example into a sequence of its own
    n_examples, n_dropped, n_truncated: how many examples were packed, left out and cut
    Raises UsageError if no sequence is left to train on.
    """

    documents = "conversations"

    def __init__(
        self,
        corpus: ChatCorpus,
        packing: Packing,
        pad_id: int = 0,
        overlong: Literal["drop", "truncate"] = "drop",
        packed: bool = True,
    ):
        self.pad_id, T = pad_id, packing.seq_len
        starts = np.asarray(corpus.document_starts)
        lengths = np.diff(starts, append=corpus.n_tokens)
        is_long = lengths > T
        fits = ~is_long
        if overlong == "truncate" and is_long.any():
            # before: the number of trained tokens before each offset, which shows the examples that have none
            # left after the cut. For a moment it takes 8 bytes per token.
            before = np.concatenate([[0], np.cumsum(corpus.trained, dtype=np.int64)])
            fits |= before[starts + np.minimum(lengths, T)] > before[starts]
        self.n_examples, self.n_dropped = int(fits.sum()), int((~fits).sum())
        self.n_truncated = int((fits & is_long).sum())
        if not self.n_examples:
            or_cut = ", or overlong=truncate" if overlong == "drop" else ""
            raise UsageError(
                f"seq_len={T}: every example is longer (the shortest has {lengths.min()} tokens), and "
                f"overlong={overlong} leaves nothing to train on; use seq_len={lengths.max()} to keep "
                f"all{or_cut}."
            )
        self.starts, self.lengths = starts[fits], np.minimum(lengths, T)[fits]
        if packed:
            self.examples, self.sequence_ends = pack(self.lengths, T)
        else:
            self.examples = np.arange(self.n_examples)
            self.sequence_ends = self.examples + 1
        super().__init__(corpus, len(self.sequence_ends), packing)
        if self.n_train < 1:
            raise UsageError(
                f"`data.path`: {self.n_examples} examples make {self.n_sequences} sequence(s) of {T} tokens, "
                f"and with {self.n_validation} held out none is left to train on; use validation_share=0, a "
                "smaller `seq_len`, or more data."
            )

    def examples_of(self, number: int) -> np.ndarray:
        """Return the numbers of the examples in the sequence with this number, in order."""
        first = self.sequence_ends[number - 1] if number else 0
        return self.examples[first : self.sequence_ends[number]]

    def tokens_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token ids (N, T + 1) int64 of the sequences with these numbers (N,)."""
        return self._gather(self.corpus.tokens, numbers, self.pad_id).astype(np.int64)

    def trained_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return (N, T + 1) bool: which tokens of the sequences with these numbers (N,) count in the loss."""
        return self._gather(self.corpus.trained, numbers, 0).astype(bool)

    def _gather(self, source: np.ndarray, numbers: np.ndarray, fill: int) -> np.ndarray:
        gathered = np.full((len(numbers), self.seq_len + 1), fill, dtype=source.dtype)
        for b, number in enumerate(numbers):
            spans = [source[self.span_of(example)] for example in self.examples_of(int(number))]
            joined = np.concatenate(spans)
            gathered[b, : len(joined)] = joined
        return gathered

    def span_of(self, example: int) -> slice:
        """Return the slice of the corpus that holds the tokens of an example."""
        return slice(self.starts[example], self.starts[example] + self.lengths[example])

    def document_starts_of(self, number: int) -> np.ndarray:
        """Return the offsets within the sequence, 1 .. T, at which another example or the padding begins."""
        return np.cumsum(self.lengths[self.examples_of(number)])


def pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples into few sequences by best fit, the longest example first.

    lengths: (n_examples,), tokens of each example, none above seq_len
    Returns the examples in the order of the sequences, (n_examples,), and where in it each sequence ends,
    (n_sequences,).
    Best fit puts an example into the sequence where it leaves the least room. `rooms` is a bit mask: bit n is
    set if some sequence has n free tokens. The lowest set bit of `rooms >> length` stands for the tightest
    fit.
    """
    sequences, with_room, rooms = [], [[] for _ in range(seq_len + 1)], 0
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = seq_len, len(sequences)
            sequences.append([])
        sequences[number].append(example)
        if room > length:
            with_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return np.concatenate(sequences), np.cumsum([len(examples) for examples in sequences])
