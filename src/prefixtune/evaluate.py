"""Measures a prefix on rows with known answers, beside the bare model. Knows no training and no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from prefixtune.attachment import packs, splits
from prefixtune.config import DataConfig
from prefixtune.data import Example, Row, build_examples
from prefixtune.errors import DataError
from prefixtune.forgetting import Forgetting, NeutralTexts, forgetting
from prefixtune.generate import check_ids, ending
from prefixtune.geometry import quiet_eval
from prefixtune.likelihood import check_examples, row_losses
from prefixtune.loss import GPU_PASS_TOKENS, PASS_TOKENS, Passes, RowTokens, default_capacity, first_target
from prefixtune.model import PrefixModel
from prefixtune.progress import progress_bar
from prefixtune.task import Input, Task

__all__ = ["Evaluation", "evaluate", "target_loss"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the model does on the rows; `base_*` is without the prefix, None where it was not measured.

    Attributes:
        rows: those that the loss was measured on.
        target_tokens: their target tokens.
        truncated_rows: rows of which the loss saw only the first max_length tokens.
        dropped_rows: rows without a target, left out with on_no_target="drop".
        loss: mean negative log likelihood of a target token, in nats.
        perplexity: exp(loss).
        exact_match: share of the inputs whose greedy answer is a reference, but for white space around it.
        metrics: all that was measured on answers and labels, exact_match too; units: docs/metrics.md.
        failed_metrics: the error of each metric that could not be measured on the answers.
        metric_settings: the language that the metrics took the text for, and the libraries' signatures.
        inputs: distinct prompts; None where nothing was asked.
        labels: what the accuracy chose from.
        forgetting: rise of the loss on neutral text, in nats per token; the detail says on how much text.
        samples: for each input: origin, prompt, reference (the first), references; prediction and exact_match
            where an answer was made, label where one was chosen, and the same of the bare model with base_
            before the name.
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
    metrics: dict[str, float] = field(default_factory=dict)
    base_metrics: dict[str, float] | None = None
    failed_metrics: dict[str, str] = field(default_factory=dict)
    base_failed_metrics: dict[str, str] = field(default_factory=dict)
    metric_settings: dict[str, str] = field(default_factory=dict)
    inputs: int | None = None
    labels: list[str] | None = None
    forgetting: float | None = None
    forgetting_detail: Forgetting | None = None
    samples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def target_loss(
    model: Any,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    capacity: int | None = None,
    packing: bool = True,
    progress: str | None = None,
) -> tuple[float, int]:
    """Mean negative log likelihood per target token in nats, and the number of target tokens.

    Of examples with aims the mean divergence from their teacher.
    Each target token counts the same, whatever row or pass it is in; its logits are float32.

    Args:
        model: a PrefixModel, a bare base model, or a PEFT model; it is in evaluation mode meanwhile.
        capacity: tokens of a pass through the model, see `prefixtune.loss.default_capacity`; 2,048 beside
            what rows begin with on a GPU, unless given; a longer row has one of its own.
        packing: documents end to end where the model allows it.

    Raises:
        DataError: there is no target token, or a row is longer than the model has positions.
    """
    check_ids(model, (example.input_ids for example in examples))
    lengths = [len(example.input_ids) for example in examples]
    check_examples(model, examples)
    count = sum(example.target_tokens for example in examples)
    if count == 0:
        raise DataError(f"there is no target token in {len(examples)} examples, so there is no loss")
    if hasattr(model, "peft_config"):  # it may put tokens of its own before the text: through its own forward
        room = capacity or PASS_TOKENS
        losses = row_losses(model, examples, pad_token_id=pad_token_id, capacity=room, progress=progress)
        return sum(losses) / count, count
    base = model.base_model if has_prefix(model) else model
    if capacity is None:
        ids, first_targets = zip(*((e.input_ids, first_target(e.labels)) for e in examples), strict=True)
        on_gpu = next(base.parameters()).is_cuda and splits(base)  # without gradient a pass needs little
        own = GPU_PASS_TOKENS[0] if on_gpu else PASS_TOKENS
        capacity = default_capacity(ids, first_targets, packing=packing and not packs(base), tokens=own)
    rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels), e.aims) for e in examples]
    total = 0.0
    with torch.no_grad(), quiet_eval(model), progress_bar(progress, total=len(rows)) as advance:
        pairs = model.prefix() if has_prefix(model) else None
        passes = Passes.of(base, capacity=max(capacity, *lengths), pad_token_id=pad_token_id, packing=packing)
        for group in passes.plan(rows):
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
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    language: str = "auto",
    neutral: NeutralTexts | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Measure target loss and task metrics on rows; rows with the same prompt are one input.

    Args:
        model: a PrefixModel, a bare base model, or a PEFT model.
        base: measure the bare model beside the prefix (nothing to do where `model` is bare itself).
        exact_match: generate an answer to every input, greedily, and compare it with the references.
        metrics: names for `prefixtune.metrics.score`, and "accuracy": the share of the inputs whose most
            likely label (`prefixtune.likelihood.choose_labels`) is a reference.
        labels: for the accuracy; the distinct references unless given, where there are 20 or fewer.
        language: for the metrics: auto, en or zh.
        neutral: measure what the prefix has forgotten, on these texts.
        max_new_tokens: the longest answer; the longest reference's tokens and 8 more, unless given.
        progress: bars on stderr.

    Raises:
        ConfigError: a metric, the labels or the language cannot be used.
        DataError: a row cannot be used.
    """
    names = [*(["exact_match"] if exact_match and "exact_match" not in metrics else []), *metrics]
    task = Task.of(
        rows,
        tokenizer,
        data_config,
        metrics=names,
        labels=labels,
        language=language,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    examples, report = build_examples(rows, tokenizer, data_config)
    task.check(model)
    samples = [_asked(one) for one in task.inputs]
    models = {"": model} | ({"base_": model.base_model} if base and has_prefix(model) else {})
    found: dict[str, Any] = {"labels": [label.strip() for label in task.labels] or None}
    for start, one in models.items():
        found |= _of_one(one, task, examples, samples, start=start, progress=progress)
    if neutral is not None:
        lost = forgetting(model, None, tokenizer, texts=neutral, progress=progress)
        found |= {"forgetting": lost.rise, "forgetting_detail": lost}
    return Evaluation(
        rows=report.rows - report.dropped,
        inputs=len(task.inputs) or None,
        truncated_rows=report.truncated_rows,
        dropped_rows=report.dropped,
        samples=samples,
        **found,
    )


def _of_one(
    model: Any,
    task: Task,
    examples: Sequence[Example],
    samples: list[dict[str, Any]],
    *,
    start: str,
    progress: bool,
) -> dict[str, Any]:
    """One model's fields of an Evaluation, named with `start` before; its answers go into the samples."""
    told = partial(_name, start) if progress else _silent
    pad = ending(model, task.tokenizer)["pad_token_id"]
    loss, tokens = target_loss(model, examples, pad_token_id=pad, progress=told("loss"))
    result = task.run(model, told=told)
    for sample, made in zip(samples, result.samples, strict=True):
        sample |= {start + key: value for key, value in made.items()}
    found = {
        "loss": loss,
        "perplexity": _exp(loss),
        "exact_match": result.values.get("exact_match"),
        "metrics": result.values,
        "failed_metrics": result.failed,
    }
    settings = {"target_tokens": tokens, "metric_settings": result.settings}
    return {start + name: value for name, value in found.items()} | settings


def _asked(one: Input) -> dict[str, Any]:
    first = one.references[0]
    return {
        "origin": one.prompt.origin,
        "prompt": one.prompt.text,
        "reference": first,
        "references": one.references,
    }


def has_prefix(model: Any) -> bool:
    """Whether `model` is a PrefixModel; a bare model has a base_model too: its body without the head."""
    return isinstance(model, PrefixModel)


def _name(prefix: str, what: str) -> str:
    return f"{what}, bare model" if prefix else what


def _silent(what: str) -> None:
    return None


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # the limit of a float64
