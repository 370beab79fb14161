"""Reads files in chunks of about a mebibyte, and splits the chunks into documents.

Memory does not depend on the size of a file. One process reads (`read_chunks`). The processes that tokenize
split the chunks into documents (`Chunk.documents`), so that parsing does not slow down the reading. Every
defect of a file raises a UsageError that names the file and the line or row.
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

from dtensor_llama.data.cut import WINDOW_CHARS, Cutter
from dtensor_llama.data.records import (
    Records,
    arrow_records,
    csv_records,
    fields_once,
    in_json,
    json_records,
    parquet_records,
)
from dtensor_llama.data.unpack import (
    COMPRESSIONS,
    NEEDS_WINDOW,
    UNPACK_ERRORS,
    long_window_error,
    open_compressed,
)
from dtensor_llama.errors import BadRecord, UsageError
from dtensor_llama.places import expanded, hub_hint

RECORD_FORMATS = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv")  # records with several fields
FORMATS = (".txt", *RECORD_FORMATS)
OTHER_ENDINGS = {".ndjson": ".jsonl", ".feather": ".arrow"}  # other names for the same formats
# A worker gets this much at a time: enough to hide the transfer to it, and little enough to balance the load.
CHUNK_BYTES = 1 << 20

Skip = Callable[[str, UsageError], None]  # takes where a bad record is, and what is wrong with it


def refuse(where: str, error: UsageError) -> None:
    """Raise the error of a bad record, as bad_records="refuse" asks for."""
    raise error


@dataclass(frozen=True)
class TextOptions:
    """Decides which texts a corpus contains.

    field: the field of a record, or the column, that holds the text; a.b means the field b of the object in a
    bad_records: "refuse" ends the run at a record without a text; "skip" leaves it out and lists it"""

    field: str = "text"
    bad_records: Literal["refuse", "skip"] = "refuse"


@dataclass
class Chunk:
    """Holds part of one file: whole lines of a .jsonl (bytes), a piece of a .txt (str), or a list of records.

    A record in the list comes with its place in the file, for example ("row 3", {"text": "..."})."""

    path: Path
    data: bytes | str | list[tuple[str, dict]]
    first_line: int = 1  # .jsonl: the number of its first line in the file, counted from 1
    input_bytes: int = 0  # bytes read from disk since the chunk before, for the progress bar
    skip: int = 0  # .txt: the number of leading ids that come from the cut and not from the text
    opens: bool = True  # .txt: the piece starts its document
    closes: bool = True  # .txt: the piece ends its document

    def documents(self, text_field: str, skip: Skip = refuse) -> list[str]:
        """Return the texts in this chunk, without those that contain nothing but whitespace.

        skip: is called with the place and the UsageError of each record that cannot be read or has no text;
            the default raises the error"""
        texts = []
        if isinstance(self.data, str):
            texts.append(self.data)
        else:
            for where, record in self.records(skip):
                try:
                    texts.append(_text_of_record(record, where, text_field))
                except UsageError as error:
                    skip(where, error)
        is_whole = self.opens and self.closes
        return [text for text in texts if text and not (is_whole and text.isspace())]

    def records(self, skip: Skip = refuse) -> Records:
        """Yield (where, record) for each record in this chunk; `where` is "FILE, line 3", for example.

        skip: is called with the place and the UsageError of each line that holds no JSON object; the default
            raises the error"""
        if not isinstance(self.data, bytes):
            for where, record in self.data:
                yield f"{self.path}, {where}", record
            return
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                record = _object_of_line(line, where)
            except UsageError as error:
                skip(where, error)
            else:
                yield where, record


# ---- which files ----


def expand_paths(patterns: Sequence[str | Path], formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Return the files that `patterns` (file names and globs, also with `**`) stand for.

    Paths are absolute and sorted, and each file comes once. A link keeps its own name, because its ending
    tells the format: in the cache of the Hugging Face Hub, data.jsonl is a link to a file whose name is a
    hash. If two links lead to one file, the first is used.
    Raises UsageError if a pattern matches no file, and for a file whose ending is not in `formats`."""
    files = {}
    for pattern in patterns:
        for match in _matches(str(pattern)):
            files.setdefault(os.path.realpath(match), set()).add(Path(os.path.abspath(match)))
    if not files:
        raise UsageError("`data.path`: no file was named; give files or patterns such as 'data/**/*.txt'.")
    chosen = [_named_by_its_kind(sorted(names), Path(target), formats) for target, names in files.items()]
    chosen.sort()
    for file in chosen:
        if _kind_of(file)[0] not in formats:
            raise UsageError(
                f"{file}: unknown kind of file; {_listed(formats)} can be read, also compressed as "
                f"{_listed(tuple(COMPRESSIONS))}."
            )
    return chosen


