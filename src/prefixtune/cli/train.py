"""prefixtune train: a prefix for a model from rows of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option
from prefixtune.cli.output import print_json
from prefixtune.config import DataConfig, TrainConfig

__all__ = ["train"]

DEFAULTS = {
    "init": "the KV of a whole training row, prompt and target",
    "length": "auto, by the rows: 32 for 100 (45 if labels), 64 for 400, 128 for 1,600 and more",
}


@click.command()
@click.option("--model", required=True, help="base model: hub name, folder, .gguf file, or demo")
@click.option("--data", required=True, help="rows to train on")
@click.option("--eval-data", help="rows to evaluate on meanwhile")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="folder of the run")
@click.option("--resume", is_flag=True, help="go on from the last checkpoint in --output")
@click.option("--overwrite", is_flag=True, help="replace the run that is in --output")
@click.option("--force", is_flag=True, help="begin even if the memory will not do, by the estimate")
@config_options("prefix", "data", "train", defaults=DEFAULTS)
@json_option
def train(
    model: str,
    data: str,
    eval_data: str | None,
    output: Path,
    resume: bool,
    overwrite: bool,
    force: bool,
    prefix_options: dict[str, Any],
    data_options: dict[str, Any],
    train_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Train a prefix; the model itself does not change."""
    data_config, config = (
        DataConfig(**data_options),
        TrainConfig(**train_options),
    )  # wrong values before any work

    import prefixtune.train as room

    result = room.train(
        model=model,
        data=data,
        eval_data=eval_data,
        output=output,
        prefix_options=prefix_options,
        data_config=data_config,
        config=config,
        resume=resume,
        overwrite=overwrite,
        force=force,
    )
    if room.is_first():
        print_json(result.to_dict()) if as_json else click.echo(result.summary())
    room.leave()
