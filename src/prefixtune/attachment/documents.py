"""Attention of the documents of a pack to a shared prefix, to a common beginning, and to themselves.

On a CPU it is done in tiles: 64 queries, and of the keys only those from the start of the tile's first
document on. Tiles with about as many keys share one batched matmul, so that the number of operations grows
with the tokens of a pack, not with its documents, and little is computed that a mask would hide. On a GPU one
fused kernel with a mask is faster than many small ones. Scores and softmax are float32 whatever the model's
precision: in bfloat16 the gradient would be visibly off.

Axes: H query heads, K kv heads, G = H / K, P prefix, C common tokens, T tokens with these, D head dim; of a
batch of tiles: n tiles, S queries and W keys of each, prefix and common tokens among them. Queries that share
a kv head lie together: [n*K, S*G, D].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

__all__ = ["Layout", "attend_documents"]

STEP = 32  # sizes are multiples of it: oneDNN keeps a kernel for each size that it meets
TILE = 64  # queries: below it matmuls get slow, above it too much of the future is computed
SIMILAR = 0.7  # tiles share a matmul while the shortest has this share of the longest's keys
SCORES = 2**19  # of a matmul, at most, where it has more than one tile: what a core's caches hold


@dataclass(frozen=True)
class Tile:
    """Queries `first` to `last` of the pack, and its keys from `lowest` to `last`, beside the front."""

    first: int
    last: int
    lowest: int

    @property
    def keys(self) -> int:
        return max(0, self.last - self.lowest)


@dataclass(frozen=True)
class Batch:
    """Tiles that are attended at once.

    Attributes:
        queries: [n*K*S] where each query is in the rows [T*K, G*D].
        keys: [n*K*W] where each key is in the rows [(P+T)*K, D]; the first where a tile has fewer.
        mask: [n*K, S*G, W] float32, 0 where a query sees a key, -inf elsewhere.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the documents of a pack, and the tiles of its attention, are.

    Attributes:
        lengths: tokens of each document.
        prefix: virtual tokens P.
        window: how many positions a token sees, itself included; None for all before it.
        device: of the model.
        common: tokens C of the first document, which all others continue; 0 where they begin by themselves.
    """

    lengths: tuple[int, ...]
    prefix: int
    window: int | None
    device: torch.device
    common: int = 0
    _batches: dict[tuple[int, int], list[Batch]] = field(default_factory=dict, compare=False)

    @cached_property
    def document(self) -> Tensor:
        """[T] the number of each token's document; on the host."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """[T] positions: the first document's begin at P, those of the others after C more; on the host."""
        begins = [self.prefix, *[self.front] * (len(self.lengths) - 1)]
        return torch.cat([torch.arange(t) + begin for t, begin in zip(self.lengths, begins, strict=True)])

    @property
    def front(self) -> int:
        """Keys before a document: P + C."""
        return self.prefix + self.common

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        begins = list(accumulate(self.lengths, initial=0))
        found = []
        for first in range(0, begins[-1], TILE):
            lowest = max(self.common, begins[bisect_right(begins, first) - 1])
            if self.window is not None:
                lowest = max(lowest, first - self.window + 1)
            found.append(Tile(first, min(begins[-1], first + TILE), lowest))
        return tuple(found)

    def batches(self, heads: int, kv_heads: int) -> list[Batch]:
        """The tiles in batches, the longest first; made once for each shape of attention."""
        if (heads, kv_heads) not in self._batches:
            self._batches[heads, kv_heads] = [
                self._batch(tiles, kv_heads, heads // kv_heads) for tiles in self._alike(heads)
            ]
        return self._batches[heads, kv_heads]

    def _alike(self, heads: int) -> list[list[Tile]]:
        found: list[list[Tile]] = []
        for tile in sorted(self.tiles, key=lambda tile: (tile.first - tile.last, -tile.keys)):
            if found:
                longest = found[-1][0]
                alike = tile.last - tile.first == longest.last - longest.first
                similar = tile.keys >= SIMILAR * longest.keys
                scores = (len(found[-1]) + 1) * heads * TILE * (self.front + longest.keys)
                if alike and similar and scores <= SCORES:
                    found[-1].append(tile)
                    continue
            found.append([tile])
        return found

    def _batch(self, tiles: Sequence[Tile], kv_heads: int, groups: int) -> Batch:
        width = self.front + max(tile.keys for tile in tiles)
        width = -(-width // STEP) * STEP
        front, head = torch.arange(self.front), torch.arange(kv_heads)
        keys, seen = [], []
        for tile in tiles:
            spare = width - self.front - tile.keys
            text = torch.arange(tile.keys) + self.prefix + tile.lowest
            keys.append(F.pad(torch.cat([front, text]), (0, spare)))
            seen.append(F.pad(self._seen(tile.first, tile.last, tile.lowest), (0, spare)))
        queries = torch.stack([torch.arange(tile.first, tile.last) for tile in tiles])
        hidden = ~torch.stack(seen).repeat_interleave(groups, 1)  # [n, S*G, W]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return Batch(
            (queries[:, None] * kv_heads + head[:, None]).flatten().to(self.device),
            (torch.stack(keys)[:, None] * kv_heads + head[:, None]).flatten().to(self.device),
            mask.repeat_interleave(kv_heads, 0).to(self.device),
        )

    @cached_property
    def whole(self) -> Tensor:
        """[T, P+T] bool: what each token sees of [prefix; pack]."""
        return self._seen(0, sum(self.lengths), self.common).to(self.device)

    def _seen(self, first: int, last: int, lowest: int) -> Tensor:
        """[queries, P+C + keys] bool for queries `first` to `last` and the pack's keys from `lowest` on."""
        place = self.positions[first:last, None]
        distance = place - torch.cat([torch.arange(self.front), self.positions[lowest:last]])
        same = self.document[first:last, None] == self.document[lowest:last]
        mine = torch.cat([same.new_ones(last - first, self.front), same], dim=1)
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
    """Softmax attention of each document to [prefix; common tokens; itself].

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
    trained = sinks is not None and sinks.requires_grad and torch.is_grad_enabled()
    if not query.is_cuda and dropout == 0.0 and not trained:
        given = (query, key, value, *prefix, layout, scale, softcap, sinks)
        out: Tensor = _Documents.apply(*given)  # type: ignore[no-untyped-call]
        return out
    queries, keys, values = _rows(query, len(key)), _joined(key, prefix[0]), _joined(value, prefix[1])
    heads, tokens, dim = query.shape
    batches, parts = layout.batches(heads, len(key)), []
    for batch in batches:
        shape, groups = batch.mask.shape, heads // len(key)
        scores = _wide(_take(queries, batch.queries, (*shape[:2], dim))) @ _wide(
            _take(keys, batch.keys, (shape[0], shape[2], dim))
        ).transpose(1, 2)
        scores = scores * scale  # [n*K, S*G, W]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + batch.mask.to(scores.dtype)
        if sinks is not None:
            of_row = sinks.to(scores).view(1, len(key), 1, groups)
            of_row = of_row.expand(shape[0] // len(key), -1, shape[1] // groups, -1)
            scores = torch.cat([scores, of_row.reshape(*shape[:2], 1)], dim=2)
        weights = torch.softmax(scores, dim=2)[..., : shape[2]].to(query.dtype)
        found = F.dropout(weights, dropout) @ _take(values, batch.keys, (shape[0], shape[2], value.shape[2]))
        parts.append(found.reshape(len(batch.queries), -1))
    order = torch.cat([batch.queries for batch in batches])
    rows = torch.cat(parts)
    return torch.zeros_like(rows).index_copy(0, order, rows).view(tokens, heads, -1)


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
    groups = len(query) // len(key)
    # a kv head for each query head: for enable_gqa with a mask CUDA has the kernel with whole scores alone
    keys, values = (
        torch.cat([before.to(text), text], dim=1).repeat_interleave(groups, dim=0)[None]
        for before, text in zip(prefix, (key, value), strict=True)
    )
    found = F.scaled_dot_product_attention(query[None], keys, values, layout.whole, dropout, scale=scale)
    return found[0].transpose(0, 1)


def _rows(query: Tensor, kv_heads: int) -> Tensor:
    """[H, T, D] to [T*K, G*D]: no copy where a model's projection lies behind it."""
    heads, tokens, dim = query.shape
    return query.transpose(0, 1).reshape(tokens * kv_heads, heads // kv_heads * dim)


def _joined(text: Tensor, prefix: Tensor) -> Tensor:
    """[K, T, D] and [K, P, D] to [(P+T)*K, D]."""
    return torch.cat([prefix.to(text).transpose(0, 1), text.transpose(0, 1)]).flatten(0, 1)


def _largest_last(batches: Sequence[Batch]) -> list[Batch]:
    return sorted(batches, key=lambda batch: batch.mask.numel())


def _take(rows: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.index_select(0, index).view(shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _capped(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """tanh(scale * query key'), [n*K, S*G, W]: scores as shares of their soft cap."""
    return (query @ key.transpose(1, 2)).mul_(scale).tanh_()


def _softmax_beside(scores: Tensor, sinks: Tensor) -> Tensor:
    """Softmax of scores [n*K, S*G, W], in their place, beside one more logit for each query head [K, G]."""
    many, rows, _ = scores.shape
    kv_heads, groups = sinks.shape
    of_row = sinks.to(scores)[None, :, None].expand(many // kv_heads, -1, rows // groups, -1)
    of_row = of_row.reshape(many, rows, 1)
    highest = torch.maximum(scores.amax(2, keepdim=True), of_row)
    scores.sub_(highest).exp_()
    return scores.div_(scores.sum(2, keepdim=True) + (of_row - highest).exp_())


class _Documents(torch.autograd.Function):
    """On a CPU by hand: keeps the weights of each batch in the model's precision, and no scores.

    Keys and values, which several tiles have, are kept once and gathered again for the backward pass. Where
    scores have a soft cap, its slope is computed again too.

    Of tensors without data, whose bytes an estimate counts, the two largest batches alone are computed: one's
    tensors go when the next one's take their names. Of the others there is what is kept.
    """

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
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        (heads, tokens, dim), kv_heads = query.shape, len(key)
        ctx.softcap = softcap
        ctx.batches, ctx.scale, ctx.kv_heads, ctx.dim = layout.batches(heads, kv_heads), scale, kv_heads, dim
        ctx.prefix = prefix_key.shape[1], prefix_key.dtype, prefix_value.dtype
        queries = _rows(query, kv_heads)
        keys, values = _joined(key, prefix_key), _joined(value, prefix_value)
        out = value.new_empty(tokens * kv_heads, heads // kv_heads * value.shape[2])
        kept = [keys, values]
        if isinstance(query, FakeTensor):
            ctx.batches, ctx.passed_over = _largest_last(ctx.batches), len(ctx.batches) - 2
        else:
            ctx.passed_over = 0
        for number, batch in enumerate(ctx.batches):
            many, rows, width = batch.mask.shape
            if number < ctx.passed_over:
                kept += [query.new_empty(many, rows, dim), query.new_empty(many, rows, width)]
                continue
            q = _take(queries, batch.queries, (many, rows, dim))
            k = _take(keys, batch.keys, (many, width, dim))
            v = _take(values, batch.keys, (many, width, value.shape[2]))
            mask, wide = batch.mask, _wide(q)
            if softcap:
                scores = _capped(wide, _wide(k), scale / softcap).mul_(softcap).add_(mask)
            else:
                scores = torch.baddbmm(mask.to(wide.dtype), wide, _wide(k).transpose(1, 2), alpha=scale)
            if sinks is None:
                weights = torch.softmax(scores, dim=2).to(query.dtype)  # [n*K, S*G, W]
            else:
                weights = _softmax_beside(scores, sinks.view(kv_heads, -1)).to(query.dtype)
            out.index_copy_(0, batch.queries, (weights @ v).view(-1, out.shape[1]))
            kept += [q, weights]
        ctx.save_for_backward(*kept)
        return out.view(tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (tokens, heads, value_dim), kept = gradient.shape, iter(ctx.saved_tensors)
        (length, key_dtype, value_dtype), kv_heads, dim = ctx.prefix, ctx.kv_heads, ctx.dim
        keys, values = next(kept), next(kept)
        gradients = gradient.reshape(tokens * kv_heads, -1)  # [T*K, G*Dv]
        sums = _wide(gradients[:0])  # over the tiles that a key is in: float32
        of_key = sums.new_zeros((length + tokens) * kv_heads, dim)
        of_value = sums.new_zeros((length + tokens) * kv_heads, value_dim)
        of_query = gradients.new_empty(tokens * kv_heads, heads // kv_heads * dim)
        for number, batch in enumerate(ctx.batches):
            q, weights = next(kept), next(kept)
            if number < ctx.passed_over:
                continue
            many, _, width = weights.shape
            v = _take(values, batch.keys, (many, width, value_dim))
            out = _take(gradients, batch.queries, (*weights.shape[:2], value_dim))
            of_value.index_add_(0, batch.keys, _wide(weights.transpose(1, 2) @ out).flatten(0, 1))
            of_weights = out @ v.transpose(1, 2)
            of_scores = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype)  # float32 within
            if ctx.softcap or ctx.needs_input_grad[0]:
                k = _take(keys, batch.keys, (many, width, dim))
            if ctx.softcap:
                slope = _capped(_wide(q), _wide(k), ctx.scale / ctx.softcap).square_().neg_().add_(1)
                of_scores = slope.mul_(of_scores).to(weights.dtype)
            of_key.index_add_(0, batch.keys, _wide(of_scores.transpose(1, 2) @ q).flatten(0, 1))
            if ctx.needs_input_grad[0]:
                of_query.index_copy_(0, batch.queries, (of_scores @ k).view(-1, of_query.shape[1]))
        by_key, by_value = (
            total.view(-1, kv_heads, total.shape[1]).transpose(0, 1)  # [K, P+T, D]
            for total in (of_key.mul_(ctx.scale), of_value)
        )
        by_query = of_query.mul_(ctx.scale).view(tokens, heads, dim).transpose(0, 1)
        return (
            by_query if ctx.needs_input_grad[0] else None,
            by_key[:, length:].to(gradient.dtype),
            by_value[:, length:].to(gradient.dtype),
            by_key[:, :length].to(key_dtype),
            by_value[:, :length].to(value_dtype),
            *[None] * 4,
        )
