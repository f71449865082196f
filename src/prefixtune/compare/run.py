"""Runs the cells of a comparison one after the other, each in a fresh process. Imports no torch.

The folder: data.json (the rows), cells/NAME.json (a finished cell), cells/NAME.failed.json, cells/NAME.log,
cells/NAME/ (what was trained, and its answers), results.json.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune import errors
from prefixtune.compare.estimate import Forecast, spelled
from prefixtune.compare.machine import versions
from prefixtune.compare.plan import Cell, Plan
from prefixtune.compare.results import machines_of, result_rows
from prefixtune.compare.rows import Rows, write_json
from prefixtune.compare.scoring import check_scoring, read_answers, score_answers
from prefixtune.errors import PrefixTuneError, RunError
from prefixtune.metrics import check_metrics
from prefixtune.progress import note, progress_bar
from prefixtune.train.folder import in_use

__all__ = ["DATA", "RESULTS", "compare"]

DATA, RESULTS, CELLS = "data.json", "results.json", "cells"


def compare(plan: Plan, output: Path, *, command: str = "") -> dict[str, Any]:
    """Run what is not finished yet and write results.json, whose contents are returned.

    Args:
        output: the folder of the comparison; cells that are finished in it are not run again.
        command: as it is to be shown with the results.

    Raises:
        MissingExtraError: a package that a method or a metric needs is not installed.
        DataError, ModelError, ConfigError: the input cannot be used.
        RunError: another process has the folder.
        KeyboardInterrupt: stopped by Ctrl-C; finished cells and their results are kept.
    """
    check_metrics(plan.config.metrics)
    if any(method.needs_peft for method in plan.methods):
        _require_peft()
    with in_use(output):
        return _compare(plan, output, command)


def _compare(plan: Plan, output: Path, command: str) -> dict[str, Any]:
    (output / CELLS).mkdir(exist_ok=True)
    rows = _rows(plan, output)
    plan.check_limits(rows.about["limits"])
    if plan.config.metrics:
        check_scoring(plan.config.metrics, rows.questions)
    bench = _Bench(plan, output, rows, command)
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.write()
        finished, all_cells = len(bench.done), len(plan.cells)
        raise KeyboardInterrupt(
            f"{finished} of {all_cells} cells are finished; the same command goes on"
        ) from None
    return bench.write()


def _require_peft() -> None:
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise errors.MissingExtraError(
            "this comparison has methods of PEFT, which is not installed",
            hint="pip install 'prefixtune[compare]'",
        )


def _rows(plan: Plan, output: Path) -> Rows:
    """The rows of an earlier run of the same plan, or new ones, made in a process of their own."""
    path = output / DATA
    rows = Rows.read(path, key=plan.data_key())
    if rows is None or len(rows.questions) < (plan.config.eval_rows or 0):  # the child tells that
        sampled = ", sampling neutral text" if plan.config.forgetting else ""
        with progress_bar(f"reading the rows{sampled}, timing the model", total=1):
            failure = _child(plan, output, name="rows", result=path, cell=None)
        if failure is not None:
            raise _as_error(failure)
        rows = Rows.read(path)
        assert rows is not None
    for name in ("training", "evaluation"):
        note(f"{name}: {rows.about[name]}")
    seen, of = rows.trained_on()
    if seen:
        note(f"evaluation: {seen:,} of {of:,} rows are training rows too (identical prompt and target)")
    return rows


def _as_error(failure: dict[str, Any]) -> PrefixTuneError:
    kind = getattr(errors, failure["kind"], RunError)
    error: PrefixTuneError = kind(failure["message"], hint=failure["hint"])
    return error


def _child(
    plan: Plan, output: Path, *, name: str, result: Path, cell: Cell | None, about: Any = None
) -> dict[str, Any] | None:
    """Run a child to its end; None where it wrote its result, else what went wrong."""
    place = output / CELLS / name
    files = {kind: place.with_name(f"{name}.{kind}") for kind in ("task.json", "failed.json", "log")}
    files["failed.json"].unlink(missing_ok=True)
    task = {
        "plan": plan.to_dict(),
        "cell": cell.name if cell else None,
        "rows": str(output / DATA),
        "folder": str(place),
        "result": str(result),
        "failure": str(files["failed.json"]),
        "about": about,
    }
    write_json(files["task.json"], task)
    command = [sys.executable, "-m", "prefixtune.compare.child", str(files["task.json"])]
    with files["log"].open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = child.wait()  # Ctrl-C reaches this process alone; the child is ended below
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            assert child.stdin is not None
            child.stdin.close()
            files["task.json"].unlink(missing_ok=True)
    return None if code == 0 else _failure(code, files["failed.json"], files["log"])


def _failure(code: int, told: Path, log: Path) -> dict[str, Any]:
    """What a child said of its failure; else how it ended, and the last line of its log."""
    if told.is_file():
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found
    ended = f"ended by signal {-code}; is the memory full?" if code < 0 else f"ended with code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"kind": "RunError", "message": ": ".join([ended, *lines[-1:]]), "hint": f"see {log}"}


@dataclass
class _Bench:
    """A comparison that runs: what is finished, and what failed."""

    plan: Plan
    output: Path
    rows: Rows
    command: str
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        cells, data = self.plan.cells, functools.cache(self.rows.key)
        keys = {cell.name: self.plan.cell_key(cell, data(self.plan.rows_of(cell))) for cell in cells}
        for cell in cells:
            finished = self._finished(cell, keys[cell.name])
            if finished is not None:
                self.done[cell.name] = finished
        waiting = [cell for cell in cells if cell.name not in self.done]
        if self.done:
            note(f"{len(self.done)} of {len(cells)} cells are finished already")
        forecast = Forecast(self.plan, self.rows)
        for cell in cells:
            if cell.name in self.done:
                forecast.learn(cell, self.done[cell.name]["wall_seconds"])
        if waiting:
            count = "1 cell" if len(waiting) == 1 else f"{len(waiting)} cells"
            note(f"{count}: about {spelled(forecast.total(waiting))} at a guess")
        with progress_bar("cells", total=len(waiting)) as advance:
            for number, cell in enumerate(waiting):
                self._run(cell, keys[cell.name], forecast, waiting[number + 1 :])
                advance(1)

    def _finished(self, cell: Cell, key: str) -> dict[str, Any] | None:
        path = self._path(cell)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == key and not found["failed_metrics"]:
                return found
            if found["key"].split(":")[0] == key.split(":")[0] and self._score(cell, found):
                write_json(path, {**found, "key": key})
                return found
            note(
                f"{cell.name}: its settings, rows, model, packages or answers have changed, so it runs again"
            )
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            note(f"{path} is damaged, so the cell runs again")
        return None

    def _score(self, cell: Cell, found: dict[str, Any]) -> bool:
        """Score a cell whose metrics alone changed or failed; False where its answers are no longer there."""
        answers = read_answers(self._path(cell).with_suffix(""), found.get("answers"))
        if answers is None:
            return False
        note(f"{cell.name}: its answers are scored again")
        found |= score_answers(self.plan.config.metrics, answers, self.rows.questions)
        self._tell(cell, found)
        return True

    def _tell(self, cell: Cell, found: dict[str, Any]) -> None:
        for name, error in found["failed_metrics"].items():
            note(f"{cell.name}: NOT SCORED by {name}: {error}")

    def _run(self, cell: Cell, key: str, forecast: Forecast, left: list[Cell]) -> None:
        about = {
            "key": key,
            "method": cell.method.name,
            "of": cell.method.of,
            "seed": cell.seed,
            "train_rows": cell.rows,
            "settings": cell.method.shown(),
            "versions": versions(),
        }
        path, start = self._path(cell), time.perf_counter()
        failure = _child(self.plan, self.output, name=cell.name, result=path, cell=cell, about=about)
        seconds = time.perf_counter() - start
        if failure is None:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.done[cell.name] = found
            forecast.learn(cell, found["wall_seconds"])
            said = f"dev loss {found['dev_loss']:.4f}"
            said += "".join(f", {name} {value:.4g}" for name, value in found["metrics"].items())
        else:
            self.failed[cell.name] = {"method": cell.method.name, "seed": cell.seed, "train_rows": cell.rows}
            self.failed[cell.name] |= {"error": failure["message"], "hint": failure["hint"]}
            said = f"FAILED: {failure['message']}"
        rest = f"; about {spelled(forecast.total(left))} left" if left else ""
        note(f"{cell.name}: {said} ({seconds:.0f} s{rest})")
        self._tell(cell, self.done.get(cell.name, {"failed_metrics": {}}))

    def _path(self, cell: Cell) -> Path:
        return self.output / CELLS / f"{cell.name}.json"

    def write(self) -> dict[str, Any]:
        """results.json of what is finished."""
        plan = self.plan
        found = {
            "rows": result_rows(plan, self.done.values()),
            "failed": list(self.failed.values()),
            "failed_metrics": [
                {"method": cell["method"], "seed": cell["seed"], "metric": name, "error": error}
                for cell in self.done.values()
                for name, error in cell["failed_metrics"].items()
            ],
            "unfinished": [
                cell.name
                for cell in plan.cells
                if cell.name not in self.done and cell.name not in self.failed
            ],
            "cells": [f"{CELLS}/{name}.json" for name in self.done],
            "settings": {
                method.name: {"of": method.of, **method.shown(), "resolved": self._resolved(method.name)}
                for method in plan.methods
            },
            "compared": {**plan.config.to_dict(), "data": plan.data.to_dict()},
            "metric_settings": next((cell["metric_settings"] for cell in self.done.values()), {}),
            "seeds": list(range(1, plan.config.seeds + 1)),
            "data": {
                **{name: self.rows.about[name] for name in ("training", "evaluation", "neutral")},
                "evaluation_rows_trained_on": self.rows.trained_on()[0],
            },
            "dtype": self.rows.about["dtype_reason"],
            "versions": versions(),
            "machine": self.rows.about["machine"],
            "machines": machines_of(self.done.values()),
            "command": self.command,
        }
        write_json(self.output / RESULTS, found)
        return found

    def _resolved(self, method: str) -> dict[str, Any]:
        """What the defaults came to, by the first finished cell."""
        cells = [cell for cell in self.done.values() if cell["method"] == method]
        return dict(cells[0]["resolved"]) if cells else {}
