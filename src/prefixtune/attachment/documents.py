"""Attention of the documents of a pack to a shared prefix and to themselves.

On a CPU it is done in tiles: up to 128 queries, and of the keys only those from the start of the tile's first
document on. So little is computed that a mask would hide, and the number of operations grows with the tokens
of a pack, not with its documents. On a GPU one fused kernel with a mask is faster than many small ones.
Scores and softmax are float32 whatever the model's precision: in bfloat16 the gradient would be visibly off.

Axes: H query heads, K kv heads, G = H / K, P prefix, T tokens, D head dim, N = the keys of all tiles, each
with its copy of the prefix: [P; keys of tile 1; P; keys of tile 2; ...]. Queries that share a kv head lie
together: [K, T*G, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layout", "attend_documents"]

STEP = 32  # sizes are multiples of it: oneDNN keeps a kernel for each size that it meets
TILE = 128  # queries: below it matmuls get slow, above it too much of the future is computed


@dataclass(frozen=True)
class Tile:
    """Queries `first` to `last` of the pack, and the keys from `lowest` on: `start` to `end` of N."""

    first: int
    last: int
    lowest: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where the documents of a pack, and the tiles of its attention, are.

    Attributes:
        lengths: tokens of each document.
        prefix: virtual tokens P.
        window: how many positions a token sees, itself included; None for all before it.
        device: of the model.
    """

    lengths: tuple[int, ...]
    prefix: int
    window: int | None
    device: torch.device

    @cached_property
    def document(self) -> Tensor:
        """[T] the number of each token's document; on the host."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """[T] positions: each document's begin at P; on the host."""
        return self.prefix + torch.cat([torch.arange(t) for t in self.lengths])

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        tokens, begins = sum(self.lengths), list(accumulate(self.lengths, initial=0))
        size = -(-tokens // -(-tokens // TILE))  # tiles of nearly equal size, of few sizes
        size = -(-size // STEP) * STEP
        found, key = [], 0
        for first in range(0, tokens, size):
            last = min(tokens, first + size)
            lowest = begins[int(self.document[first])]
            if self.window is not None:
                lowest = max(lowest, first - self.window + 1)
            lowest -= lowest % STEP
            end = key + self.prefix + last - lowest
            found.append(Tile(first, last, lowest, key, end))
            key = end
        return tuple(found)

    @cached_property
    def gather(self) -> Tensor:
        """[N] where each key is in [prefix; pack]."""
        front = torch.arange(self.prefix)
        parts = [(front, torch.arange(self.prefix + t.lowest, self.prefix + t.last)) for t in self.tiles]
        return torch.cat([part for pair in parts for part in pair]).to(self.device)

    def masks(self, groups: int) -> list[Tensor]:
        """For each tile [queries*G, keys] in float32: 0 where a query sees a key, -inf elsewhere."""
        if groups not in self._masks:
            self._masks[groups] = [
                torch.zeros(seen.shape)
                .masked_fill_(~seen, float("-inf"))
                .repeat_interleave(groups, 0)
                .to(self.device)
                for seen in (self._seen(tile.first, tile.last, tile.lowest) for tile in self.tiles)
            ]
        return self._masks[groups]

    @cached_property
    def _masks(self) -> dict[int, list[Tensor]]:
        return {}

    def whole(self) -> Tensor:
        """[T, P+T] bool: what each token sees of [prefix; pack]."""
        return self._seen(0, sum(self.lengths), 0).to(self.device)

    def _seen(self, first: int, last: int, lowest: int) -> Tensor:
        """[queries, P + keys] bool for queries `first` to `last` and the pack's keys from `lowest` on."""
        place = self.positions[first:last, None]
        distance = place - torch.cat([torch.arange(self.prefix), self.positions[lowest:last]])
        same = self.document[first:last, None] == self.document[lowest:last]
        mine = torch.cat([same.new_ones(last - first, self.prefix), same], dim=1)
        return mine & (distance >= 0) & (distance < (self.window or last + self.prefix))


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    layout: Layout,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each document to [prefix; itself].

    Args:
        query: [H, T, D]; key: [K, T, D]; value: [K, T, Dv].
        prefix: key [K, P, D] and value [K, P, Dv], in any precision.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [H] logits that take part in the softmax and carry no value (gpt-oss).

    Returns:
        [T, H, Dv] in the query's precision.
    """
    prefix = prefix or (key[:, :0], value[:, :0])
    plain = not softcap and sinks is None
    if plain and query.is_cuda:
        return _attend_at_once(query, key, value, prefix, layout, scale=scale, dropout=dropout)
    if plain and dropout == 0.0:
        out: Tensor = _Documents.apply(query, key, value, *prefix, layout, scale)  # type: ignore[no-untyped-call]
        return out
    groups, by_group = len(query) // len(key), _by_group(query, len(key))
    key, value = _with_prefix(key, prefix[0], layout), _with_prefix(value, prefix[1], layout)  # [K, N, D]
    parts = []
    for tile, mask in zip(layout.tiles, layout.masks(groups), strict=True):
        rows, seen = slice(tile.first * groups, tile.last * groups), slice(tile.start, tile.end)
        scores = _wide(by_group[:, rows]) @ _wide(key[:, seen]).transpose(1, 2) * scale  # [K, t*G, keys]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask.to(scores.dtype)
        if sinks is not None:
            sink = sinks.to(scores).view(len(key), 1, groups).expand(-1, tile.last - tile.first, -1)
            scores = torch.cat([scores, sink.reshape(len(key), -1, 1)], dim=2)
        weights = torch.softmax(scores, dim=2)[..., : tile.end - tile.start].to(query.dtype)
        parts.append(F.dropout(weights, dropout) @ value[:, seen])
    return _by_token(torch.cat(parts, dim=1), groups)


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    layout: Layout,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """`attend_documents` by one call with a mask over [prefix; pack]."""
    keys = torch.cat([prefix[0].to(key), key], dim=1)[None]
    values = torch.cat([prefix[1].to(value), value], dim=1)[None]
    return F.scaled_dot_product_attention(
        query[None], keys, values, layout.whole(), dropout, scale=scale, enable_gqa=len(query) != len(key)
    )[0].transpose(0, 1)


def _with_prefix(text: Tensor, prefix: Tensor, layout: Layout) -> Tensor:
    """[K, T, D] and [K, P, D] to [K, N, D]: the prefix before each document."""
    return torch.cat([prefix.to(text), text], dim=1).index_select(1, layout.gather)


def _by_group(rows: Tensor, kv_heads: int) -> Tensor:
    """[H, T, D] to [K, T*G, D]."""
    heads, tokens, dim = rows.shape
    return rows.reshape(kv_heads, heads // kv_heads, tokens, dim).transpose(1, 2).reshape(kv_heads, -1, dim)


def _by_token(rows: Tensor, groups: int) -> Tensor:
    """[K, T*G, D] to [T, H, D]."""
    kv_heads, _, dim = rows.shape
    return rows.reshape(kv_heads, -1, groups, dim).transpose(0, 1).reshape(-1, kv_heads * groups, dim)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _Documents(torch.autograd.Function):
    """The plain case by hand: keeps the weights of each tile in the model's precision, and no scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        layout: Layout,
        scale: float,
    ) -> Tensor:
        groups = len(query) // len(key)
        ctx.layout, ctx.scale, ctx.groups = layout, scale, groups
        ctx.prefix_dtypes = prefix_key.dtype, prefix_value.dtype
        query = _by_group(query, len(key))  # [K, T*G, D]
        key, value = _with_prefix(key, prefix_key, layout), _with_prefix(value, prefix_value, layout)
        wide_query, wide_key = _wide(query), _wide(key).transpose(1, 2)
        parts, kept = [], []
        for tile, mask in zip(layout.tiles, layout.masks(groups), strict=True):
            rows, seen = slice(tile.first * groups, tile.last * groups), slice(tile.start, tile.end)
            mask = mask.to(wide_query.dtype)
            scores = torch.baddbmm(mask, wide_query[:, rows], wide_key[:, :, seen], alpha=scale)
            weights = torch.softmax(scores, dim=2).to(query.dtype)  # [K, t*G, keys]
            parts.append(weights @ value[:, seen])
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return _by_token(torch.cat(parts, dim=1), groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        layout, groups = ctx.layout, ctx.groups
        gradient = _by_group(gradient.transpose(0, 1), len(key))  # [K, T*G, Dv]
        values = value.transpose(1, 2)
        of_query, of_key, of_value = [], [], []
        for tile, weights in zip(layout.tiles, kept, strict=True):
            rows, seen = slice(tile.first * groups, tile.last * groups), slice(tile.start, tile.end)
            of_value.append(weights.transpose(1, 2) @ gradient[:, rows])
            of_weights = gradient[:, rows] @ values[:, :, seen]
            of_scores = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype)  # float32 within
            if ctx.needs_input_grad[0]:
                of_query.append(of_scores @ key[:, seen])
            of_key.append(of_scores.transpose(1, 2) @ query[:, rows])
        by_query = _by_token(torch.cat(of_query, dim=1), groups).mul_(ctx.scale) if of_query else None
        prefix_key, text_key = _apart(torch.cat(of_key, dim=1), layout)
        prefix_value, text_value = _apart(torch.cat(of_value, dim=1), layout)
        return (
            None if by_query is None else by_query.transpose(0, 1),
            text_key.mul_(ctx.scale).to(key.dtype),
            text_value.to(value.dtype),
            (prefix_key * ctx.scale).to(ctx.prefix_dtypes[0]),
            prefix_value.to(ctx.prefix_dtypes[1]),
            None,
            None,
        )


def _apart(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Sums of [K, N, D] over the tiles, in float32: of the prefix [K, P, D] and of the text [K, T, D]."""
    size = layout.prefix + sum(layout.lengths)
    wide = _wide(gradient)
    total = wide.new_zeros(len(wide), size, wide.shape[2]).index_add_(1, layout.gather, wide)
    return total[:, : layout.prefix], total[:, layout.prefix :]
