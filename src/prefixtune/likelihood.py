"""How likely rows are, one by one, to any causal model: bare, with a prefix, or of another library.

Knows no generation. Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixtune.config import DataConfig
from prefixtune.data import Collator, Example, Row, build_examples
from prefixtune.errors import ConfigError
from prefixtune.generate import check_ids, check_positions, with_target
from prefixtune.geometry import quiet_eval
from prefixtune.loss import PASS_TOKENS, planned
from prefixtune.progress import progress_bar
from prefixtune.rotary import settle

__all__ = ["check_examples", "check_labels", "choose_labels", "row_losses"]

IGNORED = -100


def row_losses(
    model: Any,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    capacity: int = PASS_TOKENS,
    progress: str | None = None,
) -> list[float]:
    """The summed negative log likelihood of each row's targets, in nats.

    Goes through the model's own forward and its whole logits, so that it is the same measure for every kind
    of model, and exactly the same number for the same model; `evaluate.target_loss` is faster on ours.

    Args:
        model: a causal language model called with input_ids and attention_mask: a PrefixModel, a bare base,
            or a PEFT model; logits before the text's, of PEFT's virtual tokens, are left out.
        capacity: tokens of a pass with its padding; a longer row has one of its own.

    Raises:
        DataError: a token is beyond the model's vocabulary, or a row beyond its positions.
    """
    check_ids(model, (example.input_ids for example in examples))
    check_examples(model, examples)
    device, collate = next(model.parameters()).device, Collator(pad_token_id)
    losses, lengths = [0.0] * len(examples), [len(example.input_ids) for example in examples]
    with torch.no_grad(), quiet_eval(model), progress_bar(progress, total=len(examples)) as advance:
        for rows in planned(model, lengths, capacity, packing=False):
            settle(model)
            batch = collate([examples[row] for row in rows])
            labels = batch.pop("labels")[:, 1:]  # [B, T-1]: what the places before them predict
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            logits = logits[:, -labels.shape[1] - 1 : -1]  # [B, T-1, V]
            for row, scores, wanted in zip(rows, logits, labels, strict=True):
                chosen = wanted != IGNORED
                scores, wanted = scores[chosen.to(device)], wanted[chosen].to(device)
                losses[row] = float(F.cross_entropy(_wide(scores), wanted, reduction="sum"))
            advance(len(rows))
    return losses


def check_examples(model: Any, examples: Sequence[Example]) -> None:
    """Raise DataError, with the longest row's origin, where the model has no positions for it."""
    longest = max(examples, key=lambda example: len(example.input_ids), default=None)
    if longest is not None:
        check_positions(model, len(longest.input_ids), origin=longest.origin)


def choose_labels(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    data_config: DataConfig,
    labels: Sequence[str],
    *,
    pad_token_id: int,
    progress: str | None = None,
) -> list[str]:
    """For each row the label that the model finds most likely as its answer; the first of equals.

    The likelihood is that of all target tokens of the answer, its end token among them, as in training: the
    sum of their logarithms, not divided by their number. The end token tells "no" from "no idea".

    Raises:
        ConfigError: there are not at least two labels, or a label is empty or comes twice.
    """
    check_labels(labels)
    asked = [with_target(row, label, data_config.template) for row in rows for label in labels]
    # never cut: half a label would be another one
    unlimited = replace(data_config, max_length=sys.maxsize)
    examples, _ = build_examples(asked, tokenizer, unlimited, last_turn=True)
    losses = row_losses(model, examples, pad_token_id=pad_token_id, progress=progress)
    chosen = []
    for first in range(0, len(losses), len(labels)):
        of_row = losses[first : first + len(labels)]
        chosen.append(labels[of_row.index(min(of_row))])
    return chosen


def check_labels(labels: Sequence[str]) -> None:
    """Raise ConfigError where the labels cannot be told apart."""
    if len(labels) < 2:
        raise ConfigError(f"labels: expected two or more; got {', '.join(labels) or 'none'}")
    if any(not label.strip() for label in labels):
        raise ConfigError(f"labels: one of {list(labels)!r} is empty")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"labels: {', '.join(twice)} comes twice")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
