"""prefixtune estimate: how much memory a training run will take, and whether it fits."""

from __future__ import annotations

from typing import Any

import click

from prefixtune.cli.options import config_options, json_option
from prefixtune.cli.output import print_json
from prefixtune.config import DataConfig, TrainConfig

__all__ = ["estimate"]

DEFAULTS = {"length": "auto, as train: by the number of rows, 128 without --data"}


@click.command()
@click.option("--model", required=True, help="base model: as for train, or a config.json file")
@click.option("--data", help="rows to train on, to know their lengths; --max-length is assumed unless given")
@click.option("--eval-data", help="rows to evaluate on meanwhile")
@click.option("--device", help="torch device; CUDA where there is some by default")
@click.option("--probe", is_flag=True, help="load the model and time a few steps")
@config_options("prefix", "data", "train", defaults=DEFAULTS)
@json_option
def estimate(
    model: str,
    data: str | None,
    eval_data: str | None,
    device: str | None,
    probe: bool,
    prefix_options: dict[str, Any],
    data_options: dict[str, Any],
    train_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Predict the peak memory of a training run; no weights are loaded without --probe.

    Takes the options of train, so that its line can be tried here first. The largest batch decides: with
    --data it has the longest row.
    """
    data_config, config = DataConfig(**data_options), TrainConfig(**train_options)

    from prefixtune.train.forecast import forecast_for
    from prefixtune.train.probe import seconds_per_1000_rows

    found = forecast_for(
        model,
        data=data,
        eval_data=eval_data,
        prefix_options=prefix_options,
        data_config=data_config,
        config=config,
        device=device,
    )
    facts = found.to_dict()
    if probe:
        facts["seconds_per_1000_rows"] = seconds_per_1000_rows(model, found.setup, config)
    if as_json:
        print_json(facts)
        return
    click.echo(found.summary())
    if probe:
        click.echo(f"time for 1,000 rows: {facts['seconds_per_1000_rows']:.0f} s")
