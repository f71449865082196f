"""How each method trains: the settings that are known to be its best, in one table. Knows no torch, no disk.

Where the numbers are from: docs/compare.md. A comparison prints them, and a TOML file changes them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefixtune.config import (
    PrefixConfig,
    TrainConfig,
    _Config,
    _positive,
    _share,
    _zero_or_more,
    check_damping,
    option,
)
from prefixtune.errors import ConfigError

__all__ = ["ALL_PEERS", "KINDS", "METHODS", "Method", "PeerConfig", "methods_of", "naming"]

UNTRAINED = ("base", "prompt")
PEERS = ("full", "lora", "prompt-tuning", "p-tuning", "peft-prefix")
KINDS = (*UNTRAINED, *PEERS, "prefix")
# what a comparison decides for all methods alike, so that it is none of a method's own settings
COMMON = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "dtype", "quantize", "logging_steps", "eval_steps", "save_steps", "report_to"),
    "packing",  # rows that are not packed come in another order than the other methods'
}


@dataclass(frozen=True, kw_only=True)
class PeerConfig(_Config):
    """Settings of a method that is not ours; a file may set those that its method has, and no others."""

    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    warmup_ratio: float = option(0.06, "share of the steps over which the learning rate rises")
    lr_scheduler_type: str = option(
        "linear",
        "schedule of the learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this")
    label_smoothing_factor: float = option(0.0, "share of each target that is spread over the vocabulary")
    length: int | None = option(None, "virtual tokens of a prompt or prefix; as many as ours unless given")
    init: str = option(
        "text",
        "start of prompt-tuning and peft-prefix: text, or PEFT's own noise",
        choices=("text", "random"),
    )
    projection: bool = option(False, "peft-prefix with PEFT's MLP; it starts from noise")
    hidden_size: int | None = option(None, "width of the MLP of p-tuning and peft-prefix; the model's own")
    targets: str = option(
        "qv",
        "LoRA on queries and values (or the fused layer that holds them), on all linear layers, or on "
        "whichever of the two comes nearest to the prefix's number of parameters",
        choices=("qv", "all-linear", "nearest"),
    )
    rank: int | None = option(None, "LoRA's r; unless given, as many parameters as the prefix has")
    alpha: float | None = option(None, "LoRA's scale; twice the rank unless given")

    def check(self) -> None:
        _positive(self, "learning_rate", "length", "hidden_size", "rank", "alpha")
        _zero_or_more(self, "weight_decay", "max_grad_norm")
        _share(self, "warmup_ratio", "label_smoothing_factor")


LOOKED_AT = {
    "full": (),
    "lora": ("targets", "rank", "alpha"),
    "prompt-tuning": ("length", "init"),
    "p-tuning": ("length", "hidden_size"),
    "peft-prefix": ("length", "init", "projection", "hidden_size"),
}
ALL_PEERS = (
    *("learning_rate", "warmup_ratio", "lr_scheduler_type", "weight_decay", "max_grad_norm"),
    "label_smoothing_factor",
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table.

    Attributes:
        of: one of KINDS: what it is. Several lines may be the same kind of method with other settings.
        options: of PrefixConfig and TrainConfig for the kind "prefix", of PeerConfig for the others.
    """

    name: str
    of: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.of not in KINDS:
            raise ConfigError(f"{self.name}: of: expected one of {', '.join(KINDS)}; got {self.of!r}")
        known = self._known()
        unknown = sorted(set(self.options) - known)
        if unknown:
            shared = sorted(COMMON.intersection(unknown))
            hint = f"it has {', '.join(sorted(known))}" if known else "it trains nothing"
            if shared:
                hint = f"{', '.join(shared)}: a comparison decides that for all methods alike"
            raise ConfigError(f"{self.of} has no setting {', '.join(unknown)}", hint=hint)
        if self.of == "prefix":
            prefix = PrefixConfig(**{"init": "random", **self.prefix_options})
            check_damping(prefix, TrainConfig(**self.train_options))
        elif self.of in PEERS:
            PeerConfig(**self.options)

    def _known(self) -> set[str]:
        if self.of == "prefix":
            return {*_names(PrefixConfig), *_names(TrainConfig)} - COMMON - {"find_learning_rate"}
        return {*ALL_PEERS, *LOOKED_AT[self.of]} if self.of in PEERS else set()

    @property
    def trains(self) -> bool:
        return self.of not in UNTRAINED

    @property
    def needs_peft(self) -> bool:
        return self.of in PEERS and self.of != "full"

    @property
    def prefix_options(self) -> dict[str, Any]:
        given = {name: self.options[name] for name in _names(PrefixConfig) if name in self.options}
        for name, kind in (("init_text", "text"), ("init_tokens", "tokens")):
            if name in given:
                given.setdefault("init", kind)
        return given

    @property
    def train_options(self) -> dict[str, Any]:
        return {name: self.options[name] for name in _names(TrainConfig) if name in self.options}

    @property
    def peer(self) -> PeerConfig:
        return PeerConfig(**self.options)

    def shown(self) -> dict[str, Any]:
        """The settings that count, as they are printed; empty means default options."""
        if self.of not in PEERS:
            return dict(self.options)
        values = self.peer.to_dict()
        shown = {name: values[name] for name in (*ALL_PEERS, *LOOKED_AT[self.of])}
        return {name: value for name, value in shown.items() if value is not None}


