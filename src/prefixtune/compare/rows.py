"""The rows that all methods of a comparison see: tokenised once, kept in one file, read by every cell."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.compare.plan import digest
from prefixtune.data import Example
from prefixtune.errors import RunError

__all__ = ["Question", "Rows", "first_rows", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One input of the evaluation rows, and all its answers."""

    input_ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]
    lead: str = ""  # `prefixtune.data.Prompt.lead`


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is trained and measured on.

    Attributes:
        train: in the order of the file.
        eval: rows of the questions, for the loss.
        neutral: text that the base wrote itself, for forgetting; empty where that is not measured.
        neutral_losses: the base's loss on each text of it, in nats.
        about: counts and settings that the report shows; of these the precision and the base are in the hash.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    questions: tuple[Question, ...]
    neutral: tuple[Example, ...]
    neutral_losses: tuple[float, ...]
    about: Mapping[str, Any]

    def key(self, trained: int | None = None) -> str:
        """A hash of the rows as the models see them, of the answers, and of the base in its precision.

        Args:
            trained: how many of the first training rows are in it; all unless given.
        """
        rows = {name: value for name, value in self._plain().items() if name != "neutral_losses"}
        rows["train"] = _flat(self.first(trained))
        return digest({**rows, "dtype": self.about["dtype"], "base": self.about["base"]})

    def first(self, count: int | None) -> list[Example]:
        """The examples of the first so many training rows, or of all."""
        return first_rows(self.train, count)

    def trained_on(self) -> tuple[int, int]:
        """How many evaluation rows are training rows too, with the same prompt and target, and how many there
        are."""
        rows, training = _by_row(self.eval), set(_by_row(self.train))
        return sum(row in training for row in rows), len(rows)

    def _plain(self) -> dict[str, Any]:
        return {
            **{name: _flat(getattr(self, name)) for name in ("train", "eval", "neutral")},
            "questions": [[*_question(question)] for question in self.questions],
            "neutral_losses": list(self.neutral_losses),
        }

    def write(self, path: Path, *, key: str) -> None:
        """`key` is that of the plan, by which the file is known again."""
        write_json(path, {"key": key, "about": dict(self.about), **self._plain()})

    @classmethod
    def read(cls, path: Path, *, key: str | None = None) -> Rows | None:
        """What `write` wrote; None where there is nothing, or what belongs to another plan than `key`'s.

        Raises:
            RunError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if key is not None and found["key"] != key:
                return None
            return cls(
                **{name: tuple(_examples(found[name])) for name in ("train", "eval", "neutral")},
                questions=tuple(
                    Question(input_ids=tuple(ids), text=text, references=tuple(answers), lead=lead)
                    for ids, text, answers, lead in found["questions"]
                ),
                neutral_losses=tuple(found["neutral_losses"]),
                about=found["about"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error})", hint="delete it, and it is made again") from None


def first_rows(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Those of the first so many rows, or of all: a chat of several turns may be several examples."""
    begins = [place for place, example in enumerate(examples) if example.part == 0]
    return list(examples[: None if count is None or count >= len(begins) else begins[count]])


def _by_row(examples: Iterable[Example]) -> list[tuple[Any, ...]]:
    """Token ids and labels of each row: a chat of several turns may be several examples."""
    rows: list[tuple[Any, ...]] = []
    for example in examples:
        before = rows.pop() if example.part else ()
        rows.append((*before, example.input_ids, example.labels))
    return rows


def _flat(examples: Iterable[Example]) -> list[list[Any]]:
    return [[list(e.input_ids), list(e.labels), e.origin, e.truncated, e.part] for e in examples]


def _question(question: Question) -> Sequence[Any]:
    return list(question.input_ids), question.text, list(question.references), question.lead


def _examples(rows: Iterable[Sequence[Any]]) -> Iterable[Example]:
    for ids, labels, origin, truncated, part in rows:
        yield Example(
            input_ids=tuple(ids), labels=tuple(labels), origin=origin, truncated=truncated, part=part
        )


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
