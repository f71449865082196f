"""Plots of a comparison as PNG files. Needs matplotlib, and no display."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import MissingExtraError

__all__ = ["draw", "require_matplotlib"]

Row = Mapping[str, Any]
SIZE, DPI = (7.0, 4.2), 130  # inches; dots of an inch
AVERAGED = 20  # a loss curve of more points than this is smoothed
LEGEND = {"fontsize": 8, "frameon": False}


def require_matplotlib() -> None:
    """Raise MissingExtraError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "a report's plots need matplotlib, which is not installed",
            hint="pip install 'prefixtune[report]'",
        )


def draw(rows: Sequence[Row], cells: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Write the plots that the numbers allow.

    Args:
        rows: of results.json.
        cells: contents of the cells' files, with their loss curves.

    Returns:
        (title, file name) of each.
    """
    require_matplotlib()
    drawn = []
    if any(cell["losses"] for cell in cells):
        _curves(cells, folder / "loss.png")
        drawn.append(("Training loss", "loss.png"))
    name, label = _quality(rows)
    if any(row["train_rows"] for row in rows) and len({row["train_rows"] for row in rows}) > 1:
        _by_rows(rows, name, label, folder / "quality_rows.png")
        drawn.append((f"{label} against training rows", "quality_rows.png"))
    for title, key, unit, scale, file in (
        ("peak memory", "peak_memory_bytes", "GB", 1e9, "quality_memory.png"),
        ("training time", "train_seconds", "s", 1.0, "quality_time.png"),
    ):
        _scatter(rows, name, label, (key, f"{title} ({unit})", scale), folder / file)
        drawn.append((f"{label} against {title}", file))
    return drawn


def _quality(rows: Sequence[Row]) -> tuple[str | None, str]:
    """The first metric, or the loss where none was measured."""
    names = [name for row in rows for name, found in row["metrics"].items() if found["mean"] is not None]
    return (names[0], names[0]) if names else (None, "dev loss")


def _value(row: Row, name: str | None) -> tuple[float | None, float]:
    found = (
        {"mean": row["dev_loss"], "std": row["dev_loss_std"]} if name is None else row["metrics"].get(name)
    )
    return (found["mean"], found["std"] or 0.0) if found else (None, 0.0)


def _figure() -> Any:
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    return Figure(figsize=SIZE, dpi=DPI, layout="constrained")


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def _curves(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line for each method: the mean over seeds at each step, of the largest number of rows."""
    figure = _figure()
    axes = figure.add_subplot()
    most = max((cell["train_rows"] or 0 for cell in cells), default=0)
    for method in dict.fromkeys(cell["method"] for cell in cells):
        curves = [
            cell["losses"]
            for cell in cells
            if cell["method"] == method and cell["losses"] and (cell["train_rows"] or 0) == most
        ]
        if curves:
            points = list(zip(*curves, strict=False))  # of the same steps
            steps = [point[0][0] for point in points]
            means = [sum(loss for _, loss in point) / len(point) for point in points]
            axes.plot(steps, _smooth(means), label=_plain(method), linewidth=1.4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per target token)")
    axes.legend(**LEGEND)
    _save(figure, axes, path)


def _smooth(values: list[float]) -> list[float]:
    """A running mean over a tenth of the points, where there are many."""
    if len(values) <= AVERAGED:
        return values
    half = max(1, len(values) // 20)
    pieces = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(piece) / len(piece) for piece in pieces]


def _scatter(
    rows: Sequence[Row], name: str | None, label: str, against: tuple[str, str, float], path: Path
) -> None:
    key, title, scale = against
    figure = _figure()
    axes = figure.add_subplot()
    for row in rows:
        mean, std = _value(row, name)
        if mean is None or row[key] is None:
            continue
        place = row[key] / scale
        axes.errorbar([place], [mean], yerr=[std], fmt="o", capsize=3)
        axes.annotate(_label(row, rows), (place, mean), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel(title)
    axes.set_ylabel(_plain(label))
    _save(figure, axes, path)


def _label(row: Row, rows: Sequence[Row]) -> str:
    several = len({other["train_rows"] for other in rows}) > 1
    return _plain(f"{row['method']} ({row['train_rows']})" if several else str(row["method"]))


def _plain(name: str) -> str:
    """A name of the user's: matplotlib takes what stands between two $ for a formula."""
    return name.replace("$", r"\$")


def _by_rows(rows: Sequence[Row], name: str | None, label: str, path: Path) -> None:
    figure = _figure()
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["train_rows"], *_value(row, name)) for row in rows if row["method"] == method]
        points = [point for point in points if point[0] is not None and point[1] is not None]
        if points:
            counts, means, stds = zip(*points, strict=True)
            axes.errorbar(counts, means, yerr=stds, marker="o", capsize=3, label=_plain(method))
    axes.set_xscale("log")
    axes.set_xlabel("training rows")
    axes.set_ylabel(_plain(label))
    axes.legend(**LEGEND)
    _save(figure, axes, path)
