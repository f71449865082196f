"""How a row becomes a prompt and a target: the tutorial's form, and plain text formats. Knows no files.

The chat template has a module of its own, `prefixtune.data.chat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

from prefixtune.data.row import NoTargetError, Row, field_text, missing_field, required_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix import place_of

__all__ = [
    "Encoded",
    "FormatTemplate",
    "HumanTemplate",
    "PromptText",
    "Template",
    "added_tokens",
    "empty_target",
    "text_start",
    "token_ids",
]

NO_TARGET = -100  # the label that no loss counts (torch.nn.CrossEntropyLoss.ignore_index)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A whole row, not yet cut; `unclosed` targets have no mark of their end, an `empty` one nothing else.

    `without_tools`: the row has tools, which the template does not write.
    """

    input_ids: list[int]
    labels: list[int]
    unclosed: int = 0
    empty: bool = False
    without_tools: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """What stands before the (last) target, as ids and as text, and the target's text.

    `lead` is what a chat template writes between the two: the model writes it too, but it is no answer.
    """

    input_ids: list[int]
    text: str
    reference: str
    lead: str = ""


class Template(Protocol):
    """One form of rows."""

    def fields(self, row: Row) -> tuple[str, ...]:
        """The row's fields that are read as text; not each need be there."""

    def encode(self, row: Row) -> list[Encoded]:
        """The row's ids and labels; several where each turn of a chat stands for itself.

        Raises:
            NoTargetError: the target is empty.
        """

    def prompt(self, row: Row) -> PromptText:
        """The row up to its last target; raises NoTargetError where that is empty."""


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The ids of one text, never cut; `special` lets the tokenizer add its BOS or EOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before each text, a BOS or another token (XGLM's is </s>), and after each.

    Raises:
        DataError: it reads a text differently where it adds tokens.
    """
    bare, whole = token_ids(tokenizer, "a1", special=False), token_ids(tokenizer, "a1")
    start = place_of(bare, whole)
    if start is not None:
        return whole[:start], whole[start + len(bare) :]
    raise DataError(
        f"the tokenizer reads 'a1' as the tokens {bare}, and as {whole} where it adds its special tokens, "
        "so what it adds to a text cannot be told"
    )


def text_start(tokenizer: Any) -> list[int]:
    """What begins each text once: what the tokenizer adds, or the BOS that only the chat template writes.

    A BOS that begins every turn of a chat (SmolLM2's is <|im_start|>) begins no text.
    """
    start, bos = added_tokens(tokenizer)[0], tokenizer.bos_token_id
    if start or bos is None or not getattr(tokenizer, "chat_template", None):
        return start
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        ids = token_ids(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False), special=False)
    except Exception:  # a template is a program: it raises what it likes about roles and their order
        return []
    return [bos] if ids[:1] == [bos] and ids.count(bos) == 1 else []


def empty_target(row: Row, name: str, what: str = "empty") -> NoTargetError:
    return NoTargetError(
        f"{row.origin}: {name} is {what}, so the row has no target",
        hint="fill it in, or leave such rows out with --on-no-target drop",
    )


def _pair(prompt_ids: list[int], target_ids: list[int], *, empty: bool) -> list[Encoded]:
    # tokenised apart and joined as ids: no token may straddle prompt and target, as none can in generation
    labels = [NO_TARGET] * len(prompt_ids) + target_ids
    return [Encoded(input_ids=prompt_ids + target_ids, labels=labels, empty=empty)]


def _opening_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that goes on: with what begins each text, without what ends it."""
    return added_tokens(tokenizer)[0] + token_ids(tokenizer, text, special=False)


class HumanTemplate:
    """The tutorial's process_func: "Human: {instruction}\\n{input}", then "Assistant: " and the output.

    It tokenises prompt and target apart, with special tokens in both, so a tokenizer that begins each text
    with a BOS puts one before the target too, and one that ends each text puts its end token there. `one_bos`
    has the BOS before the prompt only, and the end token after the target only, once.

    Its rule for fields: `output` is required, and one of `instruction` and `input`. A row without the column
    `input` reads as the tutorial's with input "". A row without the column `instruction` has no line for it:
    "Human: {input}". Null in a column that is there is an empty text, but no target.
    """

    def __init__(self, tokenizer: Any, *, one_bos: bool = False) -> None:
        self._tokenizer = tokenizer
        self._one_bos = one_bos

    def fields(self, row: Row) -> tuple[str, ...]:
        return ("instruction", "input", "output")

    def encode(self, row: Row) -> list[Encoded]:
        prompt, target = self._texts(row)
        return _pair(
            self._prompt_ids(prompt),
            token_ids(self._tokenizer, target + self._tokenizer.eos_token, special=not self._one_bos),
            empty=not target.strip(),
        )

    def prompt(self, row: Row) -> PromptText:
        prompt, target = self._texts(row)
        return PromptText(input_ids=self._prompt_ids(prompt), text=prompt, reference=target)

    def _prompt_ids(self, text: str) -> list[int]:
        if self._one_bos:
            return _opening_ids(self._tokenizer, text)
        return token_ids(self._tokenizer, text)

    def _texts(self, row: Row) -> tuple[str, str]:
        target = _target_text(row, "output")
        if "instruction" not in row.values and "input" not in row.values:
            raise missing_field(row, "instruction", wanted="instruction")
        parts = [field_text(row, name) for name in ("instruction", "input") if name in row.values]
        return "\n".join(["Human: " + parts[0], *parts[1:]]).strip() + "\n\nAssistant: ", target


class FormatTemplate:
    """A text with named fields, such as "Question: {instruction}\\nAnswer: {output}"; the last is the target.

    "{{" and "}}" are literal braces. The two characters \\n are a line break, \\t a tab and \\\\ a backslash,
    because a shell passes them on as they are typed. The target is followed by the EOS token.

    Raises:
        ConfigError: the format has no field, text after the last one, or anything but plain names in braces.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self._parts = _parse_format(text)

    def fields(self, row: Row) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self._parts))

    def encode(self, row: Row) -> list[Encoded]:
        prompt, target = self._texts(row)
        return _pair(
            _opening_ids(self._tokenizer, prompt),
            token_ids(self._tokenizer, target + self._tokenizer.eos_token, special=False),
            empty=not target.strip(),
        )

    def prompt(self, row: Row) -> PromptText:
        prompt, target = self._texts(row)
        return PromptText(input_ids=_opening_ids(self._tokenizer, prompt), text=prompt, reference=target)

    def _texts(self, row: Row) -> tuple[str, str]:
        *before, (last_literal, target_name) = self._parts
        prompt = "".join(literal + required_text(row, name) for literal, name in before) + last_literal
        return prompt, _target_text(row, target_name)


def _target_text(row: Row, name: str) -> str:
    """The field's text: an empty one is an answer, as in the tutorial, whose target is the end token."""
    if name in row.values and row.values[name] is None:
        raise empty_target(row, f"'{name}'", "null")
    return required_text(row, name)


def _parse_format(text: str) -> list[tuple[str, str]]:
    """The pairs of literal text and the field after it."""
    example = "for example 'Question: {instruction}\\nAnswer: {output}'"
    parts: list[tuple[str, str]] = []
    literal = ""
    try:
        for piece, name, spec, conversion in Formatter().parse(text):
            literal += _unescape(piece)
            if name is None:  # an escaped brace or the end
                continue
            if not name.strip() or name.strip().isdigit() or set(name) & set(".[]") or spec or conversion:
                raise ConfigError(
                    f"template: expected a field's name in braces; got it in {text!r}", hint=example
                )
            parts.append((literal, name.strip()))
            literal = ""
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"template: {error}, in {text!r}", hint="a literal brace is written {{ or }}"
        ) from None
    if not parts:
        raise ConfigError(f"template: expected a format with {{fields}}; got {text!r}", hint=example)
    if literal:
        raise ConfigError(
            f"template: expected nothing after the last field, which is the target; got {literal!r} after "
            f"{{{parts[-1][1]}}}",
            hint="the EOS token is added by itself",
        )
    target = parts[-1][1]
    if target in (name for _, name in parts[:-1]):
        raise ConfigError(f"template: the target {{{target}}} is in the prompt too, in {text!r}")
    return parts


def _unescape(literal: str) -> str:
    breaks = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: breaks[found.group()], literal)


def require_eos(tokenizer: Any) -> None:
    """Raise DataError where the tokenizer has no EOS token: a target could never end."""
    if not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has no EOS token, so a target could never end",
            hint='set one before: tokenizer.eos_token = "</s>", a token that the model knows',
        )
