"""What people see while they wait: bars and notes on stderr. Never writes to stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["note", "progress_bar"]


@cache
def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def note(text: str) -> None:
    """One line on stderr; a running bar moves below it."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str | None, *, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left, as a function that advances it; no bar without a description."""
    if description is None:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
