"""Rows as they will be trained on, to be looked at: as coloured text, and as the plain numbers of tokens and
labels."""

import json
from pathlib import Path

import numpy as np

from dtensor_llama.chat.conversations import EMPTY_ANSWER, NOTHING_TRAINED, UNANSWERED
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.reader import NOT_SCORED, make_batch
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

TRAINED, CONTEXT, PLAIN = "\x1b[1;92m", "\x1b[2m", "\x1b[0m"  # bright green; dim; as before


def row_as_numbers(rows: PackedExamples, row: int) -> dict[str, list[int]]:
    """{"tokens", "labels"} of one row without its padding: labels[i] is tokens[i + 1], which position i must
    predict, or -100 where nothing is trained."""
    batch, n_tokens = (
        make_batch(rows, np.array([row]), document_mask=True),
        int(rows.document_starts_of(row)[-1]),
    )
    return {"tokens": batch.tokens[0, :n_tokens].tolist(), "labels": batch.labels[0, :n_tokens].tolist()}


def row_as_text(rows: PackedExamples, row: int, tokenizer: Tokenizer) -> str:
    """One row for a terminal: an example below the other, trained tokens bright, the rest dim, control tokens
    as written."""
    numbers, controls = (
        row_as_numbers(rows, row),
        {tokenizer.id_of(text): text for text in tokenizer.control_tokens},
    )
    trained = [False, *(label != NOT_SCORED for label in numbers["labels"])]
    shown, since_control, starts = "", [], {0, *rows.document_starts_of(row).tolist()}
    for at, token in enumerate(numbers["tokens"]):
        if at in starts:
            shown, since_control = shown + ("\n" if at else ""), []
        if token in controls:
            text, since_control = controls[token], []
        else:  # decoded with what comes before it: a space, or half a character, may hang on that
            text = tokenizer.decode([*since_control, token])[len(tokenizer.decode(since_control)) :]
            since_control.append(token)
        if at == 0 or trained[at] != trained[at - 1]:
            shown += PLAIN + (TRAINED if trained[at] else CONTEXT)
        shown += text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
    return shown + PLAIN


def preview(rows: PackedExamples, tokenizer: Tokenizer, n_rows: int, json_file: str | None) -> None:
    """Print the first rows in the order of training, and write them to json_file (n_rows 0: all, the held-out
    ones last)."""
    order = [*rows.rows_at(np.arange(rows.n_train)), *rows.validation_rows()]
    for number, row in enumerate(order[:n_rows]):
        print(f"\n---- row {number} ----\n{row_as_text(rows, int(row), tokenizer)}")
    if json_file:
        chosen = [row_as_numbers(rows, int(row)) for row in order[: n_rows or None]]
        try:
            Path(json_file).write_text(json.dumps(chosen), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--preview-json {json_file} cannot be written ({error.strerror}).") from None


def say_data(rows: PackedExamples, template_name: str, say) -> None:
    """What was found in the files, and what became of it."""
    counts = dict(rows.corpus.counts)
    happened = {name: counts.pop(name, 0) for name in (EMPTY_ANSWER, NOTHING_TRAINED, UNANSWERED)}
    found = ", ".join(f"{n:,} of {name}" for name, n in counts.items())
    words = {EMPTY_ANSWER: "left out, which have an empty answer", UNANSWERED: UNANSWERED}
    words |= {NOTHING_TRAINED: f"left out, {NOTHING_TRAINED}"}
    found += "".join(f"; {n:,} {words[name]}" for name, n in happened.items() if n)
    say(f"data      {found}; written with {template_name}")
    if rows.corpus.unread:
        names = sorted(rows.corpus.unread, key=rows.corpus.unread.get, reverse=True)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        named = ", ".join(f"{name} ({rows.corpus.unread[name]:,})" for name in names[:10])
        say(f"fields    not read, as neither the format nor the template has a use for them: {named}{more}")
    too_long = "".join(
        f"; {n:,} longer than a row were {done}"
        for n, done in (
            (rows.n_dropped, "DROPPED (--data.overlong truncate keeps their beginnings)"),
            (rows.n_truncated, "CUT (--data.overlong drop leaves them out)"),
        )
        if n
    )
    n_trained, n_tokens = int(rows.corpus.trained.sum()), rows.corpus.n_tokens
    say(
        f"rows      {rows.n_train:,} of {rows.seq_len} tokens to train on, {rows.n_validation:,} held out: {rows.n_examples:,} "
        f"examples, {rows.lengths.sum() / rows.n_rows / rows.seq_len:.0%} full; {n_trained / n_tokens:.0%} of the tokens are "
        f"trained{too_long}"
    )
