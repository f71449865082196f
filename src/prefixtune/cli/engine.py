"""Loads what a command runs: a base with a prefix, or bare, with its tokenizer and template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefixtune.cli.output import say
from prefixtune.config import SCHEMES
from prefixtune.errors import ConfigError, ModelError

__all__ = ["Loaded", "load", "with_prefix"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that can be called and generates, and how rows are written for it.

    `base` is the bare model, which `model` is itself where there is no prefix; `template` is the one that the
    prefix was trained with.
    """

    model: Any
    base: Any
    tokenizer: Any
    name: str
    template: str | None = None


def load(
    model: str | None, prefix: Path | None, *, dtype: str, device: str | None, quantize: str | None
) -> Loaded:
    """The model with the prefix, or bare. Without `model`, the base that the prefix folder names.

    Args:
        quantize: "none" or a scheme; as the prefix was trained unless given.

    Raises:
        ConfigError: neither a model nor a prefix is given, or the scheme does not work here.
        ModelError: the model cannot be loaded, or has no tokenizer.
        StorageError: the prefix folder cannot be used.
    """
    from prefixtune.load import load_base

    if model is None:
        if prefix is None:
            raise ConfigError("neither --model nor --prefix is given", hint="for example --model demo")
        model = _base_name(prefix)
    if quantize is None and prefix is not None:
        quantize = _trained_scheme(prefix)
    scheme = None if quantize == "none" else quantize
    try:
        base = load_base(model, dtype=dtype, device=device, quantize=scheme)
    except ModelError as error:
        if prefix is None or model != _base_name(prefix):
            raise
        raise ModelError(
            f"{error.message}; the prefix was trained on it", hint="if it has moved, name it with --model"
        ) from error
    say(f"{model}: {base.dtype_reason}")
    if base.tokenizer is None:
        raise ModelError(f"{model}: this command needs a tokenizer, and there is none in the folder")
    bare = Loaded(model=base.model, base=base.model, tokenizer=base.tokenizer, name=model)
    return bare if prefix is None else with_prefix(bare, prefix)


def with_prefix(loaded: Loaded, folder: Path) -> Loaded:
    """The same base with the prefix of a folder, and the template that it was trained with."""
    from prefixtune import PrefixModel
    from prefixtune.storage import read_info

    info = read_info(folder)
    model = PrefixModel.from_pretrained(loaded.base, folder)
    return replace(loaded, model=model, name=folder.resolve().name, template=info.get("template"))


def scheme_of(folder: Path) -> str | None:
    """How the base was quantised that the prefix was trained on; None for one in full precision."""
    from prefixtune.storage import read_info

    told = read_info(folder)["quantization"]
    return told.get("scheme") if isinstance(told, dict) else told


def _trained_scheme(folder: Path) -> str | None:
    """How the prefix's base was quantised, where load_base can do that; said, because nobody asked for it."""
    scheme = scheme_of(folder)
    if scheme is None:
        return None
    if scheme in SCHEMES:
        say(f"{folder}: trained on a base in {scheme}, so it is loaded so (--quantize none does not)")
        return scheme
    say(f"{folder}: trained on a base in {scheme}, which is not offered: it is loaded in full precision")
    return None


def _base_name(folder: Path) -> str:
    from prefixtune.storage import read_info

    name = read_info(folder).get("base_name")
    if not name:
        raise ConfigError(
            f"{folder}: the prefix does not say which model it is for", hint="name it with --model"
        )
    return str(name)
