"""prefixtune quickstart: a first prefix on the demo model, with answers before and after."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import json_option
from prefixtune.cli.output import print_json

__all__ = ["quickstart"]

NEXT = """Go on with:
  prefixtune chat --prefix {output}
  prefixtune evaluate --prefix {output} --data demo:heldout
  prefixtune inspect {output}
  prefixtune train --model demo --data YOUR.jsonl --output runs/mine
"""


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/quickstart"),
    show_default=True,
    help="folder of the run; an earlier run there is replaced",
)
@click.option(
    "--rows", default=4, show_default=True, type=click.IntRange(min=0), help="how many answers to show"
)
@json_option
def quickstart(output: Path, rows: int, as_json: bool) -> None:
    """Train a prefix on the packaged mails and measure it: 8 to 10 minutes on two quiet cores."""
    from prefixtune import quickstart as room

    result = room.quickstart(output)
    if as_json:
        print_json({**asdict(result), "samples": result.samples[:rows]})
    else:
        _print(result, rows, output)


def _print(result: Any, rows: int, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("mail", "wanted", "bare model", "with the prefix", show_lines=True)
    for sample in result.samples[:rows]:
        mail = sample["prompt"].split("\n", 1)[-1].removesuffix("Assistant: ").strip()
        answers = [sample["reference"], _short(sample["base_prediction"]), _short(sample["prediction"])]
        table.add_row(*(_plain(text) for text in (mail, *answers)))
    console.print(table)
    score = Table("", "bare model", "with the prefix")
    score.add_row(
        "exact match", *(f"{100 * x:.1f} %" for x in (result.base_exact_match, result.prefix_exact_match))
    )
    score.add_row("target loss", f"{result.base_loss:.4f}", f"{result.prefix_loss:.4f}")
    console.print(score)
    click.echo(
        f"{result.heldout_rows} held-out mails; {result.trainable_parameters:,} trainable parameters, "
        f"{result.prefix_file_bytes:,} bytes; trained in {result.train_seconds:.0f} s, "
        f"all in all {result.total_seconds:.0f} s\nwritten to {output / 'summary.json'}\n"
    )
    click.echo(NEXT.format(output=output))


def _short(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " …"


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # no markup: mails may hold brackets
