"""The few pieces of ASGI that a middleware needs. Knows no prefix."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from prefixtune_vllm.errors import RefusalError

__all__ = ["App", "Reply", "Scope", "ask", "forward", "header", "read_body", "refuse", "relay", "reply_json"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Reply:
    """A whole answer of the application inside."""

    status: int
    headers: Headers
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None where it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


async def read_body(receive: Receive) -> bytes | None:
    """The request's whole body; None where the client has gone."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def header(scope: Scope, name: bytes) -> bytes | None:
    """A request header; names are in lower case."""
    return next((value for key, value in scope["headers"] if key.lower() == name), None)


async def forward(app: App, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Pass a request on with another body; afterwards `receive` tells when the client goes."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    await app({**scope, "headers": _with_length(scope["headers"], len(body))}, replay, send)


async def ask(app: App, scope: Scope, path: str, body: Any = None) -> Reply:
    """Ask the application inside, as the client of `scope` does: a POST with a JSON body, or a GET."""
    raw = b"" if body is None else json.dumps(body).encode()
    headers = _with_length(_without(scope["headers"], b"content-type", b"content-encoding"), len(raw))
    inner = {
        **scope,
        "method": "GET" if body is None else "POST",
        "path": scope.get("root_path", "") + path,
        "raw_path": (scope.get("root_path", "") + path).encode(),
        "query_string": b"",
        "headers": [*headers, (b"content-type", b"application/json")],
    }
    status, kept, parts = 500, [], []

    async def collect(message: Message) -> None:
        nonlocal status, kept
        if message["type"] == "http.response.start":
            status, kept = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await forward(app, inner, raw, _never, collect)
    return Reply(status, kept, b"".join(parts))


async def reply_json(send: Send, status: int, document: Any) -> None:
    raw = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


async def refuse(send: Send, refusal: RefusalError) -> None:
    """An error in OpenAI's shape."""
    kind = {404: "NotFoundError", 503: "ServiceUnavailableError"}.get(
        refusal.status, "BadRequestError" if refusal.status < 500 else "InternalServerError"
    )
    error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.status}
    await reply_json(send, refusal.status, {"error": error})


async def relay(send: Send, reply: Reply) -> None:
    """An answer of the application inside, as it is."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
    await send({"type": "http.response.body", "body": reply.body})


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def _with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> Headers:
    kept = _without(headers, b"content-length", b"transfer-encoding")
    return [*kept, (b"content-length", str(length).encode())]


def _without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> Headers:
    return [(key, value) for key, value in headers if key.lower() not in names]
