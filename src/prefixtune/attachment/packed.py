"""Several documents in one row: each attends to the prefix and to itself, at positions from P on.

What all documents begin with may be run once: it is the first document then, and the others continue it.

The decoder runs on [1, T] tokens without padding; only attention knows where documents begin, through an
attention function that is registered with transformers. It needs no mask of T x T and no cache:

    document of t tokens:   queries [t]  against  keys [P prefix; t of its own]

Axes: H query heads, K kv heads, G = H / K, P prefix, T tokens of the pack, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixtune.attachment.documents import Layout, attend_documents
from prefixtune.attachment.experts import aligned_experts
from prefixtune.attachment.forward import refuse_positions
from prefixtune.attachment.head import decoder_of, last_hidden
from prefixtune.attachment.quicker import quicker
from prefixtune.errors import AttachError, UnsupportedModelError
from prefixtune.geometry import Geometry, has_values, text_config

__all__ = ["attending", "attention_configs", "packed", "refuse_extras"]

NAME = "prefixtune_packed"
T = TypeVar("T")
Pairs = Sequence[tuple[Tensor, Tensor]]
_ACTIVE: dict[int, _Pack] = {}  # by id of the config that an attention module reads, while a pack is run
# what models hand to their attention beyond the plain arguments, and what has no say here
IGNORED = {"position_ids", "cache_position"}


@dataclass
class _Pack:
    """One pack on its way through the decoder."""

    geometry: Geometry
    pairs: Pairs | None
    layouts: dict[int | None, Layout]  # by window
    hits: set[int]


@contextmanager
def packed(
    base: nn.Module, pairs: Pairs | None, lengths: Sequence[int], *, common: int = 0
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block, the callable takes ids [1, T] of documents end to end and gives hidden states [T, d].

    A backward pass through recomputed layers (gradient checkpointing) belongs into the block too.

    Args:
        pairs: (key, value) [K, P, D] of each layer, with gradient or without; None for the bare model.
        lengths: tokens of each document; they sum to T.
        common: tokens of the first document where all others continue it, so that it is run once for all.

    Raises:
        AttachError: another prefix is attached, or prefix and text take more positions than it is exact in.
        UnsupportedModelError: the model does not take part in this (see `packs`).
    """
    if getattr(base, "prefixtune_attached", False):
        raise AttachError("a prefix is attached to this model already", hint="leave attach(...) first")
    geometry = Geometry.probe(base)
    length = pairs[0][0].shape[1] if pairs is not None else 0
    device = next(base.parameters()).device
    if pairs is not None and has_values(base):  # an estimate counts rows that a run would refuse
        longest = common + max(lengths[1:] if common else lengths)
        refuse_positions(text_config(base), geometry, length + longest)
    windows = {layer.window for layer in geometry.layers}
    layouts = {w: Layout(tuple(lengths), length, w, device, common) for w in windows}
    pack = _Pack(geometry, pairs, layouts, set())
    positions = next(iter(layouts.values())).positions[None].to(device)  # [1, T]

    def hidden(input_ids: Tensor) -> Tensor:
        pack.hits.clear()
        found = last_hidden(base, input_ids=input_ids, position_ids=positions)[0]
        if len(pack.hits) != len(geometry.layers):
            raise UnsupportedModelError(f"{type(base).__name__}: {_missed(pack)} does not attend by document")
        return found

    base.prefixtune_attached = True  # type: ignore[assignment]
    try:
        attention = attending(attention_configs(base), NAME, _ACTIVE, pack)
        with attention, aligned_experts(base), quicker(base):
            yield hidden
    finally:
        del base.prefixtune_attached


@contextmanager
def attending(configs: Sequence[Any], name: str, table: dict[int, T], running: T) -> Iterator[None]:
    """Within the block all attention goes to the registered function `name`, with `running` in its `table`.

    Args:
        configs: those that attention modules read; their ids are the table's keys.
    """
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
        table[id(config)] = running
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
            table.pop(id(config), None)


def _missed(pack: _Pack) -> str:
    return f"layer {min(set(range(len(pack.geometry.layers))) - pack.hits)}"


def attention_configs(base: nn.Module) -> list[Any]:
    """The configurations that the decoder's attention modules read; to find them takes 2 ms of a pass."""
    found = {id(m.config): m.config for m in decoder_of(base).modules() if hasattr(m, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer for the running pack: query [1, H, T, D], key and value [1, K, T, D]."""
    refuse_extras(module, query, attention_mask, others)
    pack, layer = _ACTIVE[id(module.config)], module.layer_idx
    pack.hits.add(layer)
    prefix = pack.pairs[layer] if pack.pairs is not None else None
    out = attend_documents(
        query[0],
        key[0],
        value[0],
        prefix,
        pack.layouts[pack.geometry.layers[layer].window],
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None  # [1, T, H, D]


def refuse_extras(module: Any, query: Tensor, mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a model hands its attention something that would have no effect."""
    unknown = [name for name, given in others.items() if isinstance(given, Tensor) and name not in IGNORED]
    if unknown or mask is not None or query.shape[0] != 1:
        what = unknown[0] if unknown else "a mask of its own" if query.shape[0] == 1 else "several rows"
        raise UnsupportedModelError(f"{type(module).__name__} gives its attention {what}")


# compiled layers leave attention out: it reads a table by id, and its tiles change with every pack
_uncompiled: Any = torch.compiler.disable
AttentionInterface.register(NAME, _uncompiled(_packed_attention))
