"""Puts prefixes into a model's forward pass. The only file that knows transformers' internals.

The caller, `generate` included, goes on counting text tokens only: its ids, masks, positions and caches hold T
tokens. Inside the decoder each row becomes what the bare model would see in the middle of [pads; prefix; text]:

    column   0 ........ s ............ P+n ......... P+T        P  longest prefix of the batch
             [ masked  ][ row's prefix ][ row's text ]          n  left pads of the row, s = P + n - row's length

Text keeps its columns; a shorter prefix, or one before left pads, moves right until it touches its text. So index
distances (sliding windows, chunks, alibi by index), mask counts (alibi by mask) and positions are the bare model's
own, on every architecture. Axes: B batch, H kv heads, P prefix, T text, D head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from prefixtune.errors import AttachError, UnsupportedModelError
from prefixtune.geometry import Geometry, quiet_eval, text_config
from prefixtune.prefix import PrefixKV

__all__ = ["attach", "attach_pairs", "supported"]

Pairs = Sequence[tuple[Tensor, Tensor]]
MARK = "_prefixtune_rows"  # on a text cache: which prefix each of its rows was computed behind
_SUPPORTED: WeakKeyDictionary[nn.Module, Geometry] = WeakKeyDictionary()


@contextmanager
def attach(base: nn.Module, prefixes: PrefixKV | Sequence[PrefixKV | None]) -> Iterator[nn.Module]:
    """Within the block, `base` answers as if each row began with its prefix.

    Args:
        base: a causal language model of transformers.
        prefixes: one PrefixKV for all rows of any batch, or a list with one PrefixKV or None per batch row;
            lengths may differ. `base.generate` repeats the list for its beams and return sequences.

    Raises:
        UnsupportedModelError: the model cannot carry this prefix exactly.
        AttachError: a call within the block has no exact meaning (a cache from another prefix, packed rows, …).

    Example:
        >>> with attach(base, [kv_a, None, kv_b]):                             # doctest: +SKIP
        ...     base.generate(**batch, max_new_tokens=8)
    """
    rows = [prefixes] if isinstance(prefixes, PrefixKV) else list(prefixes)
    if not rows or any(row is not None and not isinstance(row, PrefixKV) for row in rows):
        raise AttachError(f"attach: expected a PrefixKV, or a list of PrefixKV and None; got {prefixes!r:.80}")
    geometry = supported(base)
    for row in rows:
        if row is not None:
            row.check(geometry)
    distinct = {id(row): row for row in rows if row is not None}
    place = {key: index for index, key in enumerate(distinct)}
    sources = [[(layer.key, layer.value) for layer in row.layers] for row in distinct.values()]
    session = _Session(
        base,
        geometry,
        sources,
        rows=[-1 if row is None else place[id(row)] for row in rows],
        names=[None if row is None else row.digest for row in rows],
        broadcast=isinstance(prefixes, PrefixKV),
    )
    with session:
        yield base


@contextmanager
def attach_pairs(base: nn.Module, pairs: Pairs, *, name: str) -> Iterator[nn.Module]:
    """`attach` for live tensors: (key, value) [H, P, D] per layer, with gradient, for all rows of any batch."""
    with _Session(base, supported(base), [list(pairs)], rows=[0], names=[name], broadcast=True):
        yield base


def supported(base: nn.Module) -> Geometry:
    """The geometry of `base`, after its oracle was checked once with a few tokens.

    Raises:
        UnsupportedModelError: a layer has no key/value cache, or the oracle does not hold.
    """
    if base not in _SUPPORTED:
        geometry = Geometry.probe(base)
        _SUPPORTED[base] = geometry
        try:
            if not next(base.parameters()).is_meta:
                _check_oracle(base)
        except BaseException:
            del _SUPPORTED[base]
            raise
    return _SUPPORTED[base]


@torch.no_grad()
def _check_oracle(base: nn.Module) -> None:
    """The prefix made of A's KV, applied to B, against the bare model on [A; B]; one row is left-padded."""
    device = next(base.parameters()).device
    vocabulary = text_config(base).vocab_size
    ids = (torch.arange(7, device=device) * 131 + 7)[None] % vocabulary
    text, rest = ids[:, :4], ids[:, 4:]
    with quiet_eval(base):
        whole = base(input_ids=ids, use_cache=False).logits[0, -1].float()
        short = base(input_ids=torch.cat([text, rest[:, 1:]], dim=1), use_cache=False).logits[0, -1].float()
        kv = PrefixKV.from_tokens(base, text)
        batch = torch.cat([rest, rest])
        mask = torch.ones_like(batch)
        mask[1, 0] = 0
        with attach(base, kv):
            found = base(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, -1].float()
    exact = next(base.parameters()).dtype in (torch.float32, torch.float64)
    for expected, got in ((whole, found[0]), (short, found[1])):
        error = float((got - expected).norm() / (expected - expected.mean()).norm().clamp_min(1e-12))
        if not error <= (1e-3 if exact else 0.25):
            raise UnsupportedModelError(
                f"{type(base).__name__}: a prefix does not reproduce the text it stands for "
                f"(relative error of the logits {error:.2g})",
                hint="this architecture is refused rather than served inexactly; please report it",
            )


