"""prefixtune chat: a conversation with the model, with a prefix or bare; each line of stdin is a turn."""

from __future__ import annotations

from pathlib import Path

import click

from prefixtune.cli.options import model_options
from prefixtune.cli.output import say

__all__ = ["chat"]


@click.command()
@click.option("--model", help="base model; the one that the prefix was trained on by default")
@model_options
@click.option(
    "--template",
    help="how turns are written; by default as the prefix was trained, else chat or as train has it",
)
@click.option(
    "--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="longest answer"
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy, more is more random")
@click.option(
    "--top-p", default=1.0, show_default=True, help="sample from the likeliest tokens of this share"
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="makes sampling repeatable")
def chat(
    model: str | None,
    prefix_folder: Path | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    template: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    """Talk to the model; /base and /prefix switch between the bare model and the prefix."""
    from prefixtune.cli.engine import load
    from prefixtune.cli.session import Session, lines
    from prefixtune.generate import sampling

    settings = sampling(temperature=temperature, top_p=top_p) | {"max_new_tokens": max_new_tokens}
    loaded = load(model, prefix_folder, dtype=dtype, device=device, quantize=quantize)
    session = Session(loaded, template=template, settings=settings, seed=seed)
    say(f"{session.describe()}; /help lists the commands")
    for line in lines():
        if line == "/quit":
            break
        session.command(line) if line.startswith("/") else session.answer(line)