def _matches(pattern: str) -> list[Path]:
    """Return the files that one argument stands for; raise UsageError if there is none or it is no file."""
    path = Path(expanded(pattern, "data.path"))
    given = f"data.path={pattern}"
    if path.is_dir():
        raise UsageError(f"{given}: is a folder; name the files in it, as in '{pattern}/**/*.jsonl'.")
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{given}: is a pipe or a device, and the data is read more than once; write it to a file first."
        )
    if os.path.lexists(path):
        matches = [path]
    else:
        found = glob.glob(str(path), recursive=True) or glob.glob(_taken_literally(path), recursive=True)
        matches = [Path(match) for match in found]
    for match in matches:
        if match.is_symlink() and not match.exists():
            raise UsageError(
                f"{match}: is a link to {os.readlink(match)}, which does not exist; fetch the data again, "
                "or leave the link out."
            )
    matches = [match for match in matches if match.is_file()]
    if not matches:
        hint = hub_hint(pattern, "dataset")
        raise UsageError(f"{given}: no file matches; give files or patterns such as 'data/**/*.txt'.{hint}")
    return matches


def _taken_literally(path: Path) -> str:
    """Return the pattern with its existing folders escaped, because their names may contain [brackets]."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    return os.path.join(glob.escape(str(folder)), path.relative_to(folder))


def _named_by_its_kind(names: list[Path], target: Path, formats: tuple[str, ...]) -> Path:
    """Return the first name of a file with a known ending; the file that the names link to is tried last."""
    return next((name for name in [*names, target] if _kind_of(name)[0] in formats), names[0])


def _kind_of(path: Path) -> tuple[str, str | None]:
    """Return (ending, compression) of a file, for example (".jsonl", "gzip")."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    return OTHER_ENDINGS.get(suffix, suffix), compression


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


# ---- files to chunks ----


