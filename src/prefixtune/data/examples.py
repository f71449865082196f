"""Rows to examples for training and prompts for generation, with a count of what is lost. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefixtune.config import DataConfig
from prefixtune.data.chat import ChatTemplate
from prefixtune.data.row import NoTargetError, Row, count_converted
from prefixtune.data.templates import (
    NO_TARGET,
    Encoded,
    FormatTemplate,
    HumanTemplate,
    Template,
    added_tokens,
    require_eos,
)
from prefixtune.errors import ConfigError, DataError
from prefixtune.progress import progress_bar

__all__ = [
    "DataReport",
    "Example",
    "Prompt",
    "build_examples",
    "build_prompts",
    "default_template",
    "rows_with_targets",
]

ONE_BOS = "human-one-bos"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as token ids.

    Attributes:
        input_ids: T ids.
        labels: T ids; -100 where the token is no target. Not shifted: labels[t] is input_ids[t] or -100.
        origin: where the row stands.
        truncated: how many tokens were cut off at the end.
        part: which of its row's examples it is, from 0; each row has that of 0.
        aims: a teacher's hidden states at the places that predict the targets, a tensor [targets, d] from
            `prefixtune.loss.Passes.aims`: its distribution is then aimed at, and not the target.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: str
    truncated: int
    part: int = 0
    aims: Any = field(default=None, compare=False, repr=False)

    @property
    def target_tokens(self) -> int:
        """The targets that a loss counts: nothing predicts the first token of a row."""
        return _count_targets(self.labels)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What stands before the last target of a row, and the text of that target.

    Attributes:
        lead: what a chat template writes between the two, as Qwen3's its empty thought. It is learnt as a
            part of the target, so the model writes it before its answer.
    """

    input_ids: tuple[int, ...]
    text: str
    reference: str
    origin: str
    lead: str = ""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows. Tokens, targets, truncation and `longest` are of the examples that were kept.

    Attributes:
        dropped: rows left out because no target token was left (on_no_target="drop").
        converted: numbers and booleans that were turned into text.
        empty: examples whose answer is an empty text, so that the end token is their only target.
        unclosed: assistant turns that the chat template ends with no end-of-turn text, so no end is learnt.
        without_tools: rows whose `tools` the chat template does not write.
        split: rows of several turns that became an example for each turn of the assistant.
        cut_turns: turns of such rows that have no target token within `max_length`, and were left out.
        template: how the rows were written.
        inner_bos: the template puts what begins each text, the tokenizer's BOS, before each target too.
        inner_eos: the template puts what ends each text between prompt and target too.
    """

    rows: int
    examples: int
    dropped: int
    truncated_rows: int
    truncated_tokens: int
    tokens: int
    target_tokens: int
    longest: int
    converted: int = 0
    empty: int = 0
    unclosed: int = 0
    without_tools: int = 0
    split: int = 0
    cut_turns: int = 0
    template: str = "human"
    inner_bos: bool = False
    inner_eos: bool = False

    def summary(self) -> str:
        """One line for people; what was lost is in capitals, and is not mentioned where there was none."""
        parts = [
            f"{_plural(self.rows, 'row')}: {_plural(self.examples, 'example')}, "
            f"{self.tokens:,} tokens, {_plural(self.target_tokens, 'target')}, longest {self.longest:,}"
        ]
        if self.truncated_rows:
            cut = _plural(self.truncated_tokens, "token")
            parts.append(f"TRUNCATED {_plural(self.truncated_rows, 'row')}, {cut} cut off")
        if self.split:
            parts.append(
                f"an example for EACH TURN of {_plural(self.split, 'row')}: "
                "the chat template writes a turn otherwise once others follow"
            )
        if self.cut_turns:
            parts.append(f"LEFT OUT {_plural(self.cut_turns, 'turn')} beyond the longest row")
        if self.dropped:
            parts.append(f"DROPPED {_plural(self.dropped, 'row')} without a target")
        if self.converted:
            parts.append(f"CONVERTED {_plural(self.converted, 'number')} to text")
        if self.empty:
            parts.append(f"{_plural(self.empty, 'answer')} EMPTY, with the end token for target")
        if self.unclosed:
            parts.append(f"{_plural(self.unclosed, 'turn')} WITHOUT an end-of-turn token")
        if self.without_tools:
            parts.append(f"the TOOLS of {_plural(self.without_tools, 'row')} LEFT OUT by the chat template")
        if self.template == ONE_BOS:
            parts.append(f"template {ONE_BOS}: the BOS of the tokenizer once a row, and its end token once")
        found = ("AN END TOKEN", self.inner_eos), ("A SECOND BOS", self.inner_bos)
        inner = " and ".join(name for name, is_there in found if is_there)
        if inner:
            parts.append(f"{inner} before each target, which the template {ONE_BOS} leaves out")
        return "; ".join(parts)


def build_examples(
    rows: Sequence[Row],
    tokenizer: Any,
    config: DataConfig,
    *,
    last_turn: bool = False,
    progress: bool = False,
) -> tuple[list[Example], DataReport]:
    """Tokenise rows for training.

    A row is one example, but for chats whose template writes a turn otherwise once others follow: there each
    turn of the assistant is one, with what stands before it when the model is asked for it.

    Reads `template`, `max_length` and `on_no_target` of the config; its other knobs are `load_rows`'s.

    Args:
        last_turn: of a row that is several examples take the last.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the template is none of the known ones.
        DataError: a row lacks a field or a target, no row is left, or the tokenizer lacks what is needed.
    """
    form = default_template(tokenizer) if config.template is None else config.template
    template = _template_for(form, tokenizer)
    before, after = added_tokens(tokenizer) if form == "human" else ([], [])
    examples: list[Example] = []
    dropped = converted = empty = unclosed = without_tools = split = cut_turns = cut_rows = 0
    with progress_bar("tokenising" if progress else None, total=len(rows)) as advance:
        for row in rows:
            advance(1)
            try:
                encoded = template.encode(row)[-1 if last_turn else 0 :]
                found = _cut(encoded, row, config.max_length)
            except NoTargetError:
                if config.on_no_target == "error":
                    raise
                dropped += 1
                continue
            examples += found
            converted += count_converted(row, template.fields(row))
            empty += sum(one.empty for one in encoded)
            unclosed += sum(one.unclosed for one in encoded[: len(found)])
            without_tools += any(one.without_tools for one in encoded)
            split += len(encoded) > 1
            cut_turns += len(encoded) - len(found)
            cut_rows += any(example.truncated for example in found)
    if not examples:
        raise DataError(f"no row has a target: {_plural(len(rows), 'row')} read, {dropped:,} dropped")
    report = DataReport(
        rows=len(rows),
        examples=len(examples),
        dropped=dropped,
        truncated_rows=cut_rows,
        truncated_tokens=sum(example.truncated for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        target_tokens=sum(example.target_tokens for example in examples),
        longest=max(len(example.input_ids) for example in examples),
        converted=converted,
        empty=empty,
        unclosed=unclosed,
        without_tools=without_tools,
        split=split,
        cut_turns=cut_turns,
        template=form,
        inner_bos=bool(before),
        inner_eos=bool(after),
    )
    return examples, report


def rows_with_targets(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> list[Row]:
    """The rows that `build_examples` has examples of; with on_no_target="error" all, and it refuses some."""
    if config.on_no_target == "error":
        return list(rows)
    template = _template_for(config.template, tokenizer)
    found = []
    for row in rows:
        with suppress(NoTargetError):
            _cut(template.encode(row), row, config.max_length)
            found.append(row)
    return found


def build_prompts(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> list[Prompt]:
    """The prompts of rows for generation, with the targets as references.

    Of a chat, what stands before the last assistant turn. A prompt is never cut: without its end it would ask
    something else. Rows whose target text is empty are refused, or left out with on_no_target="drop".
    """
    template = _template_for(config.template, tokenizer)
    prompts = []
    for row in rows:
        try:
            prompt = template.prompt(row)
        except NoTargetError:
            if config.on_no_target == "error":
                raise
            continue
        prompts.append(
            Prompt(
                input_ids=tuple(prompt.input_ids),
                text=prompt.text,
                reference=prompt.reference,
                origin=row.origin,
                lead=prompt.lead,
            )
        )
    return prompts


def default_template(tokenizer: Any, *, chat: bool = False) -> str:
    """The template where none is given: human, but with no BOS or end token in the middle of a row.

    Args:
        chat: the tokenizer's chat template instead, if it has one.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        return "chat"
    return ONE_BOS if any(added_tokens(tokenizer)) else "human"


