"""A batch whose rows join and leave between passes: each row a prefix, or none, and the text after it.

A prefix is a KV cache, so here it is simply the first P tokens of its row's cache, and the bare model runs on
rows that stand as a left-padded batch does, in which it is exact on every architecture:

    column   0 .. start ................ end .. capacity
             [     | masked | prefix; text ) room      ]     a row ends at `end`, and is contiguous

Prompts of unequal length are read in one pass, in columns that end with each row's text: what a row holds
moves right until it touches its own new tokens, and the columns before these are computed for nothing.

Nothing is forgotten: on sliding layers the mask hides what has left the window. Axes: B batch, H kv heads,
P prefix, T new tokens, W columns in use, D head dim, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from prefixtune.attachment.forward import position_limit
from prefixtune.attachment.head import multiply_once
from prefixtune.attachment.session import supported
from prefixtune.errors import UnsupportedModelError
from prefixtune.geometry import Geometry, compute_dtype, text_config
from prefixtune.prefix import PrefixKV

__all__ = ["Rows", "empty_rows", "most_positions", "row_runner"]

ROOM = 128  # columns beyond those in use when the tensors are made anew: so many passes without a copy


class Rows(Cache):  # type: ignore[misc]
    """The KV of B rows, one tensor [B, H, W, D] per layer and side, written in place.

    Args:
        geometry: the base's cache.
        dtype: of the base's activations.
        prefixes: makes a row that begins with each; None makes one without a prefix.
        room: columns for the tokens that these rows will read.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefixes: Sequence[PrefixKV | None] = (),
        room: int = ROOM,
    ) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.lengths: list[int] = []
        self.start = self.end = self.rows_capacity = self.columns = 0
        self.new, self.counts = 0, list[int]()  # tokens of the pass that runs: columns, and of each row
        self.hits = 0
        self.sides: list[tuple[Tensor, Tensor]] = []
        if not prefixes:
            return
        self.lengths = [prefix.length if prefix is not None else 0 for prefix in prefixes]
        self.end = max(self.lengths)
        self._make(rows=len(prefixes), columns=self.end + room, start=0)
        for row, prefix in enumerate(prefixes):
            for (key, value), layer in zip(self.sides, prefix.layers if prefix else (), strict=False):
                key[row, :, self.end - self.lengths[row] : self.end] = layer.key
                value[row, :, self.end - self.lengths[row] : self.end] = layer.value

    def fresh(self, prefixes: Sequence[PrefixKV | None] = (), *, room: int = ROOM) -> Rows:
        """Other rows of the same base."""
        return Rows(self.geometry, dtype=self.dtype, device=self.device, prefixes=prefixes, room=room)

    # --- what transformers asks of a cache

    def __len__(self) -> int:
        return len(self.geometry.layers)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def width(self) -> int:
        """W, the columns of the longest row."""
        return self.end - self.start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] behind the rows; what all of them hold, [B, H, W+T, D]."""
        self.hits += 1
        count, stop = len(self.lengths), self.end + self.new
        keys, values = self.sides[layer_idx]
        if self.is_even:
            keys[:count, :, self.end : stop] = key
            values[:count, :, self.end : stop] = value
        else:  # what stands before a shorter row's tokens is its own past
            for row, new in enumerate(self.counts):
                keys[row, :, stop - new : stop] = key[row, :, self.new - new :]
                values[row, :, stop - new : stop] = value[row, :, self.new - new :]
        return keys[:count, :, self.start : stop], values[:count, :, self.start : stop]

    # --- rows come and go

    def join(self, other: Rows, row: int = 0) -> None:
        """Add a row of `other` as the last; it shares no memory with it."""
        length, count = other.lengths[row], len(self.lengths)
        self._reserve(rows=count + 1, before=max(0, length - self.width), after=1)
        if count == 0:
            self.start = self.end
        first = min(self.start, self.end - length)
        for mine, theirs in zip(self.sides, other.sides, strict=True):
            for target, source in zip(mine, theirs, strict=True):
                # masked columns count 0 times what is in them, which must be a number for that
                target[:count, :, first : self.start] = 0
                target[count, :, first : self.end - length] = 0
                target[count, :, self.end - length : self.end] = source[
                    row, :, other.end - length : other.end
                ]
        self.start = first
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Take a row out; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for side in self.sides:
                for tensor in side:
                    tensor[row, :, self.start : self.end] = tensor[last, :, self.start : self.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.start = self.end - max(self.lengths, default=0)
        if not self.lengths:  # memory goes back, and with it what may have been no number
            self.sides, self.rows_capacity, self.columns, self.start, self.end = [], 0, 0, 0, 0

    @property
    def is_even(self) -> bool:
        """Whether each row of the pass has as many tokens as there are columns."""
        return min(self.counts) == self.new

    def prepare(self, counts: Sequence[int]) -> None:
        """Room for a pass over so many tokens of each row."""
        self.counts, self.new, self.hits = list(counts), max(counts), 0
        self._reserve(rows=len(self.lengths), before=0, after=self.new)
        for row, count in enumerate(self.counts):
            shift, first = self.new - count, self.end - self.lengths[row]
            if shift and self.lengths[row]:
                for side in self.sides:
                    for tensor in side:
                        tensor[row, :, first + shift : self.end + shift] = tensor[
                            row, :, first : self.end
                        ].clone()

    def finish(self) -> None:
        """The pass is over: its tokens belong to the rows."""
        self.end += self.new
        self.lengths = [length + count for length, count in zip(self.lengths, self.counts, strict=True)]
        self.new, self.counts = 0, []
        self.start = self.end - max(self.lengths)

    def mask(self) -> Tensor:
        """[B, W+T]: 1 where a row has a token, the pass's own included."""
        lengths = torch.tensor(self.lengths, device=self.device) + torch.tensor(
            self.counts, device=self.device
        )
        columns = torch.arange(self.width + self.new, device=self.device)
        return (columns >= self.width + self.new - lengths[:, None]).long()

    def positions(self) -> Tensor:
        """[B, T]: of the pass's own tokens, prefix and text counted together; before a row's first one, 0."""
        before = [length + count - self.new for length, count in zip(self.lengths, self.counts, strict=True)]
        columns = torch.arange(self.new, device=self.device)
        return (torch.tensor(before, device=self.device)[:, None] + columns).clamp_min(0)

    def _reserve(self, *, rows: int, before: int, after: int) -> None:
        if rows <= self.rows_capacity and before <= self.start and self.end + after <= self.columns:
            return
        old, first, last, count = self.sides, self.start, self.end, len(self.lengths)
        width = self.width
        capacity = self.rows_capacity if rows <= self.rows_capacity else max(rows, 2 * self.rows_capacity)
        self._make(rows=capacity, columns=before + width + max(after, ROOM, width // 2), start=before)
        self.end = before + width
        for mine, theirs in zip(self.sides, old, strict=False):
            for target, source in zip(mine, theirs, strict=True):
                target[:count, :, self.start : self.end] = source[:count, :, first:last]

    def _make(self, *, rows: int, columns: int, start: int) -> None:
        sides: list[Any] = [
            tuple(
                torch.zeros(rows, layer.kv_heads, columns, size, dtype=self.dtype, device=self.device)
                for size in (layer.key_dim, layer.value_dim)
            )
            for layer in self.geometry.layers
        ]
        # only now, as a pass that found no memory is tried again with the rows as they were
        self.sides, self.rows_capacity, self.columns, self.start = sides, rows, columns, start


def row_runner(base: nn.Module) -> Callable[..., Tensor]:
    """A function that runs [B, T] ids behind `Rows`, which hold them afterwards; logits [B, V] of the last.

    With `counts` only so many ids of each row are its own, the last ones; what stands before them is any id.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly.
    """
    geometry = supported(base)
    multiply_once(base)
    parameters = inspect.signature(base.forward).parameters
    fixed: dict[str, Any] = {"use_cache": True, "return_dict": True}
    if "logits_to_keep" in parameters:
        fixed["logits_to_keep"] = 1
    counts_mask = geometry.positions_from_mask or "position_ids" not in parameters

    @torch.no_grad()
    def run(rows: Rows, ids: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        rows.prepare(counts or [ids.shape[1]] * len(ids))
        options = {} if counts_mask else {"position_ids": rows.positions()}
        logits: Tensor = base(
            input_ids=ids, attention_mask=rows.mask(), past_key_values=rows, **options, **fixed
        ).logits
        if rows.hits != len(geometry.layers):
            raise UnsupportedModelError(
                f"{type(base).__name__}: {rows.hits} of {len(geometry.layers)} layers used the cache once"
            )
        rows.finish()
        return logits[:, -1]

    return run


def empty_rows(base: nn.Module) -> Rows:
    """No rows yet, for `base`."""
    return Rows(supported(base), dtype=compute_dtype(base), device=next(base.parameters()).device)


def most_positions(base: nn.Module) -> int | None:
    """Tokens, prefix and text, that a row may have in a batch of unequal rows; None: no limit known."""
    config, geometry = text_config(base), supported(base)
    limits = [geometry.max_positions, position_limit(config, geometry)]
    if getattr(config, "attn_temperature_tuning", False) and not all(
        getattr(config, "no_rope_layers", None) or [1]
    ):
        limits.append(config.floor_scale - 1)  # from there on attention is scaled by column, not by position
    return min((limit for limit in limits if limit is not None), default=None)
