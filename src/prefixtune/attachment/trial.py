"""What is tried on a few tokens before a run relies on it: packing, compiled layers, Liger's kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixtune.attachment.head import decoder_of, last_hidden
from prefixtune.attachment.lean import parts
from prefixtune.attachment.liger import STEPS, check_liger
from prefixtune.attachment.packed import packed
from prefixtune.attachment.quicker import COMPILED, LIGER, uncompile_layers, use_no_liger
from prefixtune.attachment.session import attach_pairs
from prefixtune.errors import ConfigError, UnsupportedModelError
from prefixtune.geometry import Geometry, is_exact, meta_ready, quiet_eval, text_config
from prefixtune.prefix import PrefixKV

__all__ = ["compile_layers", "packs", "use_liger"]

_PACKS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def compile_layers(base: nn.Module) -> None:
    """Compile each decoder layer but for its attention, for packs of any length, and try it on a few tokens.

    Only packs run through compiled layers. Each pass with a KV cache differs from the last in what a layer
    was compiled for: after some of them torch would run the packs too as if nothing were compiled.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs on a CPU; or the compiled layers
            fail, or give other hidden states or gradients. The base runs uncompiled then.
    """
    if base in COMPILED:
        return
    if next(base.parameters()).device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError(
            "compile: torch.compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++",
            hint="install one, or leave --compile out",
        )

    def start() -> None:
        COMPILED[base] = [(layer, _compiled_call(layer)) for layer in _layers(base)]

    try:
        _try_out(base, start)
    except _UnfitError as error:
        uncompile_layers(base)
        told = f"compile: torch.compile does not do on this model: {error}"
        raise ConfigError(told, hint="leave it out") from error.__cause__


def _layers(base: nn.Module) -> list[nn.Module]:
    return [layer for layer in decoder_of(base).modules() if isinstance(layer, GradientCheckpointingLayer)]


def _compiled_call(layer: nn.Module) -> Any:
    """What runs the layer compiled; the layer itself stays as it is."""
    layer.compile(dynamic=True)
    call, layer._compiled_call_impl = layer._compiled_call_impl, None
    return call


def use_liger(base: nn.Module) -> None:
    """Let packs run through Liger's kernels where they know the decoder's parts; tried on a few tokens.

    Raises:
        ConfigError: the base is not on a CUDA device or has no such part; or the kernels fail, or give other
            hidden states or gradients. The base runs without them then.
        MissingExtraError: liger-kernel is not installed.
    """
    if base in LIGER:
        return
    check_liger(next(base.parameters()).device)
    if not parts(decoder_of(base), STEPS):
        kind = text_config(base).model_type
        raise ConfigError(f"liger: its kernels do none of the parts of {kind}", hint="leave it out")
    try:
        _try_out(base, lambda: LIGER.add(base))
    except _UnfitError as error:
        use_no_liger(base)
        told = f"liger: its kernels do not do on this model: {error}"
        raise ConfigError(told, hint="leave it out") from error.__cause__


class _UnfitError(Exception):
    """What is wrong with the layers as they run now."""


def _try_out(base: nn.Module, start: Callable[[], object]) -> None:
    """Compare what a small pack gives after `start` with what it gives before.

    Raises:
        _UnfitError: it fails, or gives something else.
    """
    plain = _tried(base)
    try:
        start()
        found = _tried(base)
    except Exception as error:  # whatever a compiler, a driver, or what they made, may raise
        raise _UnfitError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    for name, rounding, own, other in zip(
        ("hidden states", "gradients"), (0.05, 0.3), found, plain, strict=True
    ):
        if why := _unlike(own, other, base, name=name, rounding=rounding):
            raise _UnfitError(why)


def _tried(base: nn.Module) -> tuple[Tensor, Tensor]:
    """Hidden states of a small pack behind a small prefix, and the prefix's gradient, flat.

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
        # no sum of squares: a norm at the end keeps it all but constant
        weights = torch.linspace(0, 99, found.numel(), device=found.device).cos().view_as(found)
        total = (found.float() * weights).sum()
        gradients = torch.autograd.grad(total, [tensor for pair in pairs for tensor in pair])
    return found.detach().float(), torch.cat([gradient.float().flatten() for gradient in gradients])


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


def _unlike(
    found: Tensor, expected: Tensor, base: nn.Module, *, name: str = "hidden states", rounding: float = 0.05
) -> str:
    """What tells two tensors apart, beyond rounding; empty where nothing does."""
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    return "" if off <= (1e-4 if is_exact(base) else rounding) else f"other {name} (off by {off:.1g})"


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
