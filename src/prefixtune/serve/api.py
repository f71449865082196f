"""The routes: OpenAI's, the admin's and the operator's. Knows no model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.errors import PrefixTuneError
from prefixtune.serve.answers import Answer, Piece, Shape, event
from prefixtune.serve.guard import Guard
from prefixtune.serve.job import OverloadedError
from prefixtune.serve.problems import ApiError, encoded, invalid_body
from prefixtune.serve.running import Asked, Running
from prefixtune.serve.schema import ChatRequest, CompletionRequest, LoadRequest
from prefixtune.serve.service import Service
from prefixtune.serve.store import Served, UnknownPrefixError

__all__ = ["build_app"]

FAILURES = {  # why the engine gave up, and what the client is told
    "timeout": ApiError(504, "the request took too long", code="timeout"),
    "shutdown": ApiError(503, "the server is shutting down", code="shutdown", headers={"retry-after": "10"}),
    "broken": ApiError(500, "the model failed on this request", code="engine_error"),
    "unreadable": ApiError(500, "the tokenizer failed on this answer", code="tokenizer_error"),
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": "an error in OpenAI's shape"}
    for code in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
KINDS: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}  # whole, or in chunks
ANSWERS = {200: {"description": "an answer in OpenAI's shape", "content": KINDS}, **ERRORS}
CLIENT_GONE = 499  # nobody reads it; the log does


def build_app(
    service: Service,
    *,
    api_key: str | None = None,
    admin_key: str | None = None,
    cors: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
) -> ASGIApp:
    """The application of a service. Starting and stopping it starts and stops the engine.

    Args:
        api_key: asked for by every route but /healthz; None asks for none.
        admin_key: opens the routes under /admin, which are closed without one.
        cors: origins whose pages may call the server; none unless given.
        hosts: names that the header Host may have; None takes any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close(0)
        await asyncio.to_thread(service.engine.join, 10)

    app = FastAPI(
        title="prefixtune", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    _handle_errors(app, service)
    _add_openai(app, service)
    _add_admin(app, service)
    _add_operations(app, service)
    guarded: ASGIApp = Guard(
        app, api_key=api_key, admin_key=admin_key, body_limit=service.config.body_limit, hosts=hosts
    )
    if cors:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return _logged(guarded, service)


def _add_openai(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "prefixtune"}

    @app.get("/v1/models", responses={401: ERRORS[401]})
    def models() -> Response:
        names = [service.name, *(f"{service.name}:{name}" for name in service.store.names())]
        return _json({"object": "list", "data": [card(name) for name in names]})

    @app.get("/v1/models/{model:path}", responses={404: ERRORS[404]})
    def model(model: str) -> Response:
        base, _, prefix = model.partition(f"{service.name}:")
        if model != service.name and (base or prefix not in service.store.names()):
            raise ApiError(404, f"there is no model {model!r}", code="model_not_found", param="model")
        return _json(card(model))

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        found = await asyncio.to_thread(service.chat, body)
        return await _respond(service, request, body, found)

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        found = await asyncio.to_thread(service.completion, body)
        return await _respond(service, request, body, found)


async def _respond(
    service: Service,
    request: Request,
    body: ChatRequest | CompletionRequest,
    found: tuple[Asked, Shape, Served | None],
) -> Response:
    asked, shape, served = found
    note = request.scope["prefixtune.log"]
    note |= {"model": body.model, "prefix": served.digest[:16] if served else None, "user": body.user}
    note["prompt_tokens"] = shape.prompt_tokens
    if service.config.log_prompts:
        note["request"] = body.model_dump(exclude_none=True)
    try:
        running = Running(service.engine, service.tokenizer, service.metrics, asked, speller=service.speller)
    except OverloadedError as error:
        status = 503 if error.closing else 429
        raise ApiError(
            status,
            error.message,
            code="shutdown" if error.closing else "overloaded",
            headers={"retry-after": str(error.retry_after)},
        ) from None
    service.metrics.prompt_tokens.inc(shape.prompt_tokens)
    note["running"] = running
    return _Stream(running, shape) if body.stream else _Whole(running, shape)


class _Whole(Response):
    """All answers at once, unless the client goes away first."""

    def __init__(self, running: Running, shape: Shape) -> None:
        super().__init__()
        self._running, self._shape = running, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def collect() -> None:
            answers = [Answer() for _ in range(self._running.asked.answers)]
            async for piece in self._running:
                if piece.failure is not None:
                    self._running.cancel()
                    await FAILURES[piece.failure].response()(scope, receive, send)
                    return
                answers[piece.index].take(piece)
            _log(answers, scope)
            body = self._shape.whole(answers)
            await Response(body, media_type="application/json")(scope, receive, send)

        await _unless_gone(collect, receive, self._running, scope)


class _Stream(Response):
    """Server-sent events. The status goes with the first token: a failure before it has its own."""

    def __init__(self, running: Running, shape: Shape) -> None:
        super().__init__()
        self._running, self._shape = running, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = [Answer() for _ in range(self._running.asked.answers)]

        async def write() -> None:
            started = False
            async for piece in self._running:
                if piece.failure is not None:
                    self._running.cancel()
                    await self._fail(FAILURES[piece.failure], started, scope, receive, send)
                    return
                answers[piece.index].take(piece)
                if not started:
                    started = True
                    await self._start(send)
                data = b"".join(self._events(piece))
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            last = b"".join(self._shape.closing(self._running.made))
            await send({"type": "http.response.body", "body": last})

        try:
            await _unless_gone(write, receive, self._running, scope)
        finally:
            _log(answers, scope)  # of one that was cut, what was sent

    def _events(self, piece: Piece) -> list[bytes]:
        shape = self._shape
        new = piece.text or (piece.tokens and (shape.tells_tokens or shape.tells_chances))
        if piece.ended is None or not shape.is_chat:
            return [shape.chunk(piece)] if new or piece.ended is not None else []
        told = Piece(index=piece.index, text=piece.text, tokens=piece.tokens, chances=piece.chances)
        return [
            *([shape.chunk(told)] if new else []),
            shape.chunk(Piece(index=piece.index, ended=piece.ended)),
        ]

    async def _start(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        first = b"".join(self._shape.opening(self._running.asked.answers))
        await send({"type": "http.response.body", "body": first, "more_body": True})

    @staticmethod
    async def _fail(error: ApiError, started: bool, scope: Scope, receive: Receive, send: Send) -> None:
        if not started:
            await error.response()(scope, receive, send)
            return
        scope["prefixtune.log"]["failure"] = error.code
        await send({"type": "http.response.body", "body": event(encoded(error.body()))})


def _log(answers: Sequence[Answer], scope: Scope) -> None:
    """For --log-prompts, which has the request in the log."""
    if scope["prefixtune.log"].get("request"):
        scope["prefixtune.log"]["answers"] = [answer.text for answer in answers]


async def _unless_gone(
    work: Callable[[], Awaitable[None]], receive: Receive, running: Running, scope: Scope
) -> None:
    """Do the work; if the client goes away meanwhile, its rows are free before the next token."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        else:
            scope["prefixtune.log"]["status"] = CLIENT_GONE
    except OSError:  # the connection broke while something was sent
        scope["prefixtune.log"]["status"] = CLIENT_GONE
    finally:
        running.cancel()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _add_admin(app: FastAPI, service: Service) -> None:
    store = service.store

    def known(name: str, act: Callable[[], None]) -> Response:
        try:
            act()
        except UnknownPrefixError as error:
            raise ApiError(404, error.message, code="prefix_not_found", param="name") from None
        except PrefixTuneError as error:
            raise ApiError(400, error.message, code="prefix_refused", param="folder") from None
        return _json({"name": name, "models": len(store.names())})

    @app.get("/admin/prefixes", responses={401: ERRORS[401]})
    def listed() -> Response:
        return _json({"data": store.describe(), "bytes_in_memory": store.bytes_in_memory})

    @app.post("/admin/prefixes", responses=ERRORS)
    def load(body: LoadRequest) -> Response:
        return known(body.name, lambda: store.add_within(body.name, body.folder or body.name))

    @app.post("/admin/prefixes/{name}/reload", responses=ERRORS)
    def reload(name: str) -> Response:
        return known(name, lambda: store.refresh(name))

    @app.delete("/admin/prefixes/{name}", responses=ERRORS)
    def unload(name: str) -> Response:
        return known(name, lambda: store.remove(name))


def _add_operations(app: FastAPI, service: Service) -> None:
    page = files("prefixtune.serve").joinpath("playground.html").read_text(encoding="utf-8")

    @app.get("/healthz", responses={503: ERRORS[503]})
    async def health() -> Response:
        return _json({"status": "ok" if service.is_well else "closing"}, 200 if service.is_well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        )
        return HTMLResponse(page, headers={"content-security-policy": policy, "x-frame-options": "DENY"})


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return invalid_body(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        told = {404: f"there is no route {request.url.path}", 405: f"{request.method} is not for this route"}
        message = told.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def mistake(request: Request, error: Exception) -> Response:
        service.log.write("failure", where=request.url.path, error=f"{type(error).__name__}: {error}")
        return ApiError(500, "a mistake of the server", code="internal_error").response()


def _logged(app: ASGIApp, service: Service) -> ASGIApp:
    """One line for each answered request, with its counts and times."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        start, note = time.monotonic(), dict[str, Any]()
        scope["prefixtune.log"] = note

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                note.setdefault("status", message["status"])
            await send(message)

        try:
            await app(scope, receive, watched)
            note.setdefault("status", CLIENT_GONE)  # before its body had come
        finally:
            _write(service, scope, note, time.monotonic() - start)

    return call


def _write(service: Service, scope: Scope, note: dict[str, Any], seconds: float) -> None:
    running: Running | None = note.pop("running", None)
    status = note.pop("status", 500)
    route = getattr(scope.get("route"), "path", None)  # the pattern: a client's path is no label
    service.metrics.requests.labels(route or "none", str(status)).inc()
    if running is not None:
        note |= {"completion_tokens": running.made, "first_token_seconds": running.first}
        service.metrics.seconds.observe(seconds)
        if status == CLIENT_GONE:
            service.metrics.cancelled.inc()
    service.log.write(
        "request", method=scope["method"], route=route, status=status, seconds=round(seconds, 4), **note
    )


def _json(value: Any, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")
