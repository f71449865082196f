"""One row of a data set and how its fields are read as text. Knows no file format and no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import DataError

__all__ = [
    "NoTargetError",
    "Row",
    "check_text",
    "count_converted",
    "field_text",
    "required_text",
    "sharegpt_messages",
]

# who speaks, in ShareGPT's form and in a chat template's
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class NoTargetError(DataError):
    """A row that teaches nothing: refused, or dropped and counted with on_no_target="drop"."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The fields of one row by name, and where it stands: "train.jsonl:17", or "name[17]" without lines."""

    values: dict[str, Any]
    origin: str


def field_text(row: Row, name: str) -> str:
    """The field as text: "" where it is absent or null, `str()` of a number or boolean.

    Raises:
        DataError: the field is a list, an object or anything else that is not text, or is no finite number.
    """
    value = row.values.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return check_text(value, f"{row.origin}: field '{name}'")
    if isinstance(value, float) and not math.isfinite(value):
        came = "NaN, a missing value" if math.isnan(value) else f"{value}, a number too large"
        raise DataError(
            f"{row.origin}: field '{name}': expected text; got {came}",
            hint="write null or an empty text where there is no value, and numbers of that size as text",
        )
    if isinstance(value, int | float):  # bool is an int
        return str(value)
    raise DataError(
        f"{row.origin}: field '{name}': expected text; got {kind_of(value)}",
        hint="map another column with --fields, or use --template chat for a list of messages",
    )


def required_text(row: Row, name: str) -> str:
    """`field_text` of a field that the row must have; null counts as empty text."""
    if name not in row.values:
        raise missing_field(row, name, wanted=name)
    return field_text(row, name)


def missing_field(row: Row, name: str, *, wanted: str) -> DataError:
    """The error for a row without the column `name`, which the template's field `wanted` needs."""
    there = [str(column) for column in row.values]
    shown = ", ".join(repr(column) if column != column.strip() else column for column in there)
    separators = [sign for sign in (";", "\t", "|") if len(there) == 1 and sign in there[0]]
    hint = f"map it with --fields {wanted}=<column>"
    if separators:
        hint = f"its columns are separated by {separators[0]!r}: save it with commas, or with tabs as .tsv"
    return DataError(
        f"{row.origin}: no '{name}' field; the row has {shown or 'no fields'}",
        hint=hint,
    )


def sharegpt_messages(row: Row) -> list[dict[str, Any]]:
    """The row's `conversations`, a list of {from, value}, as a list of {role, content}.

    Raises:
        DataError: it is no such list, or somebody else speaks than a human, gpt or the system.
    """
    where, said = f"{row.origin}: field 'conversations'", row.values["conversations"]
    if not isinstance(said, list):
        raise DataError(f"{where}: expected a list of {{from, value}}; got {kind_of(said)}")
    messages = []
    for index, turn in enumerate(said):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            came = f"the fields {', '.join(turn)}" if isinstance(turn, dict) else kind_of(turn)
            raise DataError(
                f"{where}: expected {{from, value}} at [{index}]; got {came}",
                hint="a list of {role, content} is read from the column messages: --fields messages=<column>",
            )
        if not isinstance(turn["from"], str) or turn["from"] not in _SPEAKERS:
            raise DataError(
                f"{where}: expected {', '.join(_SPEAKERS)} as 'from' at [{index}]; got {turn['from']!r}",
                hint="write other turns, such as tool calls, as messages of {role, content, tool_calls}",
            )
        messages.append({"role": _SPEAKERS[turn["from"]], "content": turn["value"]})
    return messages


def count_converted(row: Row, names: Iterable[str]) -> int:
    """How many of the fields are numbers or booleans that `field_text` turns into text."""
    return sum(isinstance(row.values.get(name), int | float) for name in names)


def check_text(text: str, where: str) -> str:
    """The text itself, unless it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}",
            hint="the text was cut inside an emoji or a rare character; repair or remove the row",
        ) from None
    return text


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
