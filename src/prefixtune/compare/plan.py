"""What is compared: the options, the file that holds them, and the cells they make. Knows no torch.

A cell is one method with one seed on one number of training rows, and runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from prefixtune.compare.machine import versions
from prefixtune.compare.settings import Method, methods_of, naming
from prefixtune.config import DataConfig, TrainConfig, _Config, chosen_layers, option
from prefixtune.errors import ConfigError
from prefixtune.metrics import check_metrics, is_own
from prefixtune.progress import note

__all__ = ["Cell", "CompareConfig", "Plan", "plan_of", "read_file"]

# options of the method `prefix` that others go by
FOLLOWED = {
    "lora": ("length", "layers", "projection", "hidden_size"),
    **dict.fromkeys(("prompt-tuning", "p-tuning", "peft-prefix", "prefix"), ("length",)),
}
LAYOUT = 4  # of data.json: a file of another is made anew
NOT_CONFIG = ("output", "data", "settings")  # of a file, beside the options of CompareConfig
EVAL_ROWS = 100  # inputs that are measured on unless it is said, or as many as there are
DEFAULT_METHODS = ("base", "lora", "peft-prefix", "prefix")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(_Config):
    """What is the same for all methods of a comparison."""

    model: str = option("demo", "base model: hub name, folder, .gguf file, or demo")
    train: str | None = option(None, "rows to train on")
    eval: str | None = option(None, "rows to measure on; rows with one input are references of one another")
    methods: tuple[str, ...] = option(DEFAULT_METHODS, "what is compared, with commas between the names")
    metrics: tuple[str, ...] = option((), "task metrics of generated answers, see prefixtune.metrics")
    train_rows: tuple[int, ...] = option((), "train on the first so many rows; several numbers are compared")
    eval_rows: int | None = option(
        None, "measure on the first so many inputs, with all their references; up to 100 unless given"
    )
    seeds: int = option(3, "train with the seeds 1 to this number")
    num_train_epochs: float | None = option(None, "passes over the training rows; as in train unless given")
    max_steps: int | None = option(None, "optimizer steps; overrides the epochs")
    per_device_train_batch_size: int | None = option(None, "rows per step; as in train unless given")
    instruction: str | None = option(
        None, "the text that `prompt` puts before each row; the first training row unless given"
    )
    max_new_tokens: int | None = option(None, "longest answer in tokens; by the longest reference")
    forgetting: bool = option(True, "measure the rise of the loss on text that the base itself writes")
    dtype: str = option(
        "auto",
        "precision of the base; what trains is fp32 always",
        choices=("auto", "float32", "bfloat16"),
    )

    def check(self) -> None:
        for name in ("methods", "metrics"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or any(not isinstance(one, str) or not one for one in names):
                raise ConfigError(f"{name}: expected names; got {names!r}")
        if not self.methods:
            raise ConfigError("methods: expected one at least")
        counts = self.train_rows
        if not isinstance(counts, tuple) or any(type(rows) is not int or rows <= 0 for rows in counts):
            raise ConfigError(f"train_rows: expected whole numbers above 0; got {self.train_rows!r}")
        for rows in counts:
            if counts.count(rows) > 1:
                raise ConfigError(f"train_rows: {rows} is named twice")
        numbers = ("eval_rows", "seeds", "max_steps", "per_device_train_batch_size", "max_new_tokens")
        for name in (*numbers, "num_train_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: expected more than 0; got {value}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CompareConfig:
        """As `from_dict`; one number or name is a list of one, and names may have commas between them."""
        values = dict(values)
        for name in ("methods", "metrics"):
            if isinstance(values.get(name), str):
                values[name] = tuple(part.strip() for part in values[name].split(",") if part.strip())
        if isinstance(values.get("train_rows"), int):
            values["train_rows"] = (values["train_rows"],)
        return cls.from_dict(values)

    @property
    def schedule(self) -> dict[str, Any]:
        """Options of TrainConfig that all methods share."""
        names = ("num_train_epochs", "max_steps", "per_device_train_batch_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method with one seed; `rows` is None where all rows are trained on."""

    method: Method
    seed: int
    rows: int | None
    several: bool = False  # numbers of rows are compared, so that they are in the name

    @property
    def name(self) -> str:
        method = re.sub(r"[^A-Za-z0-9._+-]", "_", self.method.name)
        if method != self.method.name:  # which another name may have become too
            method += f"-{hashlib.sha256(self.method.name.encode()).hexdigest()[:8]}"
        return f"{method}-{self.rows}rows-{self.seed}" if self.several else f"{method}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison before it begins."""

    config: CompareConfig
    data: DataConfig
    methods: tuple[Method, ...]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that after the first seed there is a whole table. A method that trains nothing has
        one cell: its numbers know neither seed nor training rows."""
        found: list[Cell] = []
        several = len(self.config.train_rows) > 1
        counts: tuple[int | None, ...] = self.config.train_rows or (None,)
        for seed in range(1, self.config.seeds + 1):
            for rows in counts:
                for method in self.methods:
                    if method.trains:
                        found.append(Cell(method=method, seed=seed, rows=rows, several=several))
                    elif seed == 1 and rows == counts[0]:
                        found.append(Cell(method=method, seed=seed, rows=None))
        return found

    @property
    def prefix(self) -> Method:
        """The method `prefix`, which the others are matched with, compared or not."""
        (ours,) = methods_of(("prefix",), self.changes)
        return ours

    def check_limits(self, limits: Mapping[str, Any]) -> None:
        """Raise ConfigError where a prefix, or one that LoRA is as large as, cannot be on the model.

        `limits` are the model's numbers of layers, positions (None without a limit) and token ids.
        """
        for method in self.methods:
            ours = self.prefix if method.of == "lora" else method
            if ours.of == "prefix":
                with naming(ours.name):
                    chosen_layers(ours.prefix_options.get("layers"), limits["layers"])
            if method.of == "prefix":
                with naming(method.name):
                    _check_tokens(method.prefix_options, limits)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the arguments of `plan_of`."""
        settings = {name: dict(table) for name, table in self.changes.items()}
        return {"values": self.config.to_dict(), "data": self.data.to_dict(), "settings": settings}

    def data_key(self) -> str:
        """A hash of all that decides which rows there are and how they read."""
        config = self.config
        parts = {
            "layout": LAYOUT,
            "packages": versions(("prefixtune", "torch", "transformers", "tokenizers")),
            "model": [config.model, _model_files(config.model)],
            "sources": [_file_key(config.train), _file_key(config.eval)],
            "rows": [max(config.train_rows) if config.train_rows else None, config.eval_rows or EVAL_ROWS],
            "data": self.data.to_dict(),
            "dtype": config.dtype,
            "forgetting": config.forgetting,
        }
        return digest(parts)

    def rows_of(self, cell: Cell) -> int | None:
        """How many of the first training rows decide a cell's numbers; None where all do."""
        if cell.method.trains:
            return cell.rows
        return 1 if cell.method.of == "prompt" and self.config.instruction is None else 0

    def cell_key(self, cell: Cell, data: str) -> str:
        """A hash of all that decides a cell's answers, and after a colon one of the metrics that score them.

        `data` is the hash of its rows and the base.
        """
        from prefixtune import __version__

        config = self.config
        parts = {
            "version": __version__,
            "packages": versions(("torch", "transformers", *(["peft"] if cell.method.needs_peft else []))),
            "data": data,
            "method": [cell.method.of, dict(cell.method.options)],
            "seed": cell.seed,
            "rows": cell.rows,
            "schedule": {**_defaults(), **config.schedule},
            "instruction": config.instruction if cell.method.of == "prompt" else None,
            "answers": [config.max_new_tokens, self.data.max_length],  # no longer than these
            "prefix": [self.prefix.prefix_options.get(name) for name in FOLLOWED.get(cell.method.of, ())],
        }
        metrics = [[name, _metric_file(name)] for name in config.metrics]
        return f"{digest(parts)}:{digest(metrics)}"


