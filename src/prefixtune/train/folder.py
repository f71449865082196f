"""The run folder: run.json (all options), checkpoint-N/, metrics.jsonl, best/ and the prefix files."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from prefixtune.config import TrainConfig
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
    "in_use",
    "last_checkpoint",
    "open_run",
    "record_run",
]

RUN, METRICS, RETENTION, RATES = "run.json", "metrics.jsonl", "retention.json", "learning_rates.json"
LOCK = ".lock"  # there while a process trains
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


# options that decide memory and time alone: a run that was out of memory goes on with others
SAME_GRADIENT = ("gradient_checkpointing", "packing_length", "compile", "liger")


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
        differing = _changed(began["asked"], json.loads(json.dumps(asked)))
        changed = [name for name in differing if name not in SAME_GRADIENT]
        if changed:
            raise RunError(
                f"{output}: the run was begun with other options ({', '.join(changed)})",
                hint=f"give the options that {record} records, or begin another run",
            )
        if differing:
            names = ", ".join(differing)
            note(f"{names}: not as the run was begun; gradients change by rounding and what dropout draws")
        return began
    if output.exists() and (not output.is_dir() or any(path.name != LOCK for path in output.iterdir())):
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
    """The names of the options that differ, those within a section by their own names; what the version that
    began the run did not have counts as its default."""
    names, defaults = [], TrainConfig().to_dict()
    for name in now:
        old, new = before.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            names += [key for key in sorted({*old, *new}) if old.get(key, defaults.get(key)) != new.get(key)]
        elif old != new:
            names.append(name)
    return names


def check_resumed(
    output: Path, resolved: Mapping[str, Any], same: Mapping[str, tuple[str, str]], *, processes: int
) -> None:
    """Raise RunError where the rows, the base or the number of processes are not those of the run's begin.

    Args:
        resolved: what the run recorded; one of an earlier version knows its training rows only.
        same: by name in `resolved`, what it is called and its digest now.
    """
    for name, (called, found) in same.items():
        if resolved.get(name, found) != found:
            what = "weights" if name == "base" else "rows"
            raise RunError(
                f"{called}: not the {what} that the run in {output} was begun with",
                hint="restore them, or begin another run",
            )
    before = _processes(resolved)
    if before != processes:
        raise RunError(
            f"{output}: the run was begun in {before} processes; this is {processes}",
            hint="a step has each process's rows: start as many, or begin another run",
        )


def _processes(resolved: Mapping[str, Any]) -> int:
    found: int = resolved.get("processes", 1)  # not in the records of earlier versions
    return found


@contextmanager
def in_use(output: Path) -> Iterator[None]:
    """Hold a run folder, made if need be, so that no other process trains in it.

    Raises:
        RunError: another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{output}: another process trains in it", hint="wait for its end, or give another --output"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network file systems
        note(f"{output}: no lock is to be had here ({error}), so train in it with one process at a time")
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes it on release
                (output / LOCK).unlink()
            lock.release()


def record_run(
    output: Path,
    record: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write `files` (text by name), then run.json, so that a run that began has them.

    A run that is replaced goes only now, when all that can be checked was checked.

    Raises:
        RunError: another process began a run here since `open_run`, and it is not to be overwritten.
    """
    if not (resume or overwrite) and (output / RUN).exists():
        raise RunError(f"{output}: another run was begun in it meanwhile", hint="give another --output")
    if not resume:
        for path in (path for pattern in OURS for path in output.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for name, content in {**(files or {}), RUN: text}.items():
        draft = output / f".{name}.draft"
        draft.write_text(content, encoding="utf-8")
        draft.replace(output / name)


def finished(output: Path, resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The training record of a run that has come to its end, with the size of its file; else None.

    Args:
        resolved: what the run recorded.
    """
    last = last_checkpoint(output, processes=_processes(resolved))
    if last is None or not (output / INFO).is_file() or _step(last) < resolved["steps"]:
        return None
    training = read_info(output)["training"]
    return {**training, "prefix_file_bytes": (output / TENSORS).stat().st_size} if training else None


def last_checkpoint(output: Path, *, processes: int) -> Path | None:
    """The newest complete checkpoint; half-written and damaged ones are passed over, and told.

    Args:
        processes: that the run was begun in; each has written its own random state.
    """
    found = []
    for folder in output.glob("checkpoint-*"):
        problem = _incomplete(folder, processes)
        if problem:
            note(f"{folder} is passed over: {problem}")
        else:
            found.append((_step(folder), folder))
    return max(found)[1] if found else None


def _incomplete(folder: Path, processes: int) -> str | None:
    """What is wrong with a checkpoint: each file must be there and be whole."""
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    try:
        _step(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt", *names):
            with zipfile.ZipFile(folder / name) as archive:
                if archive.testzip() is not None:
                    return f"{name} is damaged"
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
        for line in file.read_text(encoding="utf-8").split("\n"):  # as it is written, not splitlines()
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the line that a kill cut short
                continue
        file.write_text("".join(kept), encoding="utf-8")
