"""Counters at vLLM's /metrics: loads, refusals, failures, and computed placeholders (must stay 0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["LOAD_FAILURES", "PrefixCounters", "PrefixStats"]

LOAD_FAILURES = "load_failures"
COUNTERS = {
    "loads": "prefixes written into the KV cache",
    "loaded_tokens": "virtual tokens written into the KV cache",
    "refused": "requests that reached the engine and were refused there",
    LOAD_FAILURES: "prefixes that could not be loaded; their requests failed",
    "computed_placeholders": "placeholders that were computed; anything but 0 means wrong answers",
}


@dataclass
class PrefixStats(KVConnectorStats):
    """Counts by name since the last report."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> PrefixStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class PrefixCounters(KVConnectorPromMetrics):
    """One counter per name and engine, as vllm:prefixtune_*."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labelvalues)
        self._counters = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:prefixtune_{name}", documentation=text, labelnames=labelnames
            )
            for engine, values in labelvalues.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            if (engine_idx, name) in self._counters:
                self._counters[engine_idx, name].inc(amount)
