"""Which request needs which prefix loaded where, and whether one ever went without. Knows no vLLM.

To an engine a prefix is a cache, and a miss means: compute these tokens. Computed placeholders are silent
garbage, so every way to a miss ends in a load that fails, which fails the request and no other. Nothing here
raises on what a request holds: an exception in a scheduler hook ends the engine.

Tokens are counted from the start of the prompt, placeholders included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune_vllm.export import PARAMS

__all__ = ["Ledger", "Load", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """The prefix of a request: where to look for it, what it must be, and how long it is."""

    name: str
    digest: str
    length: int


@dataclass(frozen=True)
class Load:
    """Write tokens start..stop-1 of a prefix into a request's `blocks`; with a `refusal` fail them."""

    request_id: str
    wanted: Wanted | None
    start: int
    stop: int
    blocks: tuple[int, ...]
    refusal: str | None = None


@dataclass
class Ledger:
    """The scheduler's side of the connector.

    Args:
        placeholder: the reserved token's id.

    Attributes:
        counts: loads, loaded_tokens, refused, computed_placeholders, since the last `take_counts`.
        alarm: what went wrong, once placeholders were computed; from then on no request gets a prefix.
    """

    placeholder: int
    alarm: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # for the log, which is not known here
    _wanted: dict[str, Wanted] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _pending: dict[str, Load] = field(default_factory=dict)

    def admit(self, request: Any) -> None:
        """Look at a new request once; one that cannot be served exactly is refused from here on."""
        try:
            wanted, refusal = self._judge(request)
        except Exception as error:  # nothing in a request may end the engine
            wanted, refusal = None, f"{type(error).__name__}: {error}"
        if wanted is not None:
            self._wanted[request.request_id] = wanted
        if refusal is not None:
            self._refused[request.request_id] = refusal
            self._count("refused")
            self.news.append(f"request {request.request_id} is refused: {refusal}")
        if wanted is not None or refusal is not None:
            # vLLM ignores what a connector has where this is set, as prompt log-probabilities do; a refused
            # request keeps it until `matched`, so that it finds no block and all of it can be promised
            request.skip_reading_prefix_cache = refusal is not None

    def matched(self, request: Any, computed: int) -> int | None:
        """How many tokens after the first `computed` ones will be loaded; None: never schedule the request.

        A refused request is promised all its tokens but the last, so that a failed load can end it.
        """
        if request.request_id in self._refused:
            request.skip_reading_prefix_cache = False
            return max(request.num_tokens - 1 - computed, 0) or None
        wanted = self._wanted.get(request.request_id)
        return 0 if wanted is None else max(wanted.length - computed, 0)

    def allocated(self, request: Any, blocks: Sequence[int], external: int) -> None:
        """Blocks were given to a request, `external` of whose tokens will be loaded."""
        wanted, refusal = self._wanted.get(request.request_id), self._refused.get(request.request_id)
        if wanted is None and refusal is None:
            return
        self._blocks[request.request_id] = tuple(blocks)
        if external > 0:
            stop = request.num_tokens - 1 if refusal or wanted is None else wanted.length
            self._pending[request.request_id] = Load(
                request.request_id, wanted, stop - external, stop, tuple(blocks), refusal
            )

    def step(self, scheduled: Iterable[tuple[str, int]]) -> list[Load]:
        """The loads before a step in which `scheduled` requests compute, each from its n-th token on."""
        loads = list(self._pending.values())
        self._pending.clear()
        for load in loads:
            if load.refusal is None:
                self._count("loads")
                self._count("loaded_tokens", load.stop - load.start)
        for request_id, computed in scheduled:
            wanted = self._wanted.get(request_id)
            if wanted is None or request_id in self._refused or computed >= wanted.length:
                continue
            self._alert(request_id, wanted, computed)
        # blocks with garbage are reported until the request has ended; the first step may be too early for it
        loads += [
            Load(
                request_id, None, 0, len(self._blocks.get(request_id, ())), self._blocks[request_id], refusal
            )
            for request_id, refusal in self._refused.items()
            if refusal == self.alarm and request_id in self._blocks
        ]
        return loads

    def finished(self, request: Any) -> str | None:
        """Forget a request; returns why what it gave must not be believed, if so."""
        self._wanted.pop(request.request_id, None)
        self._pending.pop(request.request_id, None)
        self._blocks.pop(request.request_id, None)
        return self._refused.pop(request.request_id, None)

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last call."""
        counts, self.counts = self.counts, {}
        return counts

    def take_news(self) -> list[str]:
        """What is to be logged since the last call."""
        news, self.news = self.news, []
        return news

    def _judge(self, request: Any) -> tuple[Wanted | None, str | None]:
        """The prefix that a request is for, and why it is refused; neither where it is for none."""
        params = request.kv_transfer_params
        record = params.get(PARAMS) if isinstance(params, dict) else None
        ids = request.prompt_token_ids
        if record is None:
            stray = ids is not None and self.placeholder in ids
            return None, "it holds the reserved token, but is for no prefix" if stray else None
        wanted = Wanted(str(record["name"]), str(record["digest"]), int(record["length"]))
        sampling = request.sampling_params
        if self.alarm is not None:
            return wanted, f"placeholders were computed before: {self.alarm}"
        if ids is None or len(ids) <= wanted.length:
            return wanted, "no text follows the prefix"
        if any(token != self.placeholder for token in ids[: wanted.length]):
            return wanted, f"the prompt does not begin with {wanted.length} placeholders"
        if self.placeholder in ids[wanted.length :]:
            return wanted, "the reserved token is in the text"
        if request.cache_salt != wanted.digest:
            return wanted, "its cache_salt is not the prefix's digest"
        if sampling is None or getattr(sampling, "prompt_logprobs", None) is not None:
            return wanted, "prompt log-probabilities would compute the placeholders"
        return wanted, None

    def _alert(self, request_id: str, wanted: Wanted, computed: int) -> None:
        said = f"request {request_id} with prefix {wanted.name}: computed from token {computed} on"
        self._count("computed_placeholders", wanted.length - computed)
        self.alarm = self.alarm or said
        self._refused[request_id] = self.alarm
        self.news.append(f"PLACEHOLDERS WERE COMPUTED: {said}. No request gets a prefix any more; restart.")

    def _count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount
