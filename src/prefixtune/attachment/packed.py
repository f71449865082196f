"""Several documents in one row: each attends to the prefix and to itself, at positions from P on.

What all documents begin with may be run once: it is the first document then, and the others continue it.

The decoder runs on [1, T] tokens without padding; only attention knows where documents begin, through an
attention function that is registered with transformers. It needs no mask of T x T and no cache:

    document of t tokens:   queries [t]  against  keys [P prefix; t of its own]

Axes: H query heads, K kv heads, G = H / K, P prefix, T tokens of the pack, D head dim.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixtune.attachment.documents import Layout, attend_documents
from prefixtune.attachment.experts import aligned_experts
from prefixtune.attachment.forward import refuse_positions
from prefixtune.attachment.head import decoder_of, last_hidden
from prefixtune.attachment.lean import lean
from prefixtune.attachment.session import attach_pairs
from prefixtune.errors import AttachError, ConfigError, UnsupportedModelError
from prefixtune.geometry import Geometry, has_values, is_exact, meta_ready, quiet_eval, text_config
from prefixtune.prefix import PrefixKV

__all__ = [
    "attending",
    "attention_configs",
    "compile_layers",
    "packed",
    "packs",
    "refuse_extras",
    "uncompile_layers",
]

NAME = "prefixtune_packed"
# of a compiled layer: by its input's gradient, mode and precision. Torch's limit of 8 is for all bases of a
# process together, and what lies beyond it runs uncompiled.
VARIANTS = 64
T = TypeVar("T")
Pairs = Sequence[tuple[Tensor, Tensor]]
_ACTIVE: dict[int, _Pack] = {}  # by id of the config that an attention module reads, while a pack is run
_PACKS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_COMPILED: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Any]]] = WeakKeyDictionary()
# what models hand to their attention beyond the plain arguments, and what has no say here
IGNORED = {"position_ids", "cache_position"}


@dataclass
class _Pack:
    """One pack on its way through the decoder."""

    geometry: Geometry
    pairs: Pairs | None
    layouts: dict[int | None, Layout]  # by window
    hits: set[int]


@contextmanager
def packed(
    base: nn.Module, pairs: Pairs | None, lengths: Sequence[int], *, common: int = 0
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block, the callable takes ids [1, T] of documents end to end and gives hidden states [T, d].

    A backward pass through recomputed layers (gradient checkpointing) belongs into the block too.

    Args:
        pairs: (key, value) [K, P, D] of each layer, with gradient or without; None for the bare model.
        lengths: tokens of each document; they sum to T.
        common: tokens of the first document where all others continue it, so that it is run once for all.

    Raises:
        AttachError: another prefix is attached, or prefix and text take more positions than it is exact in.
        UnsupportedModelError: the model does not take part in this (see `packs`).
    """
    if getattr(base, "prefixtune_attached", False):
        raise AttachError("a prefix is attached to this model already", hint="leave attach(...) first")
    geometry = Geometry.probe(base)
    length = pairs[0][0].shape[1] if pairs is not None else 0
    device = next(base.parameters()).device
    if pairs is not None and has_values(base):  # an estimate counts rows that a run would refuse
        longest = common + max(lengths[1:] if common else lengths)
        refuse_positions(text_config(base), geometry, length + longest)
    windows = {layer.window for layer in geometry.layers}
    layouts = {w: Layout(tuple(lengths), length, w, device, common) for w in windows}
    pack = _Pack(geometry, pairs, layouts, set())
    positions = next(iter(layouts.values())).positions[None].to(device)  # [1, T]

    def hidden(input_ids: Tensor) -> Tensor:
        pack.hits.clear()
        found = last_hidden(base, input_ids=input_ids, position_ids=positions)[0]
        if len(pack.hits) != len(geometry.layers):
            raise UnsupportedModelError(f"{type(base).__name__}: {_missed(pack)} does not attend by document")
        return found

    base.prefixtune_attached = True  # type: ignore[assignment]
    try:
        attention = attending(attention_configs(base), NAME, _ACTIVE, pack)
        with attention, aligned_experts(base), _quicker(base):
            yield hidden
    finally:
        del base.prefixtune_attached


