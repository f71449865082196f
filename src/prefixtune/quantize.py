"""Holds a frozen base's linear weights in 8 or 4 bits. Knows nothing of prefixes, data and disk.

int8: one float32 scale per output row, symmetric (plain torch). nf4: 4-bit NormalFloat in blocks of 64 with a
float32 scale each (Dettmers et al. 2023, section 3), packed and unpacked by bitsandbytes' kernels.

The layer is ours for three measured reasons (docs/adr/0005): bitsandbytes' own 4-bit layer gives no gradient
on some CPUs once the model has run in evaluation, its 8-bit layer rounds the activations too, and torchao's
8-bit layer keeps the unpacked weights of the whole model until the backward pass.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.config import SCHEMES
from prefixtune.errors import ConfigError, MissingExtraError, UnsupportedModelError
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import text_config

__all__ = [
    "QuantizedLinear",
    "check_scheme",
    "count_numbers",
    "quantization",
    "quantize_base",
    "refuse_lost_gradient",
    "saved_bytes",
]

BLOCK = 64  # weights that share a scale in nf4
# weights that are packed at once, a multiple of BLOCK: whole layers left glibc's heap full of holes
PIECE = 2**16
LARGEST = 127  # of int8; -128 is left out, so that the scale is symmetric
SPARED = 0.1  # share of the weights outside embeddings that may stay as they are (routers, small projections)


class _Linear(torch.autograd.Function):
    """x @ W^T + b with W unpacked twice, in forward and in backward, and never kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.layer.unpacked(gradient.dtype)).to(ctx.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer with its weight [out, in] in int8 or nf4.

    Its output, and the gradient of its input, are those of a linear layer that holds `unpacked()`:
    activations are not rounded, in training and in evaluation alike.

    Args:
        weight: [out, in], of any floating type; not kept.
        bias: [out], or None; kept as it is.
        scheme: "int8" or "nf4".
    """

    packed: Tensor  # int8 [out, in]; nf4: uint8 [out * in / 2, 1], two weights a byte
    scale: Tensor  # int8: [out, 1]; nf4: [blocks]; float32

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = scheme
        self.dtype = weight.dtype
        packed, scale = (_pack_int8 if scheme == "int8" else _pack_nf4)(weight.detach())
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the precision of `x`."""
        return _Linear.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this layer computes with."""
        if self.scheme == "int8" and dtype == torch.bfloat16:
            # both factors are bfloat16 numbers, so this is the same product as below at twice the speed
            return self.packed.to(dtype) * self.scale.to(dtype)
        if self.scheme == "int8":
            return (self.packed * self.scale).to(dtype)
        functional = _bitsandbytes()
        shape = torch.Size((self.out_features, self.in_features))
        state = functional.QuantState(self.scale, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return functional.dequantize_4bit(self.packed, state)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """For the few models that read a layer's weight themselves: a copy, [out, in]."""
        return self.unpacked(self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.is_floating_point() and self.scale.dtype != torch.float32:
            # model.to(bfloat16) is for activations: rounded scales would make it another model
            self.dtype, self.scale = self.scale.dtype, scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


@torch.no_grad()
def quantize_base(base: nn.Module, scheme: str) -> nn.Module:
    """Replace the linear layers of `base` (Conv1D too) by quantised ones, in place and one at a time.

    Embeddings and the output layer keep their precision. The fingerprint is taken before, so that a prefix
    finds its base again whether that is quantised or not.

    Args:
        base: a causal language model with its weights, on a device that the scheme works on.
        scheme: "int8" or "nf4".

    Raises:
        ConfigError: there is no such scheme, or not on this device, or the base is quantised already.
        MissingExtraError: nf4 without bitsandbytes.
        UnsupportedModelError: many weights are in layers that cannot be quantised, as in mixtures.

    Example:
        >>> quantize_base(model, "nf4")                                        # doctest: +SKIP
    """
    check_scheme(scheme, next(base.parameters()).device)
    if quantization(base) is not None:
        raise ConfigError(f"{type(base).__name__} is quantised already", hint="leave quantize out")
    names = _convertible(base)
    # an attribute and not a table, so that copies of the model have it too
    base.prefixtune_fingerprint = Fingerprint.of(base)  # type: ignore[assignment]
    made: dict[int, QuantizedLinear] = {}
    for name in names:
        layer: Any = base.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            continue
        if id(layer) not in made:
            weight = layer.weight.T if _is_conv1d(layer) else layer.weight
            made[id(layer)] = QuantizedLinear(weight, layer.bias, scheme).train(layer.training)
        base.set_submodule(name, made[id(layer)])
        del layer
    for kept in base.parameters():  # a view of the checkpoint would hold the whole file mapped
        kept.data = kept.data.clone()
    _return_freed_memory()
    return base


def check_scheme(scheme: str, device: torch.device) -> None:
    """Raise ConfigError or MissingExtraError where `scheme` does not work, before a model is loaded."""
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize: expected {' or '.join(SCHEMES)}; got {scheme!r}")
    if scheme != "nf4":
        return
    _bitsandbytes()
    known = sorted(sys.modules["bitsandbytes"].supported_torch_devices)
    if device.type not in known:
        raise ConfigError(
            f"quantize=nf4 does not work on {device}: bitsandbytes knows {', '.join(known)}",
            hint="use int8, which works everywhere",
        )


def quantization(base: nn.Module) -> dict[str, Any] | None:
    """What `base` is quantised with, for prefix.json: scheme, library and version; None where it is not.

    A base that was quantised by transformers is told by its own configuration.
    """
    ours = next((module for module in base.modules() if isinstance(module, QuantizedLinear)), None)
    if ours is not None:
        library = {"int8": "torch", "nf4": "bitsandbytes"}[ours.scheme]
        return {"scheme": ours.scheme, "library": library, "version": importlib.metadata.version(library)}
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None:
        return None
    told = config if isinstance(config, dict) else config.to_dict()
    library = str(getattr(told.get("quant_method"), "value", told.get("quant_method")))
    scheme = library
    if library == "bitsandbytes":
        scheme = "llm.int8" if told.get("load_in_8bit") else str(told.get("bnb_4bit_quant_type"))
    elif library == "torchao":
        scheme = str(told["quant_type"]["default"]["_type"])
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # a method that transformers has itself
        library, version = "transformers", importlib.metadata.version("transformers")
    return {"scheme": scheme, "library": library, "version": version}


def saved_bytes(base: nn.Module, scheme: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that `scheme` takes off the weights of `base` in `dtype`; bytes of the largest layer unpacked.

    Without weights, so that memory can be predicted: `base` may be on the meta device.
    """
    layers: list[Any] = [base.get_submodule(name) for name in _convertible(base)]
    numbers = {id(layer): layer.weight.numel() for layer in layers}
    rows = {id(layer): layer.weight.shape[1 if _is_conv1d(layer) else 0] for layer in layers}
    packed = sum(
        count + 4 * rows[key] if scheme == "int8" else count // 2 + 4 * -(-count // BLOCK)
        for key, count in numbers.items()
    )
    return sum(numbers.values()) * dtype.itemsize - packed, max(numbers.values(), default=0) * dtype.itemsize


def count_numbers(base: nn.Module) -> int:
    """Weights and biases of `base`, quantised ones by how many they stand for."""
    numbers = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, QuantizedLinear))
    for parameter in base.parameters():
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit parameters
        numbers += parameter.numel() if state is None else state.shape.numel()
    return numbers


def refuse_lost_gradient(base: nn.Module) -> None:
    """Raise UnsupportedModelError where bitsandbytes has rewritten 4-bit weights for its CPU kernel.

    That layout, which a layer takes on some CPUs when it first runs in evaluation mode, has no backward pass.
    """
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"{type(base).__name__}: {name} is in bitsandbytes' CPU layout, which passes no gradient",
                hint="make the PrefixModel before the model first generates, or load it with load_base",
            )


def _convertible(base: nn.Module) -> list[str]:
    """Names of the layers to quantise; a module that is used under two names comes twice."""
    whole: Any = base
    spared = {id(whole.get_output_embeddings())} if hasattr(base, "get_output_embeddings") else set()
    names, converted, left = [], 0, Counter[str]()
    seen: set[int] = set()
    for name, module in base.named_modules(remove_duplicate=False):
        if id(module) in spared or isinstance(module, nn.Embedding):
            continue
        numbers = sum(p.numel() for p in module._parameters.values() if p is not None and p.dim() > 1)
        linear = numbers > 0 and _is_linear(module)
        if linear:
            names.append(name)
        if id(module) not in seen:
            seen.add(id(module))
            converted += numbers * linear
            left[type(module).__name__] += numbers * (not linear)
    kept = sum(left.values())
    if kept > SPARED * (kept + converted):
        kind = left.most_common(1)[0][0]
        raise UnsupportedModelError(
            f"{type(base).__name__} ({text_config(base).model_type}): {kept / (kept + converted):.0%} of the "
            f"weights cannot be quantised, most of them in {kind}",
            hint="linear layers and Conv1D can be; load this model without quantize",
        )
    return names


@torch.no_grad()
def _is_linear(module: Any) -> bool:
    """Whether the module computes x @ W^T + b; that of a subclass is tried out, where it has its weights."""
    if type(module) is nn.Linear or _is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if module.weight.is_meta:
        return True
    x = torch.randn(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    found, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _return_freed_memory() -> None:
    """Have glibc return what was freed: it keeps what other threads allocated, and they loaded the weights.

    Of SmolLM2-135M's 257 MB in bfloat16, 218 MB would stay with the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and needs none
        if trim is not None:
            trim(0)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.float()
        largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)  # a row of zeros needs a scale too
        scale = (largest / LARGEST).bfloat16().float()  # a bfloat16 number: unpacking to bfloat16 rounds once
        return (rows / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale

    return _joined(map(pack, torch.split(weight, max(1, PIECE // weight.shape[1]))))  # [out, in], [out, 1]


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    def pack(part: Tensor) -> tuple[Tensor, Tensor]:
        packed, state = _bitsandbytes().quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax

    return _joined(map(pack, torch.split(weight.reshape(-1), PIECE)))  # [out * in / 2, 1], [blocks]


def _joined(pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    packed, scales = zip(*pieces, strict=True)
    return torch.cat(packed), torch.cat(scales)


def _bitsandbytes() -> Any:
    """bitsandbytes.functional.

    Its import asks the hub for a faster kernel where the package `kernels` is installed, and warns where not:
    neither is wanted, because nothing here runs that kernel.
    """
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        return loaded.functional
    with _hidden("kernels"), _silent("bitsandbytes"):
        try:
            return importlib.import_module("bitsandbytes").functional
        except ImportError as error:
            raise MissingExtraError(
                f"quantize=nf4 needs the package bitsandbytes ({error})",
                hint="pip install 'prefixtune[quant]', or use int8, which needs nothing",
            ) from None


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Within the block, importing `package` fails."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Within the block, the library's loggers say nothing below an error."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
