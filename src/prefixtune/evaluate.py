"""Measures a prefix on rows with known answers, beside the bare model. Knows no training and no files.

Axes: B batch, T the longest row's tokens, V vocabulary, S the targets in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from prefixtune.config import DataConfig
from prefixtune.data import Collator, Example, Prompt, Row, build_examples, build_prompts
from prefixtune.errors import DataError
from prefixtune.generate import check_ids, check_positions, ending, generate_batch
from prefixtune.geometry import quiet_eval
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
    batch_size: int = 8,
    progress: str | None = None,
) -> tuple[float, int]:
    """Mean negative log likelihood per target token in nats, and the number of target tokens.

    Each target token counts the same, whatever row or batch it is in. Logits become float32 before the loss.

    Args:
        model: a PrefixModel, or a bare base model; it is in evaluation mode meanwhile.

    Raises:
        DataError: there is no target token, or a row is longer than the model has positions.
    """
    check_ids(model, (example.input_ids for example in examples))
    check_positions(model, max((len(example.input_ids) for example in examples), default=0))
    collate = Collator(pad_token_id)
    order = sorted(examples, key=lambda example: -len(example.input_ids))  # less padding
    total, count = 0.0, 0
    with torch.no_grad(), quiet_eval(model), progress_bar(progress, total=len(order)) as advance:
        for start in range(0, len(order), batch_size):
            batch = collate(order[start : start + batch_size])
            nats, targets = _batch_loss(model, {name: x.to(model.device) for name, x in batch.items()})
            total, count = total + nats, count + targets
            advance(batch["input_ids"].shape[0])
    if count == 0:
        raise DataError(f"there is no target token in {len(examples)} examples, so there is no loss")
    return total / count, count


def _batch_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Summed negative log likelihood of the targets, and their number."""
    device_type = batch["input_ids"].device.type
    with torch.autocast(device_type, enabled=False):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits  # [B, T, V]
        labels = batch["labels"][:, 1:]  # [B, T-1]: the logits at t predict token t+1
        chosen = labels != -100
        picked = logits[:, :-1][chosen].float()  # [S, V]: float32 for the targets only
        nats = F.cross_entropy(picked, labels[chosen], reduction="sum")
    return float(nats), int(chosen.sum())


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
    models = {"": model} | ({"base_": model.base_model} if base and _has_prefix(model) else {})
    found: dict[str, Any] = {"samples": []}
    for prefix, one in models.items():
        pad, name = ending(one, tokenizer)["pad_token_id"], _name(prefix, "loss") if progress else None
        loss, tokens = target_loss(one, examples, pad_token_id=pad, batch_size=batch_size, progress=name)
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


def _has_prefix(model: Any) -> bool:
    from prefixtune.model import PrefixModel

    return isinstance(model, PrefixModel)  # a bare model has a base_model too: its body without the head


def _name(prefix: str, what: str) -> str:
    return f"{what}, bare model" if prefix else what


def _longest_reference(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    lengths = [len(tokenizer(prompt.reference, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    return max(lengths)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # the limit of a float64
