"""Options from the config dataclasses, and their values from --config and --set. Knows no command.

An explicit option beats --set, which beats the TOML file, which beats the default. It works by click's own
default map, so that a value from a file passes the same checks as one that is typed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import click

from prefixtune.config import SCHEMES, DataConfig, DistillConfig, PrefixConfig, TrainConfig
from prefixtune.errors import ConfigError
from prefixtune.serve.config import ServeConfig

__all__ = ["ONE_SOURCE", "Knob", "config_options", "json_option", "model_options"]

SECTIONS: dict[str, type[Any]] = {
    "prefix": PrefixConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "serve": ServeConfig,
}
# of [data], those of a command that reads one source
ONE_SOURCE = ("template", "fields", "max_length", "split", "on_no_target", "limit")
SOURCE = "source"  # in a TOML file, [data] source = "…" is what --data says

Command = Callable[..., Any]


class Knob(click.Option):
    """An option made of a dataclass field, in the section that its config has. None means: not given."""

    def __init__(self, *args: Any, section: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class TokenIds(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """Integers with commas between them; a TOML list does as well."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            if any(isinstance(part, float) for part in parts):  # int would cut it
                raise ValueError
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"expected integers with commas between them; got {value!r}", param, ctx)


class Length(click.ParamType):  # type: ignore[type-arg]
    """A number of virtual tokens, or auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


def config_options(
    *sections: str,
    only: Sequence[str] = (),
    defaults: Mapping[str, str] | None = None,
    files: bool = True,
) -> Callable[[Command], Command]:
    """Give a command one option per field of the sections' dataclasses, and --config and --set.

    The command gets what the user gave, and nothing else, as `{section}_options: dict[str, Any]`.

    Args:
        sections: of "prefix", "data", "train", "distill" and "serve".
        only: these fields; all of them unless given.
        defaults: what the help says instead of a field's default, by field name.
        files: add --config and --set; a command may have a file of its own.
    """
    knobs = {
        section: [field for field in dataclasses.fields(SECTIONS[section]) if not only or field.name in only]
        for section in sections
    }

    def decorate(command: Command) -> Command:
        @wraps(command)
        def collected(**values: Any) -> Any:
            for section, fields in knobs.items():
                given = {field.name: values.pop(field.name) for field in fields}
                values[f"{section}_options"] = {
                    name: value for name, value in given.items() if value is not None
                }
            return command(**values)

        for section in reversed(sections):
            hints = get_type_hints(SECTIONS[section])
            for field in reversed(knobs[section]):  # decorators stack from the bottom
                shown = (defaults or {}).get(field.name, _shown(field))
                _add_knob(collected, section, field, kind=_kind(hints[field.name]), shown=shown)
        if files:
            path = click.Path(path_type=Path)
            _add(collected, "--set", metavar="KEY=VALUE", multiple=True, callback=_take_set, help=_SET_HELP)
            _add(collected, "--config", type=path, callback=_take_config, help=_CONFIG_HELP)
        return collected

    return decorate


_CONFIG_HELP = "TOML file with values for these options, in the sections that the command has, e.g. [data]"
_SET_HELP = "one option by its name, e.g. learning_rate=0.01 or train.learning_rate=0.01; repeatable"


def json_option(command: Command) -> Command:
    """--json: one JSON document on stdout in place of text."""
    return click.option("--json", "as_json", is_flag=True, help="print one JSON document")(command)


def model_options(command: Command) -> Command:
    """--prefix, --dtype, --quantize and --device: what to run beside --model, and how."""
    folder = click.Path(path_type=Path)
    choices = click.Choice(["auto", "float32", "bfloat16"])
    for option in (
        click.option(
            "--device", help="torch device, e.g. cpu or cuda:1; CUDA where there is some by default"
        ),
        click.option(
            "--quantize",
            type=click.Choice(["none", *SCHEMES]),
            help="the base's linear weights in 8 or 4 bits  [default: as the prefix was trained]",
        ),
        click.option(
            "--dtype", type=choices, default="auto", show_default=True, help="precision of the base"
        ),
        click.option(
            "--prefix", "prefix_folder", type=folder, help="prefix folder; the bare model unless given"
        ),
    ):
        command = option(command)
    return command


def _add(command: Command, flag: str, **settings: Any) -> None:
    click.option(flag, is_eager=True, expose_value=False, **settings)(command)


def _add_knob(
    command: Command, section: str, field: dataclasses.Field[Any], *, kind: type[Any], shown: str
) -> None:
    kebab = field.name.replace("_", "-")
    text = field.metadata["help"] + (f"  [default: {shown}]" if shown else "")
    settings: dict[str, Any] = {"cls": Knob, "section": section, "default": None, "help": text}
    if kind is bool:
        option = click.option(f"--{kebab}/--no-{kebab}", field.name, is_flag=True, **settings)
    else:
        choices = field.metadata.get("choices")
        known = {"length": Length(), "init_tokens": TokenIds()} if section == "prefix" else {}
        type_ = click.Choice(choices) if choices else known.get(field.name, kind)
        option = click.option(f"--{kebab}", field.name, type=type_, **settings)
    option(command)


def _kind(hint: Any) -> type[Any]:
    """The type of a field without its None; a tuple of integers is `tuple`."""
    options = [kind for kind in (get_args(hint) or (hint,)) if kind is not NoneType]
    if getattr(hint, "__origin__", None) is tuple:
        return tuple
    kind = options[0]
    return tuple if getattr(kind, "__origin__", None) is tuple else kind


def _shown(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is None:
        return str(field.metadata["unset"])
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


# --- values from a file and from --set ---------------------------------------------------------------------


def _take_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        _keep(ctx, "config", dict(_from_toml(ctx, value)))


def _take_set(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> None:
    found = {}
    for text in value:
        key, equals, setting = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {text}: expected KEY=VALUE", hint="for example --set learning_rate=0.01"
            )
        option = _option(ctx, key.strip(), where="--set")
        found[option.name] = _checked(ctx, option, setting.strip(), where=f"--set {key.strip()}")
    _keep(ctx, "set", found)


def _keep(ctx: click.Context, origin: str, values: dict[Any, Any]) -> None:
    """Whichever of the two options click handles first, what --set says counts more."""
    kept = ctx.meta.setdefault("prefixtune.values", {"config": {}, "set": {}})
    kept[origin] = values
    ctx.default_map = {**kept["config"], **kept["set"]}


def _from_toml(ctx: click.Context, path: Path) -> list[tuple[Any, Any]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        place = f"{path}:{line.group(1)}" if line else str(path)
        raise ConfigError(f"{place}: this is not TOML: {error}", hint="text is written in quotes") from None
    found = []
    for key, value in _flat(table):
        option = _option(ctx, key, where=str(path))
        found.append((option.name, _checked(ctx, option, value, where=f"{path}: {key}")))
    return found


def _flat(table: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        if key in SECTIONS and isinstance(value, dict):
            pairs += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            pairs.append((key, value))
    return pairs


def _option(ctx: click.Context, key: str, *, where: str) -> click.Option:
    """The command's option called `name` or `section.name`."""
    options: dict[str, click.Option] = {}
    for param in ctx.command.params:
        if not isinstance(param, click.Option) or not param.expose_value:
            continue  # --help, --config and their like
        name = next(flag for flag in param.opts if flag.startswith("--"))[2:].replace("-", "_")
        options[name] = param
        if isinstance(param, Knob):
            options[f"{param.section}.{name}"] = param
        elif name == "data":
            options[f"data.{SOURCE}"] = param
    found = options.get(key.replace("-", "_"))
    if found is None:
        close = difflib.get_close_matches(key.replace("-", "_"), options, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"see prefixtune {ctx.info_name} --help"
        raise ConfigError(f"{where}: {ctx.info_name} has no option {key!r}", hint=hint)
    return found


def _checked(ctx: click.Context, option: click.Option, value: Any, *, where: str) -> Any:
    """The value as the option's type, or an error that says where it was written."""
    if isinstance(value, dict):
        raise ConfigError(f"{where}: expected one value; got a table")
    expected = option.type.name
    if isinstance(value, bool) and not isinstance(option.type, click.types.BoolParamType):
        raise ConfigError(f"{where}: expected {expected}; got {str(value).lower()}")
    if isinstance(value, float) and expected.startswith("integer") and not value.is_integer():
        raise ConfigError(f"{where}: expected a whole number; got {value}")
    if isinstance(value, list) and not (option.multiple or isinstance(option.type, TokenIds)):
        raise ConfigError(f"{where}: expected {expected}; got a list")
    many = option.multiple
    try:
        if many:
            parts = value if isinstance(value, list) else [value]
            return tuple(option.type.convert(part, option, ctx) for part in parts)
        return option.type.convert(value, option, ctx)
    except click.BadParameter as error:
        raise ConfigError(f"{where}: {error.message}") from None
