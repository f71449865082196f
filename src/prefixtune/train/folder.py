"""The run folder: run.json (all options), checkpoint-N/, metrics.jsonl, best/ and the prefix files."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prefixtune.errors import RunError
from prefixtune.progress import note
from prefixtune.storage import CARD, INFO, TENSORS, TRAINABLE, read_info

__all__ = [
    "COMPARISON",
    "METRICS",
    "QUESTIONS",
    "RATES",
    "RETENTION",
    "RUN",
    "check_resumed",
    "cut_metrics",
    "finished",
    "last_checkpoint",
    "open_run",
    "record_run",
]

RUN, METRICS, RETENTION, RATES = "run.json", "metrics.jsonl", "retention.json", "learning_rates.json"
QUESTIONS, COMPARISON = "questions.jsonl", "comparison.json"  # of a distillation
OURS = (
    RUN,
    METRICS,
    RATES,
    RETENTION,
    QUESTIONS,
    COMPARISON,
    INFO,
    TENSORS,
    TRAINABLE,
    CARD,
    "best",
    "runs",
    "checkpoint-*",
)  # all that it writes


def open_run(output: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The recorded run where one is resumed; else None, and the folder may be written by `record_run`.

    Raises:
        RunError: there is nothing to resume, the options differ, or the folder is in use or cannot be one.
    """
    record = output / RUN
    if resume:
        if not record.is_file():
            raise RunError(
                f"{output}: no run to resume (there is no {RUN})", hint="leave --resume out to begin one"
            )
        began = _read_record(record)
        changed = _changed(began["asked"], json.loads(json.dumps(asked)))
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
    above = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RunError(
            f"{output}: cannot be written, because {above} is {'read-only' if above.is_dir() else 'a file'}",
            hint="choose another --output",
        )
    return None


def _read_record(record: Path) -> dict[str, Any]:
    try:
        began = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        began = None
    parts = {"asked": dict, "resolved": dict, "prefix": dict, "dtype": str}
    if not isinstance(began, dict) or any(not isinstance(began.get(k), v) for k, v in parts.items()):
        raise RunError(f"{record}: damaged, so the run cannot be resumed", hint="begin another run")
    return began


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the options that differ, those within a section by their own names."""
    names = []
    for name in now:
        old, new = before.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            names += [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        elif old != new:
            names.append(name)
    return names


def check_resumed(output: Path, began: Mapping[str, Any], *, data: str, rows: str) -> None:
    """Raise RunError where the rows, by their digest, are not those that the run was begun with."""
    if began["resolved"].get("rows") != rows:
        raise RunError(
            f"{data}: not the rows that the run in {output} was begun with",
            hint="restore the file, or begin another run",
        )


def record_run(
    output: Path, record: dict[str, Any], *, resume: bool, files: Mapping[str, str] | None = None
) -> None:
    """Write `files` (text by name), then run.json, so that a run that began has them.

    A run that is replaced goes only now, when all that can be checked was checked.
    """
    if not resume and output.is_dir():
        for path in (path for pattern in OURS for path in output.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for name, content in {**(files or {}), RUN: text}.items():
        draft = output / f".{name}.draft"
        draft.write_text(content, encoding="utf-8")
        draft.replace(output / name)


def finished(output: Path, steps: int) -> dict[str, Any] | None:
    """The training record of a run that has come to its end, with the size of its file; else None."""
    last = last_checkpoint(output)
    if last is None or not (output / INFO).is_file() or _step(last) < steps:
        return None
    training = read_info(output)["training"]
    return {**training, "prefix_file_bytes": (output / TENSORS).stat().st_size} if training else None


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint; half-written and damaged ones are passed over, and told."""
    found = []
    for folder in output.glob("checkpoint-*"):
        problem = _incomplete(folder)
        if problem:
            note(f"{folder} is passed over: {problem}")
        else:
            found.append((_step(folder), folder))
    return max(found)[1] if found else None


def _incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint: each file must be there and be whole."""
    try:
        _step(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            tensors.keys()
        states = [folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("rng_state*.pth")]
        if len(states) < 3:
            return "rng_state.pth is missing"
        for path in states:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path.name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
        return f"it is incomplete or damaged ({error})"
    return None


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


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
