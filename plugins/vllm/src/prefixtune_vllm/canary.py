"""Asks the running server what the toolkit was asked at export: the same greedy tokens must come back.

Through the whole application, so that tokenizer, connector, weights, precision and kernels are all in it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from prefixtune_vllm.asgi import App, Scope, ask
from prefixtune_vllm.errors import PrefixError, RefusalError
from prefixtune_vllm.export import Export, Prefix
from prefixtune_vllm.folder import read_tensors

__all__ = ["Canaries"]

log = logging.getLogger("vllm.prefixtune")

TIMEOUT = 300  # seconds; the first request of a server may compile
RETRY = 30  # seconds before a prefix that failed is asked again


class Canaries:
    """Which prefixes have been proven, by content.

    Args:
        app: the application inside the middleware.
        key: its API key, where it has one.
    """

    def __init__(self, app: App, export: Export, *, key: str | None) -> None:
        self._app, self._export, self._key = app, export, key
        self._proven: set[str] = set()
        self._failed: dict[str, float] = {}
        self._turn = asyncio.Lock()

    async def prove(self, prefix: Prefix, scope: Scope) -> None:
        """Return at once for a proven prefix; else ask its canary first.

        Raises:
            RefusalError: 503, where the tokens are not those of the export.
        """
        digest = prefix.stored.digest
        if digest in self._proven:
            return
        async with self._turn:
            if digest in self._proven:
                return
            now = asyncio.get_running_loop().time()
            if now - self._failed.get(digest, -RETRY) < RETRY:
                raise RefusalError(503, f"the prefix {prefix.name} did not pass its canary", param="model")
            try:
                await asyncio.to_thread(read_tensors, prefix.stored)
                await asyncio.wait_for(self._ask(prefix, scope), TIMEOUT)
            except (PrefixError, TimeoutError) as error:
                self._failed[digest] = now
                log.critical("%s: %s", prefix.name, error or "its canary did not come back in time")
                raise RefusalError(
                    503, f"the prefix {prefix.name} did not pass its canary: {error}", param="model"
                ) from None
            self._proven.add(digest)

    async def _ask(self, prefix: Prefix, scope: Scope) -> None:
        canary = prefix.canary
        body: dict[str, Any] = {
            "model": self._export.base,
            "prompt": self._export.placed(prefix, canary.prompt),
            "max_tokens": len(canary.tokens),
            "temperature": 0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": prefix.params,
            "cache_salt": prefix.salt,
        }
        reply = await ask(self._app, _scope(scope, self._key), "/v1/completions", body)
        answer = reply.json()
        if reply.status != 200 or not isinstance(answer, dict):
            raise PrefixError(f"its canary got HTTP {reply.status}: {reply.body[:300]!r}")
        if answer.get("kv_transfer_params"):
            raise PrefixError(f"its canary was computed without the prefix: {answer['kv_transfer_params']}")
        found = answer["choices"][0].get("token_ids")
        if found != list(canary.tokens):
            raise PrefixError(f"its canary gave the tokens {found}; at export {list(canary.tokens)}")


def _scope(scope: Scope, key: str | None) -> Scope:
    """A request of our own, with the server's key; `scope` may be that of the start."""
    headers = [(b"host", b"localhost")]
    if key is not None:
        headers.append((b"authorization", b"Bearer " + key.encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "headers": headers,
        "root_path": scope.get("root_path", ""),
        "app": scope.get("app"),
        "state": dict(scope.get("state") or {}),
    }
