"""The knobs, one place each: frozen keyword-only dataclasses, checked at birth.

The command line, the docs table and the JSON files are generated from these fields. Knows no torch, no disk.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any, Self, get_args, get_type_hints

from prefixtune.errors import ConfigError

__all__ = [
    "DISTILL_TRAINING",
    "SCHEMES",
    "DataConfig",
    "DistillConfig",
    "PrefixConfig",
    "TrainConfig",
    "check_damping",
    "chosen_layers",
    "option",
]

SCHEMES = ("int8", "nf4")  # in which a frozen base's linear weights can be held
# What distillation trains with unless told otherwise: few rows, but each with whole distributions to learn,
# so more passes help (docs/distill.md); and it is the teacher that is to be kept, not the bare model.
DISTILL_TRAINING: dict[str, Any] = {"num_train_epochs": 8.0, "retain": 0.0, "token_damping": 0.0}


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, unset: str = "") -> Any:
    """A dataclass field: its help, its choices where they are closed, and what no value (None) comes to."""
    return field(default=default, metadata={"help": help, "choices": choices, "unset": unset})


class _Config:
    """What all configs share: checking of types and choices, and the JSON round trip."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for knob in dataclasses.fields(self):  # type: ignore[arg-type]
            value = self._coerce(knob.name, getattr(self, knob.name), hints[knob.name])
            object.__setattr__(self, knob.name, value)
            choices = knob.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{knob.name}: expected one of {', '.join(choices)}; got {value!r}")
        self.check()

    def check(self) -> None:
        """Raise ConfigError where values do not fit together."""

    @staticmethod
    def _coerce(name: str, value: Any, hint: Any) -> Any:
        allowed = get_args(hint) or (hint,)
        plain = tuple(kind for kind in allowed if isinstance(kind, type))
        if isinstance(value, bool) and bool not in plain:
            raise ConfigError(f"{name}: expected {_names(plain)}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: expected a number; got {value}")
        if isinstance(value, int) and not isinstance(value, bool) and int not in plain and float in plain:
            return float(value)  # TOML and JSON write 1 where 1.0 is meant
        if isinstance(value, float) and int in plain and float not in plain and value.is_integer():
            return int(value)
        if isinstance(value, list):
            value = tuple(value)
        if plain and not isinstance(value, plain) and not any(_is_generic(kind) for kind in allowed):
            raise ConfigError(f"{name}: expected {_names(plain)}; got {value!r}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; an unknown name is an error that lists the known ones."""
        known = [knob.name for knob in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)}", hint=f"the options are {', '.join(known)}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_generic(kind: Any) -> bool:
    return not isinstance(kind, type)


