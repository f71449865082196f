"""From finished cells to the rows of results.json: means and standard deviations over seeds. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixtune.compare.plan import Plan

__all__ = ["machines_of", "result_rows", "spread"]

OF_THE_MACHINE = ("initial_memory_bytes", "peak_memory_bytes", "train_seconds", "tokens_per_second")


def result_rows(plan: Plan, cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and number of training rows of which a cell is finished, in the plan's order.

    `cells` are the contents of the cells' files.
    """
    finished = list(cells)
    found = []
    for count in plan.config.train_rows or (None,):
        for method in plan.methods:
            own = [
                cell
                for cell in finished
                if cell["method"] == method.name and (not method.trains or cell["train_rows"] == count)
            ]
            if own:
                planned = plan.config.seeds if method.trains else len(own)
                found.append(_row(method.name, count, own, planned=planned))
    return found


def _row(
    method: str, count: int | None, cells: Sequence[Mapping[str, Any]], *, planned: int
) -> dict[str, Any]:
    """Memory and time are None where the seeds are of several machines: their mean would be of neither."""
    means = {name: spread([cell[name] for cell in cells])["mean"] for name in (*OF_THE_MACHINE, "dev_loss")}
    if len(machines_of(cells)) > 1:
        means |= dict.fromkeys(OF_THE_MACHINE)
    whole = {
        name: round(value) for name, value in means.items() if name.endswith("bytes") and value is not None
    }
    # a metric of the user's own may give a key for some seeds only: the mean is over these
    metrics = {name: None for cell in cells for name in cell["metrics"]}
    metrics |= dict.fromkeys(_missing(cells))
    return {
        "method": method,
        "train_rows": count,
        "seeds": len(cells),
        "planned_seeds": planned,
        **{name: cells[0][name] for name in ("trainable_parameters", "file_bytes")},
        **means,
        **whole,
        "dev_loss_std": spread([cell["dev_loss"] for cell in cells])["std"],
        "metrics": {name: _metric([cell["metrics"].get(name) for cell in cells]) for name in metrics},
        "forgetting": spread([cell["forgetting"] for cell in cells]),
    }


def machines_of(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The machines that cells were measured on, each once; an earlier version did not tell."""
    found: dict[Any, dict[str, Any]] = {}
    for machine in (cell["machine"] for cell in cells if "machine" in cell):
        place = machine["gpu"] or tuple(machine[name] for name in ("processor", "cores", "threads"))
        found.setdefault(place, machine)
    return list(found.values())


def _missing(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics that failed in every cell that was to have them: they have a column without a number."""
    known = {name for cell in cells for name in cell["metrics"]}
    failed = {name: None for cell in cells for name in cell.get("failed_metrics", {})}
    return [name for name in failed if not any(one == name or one.startswith(f"{name}.") for one in known)]


def _metric(values: Sequence[float | None]) -> dict[str, Any]:
    return {**spread(values), "seeds": sum(value is not None for value in values)}


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter is 0 for one value, and both are None without any."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return {"mean": None, "std": None}
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
    }
