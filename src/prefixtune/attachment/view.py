"""What the decoder sees in one pass: cache, mask and positions in which each row's prefix touches its text.

Axes: B batch, H kv heads, P longest prefix of the batch, T text, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prefixtune.errors import AttachError
from prefixtune.geometry import compute_dtype, text_config

if TYPE_CHECKING:
    from prefixtune.attachment.session import Session

__all__ = ["View", "inner_mask", "inner_positions"]


class View(Cache):  # type: ignore[misc]
    """What the decoder sees for one forward pass: the prefixes before the text cache, or before nothing.

    Without a text cache it stores nothing, so a checkpointed layer may run it twice. Unused slots of a static
    cache are cut off: not every model masks them.
    """

    def __init__(
        self, session: Session, rows: tuple[int, ...], text: Any, *, past: int, pads: Tensor | None
    ) -> None:
        self.layers = text.layers if text is not None else []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.session, self.rows, self.text, self.past, self.pads = session, rows, text, past, pads
        self.length = max(session.lengths[row] for row in rows if row >= 0)
        self.hits: set[int] = set()

    def __len__(self) -> int:
        return len(self.session.geometry.layers)

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length + self.past

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def _dropped(self, queries: int, layer_idx: int) -> int:
        """Text columns that a sliding cache has let go."""
        return int(self.text.get_mask_sizes(queries, layer_idx)[1]) if self.text is not None else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        dropped = self._dropped(query_length, layer_idx)
        start = self.length + dropped if dropped else 0
        return self.length + self.past + query_length - start, start

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.hits.add(layer_idx)
        queries, dropped = key.shape[2], self._dropped(key.shape[2], layer_idx)
        if self.text is not None:
            key, value = type(self.text).update(self.text, key, value, layer_idx, *args, **kwargs)
            used = self.past + queries - dropped
            key, value = key[:, :, :used], value[:, :, :used]
        prefix = self.session.block(layer_idx, self.rows, key)
        return self._join(prefix[0], key, dropped), self._join(prefix[1], value, dropped)

    def _join(self, prefix: Tensor, text: Tensor, dropped: int) -> Tensor:
        """[B, H, P, D] and [B, H, T, D] to the row layout in this file's first lines."""
        if dropped == 0:
            text = torch.cat([prefix.to(text), text], dim=2)  # [B, H, P+T, D]
        if self.pads is None:
            return text
        first = self.length + dropped if dropped else 0  # the column where `text` now starts
        reach = min(self.length + int(self.pads.max()) - first, text.shape[2])
        if reach <= 0:
            return text
        columns = torch.arange(first, first + reach, device=text.device)
        source = (
            columns - self.pads.to(text.device)[:, None]
        )  # [B, reach]: which column of the block lands here
        inside = (source >= 0) & (source < self.length)
        index = source.clamp(0, self.length - 1)[:, None, :, None].expand(
            -1, prefix.shape[1], -1, prefix.shape[3]
        )
        moved = torch.where(inside[:, None, :, None], prefix.to(text).gather(2, index), text[:, :, :reach])
        return torch.cat([moved, text[:, :, reach:]], dim=2)


def inner_mask(
    session: Session, view: View, mask: Tensor | None, lengths: Tensor, total: int
) -> Tensor | None:
    """The mask over [prefix; text] in the columns of the row layout; 0 or False = not seen."""
    longest = view.length
    if mask is None:
        if bool((lengths == longest).all()):
            return None
        mask = lengths.new_ones(len(lengths), total)
    before = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]  # [B, P]
    if mask.dim() == 4:
        if text_config(session.base).model_type == "bloom" or getattr(
            text_config(session.base), "alibi", False
        ):
            raise AttachError(
                "a 4D attention_mask gives alibi no token counts; use a 2D mask with this model"
            )
        if not mask.is_floating_point():  # eager attention adds the mask, whatever its type
            kind = compute_dtype(session.base)
            mask = torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(
                mask == 0, torch.finfo(kind).min
            )
        mask = mask.expand(len(lengths), -1, -1, -1)
        shape = (*mask.shape[:3], longest)
        hidden = torch.finfo(mask.dtype).min
        front = torch.where(before[:, None, None, :], 0.0, hidden).to(mask.dtype).expand(shape)
        return torch.cat([front, mask], dim=3)
    inner = torch.nn.functional.pad(mask, (longest, 0))
    pads = view.pads if view.pads is not None else torch.zeros_like(lengths)
    place = torch.arange(inner.shape[1], device=mask.device)[None]
    end = longest + pads[:, None]
    return inner.masked_fill((place >= end - lengths[:, None]) & (place < end), 1)


def inner_positions(
    given: Tensor | None, lengths: Tensor, pads: Tensor | None, past: int, queries: int
) -> Tensor:
    """[B, T] positions with the prefix before the text: the caller's, or counted from the text's start.

    The caller's may be [A, B, T] of several axes, in which a prefix takes as many places as in one.
    """
    if given is not None:
        if given.dim() not in (2, 3) or given.shape[-1] != queries:
            raise AttachError(f"position_ids: expected [B, {queries}]; got {list(given.shape)}")
        return given + lengths[:, None].to(given)
    positions = torch.arange(past, past + queries, device=lengths.device)[None]
    if pads is not None:
        positions = (positions - pads[:, None]).clamp_min(0)
    return positions + lengths[:, None]
