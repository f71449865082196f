"""The model in two halves: the decoder that gives hidden states, and the head that turns them into logits.

Between the two, hidden states can be left out (a token that is no target needs no logits) or taken in chunks.
Axes: S tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefixtune.errors import UnsupportedModelError
from prefixtune.geometry import quiet_eval, text_config

__all__ = ["TOKEN_TYPES", "decoder_of", "head_of", "last_hidden", "multiply_once", "splits"]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 is text; images' tokens see each other


class _Ready(BaseModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output that has hidden states, and None for whatever else a model may look for in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def decoder_of(base: Any) -> Any:
    """The module that takes ids, masks, positions and the cache, and returns hidden states."""
    names = (getattr(base, "base_model_prefix", ""), "model", "transformer")
    inside = (getattr(base, name, None) for name in names if name)
    outer: Any = next((module for module in inside if _takes(module, "past_key_values")), base)
    found = base.get_decoder() if hasattr(base, "get_decoder") else base
    if found is base or not _takes(found, "past_key_values"):  # ModernBERT gives its output layer
        return outer
    # Gemma 3 with images makes masks of the text's columns before its language model could be given more
    return outer if found is not outer and _makes_masks(type(outer).forward) else found


def _takes(module: Any, name: str) -> bool:
    return isinstance(module, nn.Module) and name in _arguments(type(module).forward)


@functools.cache
def _makes_masks(forward: Callable[..., Any]) -> bool:
    called = inspect.unwrap(forward).__code__.co_names
    return any(name.startswith(("create_causal_mask", "create_masks")) for name in called)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def last_hidden(base: Any, **inputs: Any) -> Tensor:
    """The decoder's last hidden states [B, T, d]; a prefix that is attached is before every row."""
    found: Tensor = decoder_of(base)(use_cache=False, return_dict=True, **inputs).last_hidden_state
    return found


def head_of(base: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states [S, d] to logits [S, V] by the model's own forward, with its scales, caps and biases."""
    decoder = decoder_of(base)

    def head(hidden: Tensor) -> Tensor:
        with _decoder_gives(decoder, hidden[None]):
            logits: Tensor = base(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits
        return logits[0]

    return head


def multiply_once(base: Any) -> None:
    """Have the head of a frozen model read its weight once for all rows, and not once for each.

    PyTorch multiplies [B, T, d] by a weight without gradient as one matrix only where the strides are those
    of a tensor without gaps (`should_fold` in ATen's LinearAlgebra.cpp); else it copies the weight for each
    row. `hidden[:, -1:]`, of which generation takes the logits after a prompt, has gaps, and for one row
    strides that look like them. The model keeps the hook; its numbers are those of the same model unfrozen.
    """
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None and _without_gaps not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_without_gaps)


def _without_gaps(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() < 3:
        return None
    hidden, size = inputs[0], 1
    for length, stride in zip(reversed(hidden.shape), reversed(hidden.stride()), strict=True):
        if stride != size:  # is_contiguous() does not look at strides of length 1; PyTorch's matmul does
            return (hidden.clone(memory_format=torch.contiguous_format), *inputs[1:])
        size *= length
    return None


@contextmanager
def _decoder_gives(decoder: Any, hidden: Tensor) -> Iterator[None]:
    own = vars(decoder)
    had, before = "forward" in own, own.get("forward")
    own["forward"] = lambda *args, **kwargs: _Ready(last_hidden_state=hidden)
    try:
        yield
    finally:
        if had:
            own["forward"] = before
        else:
            del own["forward"]


@torch.no_grad()
def splits(base: Any) -> bool:
    """Whether the head on the decoder's hidden states gives the model's own logits, tried on a few tokens."""
    decoder, weight = decoder_of(base), next(base.parameters())
    if decoder is base:
        return False
    if weight.is_meta:
        return True
    ids = (torch.arange(5, device=weight.device) * 131 + 7)[None] % text_config(base).vocab_size
    with quiet_eval(base):
        whole = base(input_ids=ids, use_cache=False).logits[0].float()
        try:
            parts = head_of(base)(last_hidden(base, input_ids=ids)[0]).float()
        except (LookupError, ValueError, AttributeError, TypeError, RuntimeError, UnsupportedModelError):
            return False  # a model of another build: it runs whole
    return bool((parts - whole).norm() <= 1e-2 * whole.norm()) if parts.shape == whole.shape else False
