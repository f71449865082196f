"""What the options of a run leave open: start, length, learning rate, steps, passes. Knows no folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefixtune.attachment import check_liger, packs
from prefixtune.config import PrefixConfig, TrainConfig, check_damping
from prefixtune.data import Example, text_start
from prefixtune.errors import DataError
from prefixtune.geometry import Geometry, text_config
from prefixtune.load import LoadedBase
from prefixtune.loss import PASS_TOKENS, default_capacity, first_target
from prefixtune.precision import device_of
from prefixtune.prefix import start_ids
from prefixtune.progress import note
from prefixtune.rotary import rotary_change

__all__ = [
    "AUTO",
    "LONGEST_LENGTH",
    "SHORTEST_LENGTH",
    "check_lengths",
    "check_options",
    "compiled_for",
    "default_learning_rate",
    "default_length",
    "default_start",
    "digest",
    "length_for",
    "packing_length_for",
    "planned_epochs",
    "planned_steps",
    "positions_of",
    "prefix_config_of",
    "resolve",
    "telling_rows",
    "warmup_steps_for",
]

AUTO = "auto"
SHORTEST_LENGTH, LONGEST_LENGTH = 8, 128
# Two passes over the rows: in more they are learnt by heart. One where that alone makes many steps, more
# where two make next to none (docs/defaults.md).
EPOCHS, MANY_STEPS = 2, 500
FEWEST_STEPS, MOST_EPOCHS = 14, 4
# Rows whose targets are labels have little to learn by heart, and few targets in a step
LABELS, FEWEST_LABEL_STEPS = 10, 50
# so many of them are learnt better with so many virtual tokens, fewer are not (docs/defaults.md)
MANY_LABELS, SHORTEST_FOR_LABELS = 100, 45
# operations of a run from which on compiled layers save more time than compiling takes (docs/defaults.md)
COMPILED_FROM = 2e14
# In runs of so many steps the tokens with most of the attention step less; two thousand rows are learnt
# better without (docs/adr/0011), and so are labels (docs/defaults.md).
TOKEN_DAMPING, FEW_STEPS = 0.5, 125
# of the size of the keys and values (docs/adr/0007), without damping and with it
DIRECT_LEARNING_RATE, DAMPED_LEARNING_RATE = 5e-2, 7e-2
# a step of the projection moves every KV number by a sum over its hidden layer
PROJECTION_LEARNING_RATE, AT_HIDDEN_SIZE = 3e-4, 576


def check_options(options: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ConfigError or MissingExtraError where these options cannot work, before a model is loaded."""
    if config.liger:
        check_liger(device_of(None))
    given = _given(options)
    if not given.keys() & {"init", "init_text", "init_tokens"}:
        given |= {"init": "random"}  # the start is decided when the rows are known
    PrefixConfig(**_with_init(given))


