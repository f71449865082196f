"""One pass over the next token of every row of a batch and over pieces of prompts, without padding.

The decoder runs on [1, N] tokens: each row's token, then the pieces end to end. Its linear layers see N rows
of one matmul; only attention knows whose token it is, through an attention function that is registered with
transformers. It writes each token's key and value into the `Rows` of its own and attends to what these hold:

    [ row 0 | row 1 | ... | row R-1 | piece of a prompt | piece of another ]     N tokens

The rows of the batch lie right-aligned, so those of about one length are attended in one call, over their
own columns and no others. Axes: N tokens of the pass, B rows of a call, T tokens of each of them, H query
heads, K kv heads, G = H / K, W columns, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from prefixtune.attachment.head import head_of, last_hidden, splits
from prefixtune.attachment.packed import attending, attention_configs, refuse_extras
from prefixtune.attachment.rows import Rows
from prefixtune.attachment.session import supported
from prefixtune.attachment.trial import packs
from prefixtune.errors import UnsupportedModelError

__all__ = ["Piece", "flat_runner", "no_flat"]

NAME = "prefixtune_flat"
CALL = 64  # columns times rows that take as long as one call more; see bench/LOG.md
_ACTIVE: dict[int, _Pass] = {}  # by id of the config that an attention module reads, while a pass runs


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of one prompt, to be read behind what the one row of `rows` holds.

    Attributes:
        ends: the prompt is complete with them, and the logits of its last token are wanted.
    """

    rows: Rows
    ids: Sequence[int]
    ends: bool


@dataclass(frozen=True)
class _Call:
    """Rows `first` to `last` of a segment, attended at once over the last `width` columns."""

    first: int
    last: int
    width: int
    mask: Tensor | None  # [B, 1, T, W], added to the scores


@dataclass(frozen=True)
class _Segment:
    """The tokens `first` to `last` of a pass: as many of each row of `rows`."""

    rows: Rows
    first: int
    last: int
    calls: dict[int | None, list[_Call]]  # by window


@dataclass
class _Pass:
    """One pass on its way through the decoder."""

    segments: Sequence[_Segment]
    windows: Sequence[int | None]  # of each layer
    hits: list[int] = field(default_factory=list)  # layers that have attended


def no_flat(base: nn.Module) -> str:
    """Why this model cannot run flat passes; empty where it can."""
    if not splits(base):
        return f"{type(base).__name__} has no head apart from its decoder"
    return packs(base)


def flat_runner(base: nn.Module) -> Callable[[Rows, Sequence[int], Sequence[Piece]], Tensor]:
    """A function that runs one token of each row of `batch` and pieces of prompts; their rows hold them then.

    It gives the logits [R + E, V] of the R rows, and of the last tokens of the E pieces that end a prompt. If
    it fails, all rows are as they were.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly, or cannot run flat passes.
    """
    geometry, why = supported(base), no_flat(base)
    if why:
        raise UnsupportedModelError(why)
    windows, head = [layer.window for layer in geometry.layers], head_of(base)
    configs = attention_configs(base)

    @torch.no_grad()
    def run(batch: Rows, tokens: Sequence[int], pieces: Sequence[Piece]) -> Tensor:
        holders = [*([(batch, 1)] if tokens else []), *((piece.rows, len(piece.ids)) for piece in pieces)]
        segments, start = [], 0
        for rows, count in holders:
            segments.append(_segment(rows, count, start, set(windows)))
            start = segments[-1].last
        running = _Pass(segments, windows)
        ids = [*tokens, *(token for piece in pieces for token in piece.ids)]
        positions = torch.cat([segment.rows.positions().flatten() for segment in segments])
        with attending(configs, NAME, _ACTIVE, running):
            hidden = last_hidden(
                base, input_ids=torch.tensor([ids], device=batch.device), position_ids=positions[None]
            )[0]
        if sorted(running.hits) != list(range(len(windows))):
            raise UnsupportedModelError(
                f"{type(base).__name__}: of {len(windows)} layers those that attended are {running.hits}"
            )
        ends = [segment.last - 1 for segment in segments[len(segments) - len(pieces) :]]
        wanted = [*range(len(tokens)), *(end for end, one in zip(ends, pieces, strict=True) if one.ends)]
        chosen = hidden[torch.tensor(wanted, dtype=torch.long, device=batch.device)]
        logits = head(chosen) if wanted else chosen
        for rows, _ in holders:
            rows.finish()
        return logits

    return run


