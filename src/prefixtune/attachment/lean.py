"""Norms, gated MLPs and rotary embeddings of a frozen decoder, in fewer sweeps over memory.

Autograd keeps what each operation between two matmuls needs: a float32 copy of every norm's input, three
tensors of the MLP's size. Here each of these parts is one step of autograd, which keeps its input alone, in
the model's precision. A module takes part where its forward, or the function that turns its queries and keys,
is Llama's bytecode for bytecode, or its norm Gemma's, as in most families; any other runs as it always does.

Axes: T tokens, d hidden size, f MLP size, H heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama

__all__ = ["STEPS", "Steps", "lean", "parts"]

ROTARY, HALF = "apply_rotary_pos_emb", "rotate_half"
Part = tuple[nn.Module, Callable[..., Any]]  # with the forward that it has meanwhile


@dataclass(frozen=True)
class Steps:
    """What the parts run as.

    Attributes:
        norm: Llama's, of hidden [..., d], weight [d] and eps.
        gemma_norm: Gemma's, of the same: times 1 + weight, which is float32 too.
        silu_gate: silu(gate) * up, of both [..., f].
        gelu_gate: gelu(gate) * up, in its form with tanh.
        turn: as Llama's apply_rotary_pos_emb.
    """

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gemma_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_gate: Callable[[Tensor, Tensor], Tensor]
    gelu_gate: Callable[[Tensor, Tensor], Tensor]
    turn: Callable[..., tuple[Tensor, Tensor]]


_PARTS: WeakKeyDictionary[nn.Module, dict[Steps, list[Part]]] = WeakKeyDictionary()


@contextmanager
def lean(decoder: nn.Module, steps: Steps | None = None) -> Iterator[None]:
    """Within the block the decoder's parts run as described above, or as other steps that do the same.

    Not in float64: a norm is float32 within all the same, and would round otherwise than Llama's.
    """
    taken = parts(decoder, steps or STEPS)
    for module, forward in taken:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, _ in taken:
            del vars(module)["forward"]


def parts(decoder: nn.Module, steps: Steps) -> list[Part]:
    """The modules that take part at the moment, each with what it would run as."""
    known = _PARTS.setdefault(decoder, {})
    if steps not in known:
        known[steps] = _parts(decoder, steps)
    return [(module, forward) for module, forward in known[steps] if _may(module)]


def _may(module: nn.Module) -> bool:
    """Frozen, not in float64, and nobody (accelerate's hooks, say) has given it a forward of its own."""
    own = "forward" in vars(module)
    return not own and not any(w.requires_grad or w.dtype == torch.float64 for w in module.parameters())


def _parts(decoder: nn.Module, steps: Steps) -> list[Part]:
    found: list[Part] = []
    for module in decoder.modules():
        forward: Any = type(module).forward
        if _alike(forward, llama.LlamaRMSNorm.forward):
            found.append((module, partial(_normed, module, steps.norm)))
        elif _norms_as_gemma(module):
            found.append((module, partial(_normed_as_gemma, module, steps.gemma_norm)))
        elif _alike(forward, llama.LlamaMLP.forward) and (gate := _gate_of(module.act_fn, steps)):
            found.append((module, partial(_gated, module, gate)))
        elif _turns_as_llama(forward):
            names = {**forward.__globals__, ROTARY: steps.turn}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
            own.__kwdefaults__ = forward.__kwdefaults__
            found.append((module, MethodType(own, module)))
    return found


def _norms_as_gemma(module: nn.Module) -> bool:
    own = [getattr(type(module), name, None) for name in ("forward", "_norm")]
    return all(map(_alike, own, (GemmaRMSNorm.forward, GemmaRMSNorm._norm)))


def _gate_of(activation: Any, steps: Steps) -> Callable[[Tensor, Tensor], Tensor] | None:
    if isinstance(activation, (nn.SiLU, SiLUActivation)):
        return steps.silu_gate
    # its other form is written out in Python
    fast = isinstance(activation, GELUTanh) and isinstance(activation.act, partial)
    return steps.gelu_gate if fast else None


def _turns_as_llama(forward: Any) -> bool:
    if not inspect.isfunction(forward) or forward.__closure__ or ROTARY not in forward.__code__.co_names:
        return False
    turn = forward.__globals__.get(ROTARY)
    half = getattr(turn, "__globals__", {}).get(HALF)
    return _alike(turn, llama.apply_rotary_pos_emb) and _alike(half, llama.rotate_half)


def _alike(one: Any, other: Any) -> bool:
    """Whether two functions do the same, whatever their docstrings say and wherever they are defined."""
    if not inspect.isfunction(one) or not inspect.isfunction(other):
        return False
    said = [_said(function) for function in (one, other)]
    return said[0] == said[1]


def _said(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    constants = [constant for constant in code.co_consts if not isinstance(constant, str)]
    return code.co_code, code.co_names, code.co_varnames, constants, function.__defaults__


def _normed(module: Any, norm: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return norm(hidden, module.weight, module.variance_epsilon)


def _normed_as_gemma(module: Any, norm: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return norm(hidden, module.weight, module.eps)


def _gated(module: Any, gate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    out: Tensor = module.down_proj(gate(module.gate_proj(hidden), module.up_proj(hidden)))
    return out


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), float32 within (Zhang & Sennrich 2019); x [..., d].

    Llama rounds before it multiplies by the weight; Gemma after it has multiplied by 1 + weight.
    """

    @staticmethod
    def forward(ctx: Any, gemma: bool, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(hidden.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(hidden, scale, weight)
        ctx.gemma = gemma
        out: Tensor
        if gemma:
            out = (wide * scale).mul_(weight.float() + 1).to(hidden.dtype)
        else:
            out = weight * (wide * scale).to(hidden.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, scale, weight = ctx.saved_tensors
        wide = hidden.float()
        if ctx.gemma:
            by_normed = gradient.float() * (weight.float() + 1)
        else:
            by_normed = (gradient * weight).to(hidden.dtype).float()
        along = (by_normed * wide).sum(-1, keepdim=True)
        along = along.mul_(scale).mul_(scale).mul_(scale).div_(-hidden.shape[-1])
        return None, (by_normed * scale).addcmul_(wide, along).to(hidden.dtype), None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up, or gelu(gate) * up in its form with tanh; [..., f] each (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gelu: bool, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activated(gelu, gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        aten, by_active = torch.ops.aten, gradient * up
        if ctx.gelu:
            by_gate = aten.gelu_backward(by_active, gate, approximate="tanh")
        else:
            by_gate = aten.silu_backward(by_active, gate)
        return None, by_gate, _activated(ctx.gelu, gate).mul_(gradient)


def _activated(gelu: bool, gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class _Rotary(torch.autograd.Function):
    """x * cos + (-x's second half, x's first half) * sin (Su et al. 2021); x [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (one, two), (sin_one, sin_two) = x.chunk(2, -1), sin.chunk(2, -1)
        out = x * cos
        first, second = out.chunk(2, -1)
        first.addcmul_(two, sin_one, value=-1)
        second.addcmul_(one, sin_two)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        (one, two), (sin_one, sin_two) = gradient.chunk(2, -1), sin.chunk(2, -1)
        out = gradient * cos
        first, second = out.chunk(2, -1)
        first.addcmul_(two, sin_two)
        second.addcmul_(one, sin_one, value=-1)
        return out, None, None


_rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotary.apply


def _turn(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


STEPS = Steps(
    norm=partial(_Norm.apply, False),
    gemma_norm=partial(_Norm.apply, True),
    silu_gate=partial(_Gated.apply, False),
    gelu_gate=partial(_Gated.apply, True),
    turn=_turn,
)
