"""What Prometheus reads. Knows no request's content; one set per server, none of the process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters, gauges and histograms of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "answered requests", ("route", "status"))
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens read, without prefixes")
        self.generated_tokens = self._counter("generated_tokens", "tokens generated")
        self.prefix_events = self._counter("prefix_events", "what happened to prefixes", ("event",))
        self.prefix_hits = self._counter("prefix_hits", "prefixes that were in memory when asked for")
        self.prefix_misses = self._counter("prefix_misses", "prefixes that had to be read from disk")
        self.cancelled = self._counter("cancelled", "requests whose client went away")
        self.failures = self._counter("failures", "passes of the model, or of the engine, that failed")
        self.batch_rows = self._histogram("batch_rows", "rows in a pass of the batch", ROWS)
        self.first_token = self._histogram("first_token_seconds", "arrival to first token", SECONDS)
        self.next_token = self._histogram("next_token_seconds", "between two tokens of an answer", SECONDS)
        self.seconds = self._histogram("request_seconds", "arrival to the last token", SECONDS)
        self.prefix_load = self._histogram("prefix_load_seconds", "reading a prefix from disk", SECONDS)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(f"prefixtune_{name}", text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        found: bytes = generate_latest(self._registry)
        return found

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"prefixtune_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"prefixtune_{name}", text, registry=self._registry, buckets=buckets)