def _with_init(given: Mapping[str, Any]) -> dict[str, Any]:
    """`init` from what is given with it: a text, or token ids."""
    for name, kind in (("init_text", "text"), ("init_tokens", "tokens")):
        if "init" not in given and name in given:
            return {**given, "init": kind}
    return dict(given)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was given; a length of "auto" is none."""
    unsaid = (("length", AUTO),)
    return {
        name: value for name, value in options.items() if value is not None and (name, value) not in unsaid
    }


def default_length(examples: Sequence[Example]) -> int:
    """Virtual tokens for these training rows: a long prefix learns few rows by heart, and many labels less
    than text (docs/defaults.md)."""
    labels = len(examples) >= MANY_LABELS and _are_labels([example.target_tokens for example in examples])
    shortest = SHORTEST_FOR_LABELS if labels else SHORTEST_LENGTH
    return max(shortest, min(LONGEST_LENGTH, round(3.2 * math.sqrt(len(examples)))))


def default_start(
    rows: Sequence[Sequence[int]], length: int, *, front: Sequence[int] = ()
) -> tuple[int, ...]:
    """Token ids whose KV a prefix starts from: a whole row, prompt and target, as an example of the task.

    It is the longest row that fits into `length` tokens, and what is left before it is the end of other rows.
    Where none fits, it is the end of the shortest one. See docs/defaults.md.

    Args:
        rows: token ids of the training rows, in their order.
        front: what begins every text, `prefixtune.data.text_start`; where rows have it, it stays first.

    Returns:
        `length` ids, fewer where all rows together have fewer.

    Example:
        >>> default_start([[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]], 4)
        (5, 6, 7, 8)
    """
    fitting = [number for number, row in enumerate(rows) if len(row) <= length]
    if fitting:
        chosen = max(fitting, key=lambda number: len(rows[number]))
    else:
        chosen = min(range(len(rows)), key=lambda number: len(rows[number]))
    front = list(front) if all(list(row[: len(front)]) == list(front) for row in rows) else []
    tokens: list[int] = []
    for row in [rows[chosen], *(row for number, row in enumerate(rows) if number != chosen)]:
        tokens = [*row[len(front) :], *tokens]
        if len(front) + len(tokens) >= length:
            break
    return (*front, *tokens[max(0, len(tokens) + len(front) - length) :])[:length]


def telling_rows(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """Token ids of the rows to start from: those with more of an answer than its end token; else all."""
    return [e.input_ids for e in examples if e.target_tokens > 1] or [e.input_ids for e in examples]


def length_for(model: Any, examples: Sequence[Example], longest: Example) -> int:
    """The default length for these rows, or what the longest of all leaves of the model's positions.

    Raises:
        DataError: it leaves fewer than the shortest default.
    """
    length, limit, taken = default_length(examples), positions_of(model), len(longest.input_ids)
    if limit is None or taken + length <= limit:
        return length
    room = max(limit - taken, 0)
    if room < SHORTEST_LENGTH:
        fits = f"--max-length {limit - length} leaves room for {length}; " if limit - length > 2 else ""
        raise DataError(
            f"{longest.origin}: {taken} tokens leave {room} of the model's {limit} positions to the prefix"
            f"{_why_so_few(model)}",
            hint=f"{fits}--length says how many virtual tokens it is to have",
        )
    note(f"a prefix of {room} virtual tokens in place of {length}: {longest.origin} leaves no more positions")
    return room


def positions_of(model: Any) -> int | None:
    """How many positions prefix and row have together; None where there is no limit."""
    config = text_config(model)
    limit, change = getattr(config, "max_position_embeddings", None), rotary_change(config)
    if change is not None:
        return change.after
    return limit if isinstance(limit, int) else None


def _why_so_few(model: Any) -> str:
    if rotary_change(text_config(model)) is None:
        return ""
    return " (beyond them its rotary embedding changes, and no prefix is exact)"


def prefix_config_of(
    began: dict[str, Any] | None,
    options: Mapping[str, Any],
    base: LoadedBase,
    examples: list[Example],
    eval_examples: Sequence[Example] = (),
) -> PrefixConfig:
    """The user's options; where they say nothing of a start, the KV of a whole training row."""
    if began:
        return PrefixConfig.from_dict(began["prefix"])
    given = _with_init(_given(options))
    if "length" not in given:
        longest = max((*examples, *eval_examples), key=lambda example: len(example.input_ids))
        given["length"] = length_for(base.model, examples, longest)
    if given.get("init_text") and base.tokenizer is not None:
        _tell_start(start_ids(base.tokenizer, given["init_text"])[1], given["length"], base.tokenizer)
    if "init" not in given:
        front = text_start(base.tokenizer) if base.tokenizer is not None else []
        tokens = default_start(telling_rows(examples), given["length"], front=front)
        given |= {"init": "tokens", "init_tokens": tokens}
        shown = base.tokenizer.decode(tokens) if base.tokenizer is not None else tokens
        note(f"the prefix starts from the KV of: {shown!r:.200}")
    return PrefixConfig(**given)


def _tell_start(tokens: Sequence[int], length: int, tokenizer: Any) -> None:
    if len(tokens) > length:
        shown = tokenizer.decode(tokens[:length])
        note(
            f"the prefix starts from {length} of the {len(tokens)} tokens of init_text: {shown!r:.200}; "
            f"--length {len(tokens)} has room for all"
        )
    elif len(tokens) < length:
        note(f"init_text has {len(tokens)} tokens: it is repeated up to the prefix's length of {length}")


