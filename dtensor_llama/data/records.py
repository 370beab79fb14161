"""Records of the files that are not one JSON object a line: .json, .csv and .tsv, .arrow.

Each reader gives (where, record) in the order of the file, with `where` as in "line 3". Every defect is a
UsageError: of a file that is not what its name says, nothing is guessed and nothing passed over.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator

import pyarrow as pa

from dtensor_llama.errors import UsageError

BLANKS = re.compile(r"[ \t\r\n]*")  # what JSON allows between its parts
# Fields under which a whole data set stands in an object, as in {"version": "1.0", "data": [...]}.
WRAPPERS = (
    "data",
    "train",
    "rows",
    "instances",
    "examples",
    "records",
    "items",
    "samples",
    "dataset",
    "entries",
)


def json_records(text: str, given: str, text_field: str | None) -> Iterator[tuple[str, dict]]:
    """The objects of a .json: those of a list, or of several lists one after another, or objects one after
    another, over one line or many; or the list in an object like {"data": [...]}. given: "--data.path FILE".
    text_field: of plain texts."""
    for where, value in _Json(text, given).values():
        if not isinstance(value, dict):
            raise UsageError(f"{given}, {where}: expected a JSON object, found {type(value).__name__}.")
        wrapper = _wrapper(value, f"{given}, {where}", text_field)
        if wrapper is None:
            yield where, value
        else:
            yield from ((f"{where}, {wrapper}[{i}]", record) for i, record in enumerate(value[wrapper]))


def _wrapper(value: dict, where: str, text_field: str | None) -> str | None:
    """The field of `value` that holds all records, if it is no record itself."""
    if text_field in value:
        return None
    lists = [name for name, held in value.items() if _is_list_of_objects(held)]
    found = [name for name in lists if name.lower() in WRAPPERS]
    if not found:
        return None
    if len(lists) > 1:
        raise UsageError(
            f"{where}: an object with several lists of records, {' and '.join(lists)}; put the "
            "one to train on into a file of its own."
        )
    return found[0]


def _is_list_of_objects(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


class _Json:
    """Walks through JSON values one after another, knowing the line."""

    def __init__(self, text: str, given: str):
        self.text, self.given = text, given
        self.decoder = json.JSONDecoder()
        self.at, self.line, self.counted_to = 0, 1, 0

    def values(self) -> Iterator[tuple[str, object]]:
        """(where, value) of each element of a list, and of each value outside of one."""
        while self._next_char():
            if self._next_char() != "[":
                yield self._where(), self._value()
                continue
            opened_in = self._where()
            self.at += 1
            closed = self._next_char() == "]"
            while not closed:
                if not self._next_char():
                    raise self._not_closed(opened_in)
                yield self._where(), self._value()
                separator = self._next_char()
                closed = separator == "]"
                if not separator:
                    raise self._not_closed(opened_in)
                if separator not in ",]":
                    raise self._broken(f"expected a comma or the end of the list, found {separator!r}")
                if not closed:
                    self.at += 1
                    if self._next_char() == "]":
                        raise self._broken("a comma before the end of the list")
            self.at += 1

    def _next_char(self) -> str:
        """The character that the next part begins with; empty at the end."""
        self.at = BLANKS.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def _value(self):
        char = self.text[self.at]
        if char in ",]":
            what = "comma" if char == "," else "']'"
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
        return UsageError(f"{self.given}, {self._where()}: broken JSON ({reason}).")

    def _not_closed(self, opened_in: str) -> UsageError:
        return UsageError(
            f"{self.given}: the array is not closed, which begins in {opened_in}; the file is "
            "cut short: fetch it again."
        )


def csv_records(lines: Iterator[str], given: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    """The rows of a .csv or .tsv under its header line, as {column: text}. A header without a comma but with
    semicolons or tabs says that those are the delimiter, as spreadsheets write where the comma is for
    decimals."""
    csv.field_size_limit(sys.maxsize)  # a field is a whole document
    header_line = next(lines, "")
    if delimiter not in header_line:
        delimiter = next((other for other in ";\t" if other in header_line), delimiter)
    rows = csv.reader(_chain(header_line, lines), delimiter=delimiter, strict=True)
    first_line, columns = 1, None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UsageError(
                f"{given}, line {first_line}: broken CSV ({error}); a field with a quote, a "
                "line break or the delimiter in it stands in double quotes, and a quote in "
                "there is doubled."
            ) from None
        where, first_line = f"{given}, line {first_line}", rows.line_num + 1
        if row is None:
            return
        if not row:  # an empty line
            continue
        if columns is None:
            columns = row
            twice = next((name for name in columns if columns.count(name) > 1), None)
            if twice is not None:
                raise UsageError(
                    f"{where}: the column {twice!r} is there twice; give each column a name of its own."
                )
            continue
        if len(row) != len(columns):
            raise UsageError(
                f"{where}: {len(row)} fields, and the header has {len(columns)} columns ("
                f"{', '.join(columns[:20])}); a field with the delimiter in it stands in double "
                "quotes."
            )
        yield where.removeprefix(f"{given}, "), dict(zip(columns, row, strict=True))


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def open_arrow(file, given: str):
    """The reader of an Arrow file, or of an Arrow stream, which is what the datasets library writes under the
    same ending."""
    head = file.read(8)
    file.seek(-4, 2)
    tail = file.read(4)
    file.seek(0)
    if head.startswith(b"FEA1"):
        raise UsageError(
            f"{given}: Feather of version 1, which is not read; write it anew with pyarrow or as .parquet."
        )
    if head.startswith(b"ARROW1"):
        return pa.ipc.open_file(pa.PythonFile(file, mode="r"))
    if tail != b"\0\0\0\0":
        raise pa.ArrowInvalid("an Arrow stream ends with a mark, and this one does not")
    return pa.ipc.open_stream(pa.PythonFile(file, mode="r"))


def arrow_batches(reader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader
