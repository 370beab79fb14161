"""Files to chunks of about a mebibyte, and chunks to documents, in memory that does not depend on a file's
size.

One process reads (`read_chunks`); those that tokenize turn chunks into documents (`Chunk.documents`), so that
parsing holds nobody up. Every defect of a file is a UsageError that names the file and the line or row.
"""

import codecs
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dtensor_llama.data.cut import WINDOW_CHARS, Cutter
from dtensor_llama.data.records import arrow_batches, csv_records, json_records, open_arrow
from dtensor_llama.data.unpack import (
    COMPRESSIONS,
    NEEDS_WINDOW,
    UNPACK_ERRORS,
    open_compressed,
    say_long_window,
)
from dtensor_llama.errors import BadRecord, UsageError
from dtensor_llama.places import expanded, hub_hint

RECORD_FORMATS = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv")  # objects of several fields
FORMATS = (".txt", *RECORD_FORMATS)
OTHER_ENDINGS = {".ndjson": ".jsonl", ".feather": ".arrow"}  # of the same formats
# what one worker gets at a time: long enough to hide the hand-over, short enough to balance
CHUNK_BYTES = 1 << 20
BATCH_ROWS = 64  # of a table, decoded at once


@dataclass(frozen=True)
class TextOptions:
    """What decides which texts a corpus has: the flags of recipes/pretrain.py.

    field: of a record or table that holds the text; a.b: the field b of the object in a. bad_records: whether
    a record without a text ends the run or is left out and listed."""

    field: str = "text"
    bad_records: Literal["refuse", "skip"] = "refuse"


@dataclass
class Chunk:
    """Part of one file: whole lines of a .jsonl (bytes), or a piece of a .txt (str).

    Of other records it is a list of (where, object) with where as in "row 3"."""

    path: Path
    data: bytes | str | list[tuple[str, dict]]
    first_line: int = 1  # of a .jsonl's lines, counted from 1
    input_bytes: int = 0  # of the file on disk, read since the chunk before: for the progress bar
    skip: int = 0  # .txt: leading ids of the piece that come from the cut, not from the text
    opens: bool = True  # .txt: the piece starts its document
    closes: bool = True  # .txt: the piece ends its document

    def documents(self, text_field: str, skip: Callable[[str, UsageError], None] | None = None) -> list[str]:
        """The texts in this chunk, without those that hold nothing but whitespace. skip: as of `records`."""
        if isinstance(self.data, str):
            texts = [self.data]
        else:
            texts = []
            for where, record in self.records(skip):
                try:
                    texts.append(_text_of_record(record, where, text_field))
                except UsageError as error:
                    if skip is None:
                        raise
                    skip(where, error)
        return [text for text in texts if text and not (self.opens and self.closes and text.isspace())]

    def records(self, skip: Callable[[str, UsageError], None] | None = None) -> Iterator[tuple[str, dict]]:
        """(where, object) of each record in this chunk; `where` begins what is said of it. skip: is told of
        each line that holds no object, (where, what is wrong with it); None: that is raised."""
        if isinstance(self.data, bytes):
            for number, line in enumerate(self.data.split(b"\n"), self.first_line):
                if not line.strip():
                    continue
                where = f"--data.path {self.path}, line {number}"
                try:
                    record = _object_of_line(line, self.path, number)
                except UsageError as error:
                    if skip is None:
                        raise
                    skip(where, error)
                    continue
                yield where, record
        else:
            yield from ((f"--data.path {self.path}, {where}", record) for where, record in self.data)


