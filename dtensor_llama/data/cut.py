"""Cuts a long text into pieces whose ids, joined, are exactly the ids of the whole text.

Why: one core should not have to tokenize a whole book, nor memory to hold it. The libraries also slow down on
    long texts: LLaMA's BPE has no words, a text is one long word (2.5 MB/s on pieces of 1 MB, 6.5 MB/s on 16
    kB).
Where: only at whitespace between two other characters, and only where the tokenizer is seen to put a token
    boundary.
"""

import re
from collections.abc import Iterator

from dtensor_llama.data.tokenizer import Tokenizer

# Characters on each side on which a cut is checked: many times the longest piece of any vocabulary. Shorter
# texts (below 256 bytes) would be cached by `tokenizers`, which costs 30 MB in each worker.
WINDOW_CHARS = 300
# Whitespaces tried per piece. A tokenizer that fails at all of them (one that strips its text, for example)
# fails everywhere, and trying each would cost 200 times the tokenizing itself.
MAX_TRIES = 24
GAP = re.compile(r"(?<=\S)\s+(?=\S)")
# of starting the right-hand piece: (does it keep the whitespace, how many of its first ids are dropped)
WAYS = (
    (True, 0),  # byte-level BPE: nothing is added at a text's start
    (True, 1),  # SentencePiece: the dummy prefix that it puts before the right-hand piece is dropped again
    (False, 0),  # SentencePiece at a single space: the dummy prefix stands for that space
)


class Cutter:
    """Finds cuts for one tokenizer, and remembers which of the WAYS worked last, to try it first."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ways = tokenizer, list(WAYS)

    def find(self, text: str, low: int, high: int) -> tuple[int, int, int] | None:
        """Return the first good cut in text[low:high], or None.

        A cut is (end of the left piece, start of the right one, ids to skip there)."""
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
        """Yield (piece of about `size` characters, ids to skip at its start). skip: that of the text
        itself."""
        start, reach = 0, size
        while start + reach + size // 2 < len(text):  # a rest of up to half a piece joins the last one
            cut = self.find(text, start + reach, min(start + reach + size, len(text)))
            if cut is None:
                reach += size  # no cut can be trusted here; a longer piece is still exact
                continue
            end, next_start, next_skip = cut
            yield text[start:end], skip
            start, skip, reach = next_start, next_skip, size
        yield text[start:], skip
