"""Loads the rows of a source: a file, a datasets folder, the demo or a hub name. Knows no templates."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from prefixtune.data.files import READERS, without_filling
from prefixtune.data.row import Row, missing_field, sharegpt_messages
from prefixtune.errors import ConfigError, DataError

__all__ = ["check_splits", "load_rows", "parse_fields"]

_FORMATS = "JSON, JSONL, NDJSON, CSV, TSV or Parquet"
_DEMO = {"demo": "train", "demo:train": "train", "demo:heldout": "heldout"}
# what a hub name never ends with; hub names do hold dots ("v1.5"), so not any suffix
_FILE_SUFFIXES = (
    *READERS,
    ".txt",
    ".arrow",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tar",
    ".xlsx",
    ".xml",
    ".yaml",
)


def parse_fields(text: str | None) -> dict[str, str]:
    """The mapping of a template's fields to a file's columns.

    Example:
        >>> parse_fields('input=mr,"output=ref, final"')  # quotes where a name has a comma
        {'input': 'mr', 'output': 'ref, final'}

    Raises:
        ConfigError: a part is not FIELD=COLUMN, or a field is mapped twice.
    """
    fields: dict[str, str] = {}
    try:
        parts = next(csv.reader([text], skipinitialspace=True)) if text and text.strip() else []
    except csv.Error as error:  # a line break without quotes
        raise ConfigError(f"fields: {text!r} is no list: {error}") from None
    for part in parts:
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and equals and column):
            raise ConfigError(
                f"fields: expected FIELD=COLUMN, several with commas; got {part.strip()!r} in {text!r}",
                hint="for example --fields input=mr,output=ref; where a column has a comma the pair is in "
                "quotes: 'input=mr,\"output=ref, final\"'",
            )
        if name in fields:
            raise ConfigError(f"fields: '{name}' is mapped twice, to {fields[name]} and to {column}")
        fields[name] = column
    return fields


def load_rows(
    source: str, *, fields: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Read the rows of a file, a datasets folder, a hub data set, or the packaged demo.

    Args:
        source: a path (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, or a folder written by
            `Dataset.save_to_disk`); "demo", "demo:train" or "demo:heldout" ("./demo" is a path); else
            a data set's name on the hub. What exists on disk is never looked up on the hub.
        fields: renames columns, {field: column}; the other columns keep their names.
        split: the split of a DatasetDict or a hub data set; files have none.
        limit: read no more than this many rows.

    Returns:
        At least one row, each with its origin.

    Raises:
        DataError: the source cannot be found or read, is empty, or a row lacks a mapped column.
    """
    if limit is not None and limit <= 0:
        raise ConfigError(f"limit: expected more than 0; got {limit}")
    rows = [_with_messages(_rename(row, fields or {})) for row in islice(_open(source, split), limit)]
    if not rows:
        raise DataError(f"{source}: the data set is empty; there is no row in it")
    return rows


def check_splits(data: str, eval_data: str, *, split: str, eval_split: str) -> None:
    """Refuse to evaluate on the split that is trained on. A file, which has no splits, may be given twice.

    Raises:
        ConfigError: both are the same split of the same data set.
    """
    if split == eval_split and Path(data).resolve() == Path(eval_data).resolve() and _has_splits(data):
        raise ConfigError(
            f"{eval_data}: the split '{eval_split}' is trained on, so it says nothing of other rows",
            hint="name the split to evaluate on with --eval-split, or eval_split in a file's [data]",
        )


def _has_splits(source: str) -> bool:
    path = Path(source)
    if path.exists():
        return (path / "dataset_dict.json").is_file()
    return source not in _DEMO and not _looks_like_path(source)


def _rename(row: Row, fields: Mapping[str, str]) -> Row:
    for name, column in fields.items():
        if column not in row.values:
            raise missing_field(row, column, wanted=name)
    # a renamed column leaves its old name, or `input` would stand in the prompt twice
    taken = set(fields.values())
    kept = {name: value for name, value in row.values.items() if name not in taken}
    mapped = {name: row.values[column] for name, column in fields.items()}
    return Row(values={**kept, **mapped}, origin=row.origin)


def _with_messages(row: Row) -> Row:
    """ShareGPT's `conversations` as `messages`, the one form that is read from here on."""
    if "conversations" not in row.values or "messages" in row.values:
        return row
    try:
        messages = sharegpt_messages(row)
    except DataError:  # told by the chat template; others do not read the column
        return row
    kept = {name: value for name, value in row.values.items() if name != "conversations"}
    return Row(values={**kept, "messages": messages}, origin=row.origin)


def _open(source: str, split: str) -> Iterator[Row]:
    if source in _DEMO:
        return _demo(_DEMO[source])
    if source.startswith("demo:"):
        raise DataError(f"{source}: no such demo data", hint=f"there are {', '.join(_DEMO)}")
    if not source.strip():
        raise DataError("the data has no name", hint="a file, a folder, demo, or a data set on the hub")
    path = Path(source)
    if path.is_dir():
        return _folder(path, split)
    if path.exists():
        return _file(path)
    if _looks_like_path(source):
        raise DataError(f"{source}: no such file or folder", hint=f"the current folder is {Path.cwd()}")
    return _hub(source, split)


def _looks_like_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a path. A hub name is NAME or OWNER/NAME."""
    if source.lower().endswith(_FILE_SUFFIXES) or source.startswith((".", "~", "/")) or "\\" in source:
        return True
    parts = source.split("/")
    return len(parts) > 2 or "" in parts or any(char.isspace() for char in source) or Path(parts[0]).is_dir()


def _file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: expected {_FORMATS} by the file's suffix; got '{path.suffix}'",
            hint="rename or convert the file; .jsonl holds one JSON object per line",
        )
    return reader(path)


def _demo(part: str) -> Iterator[Row]:
    from importlib.resources import as_file, files

    resource = files("prefixtune") / "datasets" / f"support_mail.{part}.jsonl"
    if not resource.is_file():
        raise DataError(
            f"demo:{part}: the packaged file support_mail.{part}.jsonl is missing from this installation",
            hint="reinstall prefixtune",
        )
    with as_file(resource) as path:
        yield from _file(path)


def _folder(path: Path, split: str) -> Iterator[Row]:
    """A folder written by `save_to_disk`."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        inside = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in READERS)
        raise DataError(
            f"{path}: expected a folder written by datasets' save_to_disk; "
            "found neither state.json nor dataset_dict.json",
            hint=f"name a file in it: {', '.join(inside[:5])}" if inside else None,
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets and arrow raise over a broken folder
        raise DataError(f"{path}: datasets cannot load this folder: {_one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{path}: no split '{split}'; there are {', '.join(loaded)}",
                hint="choose with --split (--eval-split for the evaluation rows of train and compare)",
            )
        loaded = loaded[split]
    return _dataset_rows(loaded, path.name or str(path))


def _hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # not found, no network, no such split, a gated set, a broken script: all the look-up's
        raise DataError(
            f"{name}: no file or folder of this name here, and not loaded from the hub: {_one_line(error)}",
            hint="check the spelling and the network; offline, download the data and give the file's path",
        ) from error
    return _dataset_rows(loaded, name)


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    rows = enumerate(dataset)
    return (Row(values=without_filling(dict(values)), origin=f"{name}[{index}]") for index, values in rows)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
