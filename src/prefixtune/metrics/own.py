"""A metric of the user's own: a function that is named as package.module:function."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from numbers import Real
from typing import Any

from prefixtune.errors import ConfigError

__all__ = ["call_metric", "is_own", "load_metric"]

FORM = "a function is named as package.module:function, and takes predictions and references"


def is_own(name: str) -> bool:
    return ":" in name


def load_metric(name: str) -> Callable[..., Any]:
    """The function.

    Raises:
        ConfigError: there is no such module, it fails when imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise ConfigError(f"metric {name!r}: expected package.module:function", hint=FORM)
    try:
        with redirect_stdout(sys.stderr):  # stdout is the result
            module = import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise what it likes
        raise ConfigError(
            f"metric {name}: the module {module_name} cannot be imported: {type(error).__name__}: {error}",
            hint="it is looked for in the working folder and where Python finds its packages",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        kind = "there" if function is None else "a function"
        raise ConfigError(f"metric {name}: {function_name} is not {kind} in {module_name}", hint=FORM)
    return function  # type: ignore[no-any-return]


def call_metric(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """What the function returns, under its name, or "name.key" for each of a dict.

    Raises:
        ConfigError: the function fails, or returns anything but finite numbers.
    """
    function = load_metric(name)
    try:
        with redirect_stdout(sys.stderr):
            found = function(list(predictions), [list(texts) for texts in references])
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"metric {name}: it failed: {type(error).__name__}: {error}", hint="--debug shows where"
        ) from error
    if not isinstance(found, Mapping):
        return {name: _number(found, name)}
    if not found:
        raise ConfigError(f"metric {name}: expected a number or a dict of numbers; got an empty dict")
    return {f"{name}.{key}": _number(value, f"{name}.{key}") for key, value in found.items()}


def _number(value: Any, name: str) -> float:
    if not isinstance(value, Real):
        raise ConfigError(
            f"metric {name}: expected a number or a dict of numbers; got {type(value).__name__}",
            hint="a tensor or an array of one number becomes one by float(…)",
        )
    number = float(value)
    if not math.isfinite(number):
        raise ConfigError(f"metric {name}: expected a finite number; got {number}")
    return number
