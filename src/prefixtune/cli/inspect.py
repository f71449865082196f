"""prefixtune inspect: what a prefix for this model would be, or what a prefix folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option
from prefixtune.cli.output import print_json, say
from prefixtune.config import PrefixConfig, chosen_layers

__all__ = ["inspect"]

A_RUN, CHECKPOINT = ("prefix.json", "run.json"), "trainer_state.json"


@click.command()
@click.argument("target", required=False)
@click.option("--model", help="the same as TARGET, for a model")
@click.option("--prefix", "prefix_folder", help="the same as TARGET, for a prefix folder")
@config_options("prefix", only=("length", "projection", "hidden_size", "layers"))
@json_option
def inspect(
    target: str | None,
    model: str | None,
    prefix_folder: str | None,
    prefix_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Count parameters and bytes without loading weights.

    TARGET is a model (name, folder, .gguf file, demo, or a config.json file) or a prefix folder.
    """
    named = [name for name in (target, model, prefix_folder) if name is not None]
    if len(named) != 1:
        raise click.UsageError(
            "expected one model or one prefix folder, for example: prefixtune inspect demo"
        )
    target = named[0]
    if prefix_folder is not None or (model is None and _may_be_prefix(Path(target).expanduser())):
        from prefixtune.storage import load_prefix

        folder = Path(target).expanduser()
        info = _with_counts(load_prefix(folder).info, folder)
        print_json(info) if as_json else _print_info(info)
        return
    config = PrefixConfig(**_with_length(prefix_options))
    geometry, parameters = _measure(target)
    facts = _facts(geometry, parameters, config)
    print_json(facts) if as_json else _print_facts(geometry, facts, config)


def _with_length(options: dict[str, Any]) -> dict[str, Any]:
    """In place of auto, for which there are no rows, the most that it comes to."""
    if options.get("length") != "auto":
        return options
    from prefixtune.train import LONGEST_LENGTH

    say(f"auto: by the number of rows, up to {LONGEST_LENGTH} virtual tokens; here for the most")
    return {**options, "length": LONGEST_LENGTH}


def _may_be_prefix(folder: Path) -> bool:
    """Whether it is a prefix folder or a part of a run; a checkpoint of a whole model has its config.json."""
    held = {name for name in (*A_RUN, CHECKPOINT, "config.json") if (folder / name).is_file()}
    return not held.isdisjoint(A_RUN) or held == {CHECKPOINT}


def _with_counts(info: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What prefix.json says, and what follows from it: numbers of the baked KV, bytes on disk."""
    from prefixtune.geometry import Geometry
    from prefixtune.storage import TENSORS

    numbers = info["length"] * Geometry.from_dict(info["geometry"]).numbers_per_token
    return {**info, "kv_numbers": numbers, "prefix_file_bytes": (folder / TENSORS).stat().st_size}


def _measure(target: str) -> tuple[Any, int]:
    """The geometry of the model called `target`, and the number of its parameters."""
    from prefixtune.geometry import Geometry
    from prefixtune.load import empty_model

    model = empty_model(target)
    return Geometry.probe(model), sum(parameter.numel() for parameter in model.parameters())


def _facts(geometry: Any, base_parameters: int, config: PrefixConfig) -> dict[str, Any]:
    from prefixtune.prefix import count_parameters

    trainable = count_parameters(geometry, config, geometry.hidden_size)
    total = base_parameters + trainable
    layers = geometry.layers
    return {
        "model_type": geometry.model_type,
        "layers": len(layers),
        "hidden_size": geometry.hidden_size,
        "kv_heads": _uniform([layer.kv_heads for layer in layers]),
        "key_dim": _uniform([layer.key_dim for layer in layers]),
        "value_dim": _uniform([layer.value_dim for layer in layers]),
        "windows": list(geometry.windows),
        "max_positions": geometry.max_positions,
        "length": config.length,
        "projection": config.projection,
        "trained_layers": list(chosen_layers(config.layers, len(layers))),
        "base_parameters": base_parameters,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "kv_numbers_per_token": geometry.numbers_per_token,
        "kv_cache_bytes_per_token": {
            "float32": 4 * geometry.numbers_per_token,
            "bfloat16": 2 * geometry.numbers_per_token,
        },
        "prefix_file_bytes": 4 * config.length * geometry.numbers_per_token,  # the baked KV, in float32
    }


def _uniform(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _print_layers(geometry: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "kv heads", "key dim", "value dim", "window", title=geometry.model_type)
    for first, last, layer in _runs(geometry.layers):
        name = str(first) if first == last else f"{first} to {last}"
        window = "all" if layer.window is None else str(layer.window)
        table.add_row(name, str(layer.kv_heads), str(layer.key_dim), str(layer.value_dim), window)
    Console().print(table)


def _print_facts(geometry: Any, facts: dict[str, Any], config: PrefixConfig) -> None:
    _print_layers(geometry)
    per_token = facts["kv_cache_bytes_per_token"]
    kind = "with projection" if config.projection else "without projection"
    if config.layers is not None:
        kind += f", trained in {len(facts['trained_layers'])} of {facts['layers']} layers"
    click.echo(
        f"base model: {facts['base_parameters']:,} parameters\n"
        f"prefix of {config.length} tokens {kind}: {facts['trainable_parameters']:,} trainable parameters, "
        f"{facts['trainable_percent']} % of {facts['all_parameters']:,}\n"
        f"KV per token: {per_token['bfloat16']:,} bytes in bfloat16, {per_token['float32']:,} in float32\n"
        f"prefix file: {facts['prefix_file_bytes']:,} bytes of tensors"
    )


def _runs(layers: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Neighbouring layers of the same shape as (first, last, layer)."""
    runs: list[tuple[int, int, Any]] = []
    for index, layer in enumerate(layers):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], index, layer)
        else:
            runs.append((index, index, layer))
    return runs


def _print_info(info: dict[str, Any]) -> None:
    from prefixtune.geometry import Geometry

    geometry = Geometry.from_dict(info["geometry"])
    chosen = info["config"].get("layers")  # None, or not there in older folders: all
    where = "" if chosen is None else f", trained in layers {chosen}"
    _print_layers(geometry)
    click.echo(
        f"prefix of {info['length']} tokens for {info['base_name']}, {info['parameterisation']}{where}, "
        f"template {info['template']}\n"
        f"KV: {info['kv_numbers']:,} numbers\nprefix file: {info['prefix_file_bytes']:,} bytes"
    )
    if info["quantization"] is not None:
        click.echo(f"trained on a base in {_told(info['quantization'])}")
    for name, value in (info["training"] or {}).items():
        if value is not None:
            click.echo(f"{name}: {f'{value:,}' if isinstance(value, int) else value}")


def _told(quantization: dict[str, Any] | str) -> str:
    if isinstance(quantization, str):
        return quantization
    return f"{quantization.get('scheme')} ({quantization.get('library')} {quantization.get('version')})"
