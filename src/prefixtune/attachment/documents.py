"""Attention of the documents of a pack to a shared prefix and to themselves, in blocks of queries.

A block is up to 128 queries of one document against the keys they may see: nothing is computed for what
another document's mask would hide, and half of a long document's future is left out. Scores and softmax are
float32 whatever the model's precision; in bfloat16 they would lose the gradient (bench/LOG.md).

Axes: H query heads, K kv heads, G = H / K, P prefix, T tokens, D head dim, N = all documents' keys, each
with its copy of the prefix: [P; t1; P; t2; ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "attend_documents"]

BLOCK = 128  # queries: below it matmuls get slow, above it too much of the future is computed


@dataclass(frozen=True, kw_only=True)
class Block:
    """Queries `first` to `last` of the pack, keys `start` to `end` of N, and an additive mask for them."""

    first: int
    last: int
    start: int
    end: int
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where documents, their keys and their blocks are.

    Attributes:
        documents: the blocks of each document.
        gather: [N] index of each key in [prefix; pack].
        own: [T] index in N of each token's key.
        shared: [documents, P] index in N of each copy of the prefix.
    """

    documents: tuple[tuple[Block, ...], ...]
    gather: Tensor
    own: Tensor
    shared: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: int, *, window: int | None, device: torch.device) -> Layout:
        documents, gather, own, shared = [], [], [], []
        token = key = 0
        for t in lengths:
            gather += [torch.arange(prefix), torch.arange(prefix + token, prefix + token + t)]
            own.append(torch.arange(key + prefix, key + prefix + t))
            shared.append(torch.arange(key, key + prefix))
            size = -(-t // -(-t // BLOCK))  # blocks of nearly equal size
            blocks = []
            for a in range(0, t, size):
                b = min(t, a + size)
                seen = 0 if window is None else max(0, prefix + a - window + 1)  # the first key in the window
                blocks.append(
                    Block(
                        first=token + a,
                        last=token + b,
                        start=key + seen,
                        end=key + prefix + b,
                        hidden=_future(b - a, prefix + a - seen, window, device),
                    )
                )
            documents.append(tuple(blocks))
            token, key = token + t, key + prefix + t
        return cls(
            documents=tuple(documents),
            gather=torch.cat(gather).to(device),
            own=torch.cat(own).to(device),
            shared=torch.stack(shared).to(device),
        )


@lru_cache(maxsize=256)
def _future(queries: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, before + queries]: 0 where a query sees a key, -inf after it and beyond the window."""
    query = before + torch.arange(queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)[None]
    unseen = key > query
    if window is not None:
        unseen = unseen | (key <= query - window)
    return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))


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
    if dropout == 0.0 and not softcap and sinks is None:
        out: Tensor = _Documents.apply(query, key, value, *prefix, layout, scale)  # type: ignore[no-untyped-call]
        return out
    key, value = _with_prefix(key, prefix[0], layout), _with_prefix(value, prefix[1], layout)  # [K, N, D]
    parts = []
    for block in (block for document in layout.documents for block in document):
        scores = _wide(_grouped(query[:, block.first : block.last], key.shape[0])) @ _wide(
            key[:, block.start : block.end]
        ).transpose(1, 2)
        scores = scores.mul(scale).reshape(len(key), -1, block.last - block.first, block.end - block.start)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + block.hidden.to(scores.dtype)
        if sinks is not None:
            sink = sinks.to(scores).view(key.shape[0], -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
            scores = torch.cat([scores, sink], dim=3)
        weights = torch.softmax(scores, dim=3)[..., : block.end - block.start].to(query.dtype)
        weights = torch.nn.functional.dropout(weights, dropout)
        mixed = weights.flatten(1, 2) @ value[:, block.start : block.end]  # [K, G*t, Dv]
        parts.append(mixed.view(query.shape[0], -1, value.shape[2]).transpose(0, 1))
    return torch.cat(parts)


def _with_prefix(text: Tensor, prefix: Tensor, layout: Layout) -> Tensor:
    """[K, T, D] and [K, P, D] to [K, N, D]: the prefix before each document."""
    return torch.cat([prefix.to(text), text], dim=1).index_select(1, layout.gather)


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """[H, t, D] to [K, G*t, D]: the queries that share a kv head, one after another."""
    return rows.reshape(kv_heads, -1, rows.shape[2])


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
        ctx.prefix_dtypes = prefix_key.dtype, prefix_value.dtype
        key, value = _with_prefix(key, prefix_key, layout), _with_prefix(value, prefix_value, layout)
        kv_heads, groups = key.shape[0], query.shape[0] // key.shape[0]
        wide = _wide(key).transpose(1, 2)  # [K, D, N]
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])  # [T, H, Dv]
        kept = []
        for block in (block for document in layout.documents for block in document):
            hidden = block.hidden.to(wide.dtype).repeat(groups, 1)
            rows = _grouped(_wide(query[:, block.first : block.last]), kv_heads)
            scores = torch.baddbmm(hidden, rows, wide[:, :, block.start : block.end], alpha=scale)
            weights = torch.softmax(scores, dim=2).to(query.dtype)  # [K, G*t, n]
            mixed = torch.bmm(weights, value[:, block.start : block.end])
            out[block.first : block.last] = mixed.view(query.shape[0], -1, value.shape[2]).transpose(0, 1)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        layout, low, kv_heads = ctx.layout, query.dtype, key.shape[0]
        wide = _wide(value).transpose(1, 2)  # [K, Dv, N]
        of_query = query.new_empty(query.shape[1], query.shape[0], query.shape[2]).transpose(
            0, 1
        )  # [H, T, D]
        of_key = torch.zeros(key.shape, dtype=wide.dtype, device=key.device)
        of_value = torch.zeros(value.shape, dtype=wide.dtype, device=key.device)
        for block, weights in zip((b for d in layout.documents for b in d), kept, strict=True):
            rows, seen = slice(block.first, block.last), slice(block.start, block.end)
            out = _grouped(gradient[rows].transpose(0, 1), kv_heads)  # [K, G*t, Dv]
            of_value[:, seen] += weights.transpose(1, 2) @ out
            scores = torch._softmax_backward_data(
                torch.bmm(_wide(out), wide[:, :, seen]), _wide(weights), 2, wide.dtype
            )
            scores = scores.mul_(ctx.scale).to(low)
            of_query[:, rows] = (scores @ key[:, seen]).view(query.shape[0], -1, query.shape[2])
            of_key[:, seen] += scores.transpose(1, 2) @ _grouped(query[:, rows], kv_heads)
        text_key, prefix_key = _apart(of_key, layout)
        text_value, prefix_value = _apart(of_value, layout)
        kinds = ctx.prefix_dtypes
        return (
            of_query,
            text_key.to(low),
            text_value.to(low),
            prefix_key.to(kinds[0]),
            prefix_value.to(kinds[1]),
            None,
            None,
        )


def _apart(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of [K, N, D] what belongs to the text [K, T, D], and the sum of the prefix's copies [K, P, D]."""
    copies = gradient.index_select(1, layout.shared.flatten())
    shape = (len(gradient), *layout.shared.shape, gradient.shape[2])  # [K, documents, P, D]
    return gradient.index_select(1, layout.own), copies.view(shape).sum(dim=1)