def _check_tokens(options: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    length, positions, vocabulary = options.get("length", 0), limits["positions"], limits["vocabulary"]
    if positions is not None and length >= positions:
        raise ConfigError(
            f"length: {length} virtual tokens leave no room in the {positions} positions of the model"
        )
    if any(not 0 <= token < vocabulary for token in options.get("init_tokens", ())):
        raise ConfigError(f"init_tokens: expected token ids of the model, 0 to {vocabulary - 1}")


def digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _defaults() -> dict[str, Any]:
    names = ("num_train_epochs", "max_steps", "per_device_train_batch_size")
    return {name: getattr(TrainConfig(), name) for name in names}


def _file_key(source: str | None) -> str | None:
    """The contents of a file, or of a folder that `datasets` wrote; of anything else the name."""
    path = Path(source) if source else None
    if path is not None and path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path is None or not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return source
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest([[file.relative_to(path).as_posix(), _file_key(str(file))] for file in files])


def _model_files(model: str) -> list[Any]:
    """Name, size and time of a model's files that lie here; where these change, its weights are hashed."""
    path = Path(model).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _metric_file(name: str) -> str | None:
    """The contents of the file that a metric of the user's own stands in."""
    module, own, _ = name.partition(":")
    return _file_key(getattr(import_module(module), "__file__", None)) if own else None


def read_file(path: Path) -> dict[str, Any]:
    """The tables of an experiment's TOML file: options of CompareConfig, [data], [settings.METHOD], output.

    Raises:
        ConfigError: the file cannot be read, or an option in it is unknown or has a wrong value.
    """
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not TOML: {error}", hint="text is written in quotes") from None
    for name in ("data", "settings"):
        if not isinstance(table.get(name, {}), dict):
            raise ConfigError(f"{path}: {name}: expected a table [{name}]")
    if not isinstance(table.get("output", ""), str):
        raise ConfigError(f"{path}: output: expected the name of a folder; got {table['output']!r}")
    values = {name: value for name, value in table.items() if name not in NOT_CONFIG}
    known = [knob.name for knob in fields(CompareConfig)]
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(
            f"{path}: unknown option {', '.join(unknown)}",
            hint=f"the options are {', '.join([*known, *NOT_CONFIG])}",
        )
    with naming(str(path)):
        config = CompareConfig.of(values)
        with naming("data"):
            _data_config(table.get("data", {}))
        methods_of(config.methods, table.get("settings", {}))
        if "metrics" in values:
            check_metrics([name for name in config.metrics if not is_own(name)])  # which run imports
    return table


def plan_of(
    values: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """The plan of options as CompareConfig and DataConfig have them.

    Raises:
        ConfigError: an option has a wrong value, or there is nothing to train or measure on.
    """
    config = CompareConfig.of(values)
    for name in ("train", "eval"):
        if getattr(config, name) is None:
            raise ConfigError(f"there are no rows to {name} on", hint=f"name them with --{name}")
    changes = settings or {}
    methods = methods_of(config.methods, changes)
    plan = Plan(config=config, data=_data_config(data or {}), methods=methods, changes=changes)
    _check_names(plan.cells)
    if config.instruction is not None and all(method.of != "prompt" for method in methods):
        note("instruction: only the method prompt reads it, and it is not among the methods")
    return plan


def _data_config(values: Mapping[str, Any]) -> DataConfig:
    data = DataConfig.from_dict(values)
    if data.limit is not None:
        raise ConfigError(
            f"limit: a comparison has no such option; got {data.limit}",
            hint="train_rows and eval_rows say how many rows are trained and measured on",
        )
    return data


def _check_names(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where two methods would have one file, also where case makes no difference."""
    owners: dict[str, str] = {}
    for cell in cells:
        owner = owners.setdefault(cell.name.lower(), cell.method.name)
        if owner != cell.method.name:
            raise ConfigError(
                f"methods: {owner} and {cell.method.name} would both be kept as cells/{cell.name}.json",
                hint="give one of them another name",
            )
