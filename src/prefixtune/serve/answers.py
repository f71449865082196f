"""What an answer looks like to OpenAI's clients: whole, or in chunks. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from prefixtune.serve.problems import encoded
from prefixtune.serve.spelling import Spelled

__all__ = ["Answer", "Piece", "Shape", "TokenChance"]


@dataclass(frozen=True, kw_only=True)
class TokenChance:
    """A token with its log-probability, and the most probable ones in its place with theirs, best first.

    `offset` is how many characters of the answer are before it.
    """

    token: Spelled
    logprob: float
    top: tuple[tuple[Spelled, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of one answer: text, and the tokens that it ends with; `ended` closes it.

    `failure` ends the whole request: as a step's, or "unreadable" (the tokenizer failed).
    """

    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    ended: str | None = None
    failure: str | None = None


@dataclass(eq=False)
class Answer:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    chances: list[TokenChance] = field(default_factory=list)
    ended: str | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.chances += piece.chances
        self.ended = piece.ended or self.ended


@dataclass(eq=False, kw_only=True)
class Shape:
    """The frame of one response.

    Args:
        is_chat: /v1/chat/completions, else /v1/completions.
        fingerprint: which weights and which prefix answer.
        tells_chances: logprobs were asked for.
        tells_tokens: return_token_ids was asked for.
    """

    is_chat: bool
    model: str
    fingerprint: str
    prompt_tokens: int
    tells_chances: bool = False
    tells_tokens: bool = False
    tells_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid4().hex}"

    def whole(self, answers: Sequence[Answer]) -> bytes:
        """The response of a request without stream."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        made = sum(len(answer.tokens) for answer in answers)
        name = "chat.completion" if self.is_chat else "text_completion"
        return encoded({**self._frame(name), "choices": choices, "usage": self._usage(made)})

    def opening(self, count: int) -> list[bytes]:
        """The first chunks of a stream: in a chat, who speaks."""
        if not self.is_chat:
            return []
        role = {"role": "assistant", "content": ""}
        return [self._chunk([self._part(index, role, None)]) for index in range(count)]

    def chunk(self, piece: Piece) -> bytes:
        """What is new, as an event of a stream."""
        if not self.is_chat:
            answer = Answer(piece.text, list(piece.tokens), list(piece.chances), piece.ended)
            return self._chunk([self._choice(piece.index, answer)])
        delta = {"content": piece.text} if piece.text or piece.chances or piece.tokens else {}
        part = self._part(piece.index, delta, piece.ended)
        if self.tells_chances and piece.chances:
            part["logprobs"] = {"content": [_chat_chance(chance) for chance in piece.chances]}
        if self.tells_tokens:
            part["token_ids"] = list(piece.tokens)
        return self._chunk([part])

    def closing(self, made: int) -> list[bytes]:
        """The last events of a stream."""
        usage = [self._chunk([], usage=self._usage(made))] if self.tells_usage else []
        return [*usage, event(b"[DONE]")]

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": answer.ended, "logprobs": None}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            if self.tells_chances:
                choice["logprobs"] = {"content": [_chat_chance(chance) for chance in answer.chances]}
        else:
            choice["text"] = answer.text
            if self.tells_chances:
                choice["logprobs"] = _legacy_chances(answer.chances)
        if self.tells_tokens:
            choice["token_ids"] = answer.tokens
        return choice

    @staticmethod
    def _part(index: int, delta: dict[str, Any], ended: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": ended, "logprobs": None}

    def _frame(self, name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choices: list[dict[str, Any]], *, usage: dict[str, int] | None = None) -> bytes:
        name = "chat.completion.chunk" if self.is_chat else "text_completion"
        body: dict[str, Any] = {**self._frame(name), "choices": choices}
        if self.tells_usage:
            body["usage"] = usage
        return event(encoded(body))

    def _usage(self, made: int) -> dict[str, int]:
        read = self.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"


def _chat_chance(chance: TokenChance) -> dict[str, Any]:
    top = [_told(token, logprob) for token, logprob in chance.top]
    return {**_told(chance.token, chance.logprob), "top_logprobs": top}


def _told(token: Spelled, logprob: float) -> dict[str, Any]:
    spelled = None if token.raw is None else list(token.raw)
    return {"token": token.text, "logprob": max(logprob, -9999.0), "bytes": spelled}


def _legacy_chances(chances: Sequence[TokenChance]) -> dict[str, Any]:
    return {
        "tokens": [chance.token.text for chance in chances],
        "token_logprobs": [max(chance.logprob, -9999.0) for chance in chances],
        "top_logprobs": [_by_text(chance) for chance in chances],
        "text_offset": [chance.offset for chance in chances],
    }


def _by_text(chance: TokenChance) -> dict[str, float]:
    """Of tokens with the same text the most probable."""
    found: dict[str, float] = {}
    for token, logprob in (*chance.top, (chance.token, chance.logprob)):
        found.setdefault(token.text, max(logprob, -9999.0))
    return found
