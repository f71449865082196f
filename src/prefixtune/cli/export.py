"""prefixtune export: prefixes for another engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import json_option
from prefixtune.cli.output import print_json, say
from prefixtune.errors import ConfigError

__all__ = ["export"]


@click.command()
@click.argument("prefixes", nargs=-1, required=True, metavar="[NAME=]FOLDER...")
@click.option("--to", "engine", type=click.Choice(["vllm"]), required=True, help="what will serve them")
@click.option("--model", help="base model; the one that the first prefix was trained on by default")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="folder to write")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="precision in which the base is served",
)
@click.option("--device", help="torch device for the canaries; CUDA where there is some by default")
@click.option("--served-name", help="what clients call the base  [default: the last part of its name]")
@click.option("--reserved-token", help="a token that no text needs  [default: one that the model can spare]")
@json_option
def export(
    prefixes: Sequence[str],
    engine: str,
    model: str | None,
    output: Path,
    dtype: str,
    device: str | None,
    served_name: str | None,
    reserved_token: str | None,
    as_json: bool,
) -> None:
    """Write prefixes of one base model so that another engine serves them, exactly or not at all.

    Each prefix is called NAME, or as its folder. OUTPUT/serve.sh starts the server.
    """
    named = _named(prefixes)

    from prefixtune.interop.vllm import export as write
    from prefixtune.load import load_base
    from prefixtune.storage import read_info

    first = next(iter(named.values()))
    source = model or str(read_info(first)["base_name"])
    for name, folder in named.items():
        told = read_info(folder)["quantization"]
        if told is not None:
            say(f"{name}: trained on a quantised base; it is served on the base in full precision")
    base = load_base(source, dtype=dtype, device=device)
    say(f"{source}: {base.dtype_reason}")
    written = write(
        base, named, output, source=source, served_name=served_name, reserved_token=reserved_token
    )
    token = written.placeholder
    say(f"reserved token: {token.text} (id {token.id}) stands for the prefix; no request may hold it")
    facts: dict[str, Any] = {
        "folder": str(written.folder),
        "base": written.base,
        "dtype": written.dtype,
        "reserved_token": written.placeholder.text,
        "models": written.models,
        "without_chat": list(written.without_chat),
        "command": str(written.folder / "serve.sh"),
    }
    if as_json:
        print_json(facts)
        return
    for name, served in written.models.items():
        only = " (/v1/completions only)" if name in written.without_chat else ""
        click.echo(f"{served}{only}")
    click.echo(facts["command"])


def _named(prefixes: Sequence[str]) -> dict[str, Path]:
    """Folders by name."""
    named: dict[str, Path] = {}
    for text in prefixes:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text).expanduser()
        name = name if equals else path.absolute().name
        if name in named:
            raise ConfigError(f"two prefixes are called {name!r}", hint="name them as NAME=FOLDER")
        named[name] = path
    return named
