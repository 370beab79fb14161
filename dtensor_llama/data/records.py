"""Reads the records of .json, .csv, .tsv, .parquet and .arrow files. sources.py reads .jsonl and .txt.

Each reader yields (where, record) in the order of the file; `where` is the place in the file, such as
"line 3". Every defect raises UsageError: if a file is not what its name says, the reader does not guess, and
it never skips a part of a file.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dtensor_llama.errors import UsageError

Records = Iterator[tuple[str, dict]]  # (where, record); where is "line 3", for example

BLANKS = re.compile(r"[ \t\r\n]*")  # the characters that JSON allows between its parts
# The fields under which an object may hold a whole data set, as in {"version": "1.0", "data": [...]}.
WRAPPERS = "data train rows instances examples records items samples dataset entries".split()
BATCH_ROWS = 64  # this many rows of a table are decoded at once


# ---- .json ----


def json_records(text: str, path: Path, text_field: str | None) -> Records:
    """Yield the records of a .json, whose whole text is `text`.

    The file holds objects or lists of objects, one after another, over any number of lines; or one object
    with the list in it, such as {"data": [...]}.
    text_field: an object that has this field is a record itself, not a wrapper around records; None: no field
        tells. Raises UsageError for broken JSON, for values that are not objects, and for an object with
        several lists of records.
    """
    for where, value in _Json(text, path).values():
        if not isinstance(value, dict):
            raise UsageError(f"{path}, {where}: expected a JSON object, found {in_json(value)}.")
        wrapper = None if text_field in value else _wrapper(value, f"{path}, {where}")
        if wrapper is None:
            yield where, value
        else:
            yield from ((f"{where}, {wrapper}[{i}]", record) for i, record in enumerate(value[wrapper]))


def _wrapper(value: dict, where: str) -> str | None:
    """Return the name of the field that holds all records, or None if `value` is a record itself."""
    lists = [name for name, held in value.items() if _is_list_of_objects(held)]
    found = [name for name in lists if name.lower() in WRAPPERS]
    if found and len(lists) > 1:
        raise UsageError(
            f"{where}: the object has several lists of records, {' and '.join(lists)}; put the one to train "
            "on into a file of its own."
        )
    return found[0] if found else None


def _is_list_of_objects(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


class _Json:
    """Reads JSON values one after another, and counts lines."""

    def __init__(self, text: str, path: Path):
        self.text, self.path = text, path
        self.decoder = json.JSONDecoder(object_pairs_hook=fields_once)
        self.at, self.line, self.counted_to = 0, 1, 0

    def values(self) -> Iterator[tuple[str, object]]:
        """Yield (where, value) for each element of a list, and for each value outside a list."""
        while self._next_char():
            if self._next_char() != "[":
                yield self._where(), self._value()
                continue
            opened_in = self._where()
            self.at += 1
            separator = self._next_char()
            while separator != "]":
                if not self._next_char():
                    raise self._not_closed(opened_in)
                yield self._where(), self._value()
                separator = self._next_char()
                if not separator:
                    raise self._not_closed(opened_in)
                if separator not in ",]":
                    raise self._broken(f"expected a comma or the end of the list, found {separator!r}")
                self.at += separator == ","
                if separator == "," and self._next_char() == "]":
                    raise self._broken("a comma before the end of the list")
            self.at += 1

    def _next_char(self) -> str:
        """Skip blanks and return the next character without consuming it; "" at the end of the text."""
        self.at = BLANKS.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def _value(self):
        if self.text[self.at] in ",]":
            what = "comma" if self.text[self.at] == "," else "']'"
            raise self._broken(
                f"a {what} where a record should begin; records separated by commas stand in [ ]"
            )
        try:
            value, self.at = self.decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise self._broken(f"{error.msg}, line {error.lineno}") from None
        except (ValueError, RecursionError) as error:
            raise self._broken(str(error)) from None
        return value

    def _where(self) -> str:
        self.line += self.text.count("\n", self.counted_to, self.at)
        self.counted_to = self.at
        return f"line {self.line}"

    def _broken(self, reason: str) -> UsageError:
        return UsageError(f"{self.path}, {self._where()}: broken JSON ({reason}).")

    def _not_closed(self, opened_in: str) -> UsageError:
        return UsageError(
            f"{self.path}: the array is not closed, which begins in {opened_in}; the file is cut short: "
            "fetch it again."
        )


# ---- .csv and .tsv ----


def csv_records(lines: Iterator[str], path: Path, delimiter: str) -> Records:
    """Yield each row after the header line of a .csv or .tsv as {column: text}.

    If the header contains semicolons or tabs instead of `delimiter`, they are taken as the delimiter:
    spreadsheets write them in countries where the comma marks decimals. Raises UsageError for broken CSV, for
    two columns of one name, and for a row with more or fewer fields than the header."""
    csv.field_size_limit(sys.maxsize)  # a field may hold a whole document
    header_line = next(lines, "")
    if delimiter not in header_line:
        delimiter = next((other for other in ";\t" if other in header_line), delimiter)
    rows = csv.reader(itertools.chain([header_line], lines), delimiter=delimiter, strict=True)
    columns, first_line = None, 1
    while True:
        where = f"line {first_line}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UsageError(
                f"{path}, {where}: broken CSV ({error}); a field that contains a quote, a line break or the "
                "delimiter must be in double quotes, and each quote in it must be doubled."
            ) from None
        first_line = rows.line_num + 1
        if row is None:
            return
        if not row:  # an empty line
            continue
        if columns is None:
            columns = row
            twice = next((name for name in columns if columns.count(name) > 1), None)
            if twice is not None:
                raise UsageError(
                    f"{path}, {where}: the column {twice!r} is there twice; give each column a name of its "
                    "own."
                )
            continue
        if len(row) != len(columns):
            raise UsageError(
                f"{path}, {where}: {len(row)} fields, and the header has {len(columns)} columns ("
                f"{', '.join(columns[:20])}); a field that contains the delimiter must be in double quotes."
            )
        yield where, dict(zip(columns, row, strict=True))


# ---- .parquet and .arrow ----


def parquet_records(file, path: Path, text_field: str | None, buffer_bytes: int) -> Records:
    """Yield the rows of a .parquet; with a text_field only that column, or that field of its structs.

    buffer_bytes: how much is read from the file at a time. Raises UsageError if there is no such column."""
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer_bytes)
    columns = None
    if text_field is not None:
        _column_of(path, parquet.schema_arrow, text_field)
        columns = [text_field]
    return _rows(path, parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False))


def arrow_records(file, path: Path, text_field: str | None) -> Records:
    """Yield the rows of an .arrow; with a text_field only the column that contains it.

    Raises UsageError if there is no such column, and pyarrow's ArrowInvalid if the file is cut short."""
    reader = _open_arrow(file, path)
    batches = reader
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    if text_field is not None:
        column = _column_of(path, reader.schema, text_field)
        batches = (batch.select([column]) for batch in batches)
    small = itertools.chain.from_iterable(_slices(batch, BATCH_ROWS) for batch in batches)
    return _rows(path, small)


