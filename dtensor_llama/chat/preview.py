"""Shows sequences as they will be trained on, so that a person can check them: coloured text, or numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dtensor_llama.chat.conversations import EMPTY_ANSWER, NOTHING_TRAINED, UNANSWERED
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.reader import make_batch
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.loss import IGNORE

TRAINED, CONTEXT, PLAIN = "\x1b[1;92m", "\x1b[2m", "\x1b[0m"  # bright green; dim; the terminal's own style


def row_as_numbers(rows: PackedExamples, row: int) -> dict[str, list[int]]:
    """Return {"tokens": [...], "labels": [...]} of one row, without its padding.

    labels[i] is tokens[i + 1], which position i must predict, or IGNORE if that token does not count."""
    batch = make_batch(rows, np.array([row]), document_mask=True)
    n_tokens = int(rows.document_starts_of(row)[-1])
    return {"tokens": batch.tokens[0, :n_tokens].tolist(), "labels": batch.labels[0, :n_tokens].tolist()}


def row_as_text(rows: PackedExamples, row: int, tokenizer: Tokenizer) -> str:
    """Return one row as text for a terminal, one example below another, with the trained tokens bright."""
    numbers = row_as_numbers(rows, row)
    controls = {tokenizer.id_of(text): text for text in tokenizer.control_tokens}
    trained = [False] + [label != IGNORE for label in numbers["labels"]]
    starts = {0, *rows.document_starts_of(row).tolist()}
    shown, since_control = "", []
    for at, token in enumerate(numbers["tokens"]):
        if at in starts:
            shown, since_control = shown + ("\n" if at else ""), []
        if token in controls:
            text, since_control = controls[token], []
        else:
            # Decode the token together with those before it: a space or half a character may depend on them.
            text = tokenizer.decode([*since_control, token])[len(tokenizer.decode(since_control)) :]
            since_control.append(token)
        if at == 0 or trained[at] != trained[at - 1]:
            shown += PLAIN + (TRAINED if trained[at] else CONTEXT)
        shown += text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
    return shown + PLAIN


def preview(rows: PackedExamples, tokenizer: Tokenizer, n_rows: int, json_file: str | None) -> None:
    """Print the first n_rows in the order of training, and write them to json_file if it is given.

    With n_rows 0, print none and write all, the held-out rows last.
    Raises UsageError if the file cannot be written."""
    order = [*rows.rows_at(np.arange(rows.n_train)), *rows.validation_rows()]
    for number, row in enumerate(order[:n_rows]):
        print(f"\n---- row {number} ----\n{row_as_text(rows, int(row), tokenizer)}")
    if json_file:
        chosen = [row_as_numbers(rows, int(row)) for row in order[: n_rows or None]]
        try:
            Path(json_file).write_text(json.dumps(chosen), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"preview_json={json_file} cannot be written ({error.strerror}).") from None


def log_conversations(rows: PackedExamples, template_name: str, log: Callable[[str], None]) -> None:
    """Log what was found in the files, what was left out, and how the rows are filled."""
    corpus, counts = rows.corpus, dict(rows.corpus.counts)
    in_words = {
        EMPTY_ANSWER: "left out, which have an empty answer",
        NOTHING_TRAINED: f"left out, {NOTHING_TRAINED}",
        UNANSWERED: UNANSWERED,
    }
    apart = {name: counts.pop(name, 0) for name in in_words}
    found = ", ".join(f"{n:,} of {name}" for name, n in counts.items())
    found += "".join(f"; {n:,} {in_words[name]}" for name, n in apart.items() if n)
    log(f"data      {found}; written with {template_name}")
    if corpus.unread:
        names = sorted(corpus.unread, key=corpus.unread.get, reverse=True)
        named = ", ".join(f"{name} ({corpus.unread[name]:,})" for name in names[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        log(f"fields    not read, as neither the format nor the template has a use for them: {named}{more}")
    too_long = ""
    if rows.n_dropped:
        too_long += (
            f"; {rows.n_dropped:,} longer than a row were DROPPED (overlong=truncate keeps their beginnings)"
        )
    if rows.n_truncated:
        too_long += f"; {rows.n_truncated:,} longer than a row were CUT (overlong=drop leaves them out)"
    full = rows.lengths.sum() / rows.n_rows / rows.seq_len
    trained = int(corpus.trained.sum()) / corpus.n_tokens
    log(
        f"rows      {rows.n_train:,} of {rows.seq_len} tokens to train on, {rows.n_validation:,} held out: "
        f"{rows.n_examples:,} examples, {full:.0%} full; {trained:.0%} of the tokens are trained{too_long}"
    )
