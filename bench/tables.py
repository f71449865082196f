"""Markdown tables between two markers in a page, so that a page's figures are those of the last run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is left-aligned, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` in the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise click.ClickException(f"{page}: the markers {begin} and {end} are not there")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"
