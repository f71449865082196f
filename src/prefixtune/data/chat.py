"""Rows through a tokenizer's chat template: which tokens would the assistant generate. Knows no model family.

A template is a program that we can only run. Where it marks the assistant's text with {% generation %}, the
marks count; else a turn is what rendering messages[:i+1] has beyond messages[:i] with the generation prompt.
Where a template writes a turn otherwise once others follow (Qwen3's leaves out its thoughts), each turn is an
example of its own, after what stands before it when the model is asked for it.
Positions are characters of the rendered text until the last step, which maps them to tokens.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from prefixtune.data.row import (
    Row,
    check_text,
    field_text,
    kind_of,
    missing_field,
    required_text,
    sharegpt_messages,
)
from prefixtune.data.templates import NO_TARGET, Encoded, PromptText, empty_target, token_ids
from prefixtune.errors import DataError

__all__ = ["ChatTemplate", "fix_date"]

_PROBE = "prefixtune:probe"  # stands for a content whose place in the rendered text is looked for
_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
_NOW = re.compile(
    r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
)  # as Llama 3.2's and SmolLM3's templates call it

Message = dict[str, Any]
Span = tuple[int, int]  # first character and the one after the last


class ChatTemplate:
    """The tokenizer's chat template. Each assistant turn is a target, with its end token, without its header.

    A row holds `messages`, a list of {role, content}, or `conversations`, a list of {from, value}, or
    instruction, input and output: then the user says the instruction and, on a new line, the input if there
    is one, after an optional `system` message. An assistant's message may have tool_calls, with content or
    without; the row's `tools`, a list of JSON schemas, are given to the template.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template",
                hint="use --template human, or a format such as 'Question: {instruction}\\nAnswer: {output}'",
            )
        self._tokenizer = tokenizer
        self._marked = bool(_MARKER.search(tokenizer.get_chat_template()))

    def fields(self, row: Row) -> tuple[str, ...]:
        return ("system",) if _is_chat(row) else ("system", "instruction", "input", "output")

    def encode(self, row: Row) -> list[Encoded]:
        """One for the row; where its turns cannot be told apart in it, one for each turn of the assistant."""
        messages = _messages(row)
        last = _last_turn(row, messages)
        turns = [index for index in range(last + 1) if messages[index]["role"] == "assistant"]
        try:
            return [self._encoded(row, messages, turns)]
        except _InconsistentError:
            if turns == [len(messages) - 1]:
                raise
            return [self._encoded(row, messages[: turn + 1], [turn]) for turn in turns]

    def _encoded(self, row: Row, messages: list[Message], turns: list[int]) -> Encoded:
        """The messages with some of the assistant's turns as targets, all that there are or the last."""
        head = messages[: turns[-1] + 1]  # what follows the last turn is no target, but stays in the ids
        text = self._render(row, messages)
        spans, unclosed = self._turns(row, head, turns)
        if not text.startswith(self._render(row, head)[: spans[-1][1]]):
            raise _inconsistent(row)
        ids, is_target = self._tokenise(row, text, spans)
        labels = [token if target else NO_TARGET for token, target in zip(ids, is_target, strict=True)]
        without_tools = bool(_tools(row)) and text == self._render(row, messages, tools=False)
        return Encoded(input_ids=ids, labels=labels, unclosed=unclosed, without_tools=without_tools)

    def prompt(self, row: Row) -> PromptText:
        """Here only the last turn counts: many templates render it unlike the ones before it."""
        messages = _messages(row)
        last = _last_turn(row, messages)
        head = messages[: last + 1]
        whole = self._render(row, head)
        for index in (index for index, message in enumerate(head) if "tool_calls" in message):
            header, _ = self._around(row, head, index)
            turn = self._render(row, head[: index + 1]).removeprefix(header)
            self._check_call(row, head, index, turn)
        turns = sum(message["role"] == "assistant" for message in head)
        marked = self._marked_spans(row, head, turns) if self._marked else None
        header, after = self._around(row, head, last)
        asked = whole[: marked[-1][0]] if marked else self._asked(row, head, last, header)
        reference, lead = head[-1]["content"], ""
        if whole.startswith(header) and header.startswith(asked) and header[len(asked) :].strip():
            lead = header[len(asked) :]
        if "tool_calls" in head[-1] or reference.strip() not in whole[len(asked) :]:
            lead = ""  # there is no text but the template's
            if not whole.startswith(asked):
                raise _inconsistent(row)
            closing = after.rstrip()
            end = _closed_end(whole, len(asked), len(whole), closing) if closing else len(whole)
            reference = whole[len(asked) : end].removesuffix(closing)
        ids = token_ids(self._tokenizer, asked, special=False)
        return PromptText(input_ids=ids, text=asked, reference=reference, lead=lead)

    def _render(
        self, row: Row, messages: list[Message], *, generation_prompt: bool = False, tools: bool = True
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=_tools(row) if tools else None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except (
            Exception
        ) as error:  # a template is a program: it raises what it likes about roles and their order
            raise DataError(f"{row.origin}: the chat template refuses the row: {error}") from error
        return text

    def _turns(self, row: Row, messages: list[Message], turns: list[int]) -> tuple[list[Span], int]:
        """The spans of these turns in the rendered messages, and how many have no end-of-turn text."""
        text = self._render(row, messages)
        spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked = self._marked_spans(row, messages, len(spoken)) if self._marked else None
        spans = []
        unclosed = 0
        for index in turns:
            header, after = self._around(row, messages, index)
            start, end = (
                marked[spoken.index(index)] if marked else self._span(row, text, messages, index, header)
            )
            closing = after.rstrip()
            if closing:
                end = _closed_end(text, start, end, closing)
            else:  # no end-of-turn text: the white space is all that ends the turn, so it stays a target
                unclosed += 1
            if "tool_calls" in messages[index]:
                self._check_call(row, messages, index, text[start:end])
            spans.append((start, end))
        return spans, unclosed

    def _around(self, row: Row, messages: list[Message], index: int) -> tuple[str, str]:
        """What the template renders before and after the content of one message, when it is the last."""
        message = {name: value for name, value in messages[index].items() if name != "tool_calls"}
        probe = [*messages[:index], {**message, "content": _PROBE}]
        before, found, after = self._render(row, probe).rpartition(_PROBE)
        if not found:
            raise DataError(f"{row.origin}: the chat template leaves out what the assistant says")
        return before, after

    def _check_call(self, row: Row, messages: list[Message], index: int, turn: str) -> None:
        """The template must write the tool calls of a message, and what it says beside them."""
        message = messages[index]
        if not all(_function(call)["name"] in turn for call in message["tool_calls"]):
            raise DataError(
                f"{row.origin}: the chat template leaves out the tool calls of messages[{index}]",
                hint="take a model whose chat template writes tool calls",
            )
        probe = [*messages[:index], {**message, "content": _PROBE}]
        if message["content"].strip() and _PROBE not in self._render(row, probe):
            raise DataError(
                f"{row.origin}: the chat template leaves out what messages[{index}] says with its tool calls",
                hint="make its content null",
            )

    def _span(self, row: Row, text: str, messages: list[Message], index: int, header: str) -> Span:
        """The turn's text beyond what the template gives as the generation prompt."""
        upto = self._render(row, messages[: index + 1])
        prompt = self._asked(row, messages, index, header)
        if not (text.startswith(upto.rstrip()) and upto.startswith(prompt)):
            raise _inconsistent(row)
        return len(prompt), len(upto) if text.startswith(upto) else len(upto.rstrip())

    def _asked(self, row: Row, messages: list[Message], index: int, header: str) -> str:
        """The messages before a turn of the assistant, with the generation prompt."""
        before = self._render(row, messages[:index]) if index else ""
        prompt = self._render(row, messages[:index], generation_prompt=True) if index else ""
        if prompt == before and header.startswith(before):
            # the template knows no generation prompt, so the role header before the content stands for it;
            # a space stays with the content, because in most vocabularies it belongs to the word after it
            prompt = before + header[len(before) :].rstrip(" ")
        return prompt

    def _marked_spans(self, row: Row, messages: list[Message], turns: int) -> list[Span] | None:
        """The spans inside {% generation %}, or None where the marks do not give one per assistant turn."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        encoded = self._tokenizer.apply_chat_template(
            messages,
            tools=_tools(row),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        inside = False
        for marked, (start, end) in zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True):
            if marked:
                spans = [*spans[:-1], (spans[-1][0], end)] if inside else [*spans, (start, end)]
            inside = bool(marked)
        return spans if len(spans) == turns else None

    def _tokenise(self, row: Row, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """The ids of the text, and for each whether it holds a character of a span."""
        if not getattr(self._tokenizer, "is_fast", False):
            return self._tokenise_slowly(row, text, spans)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        flags = []
        for start, end in encoded["offset_mapping"]:
            # where a tokenizer trims offsets, a token of spaces has an empty one at its end
            first = min(start, end - 1)
            flags.append(any(end > low and first < high for low, high in spans))
        return list(encoded["input_ids"]), flags

    def _tokenise_slowly(self, row: Row, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Without offsets: the ids of the text up to each boundary must be the first ids of the whole."""
        ids = token_ids(self._tokenizer, text, special=False)
        flags = [False] * len(ids)
        for span in spans:
            first, last = (self._count_ids(row, text[:position], ids) for position in span)
            flags[first:last] = [True] * (last - first)
        return ids, flags

    def _count_ids(self, row: Row, prefix: str, ids: list[int]) -> int:
        prefix_ids = token_ids(self._tokenizer, prefix, special=False)
        if ids[: len(prefix_ids)] != prefix_ids:
            raise DataError(
                f"{row.origin}: a token straddles the border between a prompt and the assistant's turn, "
                "and this slow tokenizer gives no offsets to find it by",
                hint="use the fast version of the tokenizer, or --template human",
            )
        return len(prefix_ids)


def fix_date(tokenizer: Any, date: str) -> None:
    """Let the tokenizer's chat template print this date, in ISO form, where it asks for the present one.

    So the rows of a run have the same ids on every day on which it goes on.
    """

    def fixed(template: str) -> str:
        moment = datetime.fromisoformat(date)
        return _NOW.sub(lambda call: f"{call[1]}{moment.strftime(call[2])}{call[1]}", template)

    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        tokenizer.chat_template = {name: fixed(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = fixed(template)


def _closed_end(text: str, start: int, end: int, closing: str) -> int:
    """The span's end just after its end-of-turn text: without white space after it, and never without it."""
    stripped = start + len(text[start:end].rstrip())
    if text.endswith(closing, start, stripped):
        return stripped
    # the author's marks stop before the end-of-turn token, which the model must learn as well
    return next((at + len(closing) for at in (end, stripped) if text.startswith(closing, at)), stripped)


class _InconsistentError(DataError):
    """The messages up to a turn, as they are rendered, do not begin the text of which the turn is a part."""


def _inconsistent(row: Row) -> DataError:
    return _InconsistentError(
        f"{row.origin}: the chat template is not prefix-consistent: what it writes for an answer does not "
        "begin with its own generation prompt, so the assistant's tokens cannot be told apart",
        hint="mark the template with {% generation %}, or use --template human",
    )


def _last_turn(row: Row, messages: list[Message]) -> int:
    """The index of the last assistant message; each must say something or call a tool."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise empty_target(row, "the assistant's part")
    for index in turns:
        if "tool_calls" not in messages[index] and not messages[index]["content"].strip():
            raise empty_target(row, f"messages[{index}].content" if _is_chat(row) else "'output'")
    return turns[-1]


def _is_chat(row: Row) -> bool:
    return "messages" in row.values or "conversations" in row.values


def _messages(row: Row) -> list[Message]:
    if _is_chat(row):
        said = row.values["messages"] if "messages" in row.values else sharegpt_messages(row)
        return _after_system(row, _checked(row, said))
    if "output" not in row.values:
        raise missing_field(row, "messages' and no 'output", wanted="output")
    if "instruction" not in row.values and "input" not in row.values:
        raise missing_field(row, "instruction", wanted="instruction")
    asked = [field_text(row, name) for name in ("instruction", "input")]
    messages = [
        {"role": "system", "content": field_text(row, "system")},
        {"role": "user", "content": "\n".join(part for part in asked if part)},
    ]
    said = [message for message in messages if message["role"] == "user" or message["content"]]
    return [*said, {"role": "assistant", "content": required_text(row, "output")}]


def _after_system(row: Row, messages: list[Message]) -> list[Message]:
    """A column `system` beside the messages is the first of them (LLaMA-Factory writes such rows)."""
    system, first = field_text(row, "system"), messages[0]
    if not system:
        return messages
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first["content"].strip() != system.strip():
        raise DataError(
            f"{row.origin}: the field 'system' and the first message, of the {first['role']}, differ",
            hint="leave one out; a column of something else can be named otherwise: --fields unread=system",
        )
    return messages


def _checked(row: Row, value: Any) -> list[Message]:
    """The messages of a row, after checking that each has a role and a text."""
    where = f"{row.origin}: field 'messages'"
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else kind_of(value)
        raise DataError(f"{where}: expected a list of {{role, content}}; got {came}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}: expected {{role, content}} at [{index}]; got {kind_of(message)}")
        calls = _tool_calls(message.get("tool_calls"), f"{where}: tool_calls at [{index}]")
        message = {name: value for name, value in message.items() if name != "tool_calls"}
        if calls:
            message = {"content": None, **message, "tool_calls": calls}
        absent = [name for name in ("role", "content") if name not in message]
        if absent:
            raise DataError(
                f"{where}: no '{absent[0]}' at [{index}]; it has {', '.join(message) or 'no fields'}",
                hint='each message is written {"role": "user", "content": "…"}',
            )
        content = "" if message["content"] is None else message["content"]
        for name, text in (("role", message["role"]), ("content", content)):
            if not isinstance(text, str):
                raise DataError(f"{where}: expected text as '{name}' at [{index}]; got {kind_of(text)}")
        messages.append({**message, "content": check_text(content, f"{where} at [{index}]")})
    return messages


def _tool_calls(value: Any, where: str) -> list[Message]:
    """The calls, with their arguments as objects: many templates would write a text of JSON as JSON again."""
    calls: list[Message] = [] if value is None else value
    if not isinstance(calls, list):
        raise DataError(f"{where}: expected a list; got {kind_of(value)}")
    found = []
    for call in calls:
        function = _function(call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: expected calls that name a function",
                hint='each is written {"type": "function", "function": {"name": "…", "arguments": {…}}}',
            )
        if isinstance(function.get("arguments"), str):
            function = {**function, "arguments": _json(function["arguments"], f"{where}: arguments")}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _function(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else call


def _tools(row: Row) -> list[Any] | None:
    """The row's tools; a Parquet file may hold them as a text of JSON."""
    where, tools = f"{row.origin}: field 'tools'", row.values.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, where) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"{where}: expected a list of tools; got {kind_of(tools)}",
            hint="a column of something else can be named otherwise: --fields unread=tools",
        )
    return tools or None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: expected JSON; got {text[:60]!r}: {error}") from None