def resolve(
    config: TrainConfig,
    prefix: PrefixConfig,
    base: LoadedBase,
    examples: list[Example],
    *,
    processes: int = 1,
    pass_tokens: int = PASS_TOKENS,
) -> dict[str, Any]:
    """What defaults depend on: recorded, so that a resumed run goes on with the same whatever the version.

    Args:
        pass_tokens: of a pass, see `prefixtune.train.forecast.pass_tokens_for`.
    """
    hidden_size = prefix.hidden_size or Geometry.probe(base.model).hidden_size
    targets = [example.target_tokens for example in examples]
    steps = planned_steps(config, targets, processes)
    damping = _token_damping(config, prefix, steps, labels=_are_labels(targets))
    return {
        "steps": steps,
        "epochs": planned_epochs(config, targets, processes),
        "learning_rate": config.learning_rate or default_learning_rate(prefix, hidden_size, damping),
        "token_damping": damping,
        "save_steps": config.save_steps or max(1, min(50, steps // 10)),  # a kill costs a tenth at most
        "eval_steps": config.eval_steps or max(1, math.ceil(steps / 4)),
        "packing_length": packing_length_for(config, examples, base.model, pass_tokens=pass_tokens),
        "compile": compiled_for(config, base, examples, processes=processes),
        "rows": digest(examples),
        "processes": processes,
    }


def packing_length_for(
    config: TrainConfig, examples: Sequence[Example], model: Any, *, pass_tokens: int = PASS_TOKENS
) -> int:
    longest = max(examples, key=lambda example: len(example.input_ids))
    needed = len(longest.input_ids)
    if config.packing_length is not None and needed > config.packing_length:
        cut = all(first_target(example.labels) < config.packing_length for example in examples)
        raise DataError(
            f"{longest.origin}: {needed} tokens do not fit a pass of packing_length {config.packing_length}",
            hint=f"use --packing-length {needed}"
            + (f", or --max-length {config.packing_length}" if cut else ""),
        )
    if config.packing_length is not None:
        return config.packing_length
    packing = config.packing and not packs(model)
    first_targets = [first_target(example.labels) for example in examples]
    ids = [example.input_ids for example in examples]
    return default_capacity(ids, first_targets, packing=packing, tokens=pass_tokens)


def compiled_for(
    config: TrainConfig, base: LoadedBase, examples: Sequence[Example], *, processes: int = 1
) -> bool:
    """Whether a run's layers are compiled: as the configuration says, else where that was measured to pay.

    The measurements are of packs in bfloat16 on a CPU, a base as it is loaded, and one process.
    """
    if config.compile is not None:
        return config.compile
    if config.liger:
        return False
    model: Any = base.model
    measured = model.device.type == "cpu" and model.dtype == torch.bfloat16 and base.quantization is None
    if not measured or processes > 1 or config.gradient_checkpointing or not config.packing or packs(model):
        return False
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = planned_steps(config, [example.target_tokens for example in examples])
    tokens = steps * rows * sum(len(example.input_ids) for example in examples) / len(examples)
    operations = 4 * model.num_parameters(exclude_embeddings=True) * tokens  # two each way
    return bool(operations >= COMPILED_FROM)


def _are_labels(targets: Sequence[int]) -> bool:
    return sum(targets) <= LABELS * len(targets)


def _token_damping(config: TrainConfig, prefix: PrefixConfig, steps: int, *, labels: bool) -> float:
    if prefix.projection:
        check_damping(prefix, config)
        return 0.0
    if config.token_damping is not None:
        return config.token_damping
    return TOKEN_DAMPING if steps <= FEW_STEPS and not labels else 0.0


def default_learning_rate(config: PrefixConfig, hidden_size: int, damping: float = 0.0) -> float:
    """By parameterisation, larger with damping; of the projection, falling with the square root of its hidden
    size."""
    if not config.projection:
        return DAMPED_LEARNING_RATE if damping else DIRECT_LEARNING_RATE
    return float(f"{PROJECTION_LEARNING_RATE * math.sqrt(AT_HIDDEN_SIZE / hidden_size):.2g}")


def planned_steps(config: TrainConfig, targets: Sequence[int], processes: int = 1) -> int:
    """Optimizer steps of a run; `targets` as for `planned_epochs`."""
    if config.max_steps:
        return config.max_steps
    epochs = planned_epochs(config, targets, processes)
    return max(1, math.ceil(epochs * _steps_of_an_epoch(config, len(targets), processes)))


def planned_epochs(config: TrainConfig, targets: Sequence[int], processes: int = 1) -> float:
    """Passes over the rows: given, or two; one where that makes many steps, more where two make few.

    Args:
        targets: target tokens of each row. Where they are few (labels), few steps are more.

    Example:
        >>> [planned_epochs(TrainConfig(), [30] * rows) for rows in (20, 50, 2000, 4000)]
        [4.0, 2.0, 2.0, 1.0]
        >>> [planned_epochs(TrainConfig(), [3] * rows) for rows in (20, 100, 2000)]
        [4.0, 4.0, 2.0]
    """
    if config.num_train_epochs is not None:
        return config.num_train_epochs
    steps = _steps_of_an_epoch(config, len(targets), processes)
    if steps >= MANY_STEPS:
        return 1.0
    fewest = FEWEST_LABEL_STEPS if _are_labels(targets) else FEWEST_STEPS
    return float(max(EPOCHS, min(MOST_EPOCHS, math.ceil(fewest / steps))))


def warmup_steps_for(ratio: float, steps: int) -> int:
    """Steps over which the rate rises: not all, since the first of them has a rate of 0."""
    return min(math.ceil(ratio * steps), steps - 1)


def _steps_of_an_epoch(config: TrainConfig, rows: int, processes: int) -> int:
    batches = math.ceil(rows / config.per_device_train_batch_size)
    return max(1, math.ceil(math.ceil(batches / processes) / config.gradient_accumulation_steps))


def digest(examples: list[Example]) -> str:
    """A hash of the rows as the model sees them."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps([example.input_ids, example.labels]).encode())
    return found.hexdigest()


def check_lengths(base: LoadedBase, prefix: PrefixConfig, examples: list[Example]) -> None:
    limit = positions_of(base.model)
    longest = max(examples, key=lambda example: len(example.input_ids))
    needed = prefix.length + len(longest.input_ids)
    if limit is not None and needed > limit:
        raise DataError(
            f"{longest.origin}: {len(longest.input_ids)} tokens and a prefix of {prefix.length} take "
            f"{needed} positions; {base.name} has {limit}{_why_so_few(base.model)}",
            hint=f"use --max-length {limit - prefix.length}, or a shorter prefix"
            if limit - prefix.length > 2
            else "use a shorter prefix",
        )
