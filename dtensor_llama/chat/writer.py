"""Turns text that contains control tokens into ids.

Unicode reserves some characters for use inside a program. Three of them mark what a template has written:
BEGIN, END   stand around what the assistant writes, which counts in the loss
ESCAPE       stands inside the text of a control token that a person wrote, so that it is read as characters
"""

import re
from collections.abc import Iterable

from dtensor_llama.data.tokenizer import Tokenizer

ESCAPE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"

Run = tuple[str | int, bool]  # text, or the id of a control token; and whether it is trained


class TextWriter:
    """Turns text into ids for one tokenizer.

    controls: {text: AddedToken} of the texts that stand for one id where a template writes them
    special: those of them that only a template may write, never a person or the assistant
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.plain = tokenizer, tokenizer.plain
        self.controls = {text: token for text, token in tokenizer.control_tokens.items() if len(text) > 1}
        ends = tokenizer.ends.values()
        self.special = {text for text, token in self.controls.items() if token.special or text in ends}
        self.first_characters = {text[0] for text in self.controls}
        any_control = _any_of(self.controls)
        self.control_or_mark = re.compile(f"({BEGIN}|{END}|{any_control})")
        self.control = re.compile(any_control)
        self.control_behind_blanks = re.compile(rf"\s*(?:{any_control})")
        # A dummy prefix is a space that the tokenizer puts before every text. A newline never forms a token
        # with its neighbours, so the ids of a text after a newline show whether there is such a space.
        newline, both = self.plain.encode("\n"), self.plain.encode("\na")
        n = len(newline)
        self.has_dummy_prefix = both[:n] == newline and both[n:] != self.plain.encode("a")
        self.prefixes_every_text = tokenizer.prefixes_every_text

    def escaped(self, text: str, controls: Iterable[str]) -> str:
        """Return `text` with an ESCAPE after the first character of each of `controls` in it."""
        if not any(one in text for one in controls):
            return text
        return re.sub(f"(?=(?:{_any_of(controls)}))(.)", rf"\1{ESCAPE}", text, flags=re.DOTALL)

    def runs(self, text: str) -> list[Run]:
        """Split a text at its control tokens and marks. The marks say which runs are trained."""
        runs, trained, strips_next = [], False, False
        for part in self.control_or_mark.split(text):
            if part in (BEGIN, END):
                trained = part == BEGIN
            elif part in self.controls:
                token = self.controls[part]
                if token.lstrip and runs and isinstance(runs[-1][0], str):  # it absorbs the blanks before it
                    runs[-1] = runs[-1][0].rstrip(), runs[-1][1]
                runs.append((self.tokenizer.id_of(part), trained))
                strips_next = token.rstrip
            elif part:
                runs.append((part.lstrip() if strips_next else part, trained))
                strips_next = False
        return [run for run in runs if run[0] != ""]

    def trimmed(self, runs: list[Run]) -> list[Run]:
        """Return the runs, changed so that each trained turn ends with a control token where possible.

        A control token directly after the END mark is trained too. Blanks after a turn's last control token
        are not trained."""
        runs = list(runs)
        for i, (what, trained) in enumerate(runs):
            ends_here = trained and (i + 1 == len(runs) or not runs[i + 1][1])
            if not ends_here or isinstance(what, int):
                continue
            if not what.strip() and i and isinstance(runs[i - 1][0], int):
                runs[i] = what, False
            elif i + 1 < len(runs) and isinstance(runs[i + 1][0], int):
                runs[i + 1] = runs[i + 1][0], True
        return runs

    def encode_runs(self, runs: list[Run]) -> tuple[list[int], list[bool]]:
        """Return (ids, whether each of them is trained).

        The text between two control tokens is encoded as a whole, as in transformers, but it is cut where the
        trained part begins."""
        ids, mask = [], []
        first, done = 0, ""  # the ids after the last control token begin at `first`; `done` is their text
        for what, trained in runs:
            if isinstance(what, int):
                ids, mask = [*ids, what], [*mask, trained]
                first, done = len(ids), ""
                continue
            text = what.replace(ESCAPE, "")
            whole, cut = self._encode_text(done + text, at_start=first == 0), len(ids) - first
            if done and whole[:cut] != ids[first:]:
                if trained:  # a space before the answer becomes part of the answer's first piece
                    cut = len(self._encode_text(done.rstrip(" "), at_start=first == 0))
                if whole[:cut] != ids[first : first + cut]:
                    whole, cut = ids[first:] + self._continuation(text), len(ids) - first
            ids, mask = ids[: first + cut] + whole[cut:], mask[: first + cut] + [trained] * (len(whole) - cut)
            done += text
        return ids, mask

    def _encode_text(self, text: str, at_start: bool) -> list[int]:
        if at_start or self.prefixes_every_text or not self.has_dummy_prefix:
            return self.plain.encode(text)
        return self._continuation(text)

    def _continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one, without a dummy prefix."""
        before = "\n" if self.has_dummy_prefix else ""
        return self.plain.encode(before + text)[len(self.plain.encode(before)) :]


def _any_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches any of `texts`, or nothing if there are no texts.

    Longer texts come first, because the first alternative that matches is taken."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
