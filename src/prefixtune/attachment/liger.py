"""Norms, gated MLPs and rotary embeddings through Liger's Triton kernels: one kernel each way, on CUDA.

They do what `lean`'s own steps do (Hsu et al. 2024, arXiv:2410.10989), for the same modules. Two of them
write over what they are given, the kernels of the MLP's backward pass and of the rotary embedding: here
nothing is written over that anybody else may read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prefixtune.attachment.lean import STEPS as OWN
from prefixtune.attachment.lean import Steps
from prefixtune.errors import ConfigError, MissingExtraError

__all__ = ["STEPS", "check_liger"]


def check_liger(device: torch.device) -> None:
    """Raise where Liger's kernels cannot run.

    Raises:
        ConfigError: `device` is no CUDA device.
        MissingExtraError: liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"liger: Liger's kernels run on a CUDA device, and this run is on {device}", hint="leave it out"
        )
    _kernels()


@cache
def _kernels() -> Any:
    found: dict[str, Any] = {}
    try:
        for module, names in (
            ("rms_norm", ("LigerRMSNormFunction",)),
            ("swiglu", ("swiglu_forward", "swiglu_backward")),
            ("geglu", ("geglu_forward", "geglu_backward")),
            ("rope", ("rope_forward", "rope_backward")),
        ):
            loaded = importlib.import_module(f"liger_kernel.ops.{module}")
            found |= {name: getattr(loaded, name) for name in names}
    except ImportError as error:
        raise MissingExtraError(
            f"liger needs the package liger-kernel ({error})", hint="pip install 'prefixtune[liger]'"
        ) from None
    return SimpleNamespace(**found)


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    if hidden.dtype != weight.dtype:  # the kernel's result is in the precision of `hidden`, Llama's is not
        return OWN.norm(hidden, weight, eps)
    out: Tensor = _kernels().LigerRMSNormFunction.apply(hidden, weight, eps, 0.0, "llama", False)
    return out


def _gemma_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _kernels().LigerRMSNormFunction.apply(hidden, weight, eps, 1.0, "gemma", False)
    return out


class _Gated(torch.autograd.Function):
    """act(gate) * up, [..., f] each, by the kernels of that name."""

    @staticmethod
    def forward(ctx: Any, name: str, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.name = name
        with _device_of(gate):
            out: Tensor = getattr(_kernels(), f"{name}_forward")(gate, up)[2]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with _device_of(gate):
            found = getattr(_kernels(), f"{ctx.name}_backward")(gate, up, gradient.contiguous())
        for gone in (gate, up):  # the gradients are where they were: a second backward pass is an error
            torch.autograd.graph.increment_version(gone)
        return None, *found


class _Rotary(torch.autograd.Function):
    """Queries [B, H, T, D] and keys [B, K, T, D] turned by cos and sin [1 or B, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        with _device_of(query):
            query, key, cos, sin = _kernels().rope_forward(query.clone(), key.clone(), cos, sin)
        ctx.save_for_backward(cos, sin)
        return query, key

    @staticmethod
    def backward(ctx: Any, by_query: Tensor, by_key: Tensor) -> Any:
        with _device_of(by_query):
            found = _kernels().rope_backward(by_query.clone(), by_key.clone(), *ctx.saved_tensors)
        return *found, None, None


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


_rotated: Callable[..., tuple[Tensor, Tensor]] = _Rotary.apply


def _turn(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if unsqueeze_dim != 1:
        return OWN.turn(query, key, cos, sin, unsqueeze_dim)
    return _rotated(query, key, cos, sin)


STEPS = Steps(
    norm=_norm,
    gemma_norm=_gemma_norm,
    silu_gate=partial(_Gated.apply, "swiglu"),
    gelu_gate=partial(_Gated.apply, "geglu"),
    turn=_turn,
)
