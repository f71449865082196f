"""Inputs with their references: a model answers them, or chooses a label, and is scored. Knows no bare model.

Rows with the same prompt are one input, and what they want are its references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.config import DataConfig
from prefixtune.data import Prompt, Row, build_prompts, rows_with_targets, special_beside
from prefixtune.errors import ConfigError, DataError
from prefixtune.generate import check_positions, ending, generate_batch
from prefixtune.likelihood import check_labels, choose_labels
from prefixtune.metrics import (
    check_language,
    check_metrics,
    check_references,
    exact_match,
    measure_each,
    try_metrics,
)

__all__ = ["ACCURACY", "Input", "Result", "Task", "check_prompts", "check_task", "inputs_of"]

ACCURACY = "accuracy"  # by likelihood, so it needs the model and not its answers
FEW = 20  # distinct references are taken for labels up to so many
SPARE_TOKENS = (
    8  # beyond the longest reference: room for an end token, and for an answer that is a little longer
)
Told = Callable[[str], str | None]  # what a progress bar says


@dataclass(frozen=True, kw_only=True)
class Input:
    """A prompt, the distinct references of all its rows, where each first stands, and the first row."""

    row: Row
    prompt: Prompt
    references: list[str]
    origins: list[str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one model did.

    Attributes:
        values: by metric, in the units of `prefixtune.metrics.METRICS`; accuracy 0..1.
        settings: as `prefixtune.metrics.Scores` has them.
        failed: the error of each metric that could not be measured.
        samples: for each input prediction and exact_match where answers were made, label where one was chosen
    """

    values: dict[str, float]
    settings: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]]


