"""The prefix beside the text in the context and beside no text: quality, memory, speed. Knows no files.

Axes: S places that predict an answer's tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixtune.attachment import attach, head_of
from prefixtune.chunked import chunked_divergence
from prefixtune.data import Example
from prefixtune.distill.context import Context
from prefixtune.distill.teacher import Answered
from prefixtune.errors import DataError
from prefixtune.generate import ending, generate_ids, sampling
from prefixtune.geometry import quiet_eval
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes, RowTokens
from prefixtune.metrics.text import exact_match
from prefixtune.prefix import PrefixKV
from prefixtune.progress import progress_bar

__all__ = [
    *("NO_TEXT", "PREFIX", "TIMED_TOKENS", "Closeness", "Contestant", "Speed", "closeness", "compare"),
    *("greedy_answers", "measure_speed", "ways_without"),
]

TEACHER, PREFIX, NO_TEXT = "text in the context", "prefix", "no text"
TIMED_TOKENS, RUNS = 32, 3  # of an answer; the fastest of the runs counts: other load only ever adds time
PLACES = 256  # whose logits are made at a time


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How near a model is to the teacher where the teacher's answers are predicted.

    `divergence` is KL(teacher || model) in nats per token; `agreement` is the share of the places where both
    find the same token likeliest.
    """

    divergence: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds until the first token of an answer, and tokens per second after it."""

    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to answer, in comparison with the teacher.

    Attributes:
        name: "text in the context" (the teacher), "prefix", "first P tokens" (its start), or "no text".
        cache_tokens: positions that stand before a question.
        cache_bytes: their keys and values in the model's precision, for each conversation; of the text in
            layers with a window those that a question still sees, of a prefix all.
        exact_match: share of the questions with the teacher's own answer, word for word, both greedy; None
            where the teacher's answers were sampled.
        first_token_seconds, tokens_per_second: of one question at a time; the text in the context is read
            anew for it, as an engine does that keeps no cache between requests. None where not measured.
    """

    name: str
    divergence: float
    agreement: float
    cache_tokens: int
    cache_bytes: int
    exact_match: float | None = None
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None


@torch.no_grad()
def closeness(passes: Passes, examples: Sequence[Example], kv: PrefixKV | None) -> Closeness:
    """The model of the passes with this prefix (or none), on rows with a teacher's aims.

    Raises:
        DataError: a row has none.
    """
    if not examples or any(example.aims is None for example in examples):
        raise DataError(f"expected rows with aims from a teacher; got {len(examples)} rows, some without")
    rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in examples]
    pairs = None if kv is None else [(layer.key, layer.value) for layer in kv.layers]
    with quiet_eval(passes.base):
        hidden = torch.cat(passes.aims(rows, pairs))  # [S, d]
        aims = torch.cat([example.aims for example in examples]).to(hidden.device)
        head: Callable[[Tensor], Tensor] = head_of(passes.base) if passes.split else lambda chosen: chosen * 1
        nats, same = 0.0, 0
        for ours, theirs in zip(torch.split(hidden, PLACES), torch.split(aims, PLACES), strict=True):
            nats += float(chunked_divergence(ours, theirs, head))
            same += int((head(ours).argmax(dim=1) == head(theirs).argmax(dim=1)).sum())
    return Closeness(divergence=nats / len(hidden), agreement=same / len(hidden))


def ways_without(base: LoadedBase, context: Context, prefix: PrefixKV) -> dict[str, PrefixKV | None]:
    """What stands before a question in place of the text, by name: the prefix, its start, and nothing."""
    start = PrefixKV.from_tokens(base.model, torch.tensor([context.ids[: prefix.length]]))
    return {PREFIX: prefix, f"first {prefix.length} tokens": start, NO_TEXT: None}