def read_chunks(
    path: Path, text_field: str | None, cutter: Cutter | None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Yield the chunks of one file, in order.

    text_field: the only field that is needed of each record; None: all fields are, and no cutter is needed
    cutter: cuts the pieces of a .txt; None: a .txt is one piece. Raises UsageError for a file that cannot be
        read to its end."""
    suffix, compression = _kind_of(path)
    done_bytes = 0
    try:
        with open(path, "rb") as file, tempfile.TemporaryFile() as unpacked:
            stream = packed = open_compressed(path, file, compression)
            if suffix in (".parquet", ".arrow") and compression:
                # Their readers jump about in the file, so it is decompressed into a temporary file first.
                shutil.copyfileobj(stream, unpacked, chunk_bytes)
                unpacked.seek(0)
                stream = unpacked
            if suffix == ".txt":
                chunks = _read_txt(path, stream, cutter, chunk_bytes)
            elif suffix == ".jsonl":
                chunks = _read_jsonl(path, stream, chunk_bytes)
            else:
                records = _records_of(suffix, path, stream, text_field, chunk_bytes)
                chunks = _in_chunks(path, records, chunk_bytes)
            for chunk in chunks:
                chunk.input_bytes, done_bytes = file.tell() - done_bytes, file.tell()
                yield chunk
            if packed is not file:
                packed.close()
    except (*UNPACK_ERRORS, pa.ArrowException) as error:
        if compression == "zstd" and NEEDS_WINDOW in str(error):
            raise long_window_error(path) from None
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: cannot be read to its end ({reason}); it may be cut short or damaged: fetch it again "
            "or leave it out."
        ) from None


def _records_of(suffix: str, path: Path, stream, text_field: str | None, chunk_bytes: int) -> Records:
    if suffix == ".parquet":
        return parquet_records(stream, path, text_field, chunk_bytes)
    if suffix == ".arrow":
        return arrow_records(stream, path, text_field)
    if suffix == ".json":
        return json_records(_whole(path, stream, chunk_bytes), path, text_field)
    return csv_records(_lines(path, stream, chunk_bytes), path, "\t" if suffix == ".tsv" else ",")


def _in_chunks(path: Path, records: Records, chunk_bytes: int) -> Iterator[Chunk]:
    held, held_chars = [], 0
    for where, record in records:
        held.append((where, record))
        held_chars += _n_chars(record)
        if held_chars >= chunk_bytes:
            yield Chunk(path, held)
            held, held_chars = [], 0
    yield Chunk(path, held)


def _n_chars(value) -> int:
    """Return the approximate length of a record, in characters."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_n_chars, value)) if isinstance(value, list) else 1


def _blocks(path: Path, stream, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the line in which it starts, its bytes) for each block of a text file.

    A byte-order mark at the start of the file is left out."""
    line, block = 1, stream.read(chunk_bytes).removeprefix(codecs.BOM_UTF8)
    while block:
        zero = block.find(b"\0")
        if zero >= 0:
            line += block.count(b"\n", 0, zero)
            raise UsageError(
                f"{path}, line {line}: a zero byte; the file is binary or UTF-16, expected text in UTF-8."
            )
        yield line, block
        line, block = line + block.count(b"\n"), stream.read(chunk_bytes)


def _whole(path: Path, stream, chunk_bytes: int) -> str:
    data = b"".join(block for _, block in _blocks(path, stream, chunk_bytes))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise _not_utf8(f"{path}, line {line}", error) from None


def _lines(path: Path, stream, chunk_bytes: int) -> Iterator[str]:
    """Yield the lines of a text file, each with its newline."""
    rest, number = [], 1
    for _, block in _blocks(path, stream, chunk_bytes):
        *lines, last = block.split(b"\n")
        for line in lines:
            yield _decoded(b"".join([*rest, line, b"\n"]), f"{path}, line {number}")
            rest, number = [], number + 1
        rest.append(last)
    if any(rest):
        yield _decoded(b"".join(rest), f"{path}, line {number}")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> UsageError:
    return UsageError(
        f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8 text; convert the file (iconv -t "
        "utf-8) or leave it out."
    )


def _read_jsonl(path: Path, stream, chunk_bytes: int) -> Iterator[Chunk]:
    parts, first_line = [], 1
    for line, block in _blocks(path, stream, chunk_bytes):
        end = block.rfind(b"\n") + 1
        if end:  # otherwise one line is longer than a block, and goes on in the next
            yield Chunk(path, b"".join([*parts, block[:end]]), first_line)
            parts, first_line = [], line + block.count(b"\n")
        parts.append(block[end:])
    yield Chunk(path, b"".join(parts), first_line)


def _read_txt(path: Path, stream, cutter: Cutter | None, chunk_bytes: int) -> Iterator[Chunk]:
    """Yield the pieces of a file that is one document; their ids, joined, are the ids of the whole text."""
    decoder, text, line = codecs.getincrementaldecoder("utf-8")(), "", 1
    skip, opens, reach = 0, True, chunk_bytes
    try:
        for line, block in _blocks(path, stream, chunk_bytes):
            text += decoder.decode(block)
            line += block.count(b"\n")  # the line of a character that the end of the file may cut in two
            while cutter is not None and len(text) > reach + WINDOW_CHARS:
                high = min(reach + chunk_bytes, len(text) - WINDOW_CHARS)
                cut = cutter.find(text, reach, high)
                if cut is None:
                    reach = high  # no cut can be trusted so far; a longer piece is still exact
                    continue
                end, start, next_skip = cut
                yield Chunk(path, text[:end], skip=skip, opens=opens, closes=False)
                text, skip, opens, reach = text[start:], next_skip, False, chunk_bytes
        text += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise _not_utf8(f"{path}, line {line}", error) from None
    yield Chunk(path, text, skip=skip, opens=opens)


# ---- records to texts ----


def _object_of_line(line: bytes, where: str) -> dict:
    text = _decoded(line, where)
    try:
        record = json.loads(text, object_pairs_hook=fields_once)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise BadRecord(
            where,
            f"broken JSON ({reason})",
            "a .jsonl has one object per line. If an object takes several lines here, name the file .json.",
        ) from None
    if not isinstance(record, dict):
        raise BadRecord(
            where,
            f"expected a JSON object, found {in_json(record)}",
            "a .jsonl has one object per line; write a list of objects as .json.",
        )
    return record


def _text_of_record(record: dict, where: str, text_field: str) -> str:
    """Return the text of a record. a.b is a field of that name, or else the field b of the object in a."""
    value, names = record, text_field.split(".")
    for depth, name in enumerate(names):
        rest = ".".join(names[depth:])
        if not isinstance(value, dict):
            above = ".".join(names[:depth])
            raise BadRecord(
                where,
                f"no field {text_field!r}",
                f"{above!r} holds {in_json(value)}, no object with further fields.",
            )
        if rest in value:
            value = value[rest]
            break
        if name not in value:
            raise BadRecord(
                where,
                f"no field {text_field!r}",
                f"its fields are {_names_in(record)}. Name the one that holds the text with `text_field`, "
                "as a.b if it is the field b of the object in a.",
            )
        value = value[name]
    return checked_text(value, where, text_field)


def _names_in(record: dict) -> str:
    """Return the names of the fields of a record, in words; a field b of an object in a is named a.b."""
    names = []
    for name, value in record.items():
        inner = [f"{name}.{one}" for one in value] if isinstance(value, dict) else []
        names += inner or [name]
    return ", ".join(names[:20]) or "none"


def checked_text(text, where: str, text_field: str) -> str:
    """Return `text` if it is a string that UTF-8 can encode; raise BadRecord if it is not.

    where: the file and line of the record; text_field: the name of the field; both are for the message."""
    if not isinstance(text, str):
        raise BadRecord(where, f"{text_field!r} holds {in_json(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which is not a character
        raise BadRecord(
            where, f"{text_field!r} holds half a surrogate pair", "\\ud800 to \\udfff stand in pairs."
        ) from None
    return text
