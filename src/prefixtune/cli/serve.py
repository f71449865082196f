"""prefixtune serve: an OpenAI-compatible server for one base model and many prefixes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options
from prefixtune.cli.output import say
from prefixtune.config import SCHEMES
from prefixtune.errors import ConfigError, MissingExtraError

__all__ = ["serve"]

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command()
@click.option("--model", required=True, help="base model: hub name, folder, .gguf file, or demo")
@click.option(
    "--prefix", "named", multiple=True, metavar="NAME=FOLDER", help="serve this prefix folder; repeatable"
)
@click.option(
    "--prefix-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="serve each prefix folder in here under its own name, those that come later too",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="precision of the base",
)
@click.option("--quantize", type=click.Choice(SCHEMES), help="the base's linear weights in 8 or 4 bits")
@click.option("--device", help="torch device, e.g. cpu or cuda:1; CUDA where there is some by default")
@click.option(
    "--api-key",
    envvar="PREFIXTUNE_API_KEY",
    show_envvar=True,
    help="asked for by every route but /healthz; none is asked for by default",
)
@click.option(
    "--admin-key",
    envvar="PREFIXTUNE_ADMIN_KEY",
    show_envvar=True,
    help="opens the routes under /admin, which are closed by default",
)
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="let pages of this origin call the server; repeatable"
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="take requests to this name, as the header Host tells it; repeatable. On a loopback address only "
    "its own names are taken by default, on others any name is",
)
@config_options("serve")
def serve(
    model: str,
    named: Sequence[str],
    prefix_dir: Path | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    api_key: str | None,
    admin_key: str | None,
    cors: Sequence[str],
    allowed_hosts: Sequence[str],
    serve_options: dict[str, Any],
) -> None:
    """Serve a base model with many prefixes, in one batch, to OpenAI's clients.

    The base is the model MODEL, a prefix is MODEL:NAME. Routes: /v1/models, /v1/chat/completions,
    /v1/completions, /healthz, /metrics, and a page to try it at /.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"serve: the package {missing[0]} is not installed", hint="pip install 'prefixtune[serve]'"
        )
    from prefixtune.serve.config import ServeConfig

    config = ServeConfig(**serve_options)
    prefixes = _named(named)
    for option, key in (("--api-key", api_key), ("--admin-key", admin_key)):
        _check_key(option, key)

    from prefixtune.cli.engine import load
    from prefixtune.interop.names import default_name
    from prefixtune.serve.api import build_app
    from prefixtune.serve.server import run
    from prefixtune.serve.service import Service

    loaded = load(model, None, dtype=dtype, device=device, quantize=quantize)
    name = config.served_name or default_name(model)
    service = Service(
        loaded.base, loaded.tokenizer, name=name, config=config, prefixes=prefixes, prefix_dir=prefix_dir
    )
    for told in _other_bases(service.store.describe(), quantize):
        say(told)
    is_local = _is_loopback(config.host)
    hosts = (*LOOPBACK, config.host, *allowed_hosts) if is_local or allowed_hosts else None
    app = build_app(service, api_key=api_key, admin_key=admin_key, cors=cors, hosts=hosts)
    if not is_local and api_key is None:
        say(f"{config.host} is open to other machines, and no --api-key is asked for")
    count = len(service.store.names())
    run(service, app, on_ready=lambda address: say(f"{name} with {count} prefixes: {address}"))


def _check_key(option: str, key: str | None) -> None:
    """Refuse a key that would open nothing, or that leaves the server open without a word."""
    variable = f"PREFIXTUNE_{option.strip('-').replace('-', '_').upper()}"
    if key is None and variable in os.environ:  # click takes an empty variable for none
        raise ConfigError(f"{variable}: expected a key; got an empty text", hint="unset it to ask for no key")
    if key is not None and (not key or key != key.strip()):
        raise ConfigError(f"{option}: expected a key; got one that is empty or has spaces at its ends")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _other_bases(served: Sequence[Mapping[str, Any]], quantize: str | None) -> list[str]:
    """Which prefixes were trained on a base in another precision than the one that serves them all."""
    from prefixtune.cli.engine import scheme_of

    names: dict[str | None, list[str]] = {}
    for entry in served:
        if entry["problem"] is None:
            names.setdefault(scheme_of(Path(entry["folder"])), []).append(entry["name"])
    return [
        f"{', '.join(those)}: trained on a base in {scheme or 'full precision'}, but served on one in "
        f"{quantize or 'full precision'}; as trained is {f'--quantize {scheme}' if scheme else 'without'}"
        for scheme, those in names.items()
        if scheme != quantize
    ]


def _named(pairs: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--prefix {pair}: expected NAME=FOLDER", hint="--prefix mail=runs/mail")
        if name in found:
            raise ConfigError(f"--prefix: {name} is named twice")
        found[name] = Path(folder)
    return found
