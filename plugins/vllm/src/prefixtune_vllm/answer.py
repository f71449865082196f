"""An answer on its way to the client: it names the prefix, and is none where the prefix was not in it."""

from __future__ import annotations

import json

from prefixtune_vllm.asgi import Message, Send, refuse
from prefixtune_vllm.errors import RefusalError

__all__ = ["Answer"]


class Answer:
    """`send` for an application that was asked for `base` in place of `model`.

    Quotes inside JSON strings are escaped, so the bytes "model":"base" are the field and nothing else.
    """

    def __init__(self, send: Send, *, base: str, model: str) -> None:
        self._send = send
        self._old, self._new = (b'"model":' + json.dumps(name).encode() for name in (base, model))
        self._start: Message | None = None
        self._ended = False

    async def __call__(self, message: Message) -> None:
        """Pass on one ASGI message; the start waits for the first body, whose length it may tell."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body = message.get("body", b"")
        if b'"prefixtune_refusal":' in body:
            self._ended = True
            await self._withdraw()
            return
        named = body.replace(self._old, self._new, 1)
        if self._start is not None:
            start, self._start = self._start, None
            await self._send({**start, "headers": _longer(start["headers"], len(named) - len(body))})
        await self._send({**message, "body": named})

    async def _withdraw(self) -> None:
        """What was computed without its prefix never reaches a client."""
        refusal = RefusalError(500, "the answer was computed without its prefix, and is withheld")
        if self._start is not None:
            await refuse(self._send, refusal)
            return
        event = json.dumps(
            {"error": {"message": refusal.message, "type": "InternalServerError", "code": 500}}
        )
        await self._send({"type": "http.response.body", "body": f"data: {event}\n\n".encode()})


def _longer(headers: list[tuple[bytes, bytes]], by: int) -> list[tuple[bytes, bytes]]:
    return [
        (key, str(int(value) + by).encode() if key.lower() == b"content-length" else value)
        for key, value in headers
    ]
