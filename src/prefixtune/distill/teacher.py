"""The teacher: the model with the text in its context answers questions, and what it has there is kept.

The text's KV is computed once and attached: by the oracle that is the model with the text before every row.
Axes: d hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.attachment import attach
from prefixtune.config import DistillConfig
from prefixtune.data import Example
from prefixtune.distill.context import Context, prompts_of
from prefixtune.distill.questions import Question
from prefixtune.errors import RunError
from prefixtune.generate import generate_ids, sampling, seeded
from prefixtune.geometry import quiet_eval
from prefixtune.loss import Passes, RowTokens
from prefixtune.prefix import PrefixKV
from prefixtune.progress import progress_bar
from prefixtune.train.folder import QUESTIONS

__all__ = ["PARTS", "Answered", "answer", "as_text", "read_answered", "with_aims"]

PARTS = ("train", "watch", "heldout")
IGNORED = -100
ROWS = 32  # whose hidden states are computed between two movements of the bar


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question with the teacher's answer.

    Attributes:
        part: one of PARTS.
        teacher_ids: the question as the teacher read it, after the text's own ids.
        student_ids: the question as it is served, without the text.
        answer_ids: what the teacher said, its end token at the end where it ended.
    """

    part: str
    question: str
    answer: str
    teacher_ids: tuple[int, ...]
    student_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def example(self, prompt: Sequence[int]) -> Example:
        """The answer after a prompt, its tokens the targets."""
        labels = (*[IGNORED] * len(prompt), *self.answer_ids)
        origin = f"question {self.question!r:.60}"
        return Example(input_ids=(*prompt, *self.answer_ids), labels=labels, origin=origin, truncated=0)


def answer(
    base: Any,
    tokenizer: Any,
    context: Context,
    kv: PrefixKV,
    parts: Mapping[str, Sequence[Question]],
    *,
    config: DistillConfig,
    seed: int,
) -> list[Answered]:
    """The teacher's answers to the questions of all parts.

    Args:
        kv: of the text, from `Context.kv`.
    """
    asked = [(part, question.text) for part in parts for question in parts[part]]
    questions = [question for _, question in asked]
    prompts = context.prompts(questions, tokenizer)
    with seeded(seed), attach(base, kv):
        answers = generate_ids(
            base,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            settings=sampling(temperature=config.temperature, top_p=1.0),
            template=context.template,
            progress="the teacher answers",
        )
    served = prompts_of(questions, tokenizer, context.template)
    found = []
    for (part, question), theirs, ours, ids in zip(asked, prompts, served, answers, strict=True):
        # a shorter answer has ended; which of several end tokens it was no loss asks
        ended = [tokenizer.eos_token_id] if len(ids) < config.max_new_tokens else []
        found.append(
            Answered(
                part=part,
                question=question,
                answer=tokenizer.decode(ids, skip_special_tokens=True),
                teacher_ids=tuple(theirs),
                student_ids=tuple(ours),
                answer_ids=(*ids, *ended),
            )
        )
    return found


def with_aims(passes: Passes, answered: Sequence[Answered], kv: PrefixKV) -> list[Example]:
    """The student's rows, with what the teacher has where it predicts the answer, [targets, d], on the host.

    Hidden states, so that the teacher's whole distribution is known; of a model without a head of its own its
    logits.
    """
    pairs = [(layer.key, layer.value) for layer in kv.layers]
    found: list[Example] = []
    with quiet_eval(passes.base), progress_bar("the teacher's hidden states", total=len(answered)) as advance:
        for first in range(0, len(answered), ROWS):
            some = answered[first : first + ROWS]
            theirs = [one.example(one.teacher_ids) for one in some]
            rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in theirs]
            for one, aim in zip(some, passes.aims(rows, pairs), strict=True):
                found.append(replace(one.example(one.student_ids), aims=aim.cpu()))
            advance(len(some))
    return found


# --- the file that keeps them in the run folder ------------------------------------------------------------


def as_text(answered: Sequence[Answered]) -> str:
    """JSON lines, which `read_answered` reads."""
    return "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in answered)


def read_answered(output: Path) -> list[Answered]:
    """The questions and answers that a run was begun with.

    Raises:
        RunError: they are missing or damaged.
    """
    path = output / QUESTIONS
    try:
        # split("\n"), not splitlines(): JSON strings may hold U+2028 and other breaks that are no line ends
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        ids = ("teacher_ids", "student_ids", "answer_ids")
        found = [
            Answered(**{**line, **{name: tuple(map(int, line[name])) for name in ids}}) for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: missing or damaged, so the run cannot be resumed ({error})", hint="begin another run"
        ) from None
    if {one.part for one in found} != set(PARTS):
        raise RunError(f"{path}: damaged, so the run cannot be resumed", hint="begin another run")
    return found
