"""One pass of the decoder: checks what the caller gave, adds the prefix, returns the caller's own columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from prefixtune.attachment.head import TOKEN_TYPES
from prefixtune.attachment.view import View, inner_mask, inner_positions
from prefixtune.errors import AttachError, UnsupportedModelError
from prefixtune.geometry import Geometry, text_config
from prefixtune.rotary import rotary_change, settle

if TYPE_CHECKING:
    from prefixtune.attachment.session import Session

__all__ = ["forward_with_prefix", "position_limit", "refuse_positions"]

MARK = "_prefixtune_rows"  # on a text cache: which prefix each of its rows was computed behind


def forward_with_prefix(
    session: Session, original: Callable[..., Any], signature: inspect.Signature, args: Any, kwargs: Any
) -> Any:
    """One pass of the decoder: the caller's columns of text in, the caller's columns of text out."""
    call = _arguments(signature, args, kwargs)
    given = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
    if len(given) != 1:
        return original(*args, **kwargs)  # the model's own error
    (batch, queries), device = given[0].shape[:2], given[0].device
    rows, names = session.expand(batch)
    if all(row < 0 for row in rows):
        return original(*args, **kwargs)
    recomputing = _recomputes(session)
    text = _text_cache(session, call, names, recomputing)
    past = int(text.get_seq_length()) if text is not None else 0
    mask = _check_mask(call, batch, past + queries)
    pads = _left_pads(mask)
    _refuse_packed(call, mask, past)
    _refuse_images(session, call)
    view = View(session, rows, text, past=past, pads=pads)
    lengths = torch.tensor([session.lengths[row] if row >= 0 else 0 for row in rows], device=device)
    _check_positions(session, view.length, past + queries, lengths, pads)
    settle(session.base)

    call["past_key_values"], call["use_cache"] = view, text is not None
    call["attention_mask"] = inner_mask(session, view, mask, lengths, past + queries)
    model_counts = session.geometry.positions_from_mask and (mask is None or mask.dim() == 2)
    if "position_ids" in signature.parameters and not (model_counts and call.get("position_ids") is None):
        call["position_ids"] = inner_positions(call.get("position_ids"), lengths, pads, past, queries)
    if call.get("cache_position") is not None:
        call["cache_position"] = call["cache_position"] + view.length
    with _layers_decide(session.decoder):
        output = original(**call)
    missed = sorted(set(range(len(session.geometry.layers))) - view.hits)
    if missed:
        raise UnsupportedModelError(
            f"{type(session.base).__name__}: layer {missed[0]} read no cache, so its prefix had no effect",
            hint="this way of running the model is refused rather than served inexactly; please report it",
        )
    if text is not None:
        setattr(text, MARK, names)
        text.update = MethodType(_refuse_bare_use, text)
    return _give_back(output, view, text)


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    call = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def _recomputes(session: Session) -> bool:
    """Whether gradient checkpointing is on for this pass; the re-entrant kind would lose the gradient."""
    active = [m for m in session.checkpointed if getattr(m, "gradient_checkpointing", False) and m.training]
    if not active or not torch.is_grad_enabled():
        return bool(active)
    function = getattr(active[0], "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant", False):
        raise AttachError(
            "re-entrant gradient checkpointing gives a prefix no gradient",
            hint="enable it through PrefixModel, or give {'use_reentrant': False} as its options",
        )
    return True


def _text_cache(
    session: Session, call: dict[str, Any], names: tuple[str | None, ...], recomputing: bool
) -> Any:
    """The cache that holds the text's KV: the caller's, a new one, or None."""
    text = call.get("past_key_values")
    if text is None:
        config = text_config(session.base)
        wanted = call.get("use_cache")
        wanted = getattr(config, "use_cache", True) if wanted is None else wanted
        return DynamicCache(config=config) if wanted and not recomputing else None
    if not isinstance(text, Cache) or isinstance(text, EncoderDecoderCache):
        raise AttachError(f"past_key_values: expected a Cache of transformers; got {type(text).__name__}")
    if recomputing and session.generating:
        raise AttachError(
            "generate needs a cache, and gradient checkpointing has none while the model trains",
            hint="call model.eval() first, and model.train() after",
        )
    if recomputing:
        raise AttachError("past_key_values cannot be used under gradient checkpointing", hint="leave it out")
    if int(text.get_seq_length()) > 0:
        made = getattr(text, MARK, None)
        if made is None:
            raise AttachError(
                "past_key_values holds text that was computed without this prefix",
                hint="give the whole text again, or the cache that a pass with this prefix returned",
            )
        if made != names and (len(set(made)) > 1 or set(made) != set(names)):
            raise AttachError(
                "past_key_values holds text that was computed behind another prefix",
                hint="give the whole text again",
            )
    return text


def _check_mask(call: dict[str, Any], batch: int, total: int) -> Tensor | None:
    mask = call.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise AttachError("attention_mask: expected a 2D or 4D tensor over the text's tokens")
    if mask.shape[0] not in ((batch,) if mask.dim() == 2 else (1, batch)) or mask.shape[-1] < total:
        raise AttachError(
            f"attention_mask: expected {batch} rows over the {total} tokens of the text (cached and new, "
            f"without the prefix); got {list(mask.shape)}"
        )
    if bool((mask[..., total:] > 0).any()) or (mask.dtype == torch.bool and bool(mask[..., total:].any())):
        raise AttachError(f"attention_mask: lets tokens see columns beyond the {total} of the text")
    return mask[..., :total]  # the rest stands for unused slots of a static cache


def _left_pads(mask: Tensor | None) -> Tensor | None:
    """[B] number of masked columns before each row's text; None where there are none."""
    if mask is None or mask.dim() == 4 or bool((mask[:, 0] != 0).all()):
        return None
    return ((mask != 0).cumsum(dim=1) == 0).sum(dim=1)


