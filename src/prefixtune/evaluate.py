"""Measures a prefix on rows with known answers, beside the bare model. Knows no training and no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prefixtune.config import DataConfig
from prefixtune.data import Example, Prompt, Row, build_examples, build_prompts
from prefixtune.errors import DataError
from prefixtune.generate import check_ids, check_positions, ending, generate_batch
from prefixtune.geometry import quiet_eval
from prefixtune.loss import PASS_TOKENS, Passes, RowTokens
from prefixtune.model import PrefixModel
from prefixtune.progress import progress_bar

__all__ = ["Evaluation", "evaluate", "target_loss"]

SPARE_TOKENS = (
    8  # beyond the longest reference: room for an end token, and for an answer that is a little longer
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the model does on the rows; `base_*` is without the prefix, None where it was not measured.

    Attributes:
        rows: examples that the loss was measured on.
        target_tokens: their target tokens.
        truncated_rows: rows of which the loss saw only the first max_length tokens.
        dropped_rows: rows without a target, left out with on_no_target="drop".
        loss: mean negative log likelihood of a target token, in nats.
        perplexity: exp(loss).
        exact_match: share of the rows whose greedy answer is the reference, but for white space around it.
        samples: for each row that was generated for: origin, prompt, reference, prediction, exact_match, and
            base_prediction and base_exact_match where the bare model was run.
    """

    rows: int
    target_tokens: int
    truncated_rows: int
    dropped_rows: int
    loss: float
    perplexity: float
    base_loss: float | None = None
    base_perplexity: float | None = None
    exact_match: float | None = None
    base_exact_match: float | None = None
    samples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def target_loss(
    model: Any,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    capacity: int = PASS_TOKENS,
    packing: bool = True,
    progress: str | None = None,
) -> tuple[float, int]:
    """Mean negative log likelihood per target token in nats, and the number of target tokens.

    Each target token counts the same, whatever row or pass it is in; its logits are float32.

    Args:
        model: a PrefixModel, or a bare base model; it is in evaluation mode meanwhile.
        capacity: tokens of a pass through the model; a longer row has one of its own.
        packing: documents end to end where the model allows it.

    Raises:
        DataError: there is no target token, or a row is longer than the model has positions.
    """
    check_ids(model, (example.input_ids for example in examples))
    lengths = [len(example.input_ids) for example in examples]
    check_positions(model, max(lengths, default=0))
    count = sum(example.target_tokens for example in examples)
    if count == 0:
        raise DataError(f"there is no target token in {len(examples)} examples, so there is no loss")
    base = model.base_model if has_prefix(model) else model
    rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in examples]
    total = 0.0
    with torch.no_grad(), quiet_eval(model), progress_bar(progress, total=len(rows)) as advance:
        pairs = model.prefix() if has_prefix(model) else None
        passes = Passes.of(base, capacity=max(capacity, *lengths), pad_token_id=pad_token_id, packing=packing)
        for group in passes.plan(lengths):
            with passes.loss([rows[row] for row in group], pairs) as loss:
                total += float(loss)
            advance(len(group))
    return total / count, count


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    data_config: DataConfig,
    *,
    base: bool = True,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Measure target loss and exact match on rows.

    Args:
        model: a PrefixModel, or a bare base model.
        base: measure the bare model beside the prefix (nothing to do where `model` is bare itself).
        exact_match: generate an answer to every row, greedily, and compare it with the reference.
        max_new_tokens: the longest answer; the longest reference's tokens and 8 more, unless given.
        progress: bars on stderr.

    Raises:
        DataError: a row cannot be used.
    """
    examples, report = build_examples(rows, tokenizer, data_config)
    models = {"": model} | ({"base_": model.base_model} if base and has_prefix(model) else {})
    found: dict[str, Any] = {"samples": []}
    for prefix, one in models.items():
        pad, name = ending(one, tokenizer)["pad_token_id"], _name(prefix, "loss") if progress else None
        loss, tokens = target_loss(one, examples, pad_token_id=pad, progress=name)
        found |= {prefix + "loss": loss, prefix + "perplexity": _exp(loss), "target_tokens": tokens}
    if exact_match:
        prompts = build_prompts(rows, tokenizer, data_config)
        samples = [{"origin": p.origin, "prompt": p.text, "reference": p.reference} for p in prompts]
        limit = max_new_tokens or _longest_reference(prompts, tokenizer) + SPARE_TOKENS
        for prefix, one in models.items():
            name = _name(prefix, "answers") if progress else None
            ids = [prompt.input_ids for prompt in prompts]
            texts = generate_batch(
                one, tokenizer, ids, max_new_tokens=limit, batch_size=batch_size, progress=name
            )
            found[prefix + "exact_match"] = _score(samples, texts, prefix)
        found["samples"] = samples
    return Evaluation(
        rows=report.examples, truncated_rows=report.truncated_rows, dropped_rows=report.dropped, **found
    )


def _score(samples: list[dict[str, Any]], texts: Sequence[str], prefix: str) -> float:
    """Enter the answers into the samples; the share of them that is the reference."""
    hits = 0
    for sample, text in zip(samples, texts, strict=True):
        hit = text.strip() == sample["reference"].strip()
        sample |= {prefix + "prediction": text, prefix + "exact_match": hit}
        hits += hit
    return hits / len(samples)


def has_prefix(model: Any) -> bool:
    """Whether `model` is a PrefixModel; a bare model has a base_model too: its body without the head."""
    return isinstance(model, PrefixModel)


def _name(prefix: str, what: str) -> str:
    return f"{what}, bare model" if prefix else what


def _longest_reference(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    lengths = [len(tokenizer(prompt.reference, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    return max(lengths)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # the limit of a float64
