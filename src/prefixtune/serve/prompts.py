"""Messages to token ids, in the way that a prefix was trained. Knows no HTTP and no engine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

from prefixtune.config import DataConfig
from prefixtune.data import Row, build_prompts, default_template
from prefixtune.data.row import check_text
from prefixtune.errors import DataError
from prefixtune.generate import PLACEHOLDER, conversation_ids

__all__ = ["Prompts"]

Message = dict[str, str]


class Prompts:
    """Writes prompts for one tokenizer. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer may be borrowed by one at a time

    def template(self, trained: str | None) -> str:
        """The one that a prefix was trained with; else chat where the tokenizer can, or the default."""
        return trained or default_template(self._tokenizer, chat=True)

    def of_messages(self, messages: Sequence[Message], trained: str | None) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks next.

        Args:
            messages: {role, content}, with the roles system, user and assistant.
            trained: the template of the prefix, None for the bare base.

        Raises:
            DataError: the template has no place for these messages.
        """
        template = self.template(trained)
        for index, message in enumerate(messages):
            check_text(message["content"], f"messages[{index}].content")
        if template != "chat":
            turns, last = _turns(messages, template)
            with self._lock:
                return conversation_ids(turns, last, self._tokenizer, template)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not message["content"].strip():
                raise DataError(
                    f"messages[{index}].content: this turn of the assistant is empty",
                    hint="leave it out, or say what the assistant said",
                )
        said = [*messages, {"role": "assistant", "content": PLACEHOLDER}]
        config = DataConfig(template=template, max_length=sys.maxsize)
        with self._lock:
            rows = [Row(values={"messages": said}, origin="messages")]
            return list(build_prompts(rows, self._tokenizer, config)[0].input_ids)

    def of_text(self, text: str) -> list[int]:
        """Token ids of a plain text, as the tokenizer gives them: to be continued, not answered."""
        check_text(text, "prompt")
        with self._lock:
            ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids


def _turns(messages: Sequence[Message], template: str) -> tuple[list[tuple[str, str]], str]:
    """Questions with their answers, and the last question."""
    roles = [message["role"] for message in messages]
    if "system" in roles:
        raise DataError(
            f"messages: the template {template!r} has no place for a message of the system",
            hint="say it in the user's message, in the form that the prefix was trained with",
        )
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise DataError(
            f"messages: the template {template!r} needs user and assistant in turns, the user first and last;"
            f" got {', '.join(roles)}"
        )
    said = [message["content"] for message in messages]
    return list(zip(said[:-1:2], said[1::2], strict=True)), said[-1]