def inputs_of(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> list[Input]:
    """The distinct prompts of the rows that are not dropped, in the order in which they first come."""
    inputs: dict[tuple[int, ...], Input] = {}
    for row in rows_with_targets(rows, tokenizer, config):
        for prompt in build_prompts([row], tokenizer, config):
            new = Input(row=row, prompt=prompt, references=[], origins=[])
            known = inputs.setdefault(prompt.input_ids, new)
            if prompt.reference not in known.references:
                known.references.append(prompt.reference)
                known.origins.append(prompt.origin)
    return list(inputs.values())


def check_prompts(prompts: Iterable[Prompt]) -> None:
    """Raise DataError where nothing can be asked."""
    for prompt in prompts:
        if not prompt.input_ids:
            raise DataError(
                f"{prompt.origin}: the prompt is empty: there is no token from which the model could go on",
                hint="take the row out, or put a text before the target with --template",
            )


def check_task(metrics: Sequence[str], labels: Sequence[str], language: str) -> None:
    """Find out before any work whether all this can be measured.

    Raises:
        ConfigError: a metric, the labels or the language cannot be used.
        MissingExtraError: the library of a metric is not installed.
    """
    if ACCURACY in metrics and labels:
        check_labels(labels)
    elif labels:
        raise ConfigError("labels are given, but accuracy, which chooses from them, is not asked for")
    if metrics.count(ACCURACY) > 1:
        raise ConfigError("metric: accuracy is named twice")
    check_metrics([name for name in metrics if name != ACCURACY], others=[ACCURACY])
    check_language(language)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked of each model on the same inputs.

    Attributes:
        names: metrics of the answers; no answer is made where there are none.
        labels: to choose from, as the rows write them, white space included; none without accuracy.
    """

    inputs: list[Input]
    tokenizer: Any
    data_config: DataConfig
    names: list[str]
    labels: list[str]
    language: str
    max_new_tokens: int | None
    batch_size: int

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        tokenizer: Any,
        data_config: DataConfig,
        *,
        metrics: Sequence[str],
        labels: Sequence[str] = (),
        language: str = "auto",
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> Task:
        """The task that the rows make; what its arguments are, `prefixtune.evaluate.evaluate` says.

        Raises:
            ConfigError: a metric, the labels or the language cannot be used.
            DataError: a row cannot be used, or its reference is no label.
        """
        check_task(metrics, labels, language)
        inputs = inputs_of(rows, tokenizer, data_config) if metrics else []
        check_prompts(one.prompt for one in inputs)
        references, origins = [one.references for one in inputs], [one.origins for one in inputs]
        check_references(metrics, references, origins, language=language)
        own = [name for name in metrics if ":" in name]
        if own and references:
            try_metrics(own, references, language=language)
        return cls(
            inputs=inputs,
            tokenizer=tokenizer,
            data_config=data_config,
            names=[name for name in metrics if name != ACCURACY],
            labels=_labels(labels, inputs) if ACCURACY in metrics else [],
            language=language,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def run(self, model: Any, *, told: Told = lambda what: None) -> Result:
        """Ask one model."""
        samples: list[dict[str, Any]] = [{} for _ in self.inputs]
        values: dict[str, float] = {}
        settings: dict[str, str] = {}
        failed: dict[str, str] = {}
        references = [one.references for one in self.inputs]
        if self.names:
            answers = self._answers(model, told("answers"))
            for sample, answer, texts in zip(samples, answers, references, strict=True):
                sample |= {"prediction": answer, "exact_match": bool(exact_match([answer], [texts]))}
            scores = measure_each(self.names, answers, references, language=self.language)
            values, settings, failed = scores.values, scores.settings, scores.failed
        if self.labels:
            chosen = self._chosen(model, told("labels"))
            for sample, label in zip(samples, chosen, strict=True):
                sample["label"] = label.strip()
            values = {**values, ACCURACY: exact_match(chosen, references)}
        return Result(values=values, settings=settings, failed=failed, samples=samples)

    def check(self, model: Any) -> None:
        """Raise DataError where the model has no positions for an answer to the longest prompt."""
        if self.names and self.inputs:
            longest = max((one.prompt for one in self.inputs), key=lambda prompt: len(prompt.input_ids))
            new = self._most_new_tokens()
            origin = f"{longest.origin}: a prompt with an answer of up to {new}"
            check_positions(model, len(longest.input_ids) + new, origin=origin)

    def _most_new_tokens(self) -> int:
        wanted = [one.prompt.lead + text for one in self.inputs for text in one.references]
        lengths = [len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted]
        return self.max_new_tokens or max(lengths) + SPARE_TOKENS

    def _answers(self, model: Any, progress: str | None) -> list[str]:
        return generate_batch(
            model,
            self.tokenizer,
            [one.prompt.input_ids for one in self.inputs],
            max_new_tokens=self._most_new_tokens(),
            template=self.data_config.template,
            leads=[one.prompt.lead for one in self.inputs],
            dropped=special_beside((text for one in self.inputs for text in one.references), self.tokenizer),
            batch_size=self.batch_size,
            progress=progress,
        )

    def _chosen(self, model: Any, progress: str | None) -> list[str]:
        return choose_labels(
            model,
            self.tokenizer,
            [one.row for one in self.inputs],
            self.data_config,
            self.labels,
            pad_token_id=ending(model, self.tokenizer)["pad_token_id"],
            progress=progress,
        )


def _labels(given: Sequence[str], inputs: Sequence[Input]) -> list[str]:
    """The labels as the references write them, white space around included, because it makes other tokens.

    A label is written as most of its references have it; one that none has gets the white space around that
    most references have, unless it was given with its own.
    """
    written: dict[str, Counter[str]] = {}
    around: Counter[tuple[str, str]] = Counter()
    for one in inputs:
        for text, origin in zip(one.references, one.origins, strict=True):
            label = text.strip()
            if not label:
                raise DataError(
                    f"{origin}: accuracy: the reference is empty, which is no label",
                    hint="take the row out, or write a word for it, such as none",
                )
            before, _, after = text.partition(label)
            written.setdefault(label, Counter())[text] += 1
            around[before, after] += 1
            if given and label not in {one.strip() for one in given}:
                raise DataError(
                    f"{origin}: accuracy: expected one of the labels {', '.join(given)} as "
                    f"reference; got {label[:60]!r}",
                    hint="give all labels, as the rows write them, but for white space around",
                )
    forms = {label: texts.most_common(1)[0][0] for label, texts in written.items()}
    if given:
        before, after = max(around, key=lambda pair: around[pair], default=("", ""))
        unseen = {label: f"{before}{label}{after}" if label == label.strip() else label for label in given}
        return [forms.get(label.strip(), unseen[label]) for label in given]
    if not 2 <= len(written) <= FEW:
        raise ConfigError(
            f"accuracy: expected 2 to {FEW} distinct references to take for labels; got {len(written)}",
            hint="name the labels: --labels positive,negative",
        )
    return list(forms.values())
