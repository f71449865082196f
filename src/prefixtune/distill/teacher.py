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
from prefixtune.config import DataConfig, DistillConfig
from prefixtune.data import Example, build_prompts
from prefixtune.distill.questions import Question
from prefixtune.errors import RunError
from prefixtune.generate import generate_ids, prompt_row, sampling, seeded
from prefixtune.geometry import quiet_eval
from prefixtune.loss import Passes, RowTokens
from prefixtune.prefix import PrefixKV
from prefixtune.progress import progress_bar
from prefixtune.train.folder import QUESTIONS

__all__ = ["PARTS", "Answered", "answer", "as_text", "prompts_of", "read_answered", "with_aims"]

PARTS = ("train", "watch", "heldout")
IGNORED = -100
ROWS = 32  # whose hidden states are computed between two movements of the bar


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question with the teacher's answer.

    Attributes:
        part: one of PARTS.
        prompt_ids: the question in its template, without the text.
        answer_ids: what the teacher said, its end token at the end where it ended.
    """

    part: str
    question: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def example(self) -> Example:
        """The student's row: the answer's tokens are its targets."""
        ids = (*self.prompt_ids, *self.answer_ids)
        labels = (*[IGNORED] * len(self.prompt_ids), *self.answer_ids)
        return Example(input_ids=ids, labels=labels, origin=f"question {self.question!r:.60}", truncated=0)


def prompts_of(questions: Sequence[Question], tokenizer: Any, template: str) -> list[tuple[int, ...]]:
    """Each question in the template, as token ids up to its answer."""
    rows = [prompt_row(question.text, template, origin=question.origin) for question in questions]
    found = build_prompts(rows, tokenizer, DataConfig(template=template))
    return [prompt.input_ids for prompt in found]


def answer(
    base: Any,
    tokenizer: Any,
    kv: PrefixKV,
    parts: Mapping[str, Sequence[Question]],
    *,
    template: str,
    config: DistillConfig,
    seed: int,
) -> list[Answered]:
    """The teacher's answers to the questions of all parts.

    Args:
        kv: of the text, from `Context.kv`.
    """
    asked = [(part, question) for part in parts for question in parts[part]]
    prompts = prompts_of([question for _, question in asked], tokenizer, template)
    with seeded(seed), attach(base, kv):
        answers = generate_ids(
            base,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            settings=sampling(temperature=config.temperature, top_p=1.0),
            progress="the teacher answers",
        )
    found = []
    for (part, question), prompt, ids in zip(asked, prompts, answers, strict=True):
        # a shorter answer has ended; which of several end tokens it was no loss asks
        ended = [tokenizer.eos_token_id] if len(ids) < config.max_new_tokens else []
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(
            Answered(
                part=part,
                question=question.text,
                answer=text,
                prompt_ids=tuple(prompt),
                answer_ids=(*ids, *ended),
            )
        )
    return found


def with_aims(passes: Passes, examples: Sequence[Example], kv: PrefixKV) -> list[Example]:
    """The rows with the teacher's hidden states where it predicts their targets, [targets, d], on the host.

    Of a model without a head of its own they are its logits.
    """
    pairs = [(layer.key, layer.value) for layer in kv.layers]
    rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in examples]
    found: list[Example] = []
    with quiet_eval(passes.base), progress_bar("the teacher's hidden states", total=len(rows)) as advance:
        for first in range(0, len(rows), ROWS):
            some = rows[first : first + ROWS]
            aims = passes.aims(some, pairs)
            here = examples[first : first + ROWS]
            found += [replace(e, aims=aim.cpu()) for e, aim in zip(here, aims, strict=True)]
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
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ids = ("prompt_ids", "answer_ids")
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
