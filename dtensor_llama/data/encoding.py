"""Turns chunks of files into token ids. The processes that tokenize run this code."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from dtensor_llama.data.cut import Cutter
from dtensor_llama.data.sources import FORMATS, Chunk, Skip, TextOptions, refuse
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import BadRecord, UsageError

PIECE_CHARS = 16384  # a worker cuts longer texts, because both libraries are fastest at about this length


@dataclass
class Found:
    """Counts what was found in the records of some chunks.

    counts: the number of records of each format, and of each special case (such as an empty answer)
    skipped: the number of bad records for each reason
    skipped_lines: one JSON line for each bad record
    unread: {field that nothing reads: the number of records that have it}
    end_ids: the ids of the tokens that end an answer
    """

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    end_ids: set[int] = field(default_factory=set)
    skipped_lines: list[str] = field(default_factory=list)

    def skip(self, where: str, error: UsageError) -> None:
        """Count a record that is left out, and keep a line about it."""
        reason = error.reason if isinstance(error, BadRecord) else "cannot be read"
        self.skipped[reason] += 1
        line = {"where": where, "reason": reason, "message": str(error)}
        self.skipped_lines.append(json.dumps(line, ensure_ascii=False))

    def skip_or_refuse(self, bad_records: str) -> Skip:
        """Return the function to call for a bad record, as the option bad_records says."""
        return self.skip if bad_records == "skip" else refuse

    def add(self, other: "Found") -> None:
        """Add the counts of another chunk, without its lines."""
        self.counts += other.counts
        self.skipped += other.skipped
        self.unread += other.unread
        self.end_ids |= other.end_ids

    def as_json(self) -> dict:
        """Return the counts as they are written to meta.json."""
        counts = {"counts": self.counts, "skipped": self.skipped, "unread": self.unread}
        return counts | {"end_ids": sorted(self.end_ids)}


class Encoded(NamedTuple):
    """Holds the documents of a chunk as token ids."""

    ids: np.ndarray  # uint32, BOS and EOS included
    starts: np.ndarray  # int64: offsets into `ids` of the documents that start in this chunk
    trained: np.ndarray | None  # uint8, as long as `ids`: 1 where a token counts in the loss; None: all do
    found: Found


class Encoding(Protocol):
    """Turns the records of a corpus into token ids. The processes that tokenize inherit one by fork."""

    tokenizer: Tokenizer
    formats: tuple[str, ...]  # the kinds of files that it can read, such as ".jsonl"
    text_field: str | None  # the only field that is read of each record; None: all fields are read
    cutter: Cutter | None  # cuts long texts; None: records are never cut
    files: tuple[str, ...]  # the names of the files that are written beside meta.json
    meta: dict  # its own part of meta.json
    a_document: str  # for messages: what a corpus must have at least one of

    # Everything that decides the ids besides the files and the tokenizer. Its repr is hashed.
    def identity(self) -> object: ...

    # The arguments of `python -m dtensor_llama.data.tokenize` that make an equal Encoding in that program.
    def arguments(self) -> list[str]: ...

    def encode(self, chunk: Chunk) -> Encoded: ...


class TextEncoding:
    """Encodes each text as BOS (if the tokenizer adds one), its ids, and EOS (if the tokenizer has one)."""

    formats, files, a_document = FORMATS, ("tokens.bin", "documents.bin"), "document with any text"

    def __init__(self, tokenizer: Tokenizer, options: TextOptions):
        self.tokenizer, self.options, self.text_field = tokenizer, options, options.field
        self.cutter, self.meta = Cutter(tokenizer), {"text": asdict(options)}

    def identity(self) -> object:
        # For the default this is what earlier versions hashed, so that their corpora stay valid.
        return self.options.field if self.options.bad_records == "refuse" else self.options

    def arguments(self) -> list[str]:
        return [f"--text-field={self.options.field}", f"--bad-records={self.options.bad_records}"]

    def encode(self, chunk: Chunk) -> Encoded:
        tokenizer, found = self.tokenizer, Found()
        texts = chunk.documents(self.text_field, found.skip_or_refuse(self.options.bad_records))
        documents = [list(self.cutter.pieces(text, PIECE_CHARS, chunk.skip)) for text in texts]
        pieces = itertools.chain.from_iterable(documents)
        encoded = iter(tokenizer.encode_batch([text for text, _ in pieces]))
        bos = [tokenizer.bos_id] if chunk.opens and tokenizer.adds.bos else []
        eos = [tokenizer.eos_id] if chunk.closes and tokenizer.eos_id is not None else []
        ids, starts = [], []
        for pieces in documents:
            if chunk.opens:
                starts.append(len(ids))
            ids += bos
            for _, skip in pieces:
                ids += next(encoded)[skip:]
            ids += eos
        return Encoded(np.array(ids, dtype=np.uint32), np.array(starts, dtype=np.int64), None, found)
