"""What goes to stdout and what to stderr. Knows no command.

stdout is the result, and nothing but it; stderr is everything that is said on the way.
"""

from __future__ import annotations

import errno
import json
import math
import sys
from io import TextIOWrapper
from typing import IO, Any

import click

from prefixtune.errors import PrefixTuneError
from prefixtune.progress import note

__all__ = ["Failure", "describe_os_error", "print_json", "say", "to_json", "write_anything"]


class Failure(click.ClickException):
    """An error as the user sees it: one line that says what is wrong, and one that says what to do."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance as well

    @classmethod
    def of(cls, error: PrefixTuneError) -> Failure:
        return cls(error.message, hint=error.hint, exit_code=error.exit_code)

    def show(self, file: IO[Any] | None = None) -> None:
        _styled("error: ", "bold red", self.message)
        if self.hint:
            _styled("hint: ", "bold cyan", self.hint)


def say(text: str) -> None:
    """One line of news on stderr."""
    note(text)


def write_anything() -> None:
    """A letter that stdout or stderr has no code for is written as an escape: it ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(document: Any) -> None:
    """One JSON document on stdout, in ASCII where that is not UTF-8."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    click.echo(to_json(document, ascii_only=encoding != "utf8"))


def to_json(document: Any, *, ascii_only: bool = False) -> str:
    """JSON has no infinity and no NaN, so these become null."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def describe_os_error(error: OSError) -> Failure:
    """A full disk, a folder without permission and their like."""
    where = f"{error.filename}: " if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EACCES: "check the permissions, or write to another folder",
        errno.EROFS: "write to another folder",
    }
    return Failure(f"{where}{error.strerror or error}", hint=hints.get(error.errno or 0))


def _styled(label: str, style: str, text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble((label, style), text))  # Text: brackets in a message are no markup


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
