"""Cuts a long text into pieces whose ids, joined, are exactly the ids of the whole text.

Why it cuts: one core should not have to tokenize a whole book, and memory should not have to hold it. The
libraries also slow down on long texts: to LLaMA's BPE, which does not split text into words, a text is one
long word (2.5 MB/s on pieces of 1 MB, 6.5 MB/s on pieces of 16 kB).

Where it cuts: only at whitespace between two other characters, and only where a trial shows that the
tokenizer puts a token boundary there.
"""

import re
from collections.abc import Iterator

from dtensor_llama.data.tokenizer import Tokenizer

# A cut is checked on this many characters on each side, many times the longest piece of any vocabulary.
# `tokenizers` caches texts shorter than 256 bytes, which would cost 30 MB in each worker.
WINDOW_CHARS = 300
# This many whitespaces are tried per piece. A tokenizer that fails at all of them (for example because it
# strips its text) fails everywhere, and trying every whitespace would take 200 times as long as tokenizing.
MAX_TRIES = 24
GAP = re.compile(r"(?<=\S)\s+(?=\S)")
# Ways to start the right-hand piece: (does it keep the whitespace, how many of its first ids are dropped).
WAYS = (
    (True, 0),  # byte-level BPE: nothing is added at a text's start
    (True, 1),  # SentencePiece: the dummy prefix that it puts before the right-hand piece is dropped again
    (False, 0),  # SentencePiece at a single space: the dummy prefix stands for that space
)


class Cutter:
    """Finds cuts for one tokenizer. It remembers which of the WAYS worked last and tries that one first."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ways = tokenizer, list(WAYS)

    def find(self, text: str, low: int, high: int) -> tuple[int, int, int] | None:
        """Return the first good cut in text[low:high], or None if there is none.

        A cut is (end of the left piece, start of the right piece, number of ids to skip at its start). The
        first two are offsets into `text`, in characters."""
        for tries, gap in enumerate(GAP.finditer(text, low, high)):
            if tries == MAX_TRIES:
                break
            left, right = gap.span()
            before = text[max(0, left - WINDOW_CHARS) : left]
            after = text[left : right + WINDOW_CHARS]
            head, whole = self.tokenizer.encode_batch([before, before + after])
            for way in self.ways:
                keeps_gap, skip = way
                if not keeps_gap and gap.group() != " ":
                    continue
                tail = self.tokenizer.encode(after if keeps_gap else after[1:])
                if head + tail[skip:] == whole:
                    self.ways.sort(key=lambda known: known != way)
                    return left, left if keeps_gap else right, skip
        return None

    def pieces(self, text: str, size: int, skip: int = 0) -> Iterator[tuple[str, int]]:
        """Yield (piece of about `size` characters, number of ids to skip at its start).

        skip: that number for `text` itself, which may be a piece of a longer text."""
        start, reach = 0, size
        while start + reach + size // 2 < len(text):  # up to half a piece more joins the last one
            cut = self.find(text, start + reach, min(start + reach + size, len(text)))
            if cut is None:
                reach += size  # no cut can be trusted here; a longer piece is still exact
                continue
            end, next_start, next_skip = cut
            yield text[start:end], skip
            start, skip, reach = next_start, next_skip, size
        yield text[start:], skip