def _positive(config: _Config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: expected more than 0; got {value}")


def _zero_or_more(config: _Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}: expected 0 or more; got {getattr(config, name)}")


def _share(config: _Config, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected a share from 0 to 1; got {getattr(config, name)}")


def chosen_layers(layers: str | None, count: int) -> tuple[int, ...]:
    """The numbers of the layers that train in a model of `count` layers, ascending; None means all.

    Raises:
        ConfigError: `layers` cannot be read, or names a layer that the model does not have.

    Example:
        >>> chosen_layers("top:3", 30), chosen_layers("0,5,28-29", 30)
        ((27, 28, 29), (0, 5, 28, 29))
    """
    if layers is None:
        return tuple(range(count))
    ranges = _layer_ranges(layers)
    if not -count <= ranges[0][0] <= ranges[-1][-1] < count:
        raise ConfigError(f"layers: the model has {count} layers, 0 to {count - 1}; got {layers!r}")
    return tuple(number % count for part in ranges for number in part)


def _layer_ranges(layers: str) -> list[range]:
    """The ranges that `layers` names, ascending; top:N counts from the model's end, so it is -N to -1."""
    top = re.fullmatch(r"top:([1-9]\d{0,5})", layers, re.ASCII)
    if top:
        return [range(-int(top[1]), 0)]
    ranges = []
    for part in layers.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        if not found:
            raise ConfigError(
                f"layers: expected top:N, or layer numbers with commas and ranges; got {layers!r}",
                hint="for example top:8 or 0,5,20-29; the layers are counted from 0",
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ConfigError(f"layers: expected a range that ascends; got {part.strip()} in {layers!r}")
        ranges.append(range(first, last + 1))
    ranges.sort(key=lambda part: part.start)
    for lower, upper in pairwise(ranges):
        if upper.start < lower.stop:
            raise ConfigError(f"layers: layer {upper.start} is named twice in {layers!r}")
    return ranges


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(_Config):
    """The trainable prefix: its length, parameterisation, start, and the layers that train.

    Example:
        >>> PrefixConfig(length=10, projection=True).length
        10
    """

    length: int = option(10, "number of virtual tokens P")
    projection: bool = option(False, "produce the KV by an MLP (Li & Liang 2021, section 4.3)")
    hidden_size: int | None = option(None, "width of the MLP's hidden layer", unset="the model's own")
    init: str = option(
        "random",
        "start from noise at the scale of the model's KV, from the KV of text, or from the KV of token ids",
        choices=("random", "text", "tokens"),
    )
    init_text: str | None = option(None, "the text whose KV the prefix starts from (init=text)")
    init_tokens: tuple[int, ...] | None = option(
        None, "the token ids whose KV the prefix starts from (init=tokens)"
    )
    layers: str | None = option(
        None,
        "train in these layers only: top:8 (the 8 nearest to the output), or numbers from 0 such as "
        "0,5,20-29; the others keep the KV that they start with",
        unset="all layers",
    )

    def check(self) -> None:
        _positive(self, "length", "hidden_size")
        if self.layers is not None:
            _layer_ranges(self.layers)  # which layers there are is known with the model
        if self.hidden_size is not None and not self.projection:
            raise ConfigError(
                "hidden_size: only the projection has a hidden layer", hint="add projection=True"
            )
        if self.init == "text" and not (self.init_text or "").strip():
            raise ConfigError("init=text needs init_text", hint='for example init_text="Summarise the mail:"')
        if self.init_text is not None and self.init != "text":
            raise ConfigError(f"init_text is given, but init is {self.init}", hint="use init=text")
        if self.init == "tokens" and not self.init_tokens:
            raise ConfigError("init=tokens needs init_tokens, a list of token ids")
        tokens = self.init_tokens
        if tokens is not None and not (isinstance(tokens, tuple) and all(map(_is_whole, tokens))):
            raise ConfigError(f"init_tokens: expected token ids, whole numbers; got {tokens!r:.80}")
        if self.init_tokens is not None and self.init != "tokens":
            raise ConfigError(f"init_tokens is given, but init is {self.init}", hint="use init=tokens")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Config):
    """Where the rows come from and how a row becomes token ids and target tokens."""

    template: str | None = option(
        None,
        "human (the tutorial's), human-one-bos (the same text, with the tokenizer's BOS at its start only, "
        "and its end token at its end only), "
        "chat (the tokenizer's chat template), or a format such as "
        "'Question: {instruction}\\nAnswer: {output}', whose last field is the target (\\n is a line break)",
        unset="human-one-bos where the tokenizer begins or ends each text with a token, else human",
    )
    fields: str | None = option(
        None, "map the template's fields to the file's columns, e.g. input=mr,output=ref"
    )
    max_length: int = option(512, "longest row in tokens; what is cut is counted and shown")
    split: str = option("train", "which split of a hub data set or DatasetDict to read")
    eval_split: str | None = option(None, "which split to evaluate on", unset="that of --split")
    on_no_target: str = option(
        "error",
        "a row without target tokens stops the run, or is dropped and counted",
        choices=("error", "drop"),
    )
    limit: int | None = option(None, "read no more than this many rows")

    def check(self) -> None:
        _positive(self, "max_length", "limit")

    @property
    def evaluated_split(self) -> str:
        return self.eval_split or self.split


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Config):
    """How to train; named as in transformers' TrainingArguments where it has the option."""

    learning_rate: float | None = option(None, "peak learning rate", unset="by parameterisation")
    find_learning_rate: bool = option(
        False,
        "first raise the learning rate step by step (a range test), then train with the rate it suggests",
    )
    num_train_epochs: float | None = option(
        None,
        "passes over the training rows, unless --max-steps is given",
        unset="2; 1 where that makes 500 steps, up to 4 where 2 make fewer than 14 (50 where rows have 10 "
        "target tokens or fewer)",
    )
    max_steps: int | None = option(None, "optimizer steps; overrides the epochs")
    per_device_train_batch_size: int = option(
        8,
        "rows per batch; run in passes of packing_length tokens, so that memory does not grow with it",
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step, weighted by target tokens")
    packing: bool = option(True, "run rows end to end in one pass, without padding, where the model allows")
    packing_length: int | None = option(
        None,
        "tokens of one pass through the model",
        unset="512 beside what all rows begin with (on a GPU 2048 or 1024), at least the longest row's",
    )
    warmup_ratio: float = option(0.06, "share of the steps over which the learning rate rises")
    lr_scheduler_type: str = option(
        "linear",
        "schedule of the learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this")
    token_damping: float | None = option(
        None,
        "how much less the virtual tokens with most of the attention step, 0 (not at all) to 1",
        unset="0.5 in runs of up to 125 steps, 0 in longer ones, of labels, and with a projection",
    )
    label_smoothing_factor: float = option(
        0.0,
        "share of each target that the training loss spreads over the vocabulary, but for the last third of "
        "the steps: answers may gain, above all with more epochs",
    )
    retain: float = option(
        0.1,
        "weight of staying close to the bare model on text that it samples itself (nats per token beside the "
        "task's loss): less is forgotten; 0 switches it off",
    )
    logging_steps: int = option(10, "log the loss every so many steps")
    eval_steps: int | None = option(None, "evaluate every so many steps", unset="four times")
    save_steps: int | None = option(None, "checkpoint every so many steps", unset="ten times or more")
    save_total_limit: int = option(2, "keep this many checkpoints, and the best one")
    seed: int = option(42, "seed of the initialisation, the data order and dropout")
    dtype: str = option(
        "auto",
        "precision of the frozen base; the prefix is always fp32",
        choices=("auto", "float32", "bfloat16"),
    )
    quantize: str | None = option(
        None,
        "hold the frozen base's linear weights in 8 or 4 bits; nf4 needs prefixtune[quant]",
        choices=SCHEMES,
    )
    gradient_checkpointing: bool = option(False, "recompute activations backwards: less memory, more time")
    compile: bool | None = option(
        None,
        "compile the decoder's layers with torch.compile: half a minute at the start for a tenth less time",
        unset="in long runs on a CPU in bfloat16, where it pays",
    )
    liger: bool = option(False, "Liger's fused kernels, as far as they go, on CUDA; needs prefixtune[liger]")
    report_to: str | None = option(
        None,
        "where to log: tensorboard, wandb, … or none, several with commas",
        unset="TensorBoard where installed",
    )

    def check(self) -> None:
        _positive(
            self,
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "packing_length",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
        )
        _zero_or_more(self, "weight_decay", "max_grad_norm", "retain")  # of which 0 switches off
        _share(self, "warmup_ratio", "label_smoothing_factor")
        if self.token_damping is not None and not 0 <= self.token_damping <= 1:
            raise ConfigError(f"token_damping: expected 0 to 1; got {self.token_damping}")
        if self.find_learning_rate and self.learning_rate is not None:
            given = f"learning_rate is given too ({self.learning_rate:g})"
            raise ConfigError(f"find_learning_rate: {given}", hint="leave one out")
        if self.liger and (self.compile or not self.packing):
            raise ConfigError("liger: goes neither with compile nor without packing", hint="leave one out")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed: expected 0 to 2**32 - 1; got {self.seed}")


def check_damping(prefix: PrefixConfig, train: TrainConfig) -> None:
    """Raise ConfigError where virtual tokens are to be damped that a projection makes."""
    if prefix.projection and train.token_damping:
        raise ConfigError(
            "token_damping: the tokens of a projection have no steps of their own",
            hint="leave it out, or train without --projection",
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_Config):
    """How long a prefix stands for a text, what is asked about the text, and how the teacher answers."""

    length: str = option(
        "auto", "number of virtual tokens P, or auto: an eighth of the text's tokens, from 16 to 512"
    )
    write_questions: int = option(
        256, "how many questions the model writes about the text, where none are given"
    )
    heldout: int = option(
        32,
        "questions that are not trained on, a quarter of all at most: half of them watch the training, half "
        "are for the comparison",
    )
    max_new_tokens: int = option(64, "longest answer of the teacher, and of the comparison")
    temperature: float = option(0.0, "of the teacher's answers: 0 is greedy, more is more random")
    batch_size: int = option(
        16, "rows at a time while questions and answers are written; each holds the text's KV meanwhile"
    )

    def check(self) -> None:
        _positive(self, "heldout", "max_new_tokens", "batch_size")
        if self.write_questions < 3:
            raise ConfigError(
                f"write_questions: expected 3 or more (to train on, to watch the training, to compare); got "
                f"{self.write_questions}"
            )
        if self.temperature < 0:
            raise ConfigError(f"temperature: expected 0 or more; got {self.temperature}")
        if self.length != "auto" and not re.fullmatch(r"[1-9]\d{0,6}", self.length, re.ASCII):
            raise ConfigError(f"length: expected auto, or a number of 1 or more; got {self.length!r}")
