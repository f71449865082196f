"""Scores of predicted texts against their references, by well-kept libraries. Knows no model and no files.

score(["bleu", "rougeL"], ["a cat"], [["a cat", "the cat"]])
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixtune.errors import ConfigError, DataError, PrefixTuneError
from prefixtune.metrics.json_text import check_json, json_equal, json_valid
from prefixtune.metrics.libraries import bleu, check_words, chrf, require, rouge
from prefixtune.metrics.own import call_metric, is_own, load_metric
from prefixtune.metrics.text import LANGUAGES, exact_match, language_of, token_f1

__all__ = [
    "METRICS",
    "Scores",
    "check_language",
    "check_metrics",
    "check_references",
    "exact_match",
    "is_own",
    "measure",
    "measure_each",
    "score",
    "try_metrics",
]

METRICS = {
    "exact_match": "share of the answers that are a reference, but for white space around; 0..1",
    "token_f1": "mean F1 of tokens against the best reference, as SQuAD counts them; 0..1",
    "bleu": "corpus BLEU (sacrebleu); 0..100",
    "chrf": "corpus chrF2 (sacrebleu); 0..100",
    "rouge1": "mean ROUGE-1 F against the best reference (rouge-score); 0..1",
    "rouge2": "mean ROUGE-2 F against the best reference (rouge-score); 0..1",
    "rougeL": "mean ROUGE-L F against the best reference (rouge-score); 0..1",
    "json": "share of the answers that are JSON; 0..1",
    "json_equal": "share of the answers that are, as JSON, a reference; 0..1",
}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured, and how.

    Attributes:
        values: by metric, in the units of `METRICS`.
        settings: the language that the metrics took the text for, and the signatures of the libraries.
        failed: of `measure_each`, the error of each metric that could not be measured.
    """

    values: dict[str, float]
    settings: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)


def score(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str = "auto",
) -> dict[str, float]:
    """The values of the metrics, in the units of `METRICS`.

    Args:
        names: of `METRICS`, or a function of one's own as "package.module:function", which takes the
            predictions (list[str]) and references (list[list[str]]) and returns a number, entered under the
            name as given, or a dict of numbers, entered as "name.key".
        references: one or more for each prediction.
        language: "en" takes words with white space between them, whatever the language, "zh" each Chinese
            character; "auto" takes "zh" where most letters of the references are Chinese.

    Raises:
        ConfigError: a metric is not known, or a function of one's own cannot be used.
        DataError: there is no prediction, or one without a reference.
        MissingExtraError: the library of a metric is not installed.

    Example:
        >>> score(["exact_match", "token_f1"], ["the red car"], [["a red car", "car"]])
        {'exact_match': 0.0, 'token_f1': 1.0}
    """
    return measure(names, predictions, references, language=language).values


def measure(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str = "auto",
) -> Scores:
    """`score`, with what was chosen on the way; the arguments and errors are the same."""
    check_metrics(names)
    check_language(language)
    _check_texts(predictions, references)
    language = _settled(language, references)
    values: dict[str, float] = {}
    settings = {"language": language}
    rouges = rouge([name for name in names if name in ROUGE], predictions, references, language=language)
    for name in names:
        if name in SHARES:
            values[name] = SHARES[name](predictions, references)
        elif name == "token_f1":
            values[name] = token_f1(predictions, references, language=language)
        elif name in CORPUS:
            values[name], settings[name] = CORPUS[name](predictions, references, language=language)
        elif name in ROUGE:
            values[name], settings[name] = rouges[name]
        else:
            values |= call_metric(name, predictions, references)
    return Scores(values=values, settings=settings)


def measure_each(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str = "auto",
) -> Scores:
    """`measure` where one that fails stops no other: answers take longer to make than a metric to mend."""
    found = Scores(values={}, settings={})
    rouges = [name for name in names if name in ROUGE]  # which share one sweep over the texts
    for group in ([name] for name in names if name not in rouges[1:]):
        together = rouges if group[0] in ROUGE else group
        try:
            scores = measure(together, predictions, references, language=language)
        except Exception as error:
            told = error.message if isinstance(error, PrefixTuneError) else repr(error)
            found.failed.update(dict.fromkeys(together, told))
        else:
            found.values.update(scores.values)
            found.settings.update(scores.settings)
    return found


def try_metrics(names: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "auto") -> None:
    """Score the references as answers, then an empty answer and those of others, before there are any.

    Raises:
        ConfigError, DataError: a metric fails.
    """
    answers = [texts[0] for texts in references]
    measure(names, answers, references, language=language)
    try:
        measure(names, ["", *answers[:-1]], references, language=language)
    except PrefixTuneError as error:
        raise ConfigError(
            f"{error.message}, for answers that are empty or another row's",
            hint="a model may answer anything: score that too",
        ) from error


ROUGE = ("rouge1", "rouge2", "rougeL")
SHARES = {"exact_match": exact_match, "json": json_valid, "json_equal": json_equal}
CORPUS = {"bleu": bleu, "chrf": chrf}


def check_metrics(names: Sequence[str], *, others: Sequence[str] = ()) -> None:
    """Find out before any work whether each metric can be measured.

    Args:
        others: metrics that the caller measures itself; a message lists them too.

    Raises:
        ConfigError: a metric is not known or named twice, or a function of one's own is not found.
        MissingExtraError: the library of a metric is not installed.
    """
    for name in names:
        if is_own(name):
            load_metric(name)
        elif name not in METRICS:
            known = [*METRICS, *others]
            close = difflib.get_close_matches(name, known, n=2)
            raise ConfigError(
                f"metric: expected one of {', '.join(known)}, or package.module:function; got {name!r}",
                hint=f"did you mean {' or '.join(close)}?" if close else None,
            )
        elif name in CORPUS:
            require("sacrebleu", name)
        elif name in ROUGE:
            require("rouge_score", name)
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(f"metric: {', '.join(twice)} is named twice")


def check_references(
    names: Sequence[str],
    references: Sequence[Sequence[str]],
    origins: Sequence[Sequence[str]],
    *,
    language: str,
) -> None:
    """Raise DataError where the references cannot be scored, so that no answers are made in vain.

    `origins` names the row of each reference.
    """
    if "json_equal" in names:
        check_json(references, origins)
    if set(names) & set(ROUGE):
        check_words(references, language=_settled(language, references))


def check_language(language: str) -> None:
    """Raise ConfigError where the language is none that `score` takes."""
    if language not in LANGUAGES:
        raise ConfigError(f"language: expected one of {', '.join(LANGUAGES)}; got {language!r}")


def _settled(language: str, references: Sequence[Sequence[str]]) -> str:
    return language_of([text for texts in references for text in texts]) if language == "auto" else language


def _check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions came with references for {len(references)}")
    if not predictions:
        raise DataError("there is no prediction, so there is nothing to score")
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(
                f"references[{index}]: expected a list of texts; got one text",
                hint="give each prediction a list of its references: [[text], …]",
            )
        if not texts:
            raise DataError(f"references[{index}]: there is no reference")
