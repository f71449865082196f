"""An application inside the middleware: vLLM's routes, a real tokenizer, and a record of what reached it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from prefixtune_vllm import PrefixMiddleware

ROOM = 768


@dataclass
class FakeServer:
    """Answers canaries as the export has them, and everything else with token 7.

    `spoiled`: what it does to the answer of a request; `reached`: (path, body) of those past the middleware.
    """

    folder: Path
    key: str | None = None
    spoiled: Any = None
    reached: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        self.template = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        transfer = {
            "kv_connector": "PrefixConnector",
            "kv_connector_extra_config": {"export": str(self.folder)},
        }
        args = SimpleNamespace(kv_transfer_config=transfer, api_key=[self.key] if self.key else None)
        self.state = SimpleNamespace(args=args)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            return await send({"type": "lifespan.startup.complete"})
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        raw = b"".join(parts)
        headers = dict(scope["headers"])
        assert int(headers.get(b"content-length", b"0")) == len(raw)
        body = json.loads(raw) if raw else None
        if scope["path"].startswith("/v1") and self.key:  # as vLLM's own, which guards no other routes
            given = headers.get(b"authorization")
            if given != b"Bearer " + self.key.encode():
                return await _reply(send, 401, {"error": "Unauthorized"})
        status, answer = self.answer(scope["path"], body)
        return await _reply(send, status, answer)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
        if path == "/tokenize":
            return 200, {"tokens": self._tokens(body), "max_model_len": ROOM}
        self.reached.append((path, body))
        tokens = [7]
        if body and body.get("ignore_eos") and isinstance(body.get("prompt"), list):
            tokens = self._canary(body) or tokens
        choice = {"index": 0, "text": "…", "token_ids": tokens}
        answer = {"id": "x", "model": body.get("model") if body else None, "choices": [choice]}
        return self.spoiled(answer) if self.spoiled else (200, answer)

    def _tokens(self, body: Any) -> list[int]:
        if "messages" not in body:
            special = body.get("add_special_tokens", True)
            return self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
        text = self.tokenizer.apply_chat_template(
            body["messages"],
            chat_template=self.template,
            add_generation_prompt=body.get("add_generation_prompt", True),
            tokenize=False,
            **body.get("chat_template_kwargs") or {},
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _canary(self, body: Any) -> list[int] | None:
        for file in self.folder.glob("prefixes/*/vllm.json"):
            record = json.loads(file.read_text())
            prompt = record["canary"]["prompt"]
            if record["sha256"] == body["cache_salt"] and body["prompt"][-len(prompt) :] == prompt:
                return record["canary"]["tokens"]
        return None


async def _reply(send: Any, status: int, document: Any) -> None:
    raw = json.dumps(document, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


class Client:
    """Talks to the middleware before a fake server, without a socket."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.middleware = server, PrefixMiddleware(server)

    def start(self) -> str:
        """Run the start; "complete", or why it failed."""
        sent: list[Any] = []

        async def run() -> None:
            async def receive() -> Any:
                return {"type": "lifespan.startup"}

            async def send(message: Any) -> None:
                sent.append(message)

            await self.middleware({"type": "lifespan", "app": self.server}, receive, send)

        asyncio.run(run())
        self.server.reached.clear()
        return sent[0].get("message", "complete") if sent[0]["type"].endswith("failed") else "complete"

    def send(
        self, path: str, body: Any = None, *, method: str = "POST", raw: bytes | None = None, key: str = ""
    ) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        raw = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        headers = [(b"host", b"x"), (b"content-length", str(len(raw)).encode())]
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "app": self.server,
        }
        sent: list[Any] = []

        async def run() -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": raw, "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message)

            await self.middleware(scope, receive, send)

        asyncio.run(run())
        whole = b"".join(message.get("body", b"") for message in sent[1:])
        lengths = dict(sent[0]["headers"])
        assert int(lengths[b"content-length"]) == len(whole)
        return sent[0]["status"], json.loads(whole)

    def chat(self, model: str, content: Any = "hello", **more: Any) -> tuple[int, Any]:
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.send("/v1/chat/completions", {"model": model, "messages": messages, **more})

    def complete(self, model: str, prompt: Any = "hello", **more: Any) -> tuple[int, Any]:
        return self.send("/v1/completions", {"model": model, "prompt": prompt, **more})
