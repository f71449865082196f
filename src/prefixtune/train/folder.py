"""The run folder: run.json (all options), checkpoint-N/, metrics.jsonl, best/ and the prefix files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prefixtune.errors import RunError
from prefixtune.progress import note

__all__ = ["METRICS", "RUN", "cut_metrics", "last_checkpoint", "open_run", "record_run"]

RUN, METRICS = "run.json", "metrics.jsonl"


def open_run(output: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The recorded run where one is resumed; else None, and the folder may be written by `record_run`.

    Raises:
        RunError: there is nothing to resume, the options differ, or the folder is in use.
    """
    record = output / RUN
    if resume:
        if not record.is_file():
            raise RunError(
                f"{output}: no run to resume (there is no {RUN})", hint="leave --resume out to begin one"
            )
        try:
            began: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            before = began["asked"]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{record}: damaged, so the run cannot be resumed") from None
        changed = [name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))]
        if changed:
            raise RunError(
                f"{output}: the run was begun with other options ({', '.join(changed)})",
                hint=f"give the options that {record} records, or begin another run",
            )
        return began
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise RunError(
                f"{output}: exists already and is not empty",
                hint="--resume goes on with the run in it, --overwrite replaces it; or give another --output",
            )
        if not record.is_file():
            raise RunError(
                f"{output}: holds no run, so it is not overwritten", hint="choose another --output"
            )
    return None


def record_run(output: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Write run.json; a run that is replaced goes only now, when all that can be checked was checked."""
    if not resume and output.is_dir():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    draft = output / f".{RUN}.draft"
    draft.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(output / RUN)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones (no sound trainer_state.json) are passed over."""
    found = []
    for folder in output.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError, TypeError):
            note(f"{folder} is incomplete and is passed over")
    return max(found)[1] if found else None


def cut_metrics(output: Path, step: int) -> None:
    """Drop what metrics.jsonl tells of steps after `step`: they are run again."""
    file = output / METRICS
    if file.is_file():
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the line that a kill cut short
                continue
        file.write_text("".join(kept), encoding="utf-8")