@contextmanager
def attending(configs: Sequence[Any], name: str, table: dict[int, T], running: T) -> Iterator[None]:
    """Within the block all attention goes to the registered function `name`, with `running` in its `table`.

    Args:
        configs: those that attention modules read; their ids are the table's keys.
    """
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
        table[id(config)] = running
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
            table.pop(id(config), None)


def _missed(pack: _Pack) -> str:
    return f"layer {min(set(range(len(pack.geometry.layers))) - pack.hits)}"


def attention_configs(base: nn.Module) -> list[Any]:
    """The configurations that the decoder's attention modules read; to find them takes 2 ms of a pass."""
    found = {id(m.config): m.config for m in decoder_of(base).modules() if hasattr(m, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _packed_attention(
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
    """Attention of one layer for the running pack: query [1, H, T, D], key and value [1, K, T, D]."""
    refuse_extras(module, query, attention_mask, others)
    pack, layer = _ACTIVE[id(module.config)], module.layer_idx
    pack.hits.add(layer)
    prefix = pack.pairs[layer] if pack.pairs is not None else None
    out = attend_documents(
        query[0],
        key[0],
        value[0],
        prefix,
        pack.layouts[pack.geometry.layers[layer].window],
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None  # [1, T, H, D]


def refuse_extras(module: Any, query: Tensor, mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a model hands its attention something that would have no effect."""
    unknown = [name for name, given in others.items() if isinstance(given, Tensor) and name not in IGNORED]
    if unknown or mask is not None or query.shape[0] != 1:
        what = unknown[0] if unknown else "a mask of its own" if query.shape[0] == 1 else "several rows"
        raise UnsupportedModelError(f"{type(module).__name__} gives its attention {what}")


# compiled layers leave attention out: it reads a table by id, and its tiles change with every pack
_uncompiled: Any = torch.compiler.disable
AttentionInterface.register(NAME, _uncompiled(_packed_attention))


def compile_layers(base: nn.Module) -> None:
    """Compile each decoder layer but for its attention, for packs of any length, and try it on a few tokens.

    Only packs run through compiled layers. Each pass with a KV cache differs from the last in what a layer
    was compiled for: after some of them torch would run the packs too as if nothing were compiled.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs on a CPU; or the compiled layers
            fail, or give other hidden states. The base runs uncompiled then.
    """
    if base in _COMPILED:
        return
    if next(base.parameters()).device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError(
            "compile: torch.compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++",
            hint="install one, or leave --compile out",
        )
    plain, cause = _tried(base), None
    try:
        _COMPILED[base] = [(layer, _compiled_call(layer)) for layer in _layers(base)]
        why = _unlike(_tried(base), plain, base)
    except Exception as error:  # whatever a compiler, or what it made, may raise
        why, cause = (str(error).strip().splitlines() or [type(error).__name__])[0], error
    if why:
        uncompile_layers(base)
        told = f"compile: torch.compile does not do on this model: {why}"
        raise ConfigError(told, hint="leave it out") from cause


def _layers(base: nn.Module) -> list[nn.Module]:
    return [layer for layer in decoder_of(base).modules() if isinstance(layer, GradientCheckpointingLayer)]


def _compiled_call(layer: nn.Module) -> Any:
    """What runs the layer compiled; the layer itself stays as it is."""
    layer.compile(dynamic=True)
    call, layer._compiled_call_impl = layer._compiled_call_impl, None
    return call


def uncompile_layers(base: nn.Module) -> None:
    """Let packs run through the layers as they are again."""
    _COMPILED.pop(base, None)


def _tried(base: nn.Module) -> Tensor:
    """Hidden states of a small pack behind a small prefix; the backward pass is run too.

    In training mode, which compiles the layers for the run itself, unless something is dropped there.
    """
    lengths = (20, 12)
    ids, text = _trial_ids(base, sum(lengths)), _trial_ids(base, 4)
    pairs = [
        (layer.key.requires_grad_(), layer.value.requires_grad_())
        for layer in PrefixKV.from_tokens(base, text).layers
    ]
    rates = [m.p for m in base.modules() if isinstance(m, nn.Dropout)]
    rates.append(getattr(text_config(base), "attention_dropout", 0.0) or 0.0)
    with quiet_eval(base), torch.enable_grad(), packed(base, pairs, lengths) as run:
        base.train(not any(rates))
        found = run(ids)
        torch.autograd.grad(found.float().square().mean(), [t for pair in pairs for t in pair])
    return found.detach().float()


def _quicker(base: nn.Module) -> AbstractContextManager[None]:
    return _compiled(base) if base in _COMPILED else lean(decoder_of(base))


@contextmanager
def _compiled(base: nn.Module) -> Iterator[None]:
    """Within the block the layers of a base that was given to `compile_layers` are compiled."""
    layers = _COMPILED[base]
    for layer, compiled in layers:
        layer._compiled_call_impl = compiled
    dynamo: Any = torch._dynamo.config
    try:
        with dynamo.patch(recompile_limit=VARIANTS):
            yield
    finally:
        for layer, _ in layers:
            layer._compiled_call_impl = None


def packs(base: nn.Module) -> str:
    """Why this model's documents cannot be packed; empty where they can. Tried once, on a few tokens.

    Alibi models build their bias for a whole row, models without transformers' attention interface cannot be
    told where documents begin, and chunked attention counts from the row's start.
    """
    if base not in _PACKS:
        _PACKS[base] = _why_not(base)
    return _PACKS[base]


@torch.no_grad()
def _why_not(base: nn.Module) -> str:
    config, weight = text_config(base), next(base.parameters())
    holders = (config, getattr(config, "attn_config", None))  # MPT's has it
    if config.model_type == "bloom" or any(getattr(holder, "alibi", False) for holder in holders):
        return f"{config.model_type} has alibi, a bias that is built for a whole row"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers that attend in chunks of the row"
    text, ids = _trial_ids(base, 4), _trial_ids(base, 16)[:, 4:]
    lengths = (7, 5)
    try:
        with quiet_eval(base):
            if weight.is_meta:
                with meta_ready(base), packed(base, _shapes_only(base), lengths) as run:
                    run(ids)
                return ""
            pairs = [(layer.key, layer.value) for layer in PrefixKV.from_tokens(base, text).layers]
            with attach_pairs(base, pairs, name="trial"):
                alone = [
                    last_hidden(base, input_ids=part)[0].float()
                    for part in (ids[:, : lengths[0]], ids[:, lengths[0] :])
                ]
            with packed(base, pairs, lengths) as run:
                together = run(ids).float()
    except (LookupError, ValueError, AttributeError, TypeError, RuntimeError, UnsupportedModelError) as error:
        return f"{config.model_type} cannot be told where documents begin ({error})"
    if why := _unlike(together, torch.cat(alone), base):
        return f"{config.model_type} gives packed documents {why}"
    return ""


def _trial_ids(base: nn.Module, tokens: int) -> Tensor:
    """[1, tokens] ids, as good as any."""
    device = next(base.parameters()).device
    ids: Tensor = (torch.arange(tokens, device=device) * 131 + 7)[None] % text_config(base).vocab_size
    return ids


def _unlike(found: Tensor, expected: Tensor, base: nn.Module) -> str:
    """What tells two tensors of hidden states apart, beyond rounding; empty where nothing does."""
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    return "" if off <= (1e-4 if is_exact(base) else 0.05) else f"other hidden states (off by {off:.1g})"


def _shapes_only(base: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A prefix of one token on the meta device."""
    layers = Geometry.probe(base).layers
    return [
        (
            torch.empty(layer.kv_heads, 1, layer.key_dim, device="meta"),
            torch.empty(layer.kv_heads, 1, layer.value_dim, device="meta"),
        )
        for layer in layers
    ]
