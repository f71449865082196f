"""prefixtune data show: what the model reads, and what it must learn to write."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from prefixtune.cli.group import Group
from prefixtune.cli.options import ONE_SOURCE, config_options, json_option
from prefixtune.cli.output import print_json, say
from prefixtune.config import DataConfig

__all__ = ["data"]


@click.group(cls=Group)
def data() -> None:
    """Look at data before training on it."""


@data.command("show")
@click.argument("source", metavar="DATA")
@click.option("--model", default="demo", show_default=True, help="the model whose tokenizer is used")
@click.option(
    "--rows", default=5, show_default=True, type=click.IntRange(min=0), help="how many rows to show"
)
@config_options("data", only=ONE_SOURCE)
@json_option
def show(source: str, model: str, rows: int, data_options: dict[str, Any], as_json: bool) -> None:
    """Show rows as token ids will have them, with the targets in green, and what is cut or dropped."""
    from prefixtune.data import build_examples, load_rows, parse_fields
    from prefixtune.load import load_tokenizer

    config = DataConfig(**data_options)
    loaded = load_rows(source, fields=parse_fields(config.fields), split=config.split, limit=config.limit)
    tokenizer = load_tokenizer(model)
    examples, report = build_examples(loaded, tokenizer, config, progress=True)
    if as_json:
        shown = [_plain(example, tokenizer) for example in examples[:rows]]
        print_json({"report": asdict(report), "summary": report.summary(), "rows": shown})
        return
    _print(examples[:rows], tokenizer)
    say(report.summary())


def _plain(example: Any, tokenizer: Any) -> dict[str, Any]:
    targets = [label for label in example.labels if label != -100]
    return {
        "origin": example.origin,
        "tokens": len(example.input_ids),
        "target_tokens": example.target_tokens,
        "truncated": example.truncated,
        "text": tokenizer.decode(example.input_ids),
        "target": tokenizer.decode(targets),
    }


def _print(examples: Any, tokenizer: Any) -> None:
    from rich.console import Console

    from prefixtune.data import example_text

    console = Console(highlight=False)
    for example in examples:
        cut = f", {example.truncated} cut off" if example.truncated else ""
        click.echo(f"{example.origin}: {len(example.input_ids)} tokens, {example.target_tokens} targets{cut}")
        console.print(example_text(example, tokenizer), soft_wrap=True)
        click.echo()
