"""vLLM's KV connector: writes trained prefixes into the paged cache, before the step that needs them.

Tested with vLLM 0.32. The write goes through each attention layer's own do_kv_cache_update, so no layout of
the paged cache is assumed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from prefixtune_vllm.base import check_base, local_checkpoint
from prefixtune_vllm.errors import PrefixError
from prefixtune_vllm.export import PREFIXES, Export
from prefixtune_vllm.folder import read_folder, read_tensors
from prefixtune_vllm.ledger import Ledger, Load, Wanted
from prefixtune_vllm.metrics import LOAD_FAILURES, PrefixCounters, PrefixStats
from prefixtune_vllm.placement import check_layers, layer_index, own_heads, rows, slots

__all__ = ["PrefixConnector"]

log = logging.getLogger("vllm.prefixtune")

CACHE_BYTES = 4 << 30  # of prefixes kept in RAM by each worker
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers before a step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """Start vLLM with the command that `prefixtune export --to vllm` writes; it names this class.

    Raises:
        PrefixError: at the start, where a prefix is not for this model, or vLLM is set up so that prefixes
            cannot be exact. Once it runs, a request that cannot be served fails, and no other.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        folder = self._kv_transfer_config.get_from_extra_config("export", None)
        if not folder:
            raise PrefixError('kv_connector_extra_config: expected {"export": "the folder of the export"}')
        self._export = Export.read(folder)
        self._check_settings(vllm_config)
        (group,) = kv_cache_config.kv_cache_groups
        self._block_size = int(group.kv_cache_spec.block_size)
        self._config = vllm_config
        self._ledger = Ledger(self._export.placeholder)
        self._layers: dict[str, Any] = {}
        self._loaded: OrderedDict[str, Pairs] = OrderedDict()
        self._failed: set[int] = set()
        self._failures = 0

    def _check_settings(self, config: Any) -> None:
        transfer = self._kv_transfer_config
        if transfer.kv_load_failure_policy != "fail":
            raise PrefixError("kv_load_failure_policy: recomputed placeholders are garbage; expected fail")
        if config.speculative_config is not None:
            raise PrefixError("speculative decoding: the draft model has no prefix, and is not tested")
        groups = len(self._kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise PrefixError(f"expected one KV cache group; got {groups}: --disable-hybrid-kv-cache-manager")

    # --- in the scheduler: an exception in one of these ends the engine, and the ledger raises none

    def on_new_request(self, request: Any) -> None:
        self._ledger.admit(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._ledger.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._ledger.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        cached = scheduler_output.scheduled_cached_reqs
        scheduled = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
        scheduled += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        loads = self._ledger.step(scheduled)
        for line in self._ledger.take_news():
            log.critical(line)
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        refusal = self._ledger.finished(request)
        return False, None if refusal is None else {"prefixtune_refusal": refusal}

    # --- in the workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """At the start: every prefix must fit this model's cache and weights."""
        static = self._config.compilation_config.static_forward_context
        self._layers = {name: static[name] for name in kv_caches}
        model, parallel = self._config.model_config, self._config.parallel_config
        checkpoint = local_checkpoint(model.model, model.revision)
        for name in self._export.names():
            stored = self._export.find(name).stored
            ranks = get_tensor_model_parallel_world_size()
            is_whole = parallel.pipeline_parallel_size == 1
            check_layers(stored, self._layers, ranks=ranks, is_whole=is_whole)
            check_base(stored, checkpoint)
        log.info("%d prefixes for %s", len(self._export.names()), self._export.base)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            try:
                if load.wanted is None or load.refusal is not None:
                    raise PrefixError(load.refusal or "refused")
                self._write(load, self._tensors(load.wanted))
            except Exception as error:  # the blocks are reported, and vLLM fails the requests that hold them
                log.error("request %s: its prefix is not loaded: %s", load.request_id, error)
                self._failed.update(load.blocks)
                self._failures += 1

    def _tensors(self, wanted: Wanted) -> Pairs:
        """By content: what was replaced on disk since the request was made is not taken for it."""
        if wanted.digest not in self._loaded:
            stored = read_folder(self._export.folder / PREFIXES / wanted.name)
            if (stored.digest, stored.length) != (wanted.digest, wanted.length):
                raise PrefixError(f"{wanted.name} was replaced after the request was made; ask again")
            ranks = get_tensor_model_parallel_world_size()
            check_layers(stored, self._layers, ranks=ranks, is_whole=False)
            self._loaded[wanted.digest] = read_tensors(stored)
            while len(self._loaded) > 1 and sum(map(_nbytes, self._loaded.values())) > CACHE_BYTES:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(wanted.digest)
        return self._loaded[wanted.digest]

    def _write(self, load: Load, pairs: Pairs) -> None:
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        places = slots(load, self._block_size)
        for name, layer in self._layers.items():
            key, value = pairs[layer_index(name)]
            heads = own_heads(key.shape[0], rank=rank, ranks=ranks)
            cache = layer.kv_cache
            like = torch.empty(0, dtype=layer.kv_cache_torch_dtype, device=cache.device)
            layer.impl.do_kv_cache_update(
                layer,
                rows(key, load, heads, like),
                rows(value, load, heads, like),
                cache,
                places.to(cache.device),
            )

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done when start_load_kv returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # --- counters

    def get_kv_connector_stats(self) -> PrefixStats | None:
        if self.role == KVConnectorRole.SCHEDULER:
            return PrefixStats(data=self._ledger.take_counts())
        failures, self._failures = self._failures, 0
        return PrefixStats(data={LOAD_FAILURES: failures} if failures else {})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PrefixStats:
        return PrefixStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PrefixCounters:
        return PrefixCounters(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _nbytes(pairs: Pairs) -> int:
    return sum(key.nbytes + value.nbytes for key, value in pairs)