def _template_for(text: str | None, tokenizer: Any) -> Template:
    text = default_template(tokenizer) if text is None else text
    if text not in ("human", ONE_BOS, "chat") and "{" not in text:
        raise ConfigError(
            f"template: expected human, {ONE_BOS}, chat, or a format with {{fields}}; got {text!r}",
            hint="for example 'Question: {instruction}\\nAnswer: {output}'",
        )
    require_eos(tokenizer)
    if text in ("human", ONE_BOS):
        return HumanTemplate(tokenizer, one_bos=text == ONE_BOS)
    return ChatTemplate(tokenizer) if text == "chat" else FormatTemplate(tokenizer, text)


def _cut(encoded: Sequence[Encoded], row: Row, max_length: int) -> list[Example]:
    """The first `max_length` tokens of each, where there is a target in them; the first must have one."""
    first = encoded[0].labels
    if not _count_targets(first[:max_length]):
        before = next((i for i, label in enumerate(first) if label != NO_TARGET), len(first))
        raise NoTargetError(
            f"{row.origin}: no target token is left: {before} of the row's {len(first)} tokens "
            f"stand before the target, and max_length is {max_length}"
            + (", and nothing predicts a row's first token" if before == 0 else ""),
            hint="raise --max-length, or leave such rows out with --on-no-target drop",
        )
    return [
        Example(
            input_ids=tuple(one.input_ids[:max_length]),
            labels=tuple(one.labels[:max_length]),
            origin=row.origin,
            truncated=max(0, len(one.labels) - max_length),
            part=part,
        )
        for part, one in enumerate(encoded)
        if _count_targets(one.labels[:max_length])
    ]


def _count_targets(labels: Sequence[int]) -> int:
    return sum(label != NO_TARGET for label in labels[1:])  # nothing predicts the first token of a row


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