def _rows(path: Path, batches: Iterable[pa.RecordBatch], n_before: int = 0) -> Records:
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError as error:
            if len(batch) == 1:
                raise UsageError(f"{path}, row {n_before + 1}: not UTF-8 text ({error}).") from None
            yield from _rows(path, _slices(batch, 1), n_before)  # one row at a time, to find the bad one
        for record in records:
            n_before += 1
            yield f"row {n_before}", record


def _slices(batch: pa.RecordBatch, n_rows: int) -> Iterator[pa.RecordBatch]:
    for first in range(0, len(batch), n_rows):
        yield batch.slice(first, n_rows)


def _open_arrow(file, path: Path):
    """Open an Arrow file, or an Arrow stream, which the datasets library saves with the same ending."""
    head = file.read(8)
    file.seek(-4, 2)
    tail = file.read(4)
    file.seek(0)
    if head.startswith(b"FEA1"):
        raise UsageError(
            f"{path}: Feather version 1 cannot be read; write the file again with pyarrow, or as .parquet."
        )
    if head.startswith(b"ARROW1"):
        return pa.ipc.open_file(pa.PythonFile(file, mode="r"))
    if tail != b"\0\0\0\0":
        raise pa.ArrowInvalid("an Arrow stream ends with a mark, and this one does not")
    return pa.ipc.open_stream(pa.PythonFile(file, mode="r"))


def _column_of(path: Path, schema: pa.Schema, text_field: str) -> str:
    """Return the name of the column that contains text_field: the whole name, or a for the field b in a.b."""
    if text_field in schema.names:
        return text_field
    column, *inner = text_field.split(".")
    kind = schema.field(column).type if column in schema.names else None
    for name in inner:
        is_there = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(name) >= 0
        kind = kind.field(name).type if is_there else None
    if kind is None:
        names = ", ".join(itertools.chain.from_iterable(map(_columns_in, schema))) or "none"
        raise UsageError(
            f"{path}: no column {text_field!r}; it has {names}. Name the one that holds the text with "
            "`text_field`."
        )
    return column


def _columns_in(column: pa.Field) -> list[str]:
    """Return the name of a column, or a.b for each field b of a column of structs a."""
    if pa.types.is_struct(column.type):
        return [f"{column.name}.{inner.name}" for inner in column.type]
    return [column.name]


def fields_once(pairs: list[tuple[str, object]]) -> dict:
    """Return the object with these fields, as an object_pairs_hook of json; ValueError if one stands twice,
    because json would keep the last of them and drop the others."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands twice")
    return fields


def in_json(value: object) -> str:
    """Return what kind of value this is, in the words of JSON, in which people write the records."""
    kinds = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
