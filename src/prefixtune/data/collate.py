"""Examples to a batch of tensors. Knows no text. Axes: B batch, T the longest example's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.templates import NO_TARGET
from prefixtune.errors import DataError

__all__ = ["Collator", "as_example"]


class Collator:
    """Pads examples on the right.

    Args:
        pad_token_id: what fills input_ids; any id does, because the attention mask hides it.

    Example:
        >>> one = Example(input_ids=(5, 6, 7), labels=(-100, 6, 7), origin="a:1", truncated=0)
        >>> two = Example(input_ids=(8, 9), labels=(-100, 9), origin="a:2", truncated=0)
        >>> Collator(0)([one, two])["labels"].tolist()
        [[-100, 6, 7], [-100, 9, -100]]
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Any]:
        """input_ids, attention_mask and labels, each a LongTensor [B, T]; and the list of the rows' aims.

        Raises:
            DataError: a row has no ids or no labels, or not as many of each.
        """
        import torch

        rows = [_plain(example) for example in examples]
        length = max(len(ids) for ids, _, _ in rows)

        def padded(column: int, value: int) -> torch.Tensor:
            filled = [row[column] + [value] * (length - len(row[column])) for row in rows]
            return torch.tensor(filled, dtype=torch.long)  # [B, T]

        batch: dict[str, Any] = {
            "input_ids": padded(0, self.pad_token_id),
            "attention_mask": padded(1, 0),
            "labels": padded(2, NO_TARGET),
        }
        aims = [example.aims for example in examples if isinstance(example, Example)]
        if any(aim is not None for aim in aims):
            assert len(aims) == len(rows)
            assert all(aim is not None for aim in aims)
            batch["aims"] = aims
        return batch


def as_example(row: Example | Mapping[str, Any]) -> Example:
    """What Collator takes, as an example; tokens that an attention mask hides are left out."""
    if isinstance(row, Example):
        return row
    ids, mask, labels = _plain(row)
    shown = [place for place, is_shown in enumerate(mask) if is_shown]
    return Example(
        input_ids=tuple(ids[place] for place in shown),
        labels=tuple(labels[place] for place in shown),
        origin="",
        truncated=0,
    )


def _plain(example: Example | Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """ids, attention mask and labels of one example, as lists of the same length."""
    if isinstance(example, Example):
        return list(example.input_ids), [1] * len(example.input_ids), list(example.labels)
    missing = sorted({"input_ids", "labels"} - set(example))
    if missing:
        raise DataError(f"a row has no {' and no '.join(missing)}; it has {', '.join(sorted(example))}")
    ids = _integers(example["input_ids"])
    mask = _integers(example["attention_mask"]) if "attention_mask" in example else [1] * len(ids)
    labels = _integers(example["labels"])
    if not len(ids) == len(mask) == len(labels):
        raise DataError(
            f"a row has {len(ids)} input_ids, {len(mask)} of attention_mask and {len(labels)} labels",
            hint="a label for each token, -100 where it is no target; they are not shifted",
        )
    return ids, mask, labels


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values]  # lists, tuples, tensors and arrays alike
