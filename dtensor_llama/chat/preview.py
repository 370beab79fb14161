"""Shows sequences as they will be trained on, so that a person can check them: coloured text, or numbers."""

import json
from pathlib import Path

import numpy as np

from dtensor_llama.chat.conversations import EMPTY_ANSWER, NOTHING_TRAINED, UNANSWERED
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.reader import make_batch
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.loss import IGNORE
from dtensor_llama.terminal import Say

TRAINED, CONTEXT, PLAIN = "\x1b[1;92m", "\x1b[2m", "\x1b[0m"  # bright green; dim; the terminal's own style


def sequence_as_ids(sequences: PackedExamples, number: int) -> dict[str, list[int]]:
    """Return {"tokens": [...], "labels": [...]} of one sequence, without its padding.

    labels[i] is tokens[i + 1], which position i must predict, or IGNORE if that token does not count."""
    batch = make_batch(sequences, np.array([number]), document_mask=True)
    n_tokens = int(sequences.document_starts_of(number)[-1])
    return {"tokens": batch.tokens[0, :n_tokens].tolist(), "labels": batch.labels[0, :n_tokens].tolist()}


def sequence_as_text(sequences: PackedExamples, number: int, tokenizer: Tokenizer) -> str:
    """Return one sequence as text for a terminal, with the trained tokens bright.

    Each example begins on a line of its own."""
    ids = sequence_as_ids(sequences, number)
    controls = {tokenizer.id_of(text): text for text in tokenizer.control_tokens}
    trained = [False] + [label != IGNORE for label in ids["labels"]]
    starts = {0, *sequences.document_starts_of(number).tolist()}
    shown, since_control = "", []
    for at, token in enumerate(ids["tokens"]):
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


def preview(sequences: PackedExamples, tokenizer: Tokenizer, n_shown: int, json_file: str | None) -> None:
    """Print the first n_shown sequences in the order of training, and write them to json_file if it is given.

    With n_shown 0, print none and write all, the held-out sequences last.
    Raises UsageError if the file cannot be written."""
    order = [*sequences.sequences_at(np.arange(sequences.n_train)), *sequences.validation_sequences()]
    for place, number in enumerate(order[:n_shown]):
        print(f"\n---- sequence {place} ----\n{sequence_as_text(sequences, int(number), tokenizer)}")
    if json_file:
        chosen = [sequence_as_ids(sequences, int(number)) for number in order[: n_shown or None]]
        try:
            Path(json_file).write_text(json.dumps(chosen), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"preview_json={json_file} cannot be written ({error.strerror}).") from None


def log_conversations(sequences: PackedExamples, template_name: str, log: Say) -> None:
    """Log what was found in the files, what was left out, and how the sequences are filled."""
    corpus, counts = sequences.corpus, dict(sequences.corpus.counts)
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
    if sequences.n_dropped:
        too_long += (
            f"; {sequences.n_dropped:,} longer than a sequence were DROPPED (overlong=truncate keeps their "
            "beginnings)"
        )
    if sequences.n_truncated:
        too_long += (
            f"; {sequences.n_truncated:,} longer than a sequence were CUT (overlong=drop leaves them out)"
        )
    full = sequences.lengths.sum() / sequences.n_sequences / sequences.seq_len
    trained = int(corpus.trained.sum()) / corpus.n_tokens
    log(
        f"sequences {sequences.n_train:,} of {sequences.seq_len} tokens to train on, "
        f"{sequences.n_validation:,} held out: {sequences.n_examples:,} examples, {full:.0%} full; "
        f"{trained:.0%} of the tokens are trained{too_long}"
    )
