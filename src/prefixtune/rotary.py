"""Rotary embeddings that depend on the longest position of a pass: which rows may share one.

transformers takes the factors of a whole pass from its largest position. With longrope (Phi-3) there are two
sets, short up to a number of positions and long beyond it; with dynamic NTK scaling each length beyond it has
a set of its own. So a row that shares a pass with a longer one may get factors that are not its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prefixtune.geometry import text_config

__all__ = ["RotaryChange", "alike", "rotary_change", "settle", "virtual_tokens"]


@dataclass(frozen=True, kw_only=True)
class RotaryChange:
    """Up to `after` positions all passes have the same factors; beyond it others.

    Attributes:
        by_length: each length beyond it has factors of its own.
    """

    after: int
    by_length: bool


def rotary_change(config: Any) -> RotaryChange | None:
    """Where the rotary of a text configuration changes; None where it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("longrope", "dynamic")]
    if not changing:
        return None
    whole = config.max_position_embeddings
    return RotaryChange(
        after=min(_short(kind, whole) for kind in changing),
        by_length=any(kind["rope_type"] == "dynamic" for kind in changing),
    )


def _short(kind: Mapping[str, Any], whole: int) -> int:
    """Positions that a kind's first factors are for; dynamic scaling knows no others than the model's own."""
    first = kind.get("original_max_position_embeddings") if kind["rope_type"] == "longrope" else None
    return first or whole


def alike(model: Any, lengths: Sequence[int], *, new: int = 0) -> list[list[int]]:
    """Row numbers in sets whose rows a pass turns as it turns each of them alone; the longest rows first.

    Args:
        lengths: tokens of each row.
        new: tokens that a row grows by while it shares passes. A row that crosses the change does so at its
            own length, so it is with others of that length only.
    """
    change = rotary_change(text_config(model)) if hasattr(model, "config") else None
    if change is None:
        return [list(range(len(lengths)))]
    after, sets = change.after - virtual_tokens(model), dict[int, list[int]]()
    for row, length in enumerate(lengths):
        if length + new <= after:
            key = 0
        elif length > after and not change.by_length:
            key = -1
        else:
            key = length
        sets.setdefault(key, []).append(row)
    return sorted(sets.values(), key=lambda rows: -max(lengths[row] for row in rows))


def virtual_tokens(model: Any) -> int:
    """How many positions a PEFT model takes before every row."""
    configs = (getattr(model, "peft_config", None) or {}).values()
    return sum(c.num_virtual_tokens for c in configs if getattr(c, "is_prompt_learning", False))


def settle(model: Any) -> None:
    """Take back the factors that a longer pass left.

    transformers keeps dynamic ones for shorter passes, and takes them back itself only in a pass below the
    change, not in one that just reaches it.
    """
    change = rotary_change(text_config(model)) if hasattr(model, "config") else None
    if change is None or not change.by_length:
        return
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            _settle_one(module, name.removesuffix("max_seq_len_cached"))


def _settle_one(rotary: nn.Module, kind: str) -> None:
    """`kind` begins the names of the layers' kind, where these have factors of their own."""
    first = getattr(rotary, f"{kind}original_inv_freq", None)
    factors = getattr(rotary, f"{kind}inv_freq", None)
    longest = getattr(rotary, "original_max_seq_len", None)
    if first is None or factors is None or longest is None:
        return
    if getattr(rotary, f"{kind}max_seq_len_cached") > longest:
        rotary.register_buffer(f"{kind}inv_freq", first.to(factors.device), persistent=False)
        setattr(rotary, f"{kind}max_seq_len_cached", longest)
