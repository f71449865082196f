"""The answers of a cell on disk, and their scores: again where a metric has changed. Knows no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.compare.rows import Question
from prefixtune.errors import ConfigError, PrefixTuneError
from prefixtune.metrics import measure

__all__ = ["check_scoring", "read_answers", "score_answers", "write_answers"]

PREDICTIONS = "predictions.jsonl"


def check_scoring(names: Sequence[str], questions: Sequence[Question]) -> None:
    """Score the references as answers, then an empty answer and those of other questions.

    Raises:
        ConfigError, DataError: a metric fails, which is told before hours of training.
    """
    references = [question.references for question in questions]
    answers = [texts[0] for texts in references]
    measure(names, answers, references)
    try:
        measure(names, ["", *answers[:-1]], references)
    except PrefixTuneError as error:
        raise ConfigError(
            f"{error.message}, for answers that are empty or another row's",
            hint="a model may answer anything: score that too",
        ) from error


def score_answers(
    names: Sequence[str], answers: Sequence[str], questions: Sequence[Question]
) -> dict[str, Any]:
    """What a cell says of its metrics: `failed_metrics` has the error of each that could not be measured."""
    references = [question.references for question in questions]
    values: dict[str, float] = {}
    settings: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            scores = measure([name], answers, references)
        except Exception as error:  # a cell has taken longer to train than a metric to mend
            failed[name] = error.message if isinstance(error, PrefixTuneError) else repr(error)
        else:
            values |= scores.values
            settings |= scores.settings
    return {"metrics": values, "metric_settings": settings, "failed_metrics": failed}


def write_answers(folder: Path, answers: Sequence[str], questions: Sequence[Question]) -> str:
    """Write predictions.jsonl into the cell's folder: its hash, by which `read_answers` knows it again."""
    lines = [
        json.dumps(
            {"prompt": question.text, "references": question.references, "prediction": answer},
            ensure_ascii=False,
        )
        for question, answer in zip(questions, answers, strict=True)
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / PREDICTIONS).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_answers(folder: Path, digest: str | None) -> list[str] | None:
    """The answers that were written; None where there are none, or others."""
    path = folder / PREDICTIONS
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        return None
    return [json.loads(line)["prediction"] for line in content.decode().split("\n")[:-1]]