class _Session:
    """One attachment: which prefix each row has, and the hooks on the model while it lasts."""

    def __init__(
        self,
        base: nn.Module,
        geometry: Geometry,
        sources: Sequence[Pairs],
        *,
        rows: Sequence[int],
        names: Sequence[str | None],
        broadcast: bool,
    ) -> None:
        self.base, self.geometry, self.sources = base, geometry, sources
        self.decoder = _decoder(base)
        self.rows, self.names, self.broadcast = tuple(rows), tuple(names), broadcast
        self.lengths = [source[0][0].shape[1] for source in sources]
        self.generating = False
        self.blocks: dict[Any, tuple[Tensor, Tensor]] = {}
        self.checkpointed = [m for m in self.decoder.modules() if hasattr(m, "_can_checkpoint_with_cache")]
        self.undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        if getattr(self.base, "prefixtune_attached", False):
            raise AttachError(
                "a prefix is attached to this model already",
                hint="leave the other attach(...) block first; for several prefixes at once give attach a list",
            )
        original = self.decoder.forward
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _forward(self, original, parameters, args, kwargs)

        self._set(self.base, "prefixtune_attached", True)
        self._set(self.decoder, "forward", forward)
        for module in self.checkpointed:
            self._set(module, "_can_checkpoint_with_cache", True)
        if hasattr(self.base, "generate"):
            self._set(self.base, "generate", self._generate(self.base.generate))
            # generate would turn masks into 4D for static caches, and compile: both in columns of text only
            self._set(self.base, "create_masks_for_generate", _keep_mask)
            self._set(self.base, "_valid_auto_compile_criteria", lambda *args, **kwargs: False)

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        own = vars(module)
        before, had = own.get(name), name in own
        own[name] = value
        self.undo.append(lambda: own.__setitem__(name, before) if had else own.pop(name, None))

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self.generating = True
            try:
                return original(*args, **kwargs)
            finally:
                self.generating = False

        return generate

    def expand(self, batch: int) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        """Source index and name of each of `batch` rows."""
        count = len(self.rows)
        if self.broadcast or batch == count:
            repeats = batch if self.broadcast else 1
        elif self.generating and batch % count == 0:
            repeats = batch // count  # beams and return sequences lie next to each other
        else:
            raise AttachError(
                f"{count} prefixes are attached, but the batch has {batch} rows",
                hint="give attach one PrefixKV or None per row",
            )
        return (
            tuple(row for row in self.rows for _ in range(repeats)),
            tuple(name for name in self.names for _ in range(repeats)),
        )

    def block(self, layer: int, rows: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """The prefixes of all rows in one layer, ends aligned: [B, H, P, D] key and value."""
        place = (layer, rows, like.dtype, like.device)
        if place in self.blocks:
            return self.blocks[place]
        pairs = [source[layer] for source in self.sources]
        if len(set(rows)) == 1:
            one = pairs[rows[0]]
            key, value = (t.to(like).expand(len(rows), *t.shape) for t in one)
        else:
            longest = max(self.lengths[row] for row in rows if row >= 0)
            used = sorted(set(rows) - {-1})
            index = torch.tensor([used.index(row) if row >= 0 else len(used) for row in rows], device=like.device)
            key, value = (
                torch.stack(
                    [_left_pad(pairs[row][side].to(like), longest) for row in used]
                    + [like.new_zeros(like.shape[1], longest, pairs[0][side].shape[2])]
                )[index]
                for side in (0, 1)
            )
        if not (key.requires_grad or value.requires_grad):
            self.blocks[place] = (key, value)
        return key, value


class _View(Cache):  # type: ignore[misc]
    """What the decoder sees for one forward pass: the prefixes before the text cache, or before nothing.

    Without a text cache it stores nothing, so a checkpointed layer may run it twice. Unused slots of a static
    cache are cut off: not every model masks them.
    """

    def __init__(
        self, session: _Session, rows: tuple[int, ...], text: Any, *, past: int, pads: Tensor | None
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

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
        source = columns - self.pads.to(text.device)[:, None]  # [B, reach]: which column of the block lands here
        inside = (source >= 0) & (source < self.length)
        index = source.clamp(0, self.length - 1)[:, None, :, None].expand(-1, prefix.shape[1], -1, prefix.shape[3])
        moved = torch.where(inside[:, None, :, None], prefix.to(text).gather(2, index), text[:, :, :reach])
        return torch.cat([moved, text[:, :, reach:]], dim=2)


def _forward(
    session: _Session, original: Callable[..., Any], signature: inspect.Signature, args: Any, kwargs: Any
) -> Any:
    """One pass of the decoder: the caller's columns of text in, the caller's columns of text out."""
    call = _arguments(signature, args, kwargs)
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return original(*args, **kwargs)  # the model's own error
    batch, queries = (ids if ids is not None else embeds).shape[:2]
    device = (ids if ids is not None else embeds).device
    rows, names = session.expand(batch)
    if all(row < 0 for row in rows):
        return original(*args, **kwargs)
    recomputing = _recomputes(session)
    text = _text_cache(session, call, names, recomputing)
    past = int(text.get_seq_length()) if text is not None else 0
    mask = _check_mask(call, batch, past + queries)
    pads = _left_pads(mask)
    _refuse_packed(call, mask, past)
    view = _View(session, rows, text, past=past, pads=pads)
    lengths = torch.tensor([session.lengths[row] if row >= 0 else 0 for row in rows], device=device)
    _check_positions(session, view.length, past + queries, lengths, pads)

    call["past_key_values"], call["use_cache"] = view, text is not None
    call["attention_mask"] = _inner_mask(session, view, mask, lengths, past + queries)
    if "position_ids" in signature.parameters:
        call["position_ids"] = _inner_positions(call.get("position_ids"), lengths, pads, past, queries)
    if call.get("cache_position") is not None:
        call["cache_position"] = call["cache_position"] + view.length
    with _layers_decide(session.decoder):
        output = original(**call)
    missed = sorted(set(range(len(session.geometry.layers))) - view.hits)
    if missed:
        raise UnsupportedModelError(
            f"{type(session.base).__name__}: layer {missed[0]} did not read the cache, so its prefix had no effect",
            hint="this way of running the model is refused rather than served inexactly; please report it",
        )
    if text is not None:
        setattr(text, MARK, names)
        text.update = _refuse_bare_use
    return _give_back(output, view, text)


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    call = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def _recomputes(session: _Session) -> bool:
    """Whether gradient checkpointing is on for this pass; the re-entrant kind would lose the gradient."""
    active = [m for m in session.checkpointed if getattr(m, "gradient_checkpointing", False) and m.training]
    if not active or not torch.is_grad_enabled():
        return bool(active)
    function = getattr(active[0], "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant", False):
        raise AttachError(
            "re-entrant gradient checkpointing gives a prefix no gradient",
            hint="enable it through PrefixModel, or with gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    return True


def _text_cache(session: _Session, call: dict[str, Any], names: tuple[str | None, ...], recomputing: bool) -> Any:
    """The cache that holds the text's KV: the caller's, a new one, or None."""
    text = call.get("past_key_values")
    if text is None:
        config = text_config(session.base)
        wanted = call.get("use_cache")
        wanted = getattr(config, "use_cache", True) if wanted is None else wanted
        return DynamicCache(config=config) if wanted and not recomputing else None
    if not isinstance(text, Cache) or isinstance(text, EncoderDecoderCache):
        raise AttachError(f"past_key_values: expected a Cache of transformers; got {type(text).__name__}")
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
            f"attention_mask: expected {batch} rows over the {total} tokens of the text (cached and new, without "
            f"the prefix); got {list(mask.shape)}"
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
    if positions is None or mask is not None or past or positions.dim() != 2 or positions.shape[1] < 2:
        return
    if bool((positions[:, 1:] <= positions[:, :-1]).any()):
        raise AttachError(
            "position_ids restart within a row: packed documents need a 4D attention_mask",
            hint="give [B, 1, T, T] with one causal block per document, so that no document sees another",
        )


def _check_positions(session: _Session, longest: int, total: int, lengths: Tensor, pads: Tensor | None) -> None:
    geometry, config = session.geometry, text_config(session.base)
    limit = None if geometry.positions_extrapolate else geometry.max_positions
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for kind in kinds:
        if kind.get("rope_type") in ("longrope", "dynamic"):  # the rotation of cached keys would change
            limit = kind.get("original_max_position_embeddings") or config.max_position_embeddings
    if limit is None or longest + total <= limit:
        return
    needed = int((lengths + total - (pads if pads is not None else 0)).max())
    if needed > limit:
        raise AttachError(
            f"prefix and text take {needed} positions; {config.model_type} has {limit} for which its prefix is exact",
            hint="shorten the text, or the prefix",
        )


def _inner_mask(
    session: _Session, view: _View, mask: Tensor | None, lengths: Tensor, total: int
) -> Tensor | None:
    """The mask over [prefix; text] in the columns of the row layout; 0 or False = not seen."""
    longest = view.length
    if mask is None:
        if bool((lengths == longest).all()):
            return None
        mask = lengths.new_ones(len(lengths), total)
    before = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]  # [B, P]
    if mask.dim() == 4:
        if text_config(session.base).model_type == "bloom" or getattr(text_config(session.base), "alibi", False):
            raise AttachError("a 4D attention_mask gives alibi no token counts; use a 2D mask with this model")
        hidden = 0 if mask.dtype == torch.bool or not mask.is_floating_point() else torch.finfo(mask.dtype).min
        seen = 0 if mask.is_floating_point() else 1
        mask = mask.expand(len(lengths), -1, -1, -1)
        shape = (*mask.shape[:3], longest)
        front = torch.where(before[:, None, None, :], seen, hidden).to(mask.dtype).expand(shape)
        return torch.cat([front, mask], dim=3)
    inner = torch.nn.functional.pad(mask, (longest, 0))
    pads = view.pads if view.pads is not None else torch.zeros_like(lengths)
    place = torch.arange(inner.shape[1], device=mask.device)[None]
    end = longest + pads[:, None]
    return inner.masked_fill((place >= end - lengths[:, None]) & (place < end), 1)


def _inner_positions(given: Tensor | None, lengths: Tensor, pads: Tensor | None, past: int, queries: int) -> Tensor:
    """[B, T] positions with the prefix before the text: the caller's, or counted from the first text token."""
    if given is not None:
        if given.dim() != 2 or given.shape[1] != queries:
            raise AttachError(f"position_ids: expected [B, {queries}]; got {list(given.shape)}")
        return given + lengths[:, None].to(given)
    positions = torch.arange(past, past + queries, device=lengths.device)[None]
    if pads is not None:
        positions = (positions - pads[:, None]).clamp_min(0)
    return positions + lengths[:, None]


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


def _give_back(output: Any, view: _View, text: Any) -> Any:
    """The decoder's output with the caller's cache in place of the view."""
    if isinstance(output, tuple):
        return tuple(text if item is view else item for item in output if item is not view or text is not None)
    if "past_key_values" in output:
        output["past_key_values"] = text
    return output


def _decoder(base: Any) -> Any:
    """The module that takes ids, masks, positions and the cache, and returns hidden states."""
    found = base.get_decoder() if hasattr(base, "get_decoder") else base
    if found is not base and found is not None:
        return found
    for name in (getattr(base, "base_model_prefix", ""), "model", "transformer"):
        inner = getattr(base, name, None) if name else None
        if isinstance(inner, nn.Module) and "past_key_values" in inspect.signature(inner.forward).parameters:
            return inner
    return base


def _keep_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def _refuse_bare_use(*args: Any, **kwargs: Any) -> Any:
    raise AttachError(
        "this cache holds text that was computed behind a prefix, and no prefix is attached",
        hint="use it within attach(...) or with its PrefixModel",
    )


def _left_pad(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[1], 0))  # [H, P', D] -> [H, P, D]
