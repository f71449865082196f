"""prefixtune distill: a prefix that stands for a text, and what it is worth beside the text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option
from prefixtune.cli.output import print_json
from prefixtune.config import DISTILL_TRAINING, DistillConfig, TrainConfig
from prefixtune.errors import ConfigError, DataError

__all__ = ["distill"]

_FILE = click.Path(path_type=Path)
_KNOBS = (
    *("projection", "hidden_size", "layers", "template", "fields"),
    *(field.name for field in dataclasses.fields(TrainConfig) if field.name != "label_smoothing_factor"),
)
_DEFAULTS = {
    "template": "chat where the tokenizer has a chat template, else as train has it",
    **{name: str(value) for name, value in DISTILL_TRAINING.items()},
}


@click.command()
@click.option("--model", required=True, help="base model: hub name, folder, .gguf file, or demo")
@click.option("--text", metavar="FILE", help="text file that the prefix is to stand for; - reads stdin")
@click.option("--instruction", help="what the prefix is to stand for, before the text or alone")
@click.option(
    "--questions",
    metavar="FILE",
    help="questions about the text: a .txt with one in a line, or rows with a field question; the model "
    "writes them unless given",
)
@click.option("--output", required=True, type=_FILE, help="folder of the run, and of the prefix")
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=0), help="answers to show")
@click.option("--resume", is_flag=True, help="go on from the last checkpoint in --output")
@click.option("--overwrite", is_flag=True, help="replace the run that is in --output")
@click.option("--force", is_flag=True, help="begin even if the memory will not do, by the estimate")
@config_options("distill", files=False)
@config_options("prefix", "data", "train", only=_KNOBS, defaults=_DEFAULTS)
@json_option
def distill(
    model: str,
    text: str | None,
    instruction: str | None,
    questions: str | None,
    output: Path,
    rows: int,
    resume: bool,
    overwrite: bool,
    force: bool,
    distill_options: dict[str, Any],
    prefix_options: dict[str, Any],
    data_options: dict[str, Any],
    train_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Train a prefix that answers as the model does with a text in its context.

    The teacher is the model with the text, the student the model with the prefix. At the end both are
    compared, and with no text, on questions that were not trained on.
    """
    if text is None and instruction is None:
        raise ConfigError("neither --text nor --instruction is given", hint="for example --text manual.txt")
    if questions is not None and "write_questions" in distill_options:
        raise ConfigError(
            "--questions are given, so --write-questions has no say", hint="leave one of them out"
        )
    settings = DistillConfig(**distill_options)
    config = TrainConfig(**{**DISTILL_TRAINING, **train_options})
    written = _read(text) if text is not None else ""

    import prefixtune.distill as room

    found = room.distill(
        model=model,
        text=written,
        output=output,
        instruction=instruction,
        questions=questions,
        template=data_options.get("template"),
        fields=data_options.get("fields"),
        prefix_options=prefix_options,
        distill_config=settings,
        config=config,
        resume=resume,
        overwrite=overwrite,
        force=force,
    )
    if as_json:
        print_json({**found.to_dict(), "samples": found.samples[:rows]})
    else:
        _print(found, rows)


def _read(source: str) -> str:
    if source != "-":
        from prefixtune.data.files import read_text

        return read_text(Path(source))
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: expected text in UTF-8: {error}") from None
    if not text.strip():
        raise DataError("stdin: the text is empty, so there is nothing to distil")
    return text


def _print(found: Any, rows: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for sample in found.samples[:rows]:
        click.echo(sample["question"])
        for who in ("teacher", "prefix", "no text"):
            console.print(Text.assemble((f"  {who}: ", "dim"), sample[who].strip()), soft_wrap=True)
    table = Table("", "nats/\ntoken", "same\ntoken", "same\nanswer", "KV\nMiB", "first\ntoken", "tokens/s")
    table.columns[0].no_wrap = True
    for one in found.contestants:
        timed = one.first_token_seconds is not None
        table.add_row(
            one.name,
            f"{one.divergence:.4f}",
            f"{100 * one.agreement:.1f} %",
            f"{100 * one.exact_match:.0f} %" if one.exact_match is not None else "",
            f"{one.cache_bytes / 2**20:.1f}" if one.cache_tokens else "",
            f"{1000 * one.first_token_seconds:.0f} ms" if timed else "",
            f"{one.tokens_per_second:.1f}" if timed else "",
        )
    console.print(table)
    counts = found.questions
    click.echo(
        f"divergence from the model with the text, in nats per token, share of places where it has the "
        f"same likeliest token, and of answers that are the same: {found.heldout_tokens:,} answer tokens of "
        f"{counts['heldout']} questions that were not trained on\n"
        f"{found.training['steps']} steps on {counts['train']} questions in "
        f"{found.training['train_seconds']:.0f} s; {found.length} virtual tokens for {found.text_tokens:,}\n"
        f"prefix: {found.output}"
    )
