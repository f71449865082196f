"""prefixtune evaluate: a prefix beside the bare model, on rows with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option, model_options
from prefixtune.cli.output import print_json, say
from prefixtune.config import DataConfig
from prefixtune.errors import ConfigError

__all__ = ["evaluate"]


@click.command()
@click.option("--model", help="base model; the one that the prefix was trained on by default")
@model_options
@click.option("--data", required=True, help="rows to measure on")
@click.option(
    "--rows", default=3, show_default=True, type=click.IntRange(min=0), help="how many answers to show"
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="longest answer; by the longest reference")
@click.option(
    "--exact-match/--no-exact-match", default=True, help="generate answers and compare  [default: on]"
)
@click.option("--base/--no-base", default=True, help="measure the bare model too  [default: on]")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="rows at a time")
@click.option(
    "--output", type=click.Path(path_type=Path), help="write all answers to this file, as JSON lines"
)
@config_options("data", defaults={"template": "what the prefix was trained with, else human"})
@json_option
def evaluate(
    model: str | None,
    prefix_folder: Path | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    data: str,
    rows: int,
    max_new_tokens: int | None,
    exact_match: bool,
    base: bool,
    batch_size: int,
    output: Path | None,
    data_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure the loss on target tokens and exact match, with the prefix and without."""
    DataConfig(**data_options)  # wrong values before any work
    if output is not None and not exact_match:
        raise ConfigError("--output is for answers, and --no-exact-match makes none")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(
            f"{output}: not a file that can be written", hint="name a file in a folder that exists"
        )

    from prefixtune import evaluate as room
    from prefixtune.cli.engine import load
    from prefixtune.data import load_rows, parse_fields

    loaded = load(model, prefix_folder, dtype=dtype, device=device, quantize=quantize)
    stored = {"template": loaded.template} if loaded.template else {}
    config = DataConfig(**{**stored, **data_options})
    read = load_rows(data, fields=parse_fields(config.fields), split=config.split, limit=config.limit)
    result = room.evaluate(
        loaded.model,
        loaded.tokenizer,
        read,
        config,
        base=base,
        exact_match=exact_match,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if output is not None:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in result.samples]
        output.write_text("".join(lines), encoding="utf-8")
        say(f"{len(lines)} answers written to {output}")
    if as_json:
        print_json({**result.to_dict(), "samples": result.samples[:rows]})
    else:
        _print(result, rows, loaded.name)


def _print(result: Any, rows: int, name: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    has_base = result.base_loss is not None
    console = Console(highlight=False)
    for sample in result.samples[:rows]:
        told = [("prompt", "prompt"), ("reference", "reference"), (name, "prediction")]
        told += [("bare model", "base_prediction")] if has_base else []
        click.echo(sample["origin"])
        for label, key in told:
            console.print(Text.assemble((f"  {label}: ", "dim"), sample[key].strip()), soft_wrap=True)
    table = Table("", escape(name), *(["bare model"] if has_base else []))
    for label, key in (("target loss", "loss"), ("perplexity", "perplexity"), ("exact match", "exact_match")):
        values = [getattr(result, start + key) for start in (["", "base_"] if has_base else [""])]
        if values[0] is not None:
            table.add_row(
                label, *(f"{100 * x:.1f} %" if key == "exact_match" else f"{x:.4f}" for x in values)
            )
    console.print(table)
    cut = f", TRUNCATED {result.truncated_rows}" if result.truncated_rows else ""
    dropped = f", DROPPED {result.dropped_rows}" if result.dropped_rows else ""
    click.echo(f"{result.rows} rows, {result.target_tokens:,} target tokens{cut}{dropped}")
