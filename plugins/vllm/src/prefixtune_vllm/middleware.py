"""ASGI middleware: `base:name` becomes the base model with P placeholders, a KV load and a content salt.

vllm serve MODEL --middleware prefixtune_vllm.PrefixMiddleware, with the connector; the settings are those of
the connector. The server does not start unless the canary of each prefix comes back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from prefixtune_vllm.answer import Answer
from prefixtune_vllm.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    ask,
    forward,
    read_body,
    refuse,
    relay,
    reply_json,
)
from prefixtune_vllm.canary import Canaries
from prefixtune_vllm.errors import PrefixError, RefusalError
from prefixtune_vllm.export import Export, Prefix
from prefixtune_vllm.rules import (
    check_client,
    check_prompt,
    split_model,
    split_prompts,
    to_tokenize,
    with_prefix,
)

__all__ = ["PrefixMiddleware"]

log = logging.getLogger("vllm.prefixtune")

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"


class PrefixMiddleware:
    """Fails closed: until the canaries have come back, and whatever it does not know, it refuses."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._export: Export | None = None
        self._canaries: Canaries | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(scope, receive, send)
        if scope["type"] != "http":  # no socket is needed for text, and none is looked into
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        try:
            await self._http(scope, receive, send)
        except RefusalError as refusal:
            unknown = await ask(self.app, scope, MODELS)
            if unknown.status in (401, 403):  # without a key there is nothing to learn here
                await relay(send, unknown)
            else:
                await refuse(send, refusal)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if path == MODELS and scope["method"] == "GET":
                return await self._models(scope, send)
            return await self.app(scope, receive, send)
        raw = await read_body(receive)
        if raw is None:
            return None
        if not raw:
            return await forward(self.app, scope, raw, receive, send)
        export, canaries = self._ready()
        body = _parsed(raw)
        check_client(body, export)
        name = split_model(body.get("model"), export.base) if isinstance(body, dict) else None
        if name is None:
            return await forward(self.app, scope, json.dumps(body).encode(), receive, send)
        if path not in (CHAT, COMPLETIONS):
            raise RefusalError(404, f"a prefix answers at {CHAT} and {COMPLETIONS} only", param="model")
        prefix = await asyncio.to_thread(_find, export, name)
        await canaries.prove(prefix, scope)
        is_chat = path == CHAT
        asked = with_prefix(body, prefix, export, is_chat=is_chat)
        if is_chat:
            ids, room = await self._tokens(scope, to_tokenize(asked))
            check_prompt(ids, prefix, export, room=room)
        else:
            asked["prompt"] = await self._prompts(scope, asked, prefix, export)
        answer = Answer(send, base=export.base, model=body["model"])
        await forward(self.app, scope, json.dumps(asked).encode(), receive, answer)
        return None

    async def _prompts(
        self, scope: Scope, asked: Mapping[str, Any], prefix: Prefix, export: Export
    ) -> list[list[int]]:
        """A completion's prompts as token ids, the prefix first: in a text nothing could stand before <s>."""
        prompts = []
        for prompt in split_prompts(asked.get("prompt")):
            if isinstance(prompt, str):
                special = asked.get("add_special_tokens", True)
                text = {"model": export.base, "prompt": prompt, "add_special_tokens": special}
                ids, _ = await self._tokens(scope, text)
                prompts.append(export.placed(prefix, ids))
            else:
                prompts.append(export.placed(prefix, prompt))
        return prompts

    async def _tokens(self, scope: Scope, body: Mapping[str, Any]) -> tuple[list[int], int]:
        """The tokens that vLLM makes of a text or a chat, and how many it takes."""
        reply = await ask(self.app, scope, "/tokenize", body)
        found = reply.json()
        if reply.status != 200 or not isinstance(found, dict):
            error = found.get("error") if isinstance(found, dict) else None
            message = error.get("message") if isinstance(error, dict) else None
            raise RefusalError(reply.status, str(message or "the prompt cannot be made into tokens"))
        return found["tokens"], found["max_model_len"]

    def _ready(self) -> tuple[Export, Canaries]:
        if self._export is None or self._canaries is None:
            raise RefusalError(503, "the prefixes have not been checked yet")
        return self._export, self._canaries

    async def _models(self, scope: Scope, send: Send) -> None:
        reply = await ask(self.app, scope, MODELS)
        listed = reply.json()
        if reply.status != 200 or self._export is None or not isinstance(listed, dict):
            await relay(send, reply)
            return
        data: list[dict[str, Any]] = listed["data"]
        base = next((model for model in data if model["id"] == self._export.base), {})
        names = await asyncio.to_thread(self._export.names)
        more = [{**base, "id": f"{self._export.base}:{name}", "parent": self._export.base} for name in names]
        await reply_json(send, 200, {**listed, "data": [*data, *more]})

    # --- the start

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._start(scope)
                except Exception as error:
                    log.critical("the server does not start: %s", error)
                    message = {"type": "lifespan.startup.failed", "message": f"prefixtune: {error}"}
            await send(message)

        await self.app(scope, receive, guarded)

    async def _start(self, scope: Scope) -> None:
        """Read the export, and ask each canary through the whole application."""
        args = scope["app"].state.args
        export = Export.read(_export_folder(args.kv_transfer_config))
        key = next((key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key), None)
        canaries = Canaries(self.app, export, key=key)
        names = export.names()
        for name in names:
            await canaries.prove(export.find(name), scope)
        self._export, self._canaries = export, canaries
        log.info("%d prefixes gave the tokens that they gave at export: %s", len(names), ", ".join(names))


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise RefusalError(400, "expected JSON") from None


def _find(export: Export, name: str) -> Prefix:
    try:
        return export.find(name)
    except KeyError:
        raise RefusalError(404, f"there is no prefix {name!r}", param="model") from None
    except PrefixError as error:
        log.error("%s: %s", name, error)
        raise RefusalError(
            503, f"the prefix {name} cannot be used now; see the server's log", param="model"
        ) from None


def _export_folder(transfer: Any) -> str:
    """Where the connector, whose settings these are, has its prefixes."""
    settings = transfer if isinstance(transfer, Mapping) else vars(transfer or object)
    folder = (settings.get("kv_connector_extra_config") or {}).get("export")
    if settings.get("kv_connector") != "PrefixConnector" or not folder:
        raise PrefixError("vLLM runs without PrefixConnector, so prefixes would be computed: use serve.sh")
    return str(folder)