def expand_paths(patterns: Sequence[str | Path], formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The files that `patterns` (files and globs, `**` too) name: absolute, sorted, each once, of `formats`.

    A link keeps its own name, as its ending says what the file holds: in the cache of the Hugging Face Hub
    data.jsonl is a link to a file that is called by its hash. Of two links to one file the first counts."""
    files = {}
    for pattern in patterns:
        matches = _matches(str(pattern))
        for match in matches:
            files.setdefault(os.path.realpath(match), set()).add(Path(os.path.abspath(match)))
    if not files:
        raise UsageError("--data.path: no file was named; give files or patterns such as 'data/**/*.txt'.")
    chosen = [_named_by_its_kind(sorted(names), Path(target), formats) for target, names in files.items()]
    for file in sorted(chosen):
        _format_of(file, formats)
    return sorted(chosen)


def _matches(pattern: str) -> list[Path]:
    """The files of one argument, at least one. UsageError for what is there and cannot be read as a file."""
    path = Path(expanded(pattern, "data.path"))
    if path.is_dir():
        raise UsageError(
            f"--data.path {pattern}: is a folder; name the files in it, as in '{pattern}/**/*.jsonl'."
        )
    if path.exists() and not path.is_file():
        raise UsageError(
            f"--data.path {pattern}: is a pipe or a device, and the data is read more than "
            "once; write it to a file first."
        )
    if os.path.lexists(path):
        matches = [path]
    else:
        found = glob.glob(str(path), recursive=True) or glob.glob(_taken_literally(path), recursive=True)
        matches = [Path(match) for match in found if not os.path.isdir(match)]
    for match in matches:
        if match.is_symlink() and not match.exists():
            raise UsageError(
                f"--data.path {match}: is a link to {os.readlink(match)}, which is not there; "
                "fetch the data again, or leave the link out."
            )
    matches = [match for match in matches if match.is_file()]
    if not matches:
        hint = hub_hint(pattern, "dataset")
        raise UsageError(
            f"--data.path {pattern}: no file matches; give files or patterns such as 'data/**/*.txt'.{hint}"
        )
    return matches


def _taken_literally(path: Path) -> str:
    """The pattern with the folders that are there taken by their names, which may have [brackets] in them."""
    there = path.parent
    while not there.exists():
        there = there.parent
    return os.path.join(glob.escape(str(there)), path.relative_to(there))


def _named_by_its_kind(names: list[Path], target: Path, formats: tuple[str, ...]) -> Path:
    """The first of the names of one file whose ending is known, else that of the file they are links to."""
    return next((name for name in [*names, target] if _kind_of(name)[0] in formats), names[0])


def _kind_of(path: Path) -> tuple[str, str | None]:
    """(ending, compression) of a file, as in (".jsonl", "gzip")."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    return OTHER_ENDINGS.get(suffix, suffix), compression


def _format_of(path: Path, formats: tuple[str, ...]) -> tuple[str, str | None]:
    """As _kind_of; UsageError if it is not of `formats`."""
    suffix, compression = _kind_of(path)
    if suffix not in formats:
        compressed = list(COMPRESSIONS)
        raise UsageError(
            f"--data.path {path}: unknown kind of file; {', '.join(formats[:-1])} and {formats[-1]} can be "
            f"read, and {', '.join(compressed[:-1])} and {compressed[-1]} of each."
        )
    return suffix, compression


def read_chunks(
    path: Path, text_field: str | None, cutter: Cutter | None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """The chunks of one file, in order. text_field None: of records, with all their fields; they need no
    cutter."""
    suffix, compression = _format_of(path, FORMATS if text_field is not None else RECORD_FORMATS)
    done_bytes = 0
    try:
        with open(path, "rb") as file, tempfile.TemporaryFile() as unpacked:
            stream = packed = open_compressed(path, file, compression)
            if suffix in (".parquet", ".arrow") and compression:
                # What says where the columns are stands at the end of a .parquet: unpack it, on disk.
                shutil.copyfileobj(stream, unpacked, chunk_bytes)
                unpacked.seek(0)
                stream = unpacked
            if suffix == ".parquet":
                chunks = _read_parquet(path, stream, text_field, chunk_bytes)
            elif suffix == ".arrow":
                chunks = _read_arrow(path, stream, text_field, chunk_bytes)
            elif suffix == ".jsonl":
                chunks = _read_jsonl(path, stream, chunk_bytes)
            elif suffix == ".json":
                chunks = _read_json(path, stream, text_field, chunk_bytes)
            elif suffix in (".csv", ".tsv"):
                chunks = _read_csv(path, stream, "\t" if suffix == ".tsv" else ",", chunk_bytes)
            else:
                chunks = _read_txt(path, stream, cutter, chunk_bytes)
            for chunk in chunks:
                chunk.input_bytes, done_bytes = file.tell() - done_bytes, file.tell()
                yield chunk
            if packed is not file:
                packed.close()
    except (*UNPACK_ERRORS, pa.ArrowException) as error:
        if compression == "zstd" and NEEDS_WINDOW in str(error):
            raise say_long_window(path) from None
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--data.path {path}: cannot be read to its end ({reason}); it may be cut short or damaged: "
            f"fetch it again or leave it out."
        ) from None


def _blocks(path: Path, stream, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number of the line it starts in, bytes) of each block of a text file; a byte-order mark is left
    out."""
    line, block = 1, stream.read(chunk_bytes).removeprefix(codecs.BOM_UTF8)
    while block:
        if (zero := block.find(b"\0")) >= 0:
            line += block.count(b"\n", 0, zero)
            raise UsageError(
                f"--data.path {path}, line {line}: a zero byte; the file is binary or UTF-16, "
                f"expected text in UTF-8."
            )
        yield line, block
        line, block = line + block.count(b"\n"), stream.read(chunk_bytes)


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> UsageError:
    return UsageError(
        f"--data.path {path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 text; "
        f"convert the file (iconv -t utf-8) or leave it out."
    )


def _read_jsonl(path: Path, stream, chunk_bytes: int) -> Iterator[Chunk]:
    parts, first_line = [], 1
    for line, block in _blocks(path, stream, chunk_bytes):
        if end := block.rfind(b"\n") + 1:  # else a line longer than a block goes on
            yield Chunk(path, b"".join([*parts, block[:end]]), first_line)
            parts, first_line = [], line + block.count(b"\n")
        parts.append(block[end:])
    yield Chunk(path, b"".join(parts), first_line)


def _read_json(path: Path, stream, text_field: str | None, chunk_bytes: int) -> Iterator[Chunk]:
    """The objects of a file that is held whole: see json_records."""
    data = b"".join(block for _, block in _blocks(path, stream, chunk_bytes))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1 + data.count(b"\n", 0, error.start), error) from None
    yield from _in_chunks(path, json_records(text, f"--data.path {path}", text_field), chunk_bytes)


def _read_csv(path: Path, stream, delimiter: str, chunk_bytes: int) -> Iterator[Chunk]:
    lines = _lines(path, stream, chunk_bytes)
    yield from _in_chunks(path, csv_records(lines, f"--data.path {path}", delimiter), chunk_bytes)


def _lines(path: Path, stream, chunk_bytes: int) -> Iterator[str]:
    """The lines of a text file, each with its newline."""
    rest, number = [], 1
    for _, block in _blocks(path, stream, chunk_bytes):
        *lines, last = block.split(b"\n")
        for line in lines:
            yield _decoded(path, b"".join([*rest, line, b"\n"]), number)
            rest, number = [], number + 1
        rest.append(last)
    if any(rest):
        yield _decoded(path, b"".join(rest), number)


def _decoded(path: Path, line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None


def _in_chunks(path: Path, records: Iterator[tuple[str, dict]], chunk_bytes: int) -> Iterator[Chunk]:
    held, held_chars = [], 0
    for where, record in records:
        held.append((where, record))
        held_chars += _n_chars(record)
        if held_chars >= chunk_bytes:
            yield Chunk(path, held)
            held, held_chars = [], 0
    yield Chunk(path, held)


def _n_chars(value) -> int:
    """About how long a record is."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_n_chars, value.values()))
    return sum(map(_n_chars, value)) if isinstance(value, list) else 1


def _text_of_record(row: dict, where: str, text_field: str) -> str:
    if text_field in row:
        return checked_text(row[text_field], where, text_field)
    value, rest = row, text_field.split(".")
    # a.b is the field b of the object in a; a name with a dot in it goes first
    while rest:
        if not isinstance(value, dict):
            held = type(value).__name__
            above = text_field.removesuffix("." + ".".join(rest))
            raise BadRecord(
                where, f"no field {text_field!r}", f"{above!r} holds {held}, no object with further fields."
            )
        if ".".join(rest) in value:
            return checked_text(value[".".join(rest)], where, text_field)
        if rest[0] not in value:
            raise BadRecord(
                where,
                f"no field {text_field!r}",
                f"its fields are {_names_in(row)}. Name the one that holds the "
                "text with --data.text-field, as in a.b if it stands inside of another.",
            )
        value = value[rest.pop(0)]
    return checked_text(value, where, text_field)


def _names_in(row: dict) -> str:
    """The fields of a record, and as a.b those of the objects in it."""
    names = []
    for name, value in row.items():
        inner = [f"{name}.{one}" for one in value] if isinstance(value, dict) else []
        names += inner or [name]
    return ", ".join(names[:20]) or "none"


def _object_of_line(line: bytes, path: Path, number: int) -> dict:
    where = f"--data.path {path}, line {number}"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise BadRecord(
            where,
            f"broken JSON ({reason})",
            "a .jsonl holds one object a line. If one takes several lines here, call the file .json.",
        ) from None
    return _checked_object(row, where)


def _checked_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise BadRecord(
            where,
            f"expected a JSON object, found {type(row).__name__}",
            "a .jsonl holds one object a line, a list of them goes into a .json.",
        )
    return row


def checked_text(text, where: str, text_field: str) -> str:
    """`text` if it is a string of whole characters, else UsageError."""
    if not isinstance(text, str):
        raise BadRecord(where, f"{text_field!r} holds {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRecord(
            where, f"{text_field!r} holds half a surrogate pair", "\\ud800 to \\udfff stand in pairs."
        ) from None
    return text


def _read_parquet(path: Path, stream, text_field: str | None, chunk_bytes: int) -> Iterator[Chunk]:
    parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=chunk_bytes)
    column = _column_of(path, parquet.schema_arrow, text_field)
    # of a struct only the fields on the way to the text are read
    columns = None if column is None else [text_field]
    batches = parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
    yield from _read_batches(path, batches, text_field, chunk_bytes)