def compare(
    base: LoadedBase,
    passes: Passes,
    examples: Sequence[Example],
    answered: Sequence[Answered],
    *,
    context: Context,
    text_bytes: int,
    ways: Mapping[str, PrefixKV | None],
    answers: Mapping[str, Sequence[str]],
    greedy: bool,
) -> list[Contestant]:
    """The teacher and the `ways` to do without the text (`ways_without`), on the same held-out rows.

    Args:
        examples: with the teacher's aims.
        answered: what they were made of; the question of middle length is timed.
        text_bytes: `Context.cache_bytes`, in the model's precision, as the ways' are.
        answers: each way's own greedy answers to the questions of `answered`.
        greedy: whether the teacher's are, so that they can be compared word for word.
    """
    near = {name: closeness(passes, examples, kv) for name, kv in ways.items()}
    middle = sorted(answered, key=lambda one: len(one.student_ids))[len(answered) // 2]
    alone = list(middle.student_ids)
    speeds = measure_speed(
        base.model,
        base.tokenizer,
        {
            TEACHER: ([*context.ids, *middle.teacher_ids], None),
            PREFIX: (alone, ways[PREFIX]),
            NO_TEXT: (alone, None),
        },
    )
    sizes = {name: (kv.length, kv.nbytes) for name, kv in ways.items() if kv is not None}
    sizes[TEACHER] = (len(context.ids), text_bytes)
    near = {TEACHER: Closeness(divergence=0.0, agreement=1.0), **near}
    told = [[one.answer] for one in answered]
    same: dict[str, float] = {}
    if greedy:
        same = {TEACHER: 1.0, **{name: exact_match(found, told) for name, found in answers.items()}}
    return [
        _contestant(name, near[name], *sizes.get(name, (0, 0)), same.get(name), speeds.get(name))
        for name in near
    ]


def _contestant(
    name: str, near: Closeness, tokens: int, size: int, same: float | None, speed: Speed | None
) -> Contestant:
    return Contestant(
        name=name,
        divergence=near.divergence,
        agreement=near.agreement,
        cache_tokens=tokens,
        cache_bytes=size,
        exact_match=same,
        first_token_seconds=speed.first_token_seconds if speed else None,
        tokens_per_second=speed.tokens_per_second if speed else None,
    )


def measure_speed(
    base: Any, tokenizer: Any, asked: dict[str, tuple[list[int], PrefixKV | None]]
) -> dict[str, Speed]:
    """How fast the model answers, greedily and one row at a time, for each (ids, prefix) by its name.

    They take turns after a run that is not counted; the fastest of three runs counts.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    with (
        quiet_eval(base),
        progress_bar("measuring the speed", total=(RUNS + 1) * len(asked)) as advance,
    ):
        for run in range(RUNS + 1):
            for name, (ids, kv) in asked.items():
                first = _seconds(base, tokenizer, ids, kv, tokens=1)
                whole = _seconds(base, tokenizer, ids, kv, tokens=TIMED_TOKENS)
                if run:  # the first run sets up threads and kernels
                    seconds[name].append((first, whole))
                advance(1)
    found = {}
    for name, taken in seconds.items():
        first, whole = (min(times) for times in zip(*taken, strict=True))
        rate = (TIMED_TOKENS - 1) / max(whole - first, 1e-9)
        found[name] = Speed(first_token_seconds=first, tokens_per_second=rate)
    return found


@torch.no_grad()
def _seconds(base: Any, tokenizer: Any, ids: Sequence[int], kv: PrefixKV | None, *, tokens: int) -> float:
    device = next(base.parameters()).device
    batch = torch.tensor([list(ids)], device=device)
    exact = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    settings = {**sampling(temperature=0.0, top_p=1.0), **ending(base, tokenizer), **exact}
    with attach(base, kv) if kv is not None else nullcontext():
        start = time.perf_counter()
        base.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **settings)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start


def greedy_answers(
    base: LoadedBase,
    prompts: Sequence[Sequence[int]],
    kv: PrefixKV | None,
    *,
    max_new_tokens: int,
    template: str | None = None,
    batch_size: int,
    progress: str,
) -> list[str]:
    """The model's own greedy answers with this prefix, or none: to be read beside the teacher's."""
    tokenizer: Any = base.tokenizer
    with attach(base.model, kv) if kv is not None else nullcontext():
        rows = generate_ids(
            base.model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            settings=sampling(temperature=0.0, top_p=1.0),
            template=template,
            progress=progress,
        )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
