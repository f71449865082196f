"""Reads rows from JSON, JSON lines, CSV, TSV and Parquet files. Knows no templates and no hub.

Each reader is a generator of rows whose origin names the file and the line, so `limit` stops it early.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.row import Row, kind_of
from prefixtune.errors import DataError

__all__ = ["READERS", "read_text", "without_filling"]

_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's whitespace; str.isspace() knows more than JSON allows
_OBJECT = 'an object such as {"instruction": "…", "output": "…"}'


def read_text(path: Path) -> str:
    """The file as text: UTF-8, with or without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{path.name}:{line}"
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if utf16 else "<its encoding, e.g. GB18030 or LATIN1>"
        raise DataError(
            f"{where}: expected text in UTF-8; got byte 0x{data[error.start]:02x} at offset {error.start}",
            hint=f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}",
        ) from None
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty")
    return text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the object has the field '{twice}' twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _decode(text: str, start: int, where: Callable[[int, int], str]) -> tuple[Any, int]:
    """The JSON value at `start` and its end; `where` names a (line, column) of the text."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{where(error.lineno, error.colno)}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + 1
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where(line, 1)}: malformed JSON: {message}") from None


def _as_row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected {_OBJECT}; got {kind_of(value)}")
    return Row(values=value, origin=origin)


def read_json(path: Path) -> Iterator[Row]:
    """An array of objects; or lines of objects in a file that is named .json nevertheless."""
    text = read_text(path)
    start = _skip_space(text, 0)
    if text[start] == "[":
        yield from _array(text, start, path.name)
        return
    value, end = _decode(text, start, lambda line, column: f"{path.name}:{line}: column {column}")
    line = text.count("\n", 0, start) + 1
    if isinstance(value, dict) and "\n" in text[start:end]:
        raise DataError(
            f"{path.name}:{line}: expected an array of objects, or one object per line; "
            f"got an object over several lines, with the fields {', '.join(value) or '(none)'}",
            hint="put the rows into one array: [ {…}, {…} ]",
        )
    yield from _lines(text, path.name)


def _array(text: str, start: int, name: str) -> Iterator[Row]:
    def where(line: int, column: int) -> str:
        return f"{name}:{line}: column {column}"

    def place(position: int) -> str:
        return where(text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position))

    line, counted = 1, 0  # the line at `counted`; counting anew for each element would be quadratic
    last, rows = 0, 0  # the line of the row before, and how many there were
    position = _skip_space(text, start + 1)
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(text, position, where)
        rows += 1
        yield _as_row(value, f"{name}:{line}" + (f" (row {rows})" if line == last else ""))
        last, position = line, _skip_space(text, position)
        more = text.startswith(",", position)
        if more:
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise DataError(
                f"{place(position)}: malformed JSON: expected ',' or ']' after an element of the array"
            )
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(f"{place(rest)}: malformed JSON: there is more text after the end of the array")


def read_json_lines(path: Path) -> Iterator[Row]:
    """One object per line; blank lines hold no row."""
    yield from _lines(read_text(path), path.name)


def _lines(text: str, name: str) -> Iterator[Row]:
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and other breaks that are no line ends
    for number, line in enumerate(text.split("\n"), start=1):
        start = _skip_space(line, 0)
        if start == len(line):
            continue

        def where(_: int, column: int, number: int = number) -> str:
            return f"{name}:{number}: column {column}"

        if line.startswith("[", start):
            raise DataError(
                f"{name}:{number}: expected {_OBJECT} on each line; got a list",
                hint="a file that is one JSON array must be named .json",
            )
        value, end = _decode(line, start, where)
        rest = _skip_space(line, end)
        if rest < len(line):
            raise DataError(
                f"{where(0, rest + 1)}: malformed JSON: more text after the object; one object per line"
            )
        yield _as_row(value, f"{name}:{number}")


def _skip_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None  # the pattern matches the empty text
    return found.end()


def read_csv(path: Path, *, delimiter: str = ",") -> Iterator[Row]:
    """A header and rows of as many columns; the origin is the physical line on which the row starts."""
    text = read_text(path)
    # strict: without it a quote that is never closed swallows the rest of the file silently
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    limit = csv.field_size_limit(len(text))  # csv's own, 131,072 characters, is less than a long document
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:  # a blank line
                continue
            if header is None:
                header = _header(cells, f"{path.name}:{start}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path.name}:{start}: expected {len(header)} columns ({', '.join(header)}); "
                    f"got {len(cells)}",
                    hint='a cell that holds the separator, a quote or a line break must be in "quotes"',
                )
            yield Row(values=dict(zip(header, cells, strict=True)), origin=f"{path.name}:{start}")
    except csv.Error as error:
        raise DataError(
            f"{path.name}:{line}: malformed CSV: {error}",
            hint='put a cell with quotes into quotes and double the inner ones: "say ""yes"""',
        ) from None
    finally:
        csv.field_size_limit(limit)  # it is the process's


def _header(cells: list[str], where: str) -> list[str]:
    twice = [cell for cell in cells if cells.count(cell) > 1]
    if twice:
        raise DataError(f"{where}: the header names the column '{twice[0]}' twice")
    return cells


def read_tsv(path: Path) -> Iterator[Row]:
    """As `read_csv`, with tabs between the cells."""
    return read_csv(path, delimiter="\t")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file; they have no lines, so the origin is "name[index]", from 0."""
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _header(file.schema_arrow.names, path.name)
            for batch in file.iter_batches(batch_size=1024):
                for values in _batch_rows(batch, path.name, index):
                    yield Row(values=without_filling(values), origin=f"{path.name}[{index}]")
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable Parquet file: {error}") from None


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls of its objects: each has the keys of all rows there, so that a tool
    call would have the arguments of every other. What a message says stays, null or not."""
    return {name: _filled(value, ("content", "value")) for name, value in row.items()}


def _filled(value: Any, kept: Sequence[str] = ()) -> Any:
    if isinstance(value, list):
        return [_filled(item, kept) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None or key in kept}
    return value


def _batch_rows(batch: Any, name: str, first: int) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow batch; `first` is the index of its first in the file."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # of some value: each by itself
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for index in range(batch.num_rows):
            where = f"{name}[{first + index}]"
            yield {
                column: _arrow_value(values[index], f"{where}: field '{column}'")
                for column, values in columns.items()
            }
    else:
        yield from rows


def _arrow_value(scalar: Any, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{where}: expected text in UTF-8; got byte 0x{byte:02x} at offset {error.start}",
            hint="it was written as text without being decoded; write the file anew from decoded texts",
        ) from None
    except (ValueError, OverflowError):
        return scalar  # a date after the year 9999, say: refused where a template reads it, as every date is


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
