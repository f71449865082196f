"""What a pack's layers run as: compiled, through Liger's kernels, or as `lean` has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from prefixtune.attachment import liger
from prefixtune.attachment.head import decoder_of
from prefixtune.attachment.lean import lean

__all__ = ["COMPILED", "LIGER", "quicker", "uncompile_layers", "use_no_liger"]

# of a compiled layer: by its input's gradient, mode and precision. Torch's limit of 8 is for all bases of a
# process together, and what lies beyond it runs uncompiled.
VARIANTS = 64
COMPILED: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Any]]] = WeakKeyDictionary()
LIGER: WeakSet[nn.Module] = WeakSet()


def quicker(base: nn.Module) -> AbstractContextManager[None]:
    """Within the block the base's layers run as `compile_layers` or `use_liger` left them."""
    if base in COMPILED:
        return _compiled(base)
    return lean(decoder_of(base), liger.STEPS if base in LIGER else None)


@contextmanager
def _compiled(base: nn.Module) -> Iterator[None]:
    """Within the block the layers of a base that was given to `compile_layers` are compiled."""
    layers = COMPILED[base]
    for layer, compiled in layers:
        layer._compiled_call_impl = compiled
    dynamo: Any = torch._dynamo.config
    try:
        with dynamo.patch(recompile_limit=VARIANTS):
            yield
    finally:
        for layer, _ in layers:
            layer._compiled_call_impl = None


def uncompile_layers(base: nn.Module) -> None:
    """Let packs run through the layers as they are again."""
    COMPILED.pop(base, None)


def use_no_liger(base: nn.Module) -> None:
    """Let packs run without Liger's kernels again."""
    LIGER.discard(base)
