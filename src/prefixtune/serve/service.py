"""The served model: what its requests may ask for, and what they become. Knows no routes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.attachment import most_positions
from prefixtune.errors import ConfigError, DataError, PrefixTuneError
from prefixtune.fingerprint import Fingerprint
from prefixtune.generate import ending
from prefixtune.serve.answers import Shape
from prefixtune.serve.config import ServeConfig
from prefixtune.serve.engine import Engine
from prefixtune.serve.layout import lay_out
from prefixtune.serve.log import Log
from prefixtune.serve.metrics import Metrics
from prefixtune.serve.problems import ApiError
from prefixtune.serve.prompts import Prompts
from prefixtune.serve.running import Asked
from prefixtune.serve.sampling import Sampling
from prefixtune.serve.schema import ChatRequest, CompletionRequest
from prefixtune.serve.selftest import Way, check_batches
from prefixtune.serve.spelling import Speller
from prefixtune.serve.store import PrefixUnavailableError, Served, Store, UnknownPrefixError

__all__ = ["Service"]

COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions gives unless told


class Service:
    """A base model, its prefixes and its engine.

    Args:
        model, tokenizer: the base; nobody else may run it meanwhile.
        name: what clients call it.
        prefixes: names to folders; each must be good.
        prefix_dir: each good prefix folder in it is served under its name; the others are told in the log.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly.
        StorageError: a folder of `prefixes` cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        config: ServeConfig,
        prefixes: Mapping[str, Path] | None = None,
        prefix_dir: Path | None = None,
        log: Log | None = None,
    ) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.log, self.metrics = log or Log(), Metrics()
        self._rows = config.rows
        self.engine = self._checked_engine(model)
        self.prompts, self.speller = Prompts(tokenizer), Speller(tokenizer)
        self._ends, self._chat_ends = (
            frozenset(ending(model, tokenizer, template)["eos_token_id"] or ()) for template in (None, "chat")
        )
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        limits = (most_positions(model), config.max_length)
        self.max_length = min((limit for limit in limits if limit is not None), default=config.cached_tokens)
        self._base_digest = Fingerprint.of(model).digest
        self.store = Store(
            model,
            base_name=name,
            budget=config.prefix_memory * 1_000_000,
            folder=prefix_dir,
            on_event=self._prefix_event,
        )
        for prefix, folder in (prefixes or {}).items():
            self.store.add(prefix, folder)
        self.store.refresh()
        self.created = int(time.time())
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, name="prefixtune-watch", daemon=True)
        self._add_gauges()

    def start(self) -> None:
        self.engine.start()
        if self.config.watch:
            self._watch.start()

    def close(self, seconds: float) -> None:
        """Take nothing new; what runs may go on for so long."""
        self._stop.set()
        self.engine.close(seconds)

    @property
    def is_well(self) -> bool:
        return self.engine.is_alive and not self.engine.is_closing

    # --- what a request becomes

    def chat(self, request: ChatRequest) -> tuple[Asked, Shape, Served | None]:
        """Reads a prefix and tokenises, so call it outside the event loop.

        Raises:
            ApiError: the request cannot be answered, by its own fault or by a damaged prefix.
        """
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are one thing", param="max_tokens")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        served = self.find(request.model)
        messages = [message.plain() for message in request.messages]
        ids = _or_400(
            "messages", lambda: self.prompts.of_messages(messages, served.template if served else None)
        )
        wanted = request.max_tokens or request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._asked(request, [ids], served, wanted=wanted, logprobs=logprobs, default=None)

    def completion(self, request: CompletionRequest) -> tuple[Asked, Shape, Served | None]:
        """As `chat`, for a text that is continued as it is."""
        served = self.find(request.model)
        prompts = []
        for prompt in request.prompts():
            if isinstance(prompt, str):
                prompts.append(_or_400("prompt", lambda text=prompt: self.prompts.of_text(text)))
            else:
                prompts.append(prompt)
        wanted, default = request.max_tokens, COMPLETION_TOKENS
        return self._asked(
            request, prompts, served, wanted=wanted, logprobs=request.logprobs, default=default
        )

    def find(self, model: str) -> Served | None:
        """The prefix that a model's name asks for; None for the base.

        Raises:
            ApiError: there is none of this name, or it cannot be read.
        """
        if model == self.name:
            return None
        base, colon, prefix = model.partition(f"{self.name}:")
        missing = ApiError(
            404,
            f"there is no model {model!r}; GET /v1/models lists them",
            code="model_not_found",
            param="model",
        )
        if base or not colon:
            raise missing
        misses, start = self.store.misses, time.monotonic()
        try:
            served = self.store.get(prefix)
        except UnknownPrefixError:
            raise missing from None
        except PrefixUnavailableError as error:
            self.log.write("prefix", what="unavailable", name=prefix, why=error.message)
            raise ApiError(
                503, f"the prefix {prefix!r} cannot be read now", code="prefix_unavailable", param="model"
            ) from None
        if self.store.misses > misses:
            self.metrics.prefix_misses.inc()
            self.metrics.prefix_load.observe(time.monotonic() - start)
        else:
            self.metrics.prefix_hits.inc()
        return served

    def _asked(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        served: Served | None,
        *,
        wanted: int | None,
        logprobs: int | None,
        default: int | None,
    ) -> tuple[Asked, Shape, Served | None]:
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        trained = served.template if served else None
        form = self.prompts.template(trained) if isinstance(request, ChatRequest) else trained
        count = request.n or 1
        max_tokens = self._room(prompts, served, count, wanted=wanted, default=default)
        temperature = 1.0 if request.temperature is None else request.temperature
        samplings = [
            Sampling(
                temperature=temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=None if request.seed is None else (request.seed + answer) % 2**63,
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                logprobs=logprobs,
            )
            for answer in range(count)
        ]
        asked = Asked(
            prompts=prompts,
            prefix=served.kv if served else None,
            samplings=samplings,
            max_tokens=max_tokens,
            ends=self._chat_ends if form == "chat" else self._ends,
            stops=request.stops(),
            timeout=self.config.timeout,
        )
        shape = Shape(
            is_chat=isinstance(request, ChatRequest),
            model=request.model,
            fingerprint=f"{self._base_digest[:8]}-{served.digest[:16] if served else 'base'}",
            prompt_tokens=sum(map(len, prompts)),
            tells_chances=logprobs is not None,
            tells_tokens=bool(request.return_token_ids),
            tells_usage=bool(request.stream_options and request.stream_options.include_usage),
        )
        return asked, shape, served

    def _room(
        self,
        prompts: list[list[int]],
        served: Served | None,
        count: int,
        *,
        wanted: int | None,
        default: int | None,
    ) -> int:
        """How many tokens an answer may have.

        Raises:
            ApiError: prefix, prompt and answer do not fit, or a token is none of the model's.
        """
        if len(prompts) * count > self._rows:
            raise ApiError(400, f"at most {self._rows} answers at once: prompts times n", param="n")
        taken = served.kv.length if served else 0
        longest = max(map(len, prompts))
        if not all(prompts):
            raise ApiError(400, "a prompt is empty: there is no token to continue", param="prompt")
        if max(map(max, prompts)) >= self._vocabulary:
            raise ApiError(
                400, f"prompt: the model knows the tokens 0 to {self._vocabulary - 1}", param="prompt"
            )
        behind = f" after a prefix of {taken}" if taken else ""
        room = min(self.max_length, self.config.cached_tokens // count) - taken - longest
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"too long: {longest} prompt tokens{behind} and {wanted or 1} of the answer; together may be "
                f"{room + taken + longest}",
                code="context_length_exceeded",
                param="messages" if default is None else "prompt",
            )
        if wanted is not None and wanted > self.config.max_tokens:
            raise ApiError(
                400, f"max_tokens: this server gives at most {self.config.max_tokens}", param="max_tokens"
            )
        return wanted if wanted is not None else min(default or self.config.max_tokens, room)

    # --- parts

    def _checked_engine(self, model: Any) -> Engine:
        """The engine, after its batches were compared with one row at a time."""
        lay_out(model)
        found: list[Way | BaseException] = []

        def check() -> None:
            try:
                found.append(check_batches(model))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=check, daemon=True)
        thread.start()
        thread.join(self.config.startup_timeout)
        if not found:
            raise PrefixTuneError(
                f"the check of the engine took more than {self.config.startup_timeout:.0f} s",
                hint="raise --startup-timeout",
            )
        way = found[0]
        if isinstance(way, BaseException):
            raise way
        for note in way.notes:
            self.log.write("start", note=note)
        self._rows = self._rows if way.together else 1
        return Engine(
            model,
            passes=way.passes,
            rows=self._rows,
            queue=self.config.queue,
            cached_tokens=self.config.cached_tokens,
            chunk=self.config.chunk,
            # rows of an embedding beyond the tokenizer are padding, and have no text
            vocabulary=max(self.tokenizer.get_vocab().values()) + 1,
            observe=self.metrics.batch_rows.observe,
            report=self._engine_failed,
        )

    def _engine_failed(self, error: Exception) -> None:
        self.metrics.failures.inc()
        self.log.write("failure", where="engine", error=f"{type(error).__name__}: {error}")

    def _prefix_event(self, event: str, name: str, why: str) -> None:
        self.metrics.prefix_events.labels(event).inc()
        if event != "added" or self._watch_runs():
            self.log.write("prefix", what=event, name=name, why=why or None)

    def _watch_runs(self) -> bool:
        return hasattr(self, "_watch") and self._watch.is_alive()

    def _look(self) -> None:
        while not self._stop.wait(self.config.watch):
            try:
                self.store.refresh()
            except Exception as error:  # a disk that fails now may not fail the next time
                self.log.write("failure", where="watch", error=f"{type(error).__name__}: {error}")

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("queue_length", "requests that wait for a row", lambda: self.engine.waiting)
        gauge("active_rows", "answers and prompts under way", lambda: self.engine.active)
        gauge("prefixes", "prefixes that can be asked for", lambda: len(self.store.names()))
        gauge("prefixes_in_memory", "prefixes in memory", lambda: self.store.count_in_memory)
        gauge("prefix_bytes_in_memory", "their bytes", lambda: self.store.bytes_in_memory)


def _or_400(param: str, make: Any) -> list[int]:
    try:
        ids: list[int] = make()
        return ids
    except (ConfigError, DataError) as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise ApiError(400, f"{error.message}{hint}", param=param) from None
