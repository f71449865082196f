"""Whether answers are JSON, and the JSON that was wanted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from prefixtune.errors import DataError

__all__ = ["check_json", "json_equal", "json_valid"]


def json_valid(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the predictions that parse (RFC 8259, so without NaN); the references do not matter."""
    return sum(_parses(text) for text in predictions) / len(predictions)


def json_equal(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the predictions that are a reference as JSON: spaces and the order of keys do not matter.

    Raises:
        DataError: a reference is not JSON.
    """
    check_json(references)
    hits = [
        _parses(prediction) and any(_same(_parse(prediction), _parse(text)) for text in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def check_json(references: Sequence[Sequence[str]], origins: Sequence[Sequence[str]] | None = None) -> None:
    """Raise DataError where a reference is not JSON; `origins` names the row of each."""
    for index, texts in enumerate(references):
        for place, text in enumerate(texts):
            if not _parses(text):
                where = origins[index][place] if origins else f"references[{index}]"
                raise DataError(f"{where}: json_equal: the reference is not JSON: {text[:60]!r}")


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_int=_number, parse_float=_number)


def _parses(text: str) -> bool:
    try:
        _parse(text)
    except (ValueError, RecursionError):  # the latter from a model that repeats "["
        return False
    return True


def _number(digits: str) -> Decimal | tuple[str]:
    """All its digits: as a float 1e999 would equal 5e500. One with too many of them equals itself."""
    try:
        return Decimal(digits)
    except InvalidOperation:
        return (digits,)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON, however deep: 1 is 1.0, but not true, which Python takes for equal."""
    pairs = [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, bool) or isinstance(other, bool):
            if one is not other:
                return False
        elif isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(one[key], other[key]) for key in one]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif one != other:
            return False
    return True