def _read_arrow(path: Path, stream, text_field: str | None, chunk_bytes: int) -> Iterator[Chunk]:
    reader = open_arrow(stream, f"--data.path {path}")
    column = _column_of(path, reader.schema, text_field)
    batches = (batch if column is None else batch.select([column]) for batch in arrow_batches(reader))
    yield from _read_batches(path, _slices(batches), text_field, chunk_bytes)


def _slices(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for first in range(0, len(batch), BATCH_ROWS):
            yield batch.slice(first, BATCH_ROWS)


def _column_of(path: Path, schema: pa.Schema, text_field: str | None) -> str | None:
    """The column that text_field stands in: a column, or a.b in a column of structs; None of whole
    records."""
    if text_field is None or text_field in schema.names:
        return text_field
    column, *inner = text_field.split(".")
    kind = schema.field(column).type if column in schema.names else None
    for name in inner:
        is_there = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(name) >= 0
        kind = kind.field(name).type if is_there else None
    if kind is None:
        names = [name for one in schema for name in _columns_in(one)]
        raise UsageError(
            f"--data.path {path}: no column {text_field!r}; it has {', '.join(names) or 'none'}. "
            "Name the one that holds the text with --data.text-field."
        )
    return column


def _columns_in(column: pa.Field) -> list[str]:
    """The name of a column, and as a.b those in a column of structs."""
    if pa.types.is_struct(column.type):
        return [f"{column.name}.{inner.name}" for inner in column.type]
    return [column.name]


def _read_batches(
    path: Path, batches: Iterator[pa.RecordBatch], text_field: str | None, chunk_bytes: int
) -> Iterator[Chunk]:
    """The rows of a table, a few at a time."""
    row = 0
    if text_field is None:
        for batch in batches:
            try:
                yield Chunk(
                    path, [(f"row {row + i}", record) for i, record in enumerate(batch.to_pylist(), 1)]
                )
            except UnicodeDecodeError as error:
                rows = f"rows {row + 1} to {row + len(batch)}"
                raise UsageError(f"--data.path {path}, {rows}: not UTF-8 text ({error}).") from None
            row += len(batch)
        return
    held, held_chars = [], 0
    for batch in batches:
        name = batch.schema.names[0]
        for cell in batch.column(0):
            row += 1
            try:
                text = cell.as_py()
            except UnicodeDecodeError as error:
                raise UsageError(f"--data.path {path}, row {row}: not UTF-8 text ({error}).") from None
            held.append((f"row {row}", {name: text}))
            held_chars += _n_chars(text)
            if held_chars >= chunk_bytes:
                yield Chunk(path, held)
                held, held_chars = [], 0
    yield Chunk(path, held)


def _read_txt(path: Path, stream, cutter: Cutter, chunk_bytes: int) -> Iterator[Chunk]:
    """The whole file is one document; its pieces are cut so that their ids join to those of the whole."""
    decoder, text, line = codecs.getincrementaldecoder("utf-8")(), "", 1
    skip, opens, reach = 0, True, chunk_bytes
    try:
        for line, block in _blocks(path, stream, chunk_bytes):
            text += decoder.decode(block)
            line += block.count(b"\n")  # where a character that the file's end cuts off would stand
            while len(text) > reach + WINDOW_CHARS:
                high = min(reach + chunk_bytes, len(text) - WINDOW_CHARS)
                if cut := cutter.find(text, reach, high):
                    end, start, next_skip = cut
                    yield Chunk(path, text[:end], skip=skip, opens=opens, closes=False)
                    text, skip, opens, reach = text[start:], next_skip, False, chunk_bytes
                else:
                    reach = high  # no cut can be trusted so far: a longer piece is still exact
        text += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line + error.object.count(b"\n", 0, error.start), error) from None
    yield Chunk(path, text, skip=skip, opens=opens)
