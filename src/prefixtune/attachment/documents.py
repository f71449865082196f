"""Attention of the documents of a pack to a shared prefix and to themselves.

On a CPU it is done in blocks of queries: up to 128 queries of one document against the keys they may see. So
nothing is computed for what another document's mask would hide, and half of a long document's future is left
out. On a GPU one fused kernel with a mask is faster than many small ones. Scores and softmax are float32
whatever the model's precision: in bfloat16 the gradient would be visibly off.

Axes: H query heads, K kv heads, G = H / K, P prefix, T tokens, D head dim, N = all documents' keys, each
with its copy of the prefix: [P; t1; P; t2; ...]. Queries that share a kv head lie together: [K, T*G, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layout", "attend_documents"]

BLOCK = 128  # queries: below it matmuls get slow, above it too much of the future is computed


@dataclass(frozen=True)
class Block:
    """Queries `first` to `last` of the pack against keys `start` to `end` of N; `before` lie before them."""

    first: int
    last: int
    start: int
    end: int
    before: int


@dataclass(frozen=True)
class Layout:
    """Where the documents of a pack, their keys and their blocks are.

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
    def blocks(self) -> tuple[Block, ...]:
        found = []
        token = key = 0
        for t in self.lengths:
            size = -(-t // -(-t // BLOCK))  # blocks of nearly equal size
            for a in range(0, t, size):
                b = min(t, a + size)
                unseen = 0 if self.window is None else max(0, self.prefix + a - self.window + 1)
                before = self.prefix + a - unseen
                found.append(Block(token + a, token + b, key + unseen, key + self.prefix + b, before))
            token, key = token + t, key + self.prefix + t
        return tuple(found)

    @cached_property
    def gather(self) -> Tensor:
        """[N] where each key is in [prefix; pack]."""
        parts, token = [], self.prefix
        for t in self.lengths:
            parts += [torch.arange(self.prefix), torch.arange(token, token + t)]
            token += t
        return torch.cat(parts).to(self.device)

    @cached_property
    def own(self) -> Tensor:
        """[T] where each token's own key is in N."""
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return (torch.arange(sum(self.lengths)) + (document + 1) * self.prefix).to(self.device)

    @cached_property
    def shared(self) -> Tensor:
        """[documents, P] where the copies of the prefix are in N."""
        lengths = torch.tensor([0, *self.lengths[:-1]])
        first = lengths.cumsum(0) + torch.arange(len(lengths)) * self.prefix
        return (first[:, None] + torch.arange(self.prefix)).to(self.device)

    def masks(self, groups: int) -> list[Tensor]:
        """For each block [t*G, keys] in float32: 0 where a query sees a key, -inf elsewhere."""
        if groups not in self._masks:
            self._masks[groups] = [self._mask(block).repeat_interleave(groups, 0) for block in self.blocks]
        return self._masks[groups]

    @cached_property
    def _masks(self) -> dict[int, list[Tensor]]:
        return {}

    def _mask(self, block: Block) -> Tensor:
        query = block.before + torch.arange(block.last - block.first, device=self.device)[:, None]
        key = torch.arange(block.end - block.start, device=self.device)[None]
        unseen = key > query
        if self.window is not None:
            unseen = unseen | (key <= query - self.window)
        return torch.zeros(unseen.shape, device=self.device).masked_fill_(unseen, float("-inf"))

    @cached_property
    def whole(self) -> Tensor:
        """[T, P+T] bool: what each token sees of [prefix; pack]."""
        lengths = torch.tensor(self.lengths)
        document = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = self.prefix + torch.cat([torch.arange(t) for t in self.lengths])  # in its own document
        distance = place[:, None] - torch.cat([torch.arange(self.prefix), place])
        mine = torch.cat(
            [torch.ones(len(place), self.prefix, dtype=torch.bool), document[:, None] == document], dim=1
        )
        near = distance < self.window if self.window is not None else torch.ones_like(mine)
        return (mine & near & (distance >= 0)).to(self.device)


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
    for block, mask in zip(layout.blocks, layout.masks(groups), strict=True):
        rows, seen = slice(block.first * groups, block.last * groups), slice(block.start, block.end)
        scores = _wide(by_group[:, rows]) @ _wide(key[:, seen]).transpose(1, 2) * scale  # [K, t*G, keys]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask.to(scores.dtype)
        if sinks is not None:
            sink = sinks.to(scores).view(len(key), 1, groups).expand(-1, block.last - block.first, -1)
            scores = torch.cat([scores, sink.reshape(len(key), -1, 1)], dim=2)
        weights = torch.softmax(scores, dim=2)[..., : block.end - block.start].to(query.dtype)
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
        query[None], keys, values, layout.whole, dropout, scale=scale, enable_gqa=len(query) != len(key)
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
    """The plain case by hand: keeps the weights of each block in the model's precision, and no scores."""

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
        out = query.new_empty(*query.shape[:2], value.shape[2])
        kept = []
        for block, mask in zip(layout.blocks, layout.masks(groups), strict=True):
            rows, seen = slice(block.first * groups, block.last * groups), slice(block.start, block.end)
            mask = mask.to(wide_query.dtype)
            scores = torch.baddbmm(mask, wide_query[:, rows], wide_key[:, :, seen], alpha=scale)
            weights = torch.softmax(scores, dim=2).to(query.dtype)  # [K, t*G, keys]
            out[:, rows] = weights @ value[:, seen]
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return _by_token(out, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        layout, groups, low = ctx.layout, ctx.groups, query.dtype
        gradient = _by_group(gradient.transpose(0, 1), len(key))  # [K, T*G, Dv]
        wide_gradient, wide_value = _wide(gradient), _wide(value).transpose(1, 2)
        of_query = torch.empty_like(query)
        of_key = torch.zeros(key.shape, dtype=wide_value.dtype, device=key.device)
        of_value = torch.zeros(value.shape, dtype=wide_value.dtype, device=key.device)
        for block, weights in zip(layout.blocks, kept, strict=True):
            rows, seen = slice(block.first * groups, block.last * groups), slice(block.start, block.end)
            of_value[:, seen] += weights.transpose(1, 2) @ gradient[:, rows]
            of_weights = wide_gradient[:, rows] @ wide_value[:, :, seen]
            of_scores = torch._softmax_backward_data(of_weights, _wide(weights), 2, of_weights.dtype)
            of_scores = of_scores.mul_(ctx.scale).to(low)
            of_query[:, rows] = of_scores @ key[:, seen]
            of_key[:, seen] += of_scores.transpose(1, 2) @ query[:, rows]
        text_key, prefix_key = _apart(of_key, layout)
        text_value, prefix_value = _apart(of_value, layout)
        return (
            _by_token(of_query, groups).transpose(0, 1),
            text_key.to(low),
            text_value.to(low),
            prefix_key.to(ctx.prefix_dtypes[0]),
            prefix_value.to(ctx.prefix_dtypes[1]),
            None,
            None,
        )


def _apart(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of [K, N, D] what belongs to the text [K, T, D], and the sum of the prefix's copies [K, P, D]."""
    copies = gradient.index_select(1, layout.shared.flatten())
    shape = (len(gradient), *layout.shared.shape, gradient.shape[2])  # [K, documents, P, D]
    return gradient.index_select(1, layout.own), copies.view(shape).sum(dim=1)
