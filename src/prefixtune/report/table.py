"""The columns of a comparison's table, and how their numbers are written. Knows no terminal and no page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "columns_of", "markdown"]

NOTHING = "–"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A title, and what stands in a row."""

    title: str
    text: Callable[[Row], str]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows of results.json need."""
    found = [Column(title="method", text=lambda row: str(row["method"]))]
    if len({row["train_rows"] for row in rows}) > 1:
        found.append(Column(title="rows", text=lambda row: _whole(row["train_rows"])))
    found += [
        Column(title="trainable", text=lambda row: _whole(row["trainable_parameters"])),
        Column(title="file", text=lambda row: size(row["file_bytes"])),
        Column(title="initial memory", text=lambda row: size(row["initial_memory_bytes"])),
        Column(title="peak memory", text=lambda row: size(row["peak_memory_bytes"])),
        Column(title="train s", text=lambda row: _number(row["train_seconds"], 1)),
        Column(title="tokens/s", text=lambda row: _number(row["tokens_per_second"], 0)),
        Column(title="dev loss", text=_dev_loss),
    ]
    names = {name: None for row in rows for name in row["metrics"]}
    found += [Column(title=name, text=_metric(name)) for name in names]
    if any(row["forgetting"]["mean"] is not None for row in rows):
        found.append(Column(title="forgetting", text=lambda row: _spread(row["forgetting"], 4, row)))
    return found


def _dev_loss(row: Row) -> str:
    return _spread({"mean": row["dev_loss"], "std": row["dev_loss_std"]}, 4, row)


def _metric(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        found = row["metrics"].get(name) or {"mean": None, "std": None}
        digits = 2 if abs(found["mean"] or 0) > 1.5 else 4  # of 100, or of 1
        return _spread(found, digits, row)

    return text


def _spread(found: Mapping[str, Any], digits: int, row: Row) -> str:
    """A mean with its deviation, and over how many seeds it is where these are not all that were planned."""
    if found["mean"] is None:
        return NOTHING
    seeds = found.get("seeds", row["seeds"])  # of a metric, whose keys some seeds may not have
    planned = row.get("planned_seeds", row["seeds"])  # an earlier version wrote none
    spread = f" ± {found['std'] or 0:.{digits}f}" if seeds > 1 else ""
    note = f" ({seeds} of {planned} seeds)" if seeds < planned else ""
    return f"{found['mean']:.{digits}f}{spread}{note}"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _whole(value: int | None) -> str:
    return "all" if value is None else f"{value:,}"


def size(value: int | None) -> str:
    """Bytes as people read them, in powers of 1000."""
    if value is None:
        return NOTHING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value} B"


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The table in a page; the first column is text, the others are numbers."""
    lines = [
        [column.title for column in columns],
        *([column.text(row) for column in columns] for row in rows),
    ]
    head, *body = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    rule = " | ".join(["---", *["---:"] * (len(columns) - 1)])
    return "".join(f"| {line} |\n" for line in (head, rule, *body))
