"""The trainer that `train` would make, for who brings the rows and the model: no folder, no estimate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from prefixtune.config import TrainConfig
from prefixtune.data import Example
from prefixtune.generate import ending
from prefixtune.load import LoadedBase
from prefixtune.model import PrefixModel
from prefixtune.train.session import _check_lengths, _planned_steps, _prefix_config, _resolve, make_trainer
from prefixtune.train.trainer import PrefixTrainer

__all__ = ["planned_steps", "trainer_for"]


def trainer_for(
    base: LoadedBase,
    examples: list[Example],
    *,
    prefix_options: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    pad_token_id: int | None = None,
) -> tuple[PrefixTrainer, dict[str, Any]]:
    """A trainer on these rows with the defaults of `train`, and what the defaults came to.

    Args:
        prefix_options: fields of PrefixConfig, as `train` takes them.
        pad_token_id: the tokenizer's unless given.

    Raises:
        DataError: the longest row does not fit into the model's positions after the prefix.
    """
    set_seed(config.seed)
    prefix = _prefix_config(None, prefix_options, base, examples)
    _check_lengths(base, prefix, examples)
    resolved = _resolve(config, prefix, base, examples)
    model = PrefixModel(base.model, prefix, tokenizer=base.tokenizer)
    pad = ending(base.model, base.tokenizer)["pad_token_id"] if pad_token_id is None else pad_token_id
    trainer = make_trainer(model, config, resolved, output, rows=(examples, None), pad_token_id=pad)
    return trainer, {**resolved, "prefix": prefix.to_dict()}


def planned_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run on so many rows."""
    return _planned_steps(config, rows)
