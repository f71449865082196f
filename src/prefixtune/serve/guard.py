"""What every connection meets before any route: host, key, size of its body. Knows no route but one."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixtune.serve.problems import ApiError

__all__ = ["Guard"]

OPEN = "/healthz"  # answers without a key
ADMIN = "/admin"
HEAD_BYTES = 65_536  # names and values of all headers, and the path with its query
BODY_SECONDS = 30.0  # in which a body must have come
THROWN_AWAY, THROWN_AWAY_SECONDS = 8_388_608, 5.0  # of a body that is too large, before the answer


class Guard:
    """An ASGI application around another.

    Args:
        api_key: asked for by every route but /healthz, as a bearer token or as the password of HTTP basic
            authentication, which browsers know. None asks for none.
        admin_key: asked for by the routes under /admin, which None closes.
        body_limit: bytes; a longer body is refused, whether its length is told beforehand or not.
        hosts: names that a request may address the server by; None takes any. Without them a page whose own
            name is made to point here (DNS rebinding) could read the answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        admin_key: str | None,
        body_limit: int,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self._app, self._limit = app, body_limit
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._api, self._admin = _digest(api_key), _digest(admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            self._check_host(scope)
            self._check_key(scope)
            receive = await self._checked_body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if receive is not None:
            await self._app(scope, receive, send)

    @staticmethod
    def _check_head(scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope["path"]) + len(scope["query_string"]) > HEAD_BYTES:
            raise ApiError(431, f"the headers are larger than {HEAD_BYTES:,} bytes", code="headers_too_large")

    def _check_host(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        told = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(told) != 1 or _hostname(told[0]) not in self._hosts:
            raise ApiError(
                403,
                "the header Host names another machine; --allowed-host lets it be this one's name",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if path == OPEN:
            return
        is_admin = path == ADMIN or path.startswith(f"{ADMIN}/")
        wanted = self._admin if is_admin else self._api
        if wanted is None:
            if is_admin:
                raise ApiError(403, "the server was started without --admin-key", code="no_admin_key")
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # every candidate is compared, by digests of one length: the time tells nothing about the key
        fits = [hmac.compare_digest(sha256(key).digest(), wanted) for key in _keys(given)]
        if len(given) != 1 or not any(fits):
            scheme = 'Basic realm="prefixtune", charset="UTF-8"' if path == "/" else "Bearer"
            raise ApiError(
                401,
                "no key, or a wrong one: expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": scheme},
            )

    async def _checked_body(self, scope: Scope, receive: Receive) -> Any:
        """A `receive` that gives the body, which has come whole; None where the client has gone."""
        told = [value for name, value in scope["headers"] if name == b"content-length"]
        if told and any(name == b"transfer-encoding" for name, _ in scope["headers"]):
            # two lengths: what stands before the server may have believed the other one
            raise ApiError(
                400, "content-length and transfer-encoding exclude each other", code="invalid_header"
            )
        if any(not value.isdigit() for value in told) or len(set(told)) > 1:
            raise ApiError(400, "content-length is no number", code="invalid_header")
        if told and int(told[0][:20]) > self._limit:
            if not any(name == b"expect" for name, _ in scope["headers"]):
                await _throw_away(receive)
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._limit:
                        await _throw_away(receive)
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {BODY_SECONDS:.0f} s", headers={"connection": "close"}
            ) from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._limit:,} bytes",
            code="body_too_large",
            headers={"connection": "close"},
        )


def _hostname(header: str) -> str | None:
    """The name in a Host header, in lower case and without port; of an IPv6 address without brackets."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


async def _throw_away(receive: Receive) -> None:
    """Take the rest of a body, in bounds: a connection that is closed before that loses the answer too."""
    left = THROWN_AWAY
    with suppress(TimeoutError):
        async with asyncio.timeout(THROWN_AWAY_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _digest(key: str | None) -> bytes | None:
    return sha256(key.encode()).digest() if key is not None else None


def _keys(headers: Sequence[bytes]) -> list[bytes]:
    """What may be the key in these headers."""
    found = []
    for value in headers:
        scheme, _, rest = value.partition(b" ")
        if scheme.lower() == b"bearer":
            found.append(rest.strip())
        elif scheme.lower() == b"basic":
            try:
                found.append(base64.b64decode(rest.strip(), validate=True).partition(b":")[2])
            except binascii.Error:
                continue
    return found
