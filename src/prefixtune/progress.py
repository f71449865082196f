"""What people see while they wait: bars and notes on stderr. Never writes to stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

__all__ = ["muted", "note", "progress_bar"]


_RUNNING: ContextVar[Any] = ContextVar("running progress", default=None)
_MUTED: ContextVar[bool] = ContextVar("muted", default=False)


@cache
def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def note(text: str) -> None:
    """One line on stderr; a running bar moves below it."""
    if _MUTED.get():
        return
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def muted(is_muted: bool) -> Iterator[None]:
    """No notes and no bars within, if so."""
    token = _MUTED.set(is_muted or _MUTED.get())
    try:
        yield
    finally:
        _MUTED.reset(token)


@contextmanager
def progress_bar(description: str | None, *, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left, as a function that advances it; no bar without a description.

    A bar within another's block stands below it.
    """
    if description is None or _MUTED.get():
        yield lambda count: None
        return
    running = _RUNNING.get()
    if not _console().is_terminal:  # a log file: a line instead of a bar that cannot move
        note(f"{description}: {total:,}")
        yield lambda count: None
    elif running is None:
        progress = _new_progress()
        token = _RUNNING.set(progress)
        try:
            with progress:
                task = progress.add_task(description, total=total)
                yield lambda count: progress.advance(task, count)
        finally:
            _RUNNING.reset(token)
    else:
        task = running.add_task(description, total=total)
        try:
            yield lambda count: running.advance(task, count)
        finally:
            running.remove_task(task)


def _new_progress() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_console(),
        transient=True,
    )
