"""report.md: table, plots, settings, and what the numbers carry with them. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import RunError
from prefixtune.report.plots import draw
from prefixtune.report.table import columns_of, markdown

__all__ = ["missing_cells", "read_results", "write_report"]

RESULTS, PAGE = "results.json", "report.md"
LEGEND = (
    "**trainable** counts numbers that train. **file** is what has to be kept beside the base. "
    "**initial memory** is that of the process with the base loaded, **peak memory** the most until the end "
    "of training (of measuring, for what trains nothing): resident on a CPU, allocated on a GPU. "
    "**tokens/s** counts real tokens of the training, prompts among them. **dev loss** is in nats per target "
    "token. **forgetting** is the rise of the loss, in nats per token, on text that the base itself wrote. "
    "± is the standard deviation over seeds; (2 of 3 seeds) marks a mean over fewer than were planned."
)


def read_results(folder: Path) -> dict[str, Any]:
    """What a comparison wrote to its folder; all that a page needs is in it.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = folder / RESULTS
    if not path.exists():
        raise RunError(
            f"{folder}: holds no comparison (there is no {RESULTS})", hint="prefixtune compare makes one"
        )
    found: dict[str, Any] = _read(
        path, lambda found: (_page(found, ()), [folder / n for n in found["cells"]])
    )
    return found


def write_report(folder: Path, *, plots: bool = True) -> Path:
    """Write report.md and its plots beside results.json.

    Raises:
        RunError: there are no results in the folder, or they are damaged.
        MissingExtraError: plots are wanted, and matplotlib is not installed.
    """
    found = read_results(folder)
    drawn = []
    if plots and found["rows"]:
        drawn = draw(found["rows"], [_read(folder / name, _plotted) for name in found["cells"]], folder)
    page = folder / PAGE
    page.write_text("\n".join(_page(found, drawn)), encoding="utf-8")
    return page


def missing_cells(found: Mapping[str, Any]) -> list[str]:
    """A line for each cell that failed, each metric that did, for the cells that did not run, and for numbers
    that do not compare."""
    lines = [
        f"FAILED {failure['method']}, seed {failure['seed']}: {failure['error']}"
        for failure in found["failed"]
    ]
    for failure in found.get("failed_metrics", []):  # an earlier version has none
        place = f"{failure['method']}, seed {failure['seed']}"
        lines.append(f"NOT SCORED {place} by {failure['metric']}: {failure['error']}")
    if len(found.get("machines", ())) > 1:
        lines.append(
            f"measured on several machines: {'; '.join(map(_place, found['machines']))}. Memory and time do "
            "not compare between them, and are left out where the seeds of a method are of several"
        )
    return lines + ([f"not finished: {', '.join(found['unfinished'])}"] if found["unfinished"] else [])


def _read(path: Path, use: Callable[[Any], object]) -> Any:
    """The contents of a file of the comparison, where `use` finds all that it needs in them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        use(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        missing = f"there is no {error}" if isinstance(error, KeyError) else None
        what = missing or getattr(error, "strerror", None) or error
        raise RunError(f"{path}: damaged ({what})", hint="run the comparison again: it goes on") from None
    return found


def _plotted(cell: Mapping[str, Any]) -> list[Any]:
    """What the plots take from a cell."""
    return [cell["method"], cell["train_rows"], *((step, loss) for step, loss in cell["losses"])]


def _page(found: Mapping[str, Any], drawn: Sequence[tuple[str, str]]) -> list[str]:
    compared, rows = found["compared"], found["rows"]
    lines = [f"# {compared['model']}: {', '.join(found['settings'])}", ""]
    lines += [markdown(columns_of(rows), rows)] if rows else ["No cell is finished.", ""]
    lines += [LEGEND, ""]
    lines += [f"- {line}" for line in missing_cells(found)]
    for title, file in drawn:
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    lines += ["## Settings", "", *_settings(found["settings"]), "", *_about(found)]
    return lines


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| method | settings | what they came to |", "| --- | --- | --- |"]
    for name, values in settings.items():
        given = {key: value for key, value in values.items() if key not in ("of", "resolved")}
        resolved = {key: value for key, value in values["resolved"].items() if given.get(key) != value}
        lines.append(f"| {name} | {_pairs(given) or 'defaults'} | {_pairs(resolved)} |")
    return lines


def _pairs(values: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {_brief(value)}" for name, value in values.items())
    return shown.replace("|", "\\|").replace("\n", " ")


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _place(machine: Mapping[str, Any]) -> str:
    gpu, processor = machine["gpu"], machine["processor"]
    return gpu or f"{processor}, {machine['cores']} cores, {machine['threads']} threads"


def _about(found: Mapping[str, Any]) -> list[str]:
    data = found["data"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    seen = data.get("evaluation_rows_trained_on")  # results of an earlier version have none
    overlap = f"; {seen:,} of these rows are training rows too" if seen else ""
    return [
        f"- command: `{found['command']}`",
        f"- training rows: {data['training']}",
        f"- evaluation: {data['evaluation']}{overlap}",
        f"- metrics: {_pairs(found['metric_settings']) or 'none'}",
        f"- neutral text: {data['neutral'] or 'none'}",
        f"- seeds: {', '.join(map(str, found['seeds']))}; precision: {found['dtype']}",
        f"- machine: {_place(found['machine'])}",
        f"- versions: {versions}",
        "",
    ]
