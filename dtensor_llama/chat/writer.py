"""Text with control tokens in it to ids.

Three characters, which Unicode keeps free for use inside a program, mark what a template has written:
BEGIN, END   around what the assistant writes, which is trained
ESCAPE       inside of a control text that a person wrote: it is characters there, not a token
"""

import re
from collections.abc import Iterable

from dtensor_llama.data.tokenizer import Tokenizer

ESCAPE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"

Run = tuple[str | int, bool]  # characters, or the id of a control token; and whether it is trained


class TextWriter:
    """Writes text as ids.

    controls: {text: AddedToken} of what means one id where a template writes it. special: those that it alone
        may write.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.plain = tokenizer, tokenizer.plain
        self.controls = {text: token for text, token in tokenizer.control_tokens.items() if len(text) > 1}
        ends = [tokenizer.token_of(i) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
        self.special = {text for text, token in self.controls.items() if token.special or text in ends}
        self.first_characters = {text[0] for text in self.controls}
        any_control = _any_of(self.controls)
        self.control_or_mark = re.compile(f"({BEGIN}|{END}|{any_control})")
        self.control = re.compile(any_control)
        self.control_behind_blanks = re.compile(rf"\s*(?:{any_control})")
        # A dummy prefix is a space before every text. A newline joins no neighbour, so behind one it shows.
        newline, both = self.plain.encode("\n"), self.plain.encode("\na")
        n = len(newline)
        self.has_dummy_prefix = both[:n] == newline and both[n:] != self.plain.encode("a")
        self.prefixes_every_text = tokenizer.prefixes_every_text

    def escaped(self, text: str, controls: Iterable[str]) -> str:
        """Return `text` with each of `controls` in it broken by an ESCAPE behind its first character."""
        if not any(one in text for one in controls):
            return text
        return re.sub(f"(?=(?:{_any_of(controls)}))(.)", rf"\1{ESCAPE}", text, flags=re.DOTALL)

    def runs(self, text: str) -> list[Run]:
        """Split a text at its control tokens and marks."""
        runs, trained, strips_next = [], False, False
        for part in self.control_or_mark.split(text):
            if part in (BEGIN, END):
                trained = part == BEGIN
            elif part in self.controls:
                token = self.controls[part]
                if (
                    token.lstrip and runs and isinstance(runs[-1][0], str)
                ):  # some take the blanks beside them along
                    runs[-1] = runs[-1][0].rstrip(), runs[-1][1]
                runs.append((self.tokenizer.id_of(part), trained))
                strips_next = token.rstrip
            elif part:
                runs.append((part.lstrip() if strips_next else part, trained))
                strips_next = False
        return [run for run in runs if run[0] != ""]

    def trimmed(self, runs: list[Run]) -> list[Run]:
        """Return the runs with trained turns that end with a control token.

        A control token just behind the END mark is trained too, and blanks behind one are not."""
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
        """Return (ids, whether each is trained).

        Text between two control tokens is encoded as one, as in transformers, but cut where training
        begins."""
        ids, mask = [], []
        first, done = 0, ""  # the ids since the last control token begin at `first`, and `done` is their text
        for what, trained in runs:
            if isinstance(what, int):
                ids, mask = [*ids, what], [*mask, trained]
                first, done = len(ids), ""
                continue
            text = what.replace(ESCAPE, "")
            whole, cut = self._encode_text(done + text, at_start=first == 0), len(ids) - first
            if done and whole[:cut] != ids[first:]:
                if trained:  # a space before the answer belongs to the answer, as in its first piece
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
        """Return the ids of a text that goes on where another ended, without a dummy prefix."""
        before = "\n" if self.has_dummy_prefix else ""
        return self.plain.encode(before + text)[len(self.plain.encode(before)) :]


def _any_of(texts: Iterable[str]) -> str:
    """Return a regular expression for any of `texts`, the longest first; for no texts one that never
    matches."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