def _refuse_packed(call: dict[str, Any], mask: Tensor | None, past: int) -> None:
    """transformers reads restarting positions without a mask as packed documents."""
    positions = call.get("position_ids")
    if positions is not None and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # of the text; the others are of axes
    if positions is None or mask is not None or past or positions.dim() != 2 or positions.shape[1] < 2:
        return
    if bool((positions[:, 1:] - positions[:, :-1] != 1).any()):
        raise AttachError(
            "position_ids jump or restart within a row: packed documents need a 4D attention_mask",
            hint="give [B, 1, T, T] with one causal block per document, so that no document sees another",
        )


def _refuse_images(session: Session, call: dict[str, Any]) -> None:
    """Where the hooked module makes masks by the types of tokens, it would count a prefix among them."""
    if getattr(session.decoder, "config", None) is text_config(session.base):
        return
    for name in TOKEN_TYPES:
        if call.get(name) is not None and bool((call[name] != 0).any()):
            raise AttachError(
                f"{name}: {type(session.base).__name__} is exact behind a prefix for text only",
                hint="leave images and their tokens out",
            )


def _check_positions(
    session: Session, longest: int, total: int, lengths: Tensor, pads: Tensor | None
) -> None:
    geometry, config = session.geometry, text_config(session.base)
    limit = position_limit(config, geometry)
    _check_scaled_by_column(config, longest, total, longest - lengths + (pads if pads is not None else 0))
    if limit is None or longest + total <= limit:
        return
    refuse_positions(config, geometry, int((lengths + total - (pads if pads is not None else 0)).max()))


def refuse_positions(config: Any, geometry: Geometry, needed: int) -> None:
    """Raise AttachError where a prefix and its text take more positions than it is exact in."""
    limit = position_limit(config, geometry)
    if limit is not None and needed > limit:
        raise AttachError(
            f"prefix and text take {needed} positions; with {config.model_type} it is exact up to {limit}",
            hint="shorten the text, or the prefix",
        )


def position_limit(config: Any, geometry: Geometry) -> int | None:
    """The position from which on a prefix is not exact: none is left, or cached keys would be turned anew."""
    limit = geometry.learned_positions
    change = rotary_change(config)
    return limit if change is None else change.after


def _check_scaled_by_column(config: Any, longest: int, total: int, shift: Tensor) -> None:
    """Llama 4 scales attention by column; `shift` [B] is how far a row's columns are from its positions."""
    every_layer_rotates = all(getattr(config, "no_rope_layers", None) or [1])
    if not getattr(config, "attn_temperature_tuning", False) or every_layer_rotates:
        return
    if longest + total >= config.floor_scale and bool((shift > 0).any()):
        raise AttachError(
            f"{config.model_type} scales attention by column from {config.floor_scale} on: rows with pads or "
            "prefixes of unequal length are exact below it only",
            hint="give rows of equal length, or one row at a time",
        )


@contextmanager
def _layers_decide(decoder: nn.Module) -> Iterator[None]:
    """Some decoders (GPT-2) hide the cache from checkpointed layers: let them believe that it is off."""
    own = vars(decoder)
    before = own.get("gradient_checkpointing")
    if before:
        own["gradient_checkpointing"] = False
    try:
        yield
    finally:
        if before:
            own["gradient_checkpointing"] = before


def _give_back(output: Any, view: View, text: Any) -> Any:
    """The decoder's output with the caller's cache in place of the view."""
    if isinstance(output, tuple):
        return tuple(
            text if item is view else item for item in output if item is not view or text is not None
        )
    if "past_key_values" in output:
        output["past_key_values"] = text
    return output


def _refuse_bare_use(text: Cache, *args: Any, **kwargs: Any) -> Any:
    """Stands for the cache's `update` until it is emptied."""
    if int(text.get_seq_length()) == 0:
        for name in ("update", MARK):
            delattr(text, name)
        return text.update(*args, **kwargs)
    raise AttachError(
        "this cache holds text that was computed behind a prefix, and no prefix is attached",
        hint="use it within attach(...) or with its PrefixModel",
    )