def _segment(rows: Rows, count: int, first: int, windows: set[int | None]) -> _Segment:
    """The next `count` tokens of each row, which are the pass's from `first` on."""
    rows.prepare([count] * len(rows.lengths))
    calls = {window: _calls(rows, count, window) for window in windows}
    return _Segment(rows, first, first + count * len(rows.lengths), calls)


def _calls(rows: Rows, count: int, window: int | None) -> list[_Call]:
    """Rows next to each other share a call where that adds fewer masked columns than a call is worth."""
    seen = [length + count for length in rows.lengths]
    if window is not None:
        seen = [min(width, window + count - 1) for width in seen]
    runs: list[list[int]] = []
    for row in range(len(seen)):
        run = [*(runs[-1] if runs else []), row]
        masked = len(run) * max(seen[one] for one in run) - sum(seen[one] for one in run)
        if runs and (masked <= CALL or rows.device.type != "cpu"):  # elsewhere columns cost less than a call
            runs[-1] = run
        else:
            runs.append([row])
    return [_call(rows, run, [seen[row] for row in run], count, window) for run in runs]


def _call(rows: Rows, run: list[int], seen: list[int], count: int, window: int | None) -> _Call:
    width = max(seen)
    columns = torch.arange(width, device=rows.device)
    own = columns >= width - torch.tensor(seen, device=rows.device)[:, None, None]  # [B, 1, W]
    if count > 1:
        place = columns[width - count :, None]
        own = own & (columns <= place) & (columns > place - (window or width))  # [B, T, W]
    mask = torch.zeros(own.shape, dtype=rows.dtype, device=rows.device).masked_fill_(~own, float("-inf"))
    return _Call(run[0], run[-1] + 1, width, None if bool(own.all()) else mask[:, None])


def _flat_attention(
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
    """Attention of one layer for the running pass: query [1, H, N, D], key and value [1, K, N, D]."""
    refuse_extras(module, query, attention_mask, others)
    running, layer = _ACTIVE[id(module.config)], module.layer_idx
    running.hits.append(layer)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = value.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [N, H, D]
    for segment in running.segments:
        first, last, count = segment.first, segment.last, len(segment.rows.lengths)
        queries, new_keys, new_values = (
            _by_row(part[0].transpose(0, 1)[first:last], count) for part in (query, key, value)
        )
        keys, values = segment.rows.update(new_keys, new_values, layer)
        result = _by_row(out[first:last], count)
        for call in segment.calls[running.windows[layer]]:
            at, columns = slice(call.first, call.last), slice(keys.shape[2] - call.width, None)
            result[at] = _attend(
                queries[at],
                keys[at, :, columns],
                values[at, :, columns],
                call.mask,
                scale=scale,
                softcap=softcap,
                sinks=s_aux,
            )
    return out[None], None


def _by_row(tokens: Tensor, count: int) -> Tensor:
    """[B*T, H, D] of B rows to [B, H, T, D], without a copy."""
    return tokens.view(count, -1, *tokens.shape[1:]).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention: query [B, H, T, D], key and value [B, K, W, D]; [B, H, T, D]."""
    (batch, heads, tokens, dim), kv_heads = query.shape, key.shape[1]
    if not softcap and sinks is None:
        if tokens > 1:
            return F.scaled_dot_product_attention(
                query, key, value, mask, scale=scale, enable_gqa=heads != kv_heads
            )
        # queries that share a kv head lie where a head's tokens do, so that no key is copied
        shared = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        found = F.scaled_dot_product_attention(shared, key, value, mask, scale=scale)
        return found.reshape(batch, heads, 1, -1)
    shared = query.reshape(batch, kv_heads, -1, dim)  # [B, K, G*T, D]
    scores = (shared @ key.transpose(2, 3)).float() * scale
    scores = scores.view(batch, heads, tokens, -1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        of_each = sinks.to(scores).view(1, heads, 1, 1).expand(batch, -1, tokens, 1)
        scores = torch.cat([scores, of_each], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]].to(value.dtype)
    return (weights.view(batch, kv_heads, -1, key.shape[2]) @ value).view(batch, heads, tokens, -1)


AttentionInterface.register(NAME, _flat_attention)