def _names(config: type[Any]) -> list[str]:
    return [knob.name for knob in dataclasses.fields(config)]


def _method(name: str, of: str | None = None, **options: Any) -> Method:
    return Method(name=name, of=of or name, options=options)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _method("base"),
        _method("prompt"),
        _method("full", learning_rate=5e-5),
        _method("lora", learning_rate=1e-2, targets="qv"),
        _method("lora-all-linear", "lora", learning_rate=5e-3, targets="all-linear"),
        _method("prompt-tuning", learning_rate=3e-1, init="text"),
        _method("p-tuning", learning_rate=1e-2),
        _method("prefix"),
        _method("prefix+projection", "prefix", projection=True),
        _method("peft-prefix", learning_rate=1e-2, init="text"),
        _method("peft-prefix-default", "peft-prefix", learning_rate=1e-3, init="random"),
        _method("peft-prefix+projection", "peft-prefix", learning_rate=1e-3, init="random", projection=True),
    )
}


@contextmanager
def naming(place: str) -> Iterator[None]:
    """An error within says where the option stands."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None


def methods_of(names: tuple[str, ...], changes: Mapping[str, Mapping[str, Any]]) -> tuple[Method, ...]:
    """The methods by name, with the changes of a [settings.NAME] table each.

    A table with an `of` makes a method of its own: it starts from the settings of the method that it names,
    whichever of the two tables comes first.

    Raises:
        ConfigError: there is no such method or setting, or one is named twice.
    """
    for name, table in changes.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"settings.{name}: expected a table [settings.{name}]; got {table!r}")
    known = {**METHODS, **{name: _changed(name, changes) for name in changes}}
    found = []
    for name in names:
        if name not in known:
            raise _unknown(name, known, where="methods")
        if names.count(name) > 1:
            raise ConfigError(f"methods: {name} is named twice")
        found.append(known[name])
    return tuple(found)


def _changed(name: str, changes: Mapping[str, Mapping[str, Any]], after: tuple[str, ...] = ()) -> Method:
    """The method with its table's changes to what it starts from; `after` are those that start from it."""
    if name in after:
        raise ConfigError(f"settings: {' of '.join([*after, name])}: a method cannot start from itself")
    values = dict(changes.get(name, {}))
    start = values.pop("of", name)
    if not isinstance(start, str):
        raise ConfigError(f"settings.{name}: of: expected the name of a method; got {start!r}")
    if start != name and start in changes:
        method = _changed(start, changes, (*after, name))
    elif start in METHODS:
        method = METHODS[start]
    else:
        where = f"settings.{name}" if start == name else f"settings.{name}: of"
        raise _unknown(start, [one for one in {**METHODS, **changes} if one != name], where=where)
    options = {**method.options, **values}
    if method.of == "prefix" and options.get("length") == "auto":  # as train has it: what is not given
        del options["length"]
    with naming(f"settings.{name}"):
        if method.of == "peft-prefix" and options.get("projection") and options.get("init") == "text":
            if values.get("init") == "text":
                raise ConfigError(
                    "init: PEFT's projection starts from noise, not from text", hint='use init = "random"'
                )
            options["init"] = "random"
        return Method(name=name, of=method.of, options=options)


def _unknown(name: str, known: Iterable[str], *, where: str) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
    return ConfigError(f"{where}: there is no method {name!r}", hint=hint)
