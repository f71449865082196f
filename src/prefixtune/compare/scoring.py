"""The answers of a cell on disk, and their scores: again where a metric has changed. Knows no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.compare.rows import Question
from prefixtune.metrics import measure_each, try_metrics

__all__ = ["check_scoring", "read_answers", "score_answers", "write_answers"]

PREDICTIONS = "predictions.jsonl"


def check_scoring(names: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise ConfigError or DataError where a metric fails, which is told before hours of training."""
    try_metrics(names, [question.references for question in questions])


def score_answers(
    names: Sequence[str], answers: Sequence[str], questions: Sequence[Question]
) -> dict[str, Any]:
    """What a cell says of its metrics: `failed_metrics` has the error of each that could not be measured."""
    scores = measure_each(names, answers, [question.references for question in questions])
    return {
        "metrics": scores.values,
        "metric_settings": scores.settings,
        "failed_metrics": scores.failed,
    }


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
