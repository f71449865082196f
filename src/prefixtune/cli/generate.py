"""prefixtune generate: answers to prompts, or to the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option, model_options
from prefixtune.cli.output import print_json
from prefixtune.config import DataConfig
from prefixtune.errors import ConfigError

__all__ = ["generate"]


@click.command()
@click.option("--model", help="base model; the one that the prefix was trained on by default")
@model_options
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="what to answer; repeatable")
@click.option("--data", help="answer each row of this file; its targets are not needed")
@click.option(
    "--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="longest answer"
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy, more is more random")
@click.option(
    "--top-p", default=1.0, show_default=True, help="sample from the likeliest tokens of this share"
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="makes sampling repeatable")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="rows at a time")
@config_options(
    "data",
    only=("template", "fields", "split", "limit"),
    defaults={"template": "what the prefix was trained with, else as train has it"},
)
@json_option
def generate(
    model: str | None,
    prefix_folder: Path | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    prompts: Sequence[str],
    data: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    batch_size: int,
    data_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Continue prompts, with a prefix or without."""
    if bool(prompts) == (data is not None):
        raise ConfigError(
            "expected either --prompt or --data", hint='for example --prompt "Where is my parcel?"'
        )

    from prefixtune.cli.engine import load
    from prefixtune.data import build_prompts, load_rows, parse_fields
    from prefixtune.generate import generate_batch, prompt_row, without_target

    loaded = load(model, prefix_folder, dtype=dtype, device=device, quantize=quantize)
    stored = {"template": loaded.template} if loaded.template else {}
    config = DataConfig(**{**stored, **data_options})
    if data is None:
        rows = [prompt_row(text, config.template) for text in prompts]
    else:
        read = load_rows(data, fields=parse_fields(config.fields), split=config.split, limit=config.limit)
        rows = without_target(read, config.template)
    asked = build_prompts(rows, loaded.tokenizer, config)
    texts = generate_batch(
        loaded.model,
        loaded.tokenizer,
        [prompt.input_ids for prompt in asked],
        max_new_tokens=max_new_tokens,
        template=config.template,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        progress="generating" if len(asked) > 1 else None,
    )
    pairs = zip(asked, texts, strict=True)
    if as_json:
        print_json([{"origin": p.origin, "prompt": p.text, "text": text} for p, text in pairs])
    else:
        click.echo("\n".join(texts))
