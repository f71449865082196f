"""What a base model's KV cache looks like, found by running one token through the model.

Knows shapes and position limits. Knows no prefix and no training.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prefixtune.errors import UnsupportedModelError

__all__ = [
    "Geometry",
    "LayerGeometry",
    "compute_dtype",
    "has_values",
    "is_exact",
    "meta_ready",
    "quiet_eval",
    "text_config",
]

WARNING = "warn_if_padding_and_no_attention_mask"  # a method of transformers' models
CAUSAL_FORM = "set is_decoder=True where the architecture has a causal form"
# layer_types of transformers that have keys and values
ATTENTION = re.compile("(full_|sliding_|chunked_|)attention")
# of transformers 5.23: a cache with a window, and a mask without one
CACHE_ALONE_SLIDES = ("moshi",)
_PROBED: WeakKeyDictionary[nn.Module, Geometry] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """One attention layer's share of the KV cache: keys [kv_heads, T, key_dim], values the same by value_dim.

    `window`: how many positions a token sees, itself included, where the layer slides or is chunked.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def numbers_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The KV cache of a base model, layer by layer, and its limit of positions.

    Example:
        >>> geometry = Geometry.probe(base)                                    # doctest: +SKIP
        >>> geometry.layers[0].kv_heads, geometry.numbers_per_token            # doctest: +SKIP
        (3, 11520)
    """

    model_type: str
    hidden_size: int
    layers: tuple[LayerGeometry, ...]
    max_positions: int | None = (
        None  # beyond this the model has no position embedding; None: no such limit known
    )
    positions_from_mask: bool = False  # OPT numbers the tokens that its mask shows, and no others
    positions_extrapolate: bool = True  # rotary and alibi models run on beyond max_positions, if badly

    @property
    def numbers_per_token(self) -> int:
        """Key and value numbers that one token takes over all layers."""
        return sum(layer.numbers_per_token for layer in self.layers)

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct window sizes, ascending; empty where every layer sees all positions."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    @property
    def learned_positions(self) -> int | None:
        """The positions that the model has an embedding for, and cannot go beyond; None: no such limit."""
        return None if self.positions_extrapolate else self.max_positions

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        layers = tuple(LayerGeometry(**layer) for layer in values["layers"])
        return cls(**{**values, "layers": layers})

    @classmethod
    @torch.no_grad()
    def probe(cls, base: nn.Module) -> Geometry:
        """Run one token through `base` (on any device, meta included) and read the shapes from its cache.

        With weights, four tokens more tell whether the model is causal and how it counts positions.

        Raises:
            UnsupportedModelError: a layer keeps its state in something other than a key/value cache, tokens
                see later ones, or positions do not begin at 0.
        """
        if base in _PROBED:
            return _PROBED[base]
        _settle_bitsandbytes(base)
        config = text_config(base)
        cache = _cache_of_one_token(base)
        windows = _windows(config)
        limit, extrapolate = _position_limit(config)
        shortest = min(windows.values(), default=None)
        if config.model_type in CACHE_ALONE_SLIDES and shortest and shortest < (limit or math.inf):
            raise UnsupportedModelError(
                f"{type(base).__name__} ({config.model_type}): its cache forgets what left its window, its "
                "attention without a cache does not: what is generated would not be what was trained",
                hint="with sliding_window = max_position_embeddings in its configuration both see all",
            )
        layers = []
        for index in range(max(len(cache.layers), config.num_hidden_layers)):
            layer = cache.layers[index] if index < len(cache.layers) else None
            if layer is None or getattr(layer, "keys", None) is None or layer.keys.ndim != 4:
                raise UnsupportedModelError(
                    f"{type(base).__name__}: layer {index} of {config.num_hidden_layers} has no KV cache",
                    hint="a prefix needs plain attention in every layer; state-space, linear-attention and "
                    "KV-sharing layers are refused rather than served inexactly",
                )
            (_, heads, tokens, key_dim), value_shape = layer.keys.shape, layer.values.shape
            if tokens != 1 or value_shape[:3] != (1, heads, 1):
                raise UnsupportedModelError(
                    f"{type(base).__name__}: layer {index} caches keys {tuple(layer.keys.shape)} and values "
                    f"{tuple(value_shape)} for one token; expected [1, kv_heads, 1, dim]"
                )
            layers.append(
                LayerGeometry(
                    kv_heads=heads, key_dim=key_dim, value_dim=value_shape[3], window=windows.get(index)
                )
            )
        has_weights = _device(base).type != "meta"
        geometry = cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            layers=tuple(layers),
            max_positions=limit,
            positions_extrapolate=extrapolate,
            positions_from_mask=_counts_the_mask(base) if has_weights else False,
        )
        if has_weights:
            _PROBED[base] = geometry
        return geometry

    def stands_for(self, twin: nn.Module) -> None:
        """Let `probe` answer this for a copy whose numbers mean nothing, in place of running it."""
        _PROBED[twin] = self


def text_config(base: nn.Module) -> Any:
    """The configuration of the language model inside `base`."""
    config: Any = base.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def compute_dtype(base: nn.Module) -> torch.dtype:
    """The precision of the activations; a quantised weight's own type is not that.

    The input embedding's, else that of the first parameter of 16 bits or more, else the configuration's.
    """
    whole: Any = base
    embedding = getattr(whole.get_input_embeddings(), "weight", None) if hasattr(base, "config") else None
    for weight in (embedding, *base.parameters()):
        if weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
            found: torch.dtype = weight.dtype
            return found
    told = getattr(text_config(base), "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


def is_exact(base: nn.Module) -> bool:
    """Whether two ways to compute the same differ by float32's rounding only.

    Not where a library quantised the model: some of them round activations, in steps far above that.
    """
    foreign = getattr(getattr(base, "config", None), "quantization_config", None) is not None
    return compute_dtype(base) in (torch.float32, torch.float64) and not foreign


@contextmanager
def quiet_eval(base: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode it was in before."""
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_values(base: nn.Module) -> bool:
    """Whether the weights are numbers, and not the shapes alone that an estimate of the memory runs on."""
    weight = next(base.parameters())
    return not (weight.is_meta or isinstance(weight, FakeTensor))


@contextmanager
def meta_ready(base: nn.Module) -> Iterator[None]:
    """On the meta device, switch off what would read values: experts kernels by data, the padding warning."""
    config, name = text_config(base), "_experts_implementation"
    on_meta = _device(base).type == "meta"
    before = [getattr(config, name)] if on_meta and hasattr(config, name) else []
    warning = [m for m in base.modules() if on_meta and hasattr(m, WARNING) and WARNING not in vars(m)]
    for module in warning:
        vars(module)[WARNING] = lambda *_, **__: None
    if before:
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        for module in warning:
            del vars(module)[WARNING]
        for value in before:
            setattr(config, name, value)


def _cache_of_one_token(base: nn.Module) -> Any:
    from transformers import DynamicCache

    config = text_config(base)
    crossed = any(name.endswith("encoder_attn") for name, _ in base.named_modules())
    if getattr(config, "is_encoder_decoder", False) or crossed:
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder, or half of one; a prefix needs a decoder-only model"
        )
    whole: Any = base
    decoder = (whole.get_decoder() if hasattr(base, "get_decoder") else None) or whole
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder here: its attention is not causal", hint=CAUSAL_FORM
        )
    cache = DynamicCache()
    token = torch.ones((1, 1), dtype=torch.long, device=_device(base))
    with quiet_eval(base), meta_ready(base), _unsupported_unless_it_runs(base):
        base(input_ids=token, past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def _unsupported_unless_it_runs(base: nn.Module) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except (LookupError, ValueError, AttributeError, TypeError, AssertionError, RuntimeError) as error:
        kind = f"{type(base).__name__} ({text_config(base).model_type})"
        if _device(base).type == "meta" and "meta" in str(error):
            raise UnsupportedModelError(
                f"{kind} cannot be looked at without its weights: {error}",
                hint="name the folder of the model with its weights, not its configuration alone",
            ) from error
        kinds = enumerate(map(str, getattr(text_config(base), "layer_types", None) or ()))
        others = [f"{i} ({name})" for i, name in kinds if not ATTENTION.fullmatch(name)]
        reason = f"layers {', '.join(others)} have none ({error})" if others else error
        raise UnsupportedModelError(
            f"{kind} did not run a few tokens with a plain key/value cache: {reason}",
            hint="a prefix needs keys and values in every layer; models with recurrent layers or caches of "
            "their own have no prefix",
        ) from error


def _counts_the_mask(base: nn.Module) -> bool:
    """Whether positions count the mask's ones and not columns; checks that a KV cache can stand for text.

    Raises:
        UnsupportedModelError: a token sees later ones, or positions do not begin at 0.
    """
    device, kind = _device(base), f"{type(base).__name__} ({text_config(base).model_type})"
    ids = (torch.arange(4, device=device) * 131 + 7)[None] % text_config(base).vocab_size
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    hole = torch.tensor([[1, 1, 0, 1]], device=device)

    def logits(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        found: torch.Tensor = base(input_ids=tokens, use_cache=False, **options).logits.float()
        return found

    with quiet_eval(base), _unsupported_unless_it_runs(base):
        plain = logits(ids)
        # a mixture's experts round by how many tokens they get, hence not 0
        tolerance = (1e-4 if is_exact(base) else 0.05) * plain.std()
        if not bool((plain - logits(other))[:, :-1].abs().max() <= tolerance):
            raise UnsupportedModelError(
                f"{kind} is an encoder: its tokens see later ones, so no KV cache stands for a text",
                hint=CAUSAL_FORM,
            )
        if "position_ids" not in inspect.signature(base.forward).parameters:
            return False
        positions = torch.arange(4, device=device)[None]
        if not bool((plain - logits(ids, position_ids=positions)).abs().max() <= tolerance):
            raise UnsupportedModelError(
                f"{kind}: its positions do not begin at 0, so it numbers the text after a prefix differently"
            )
        masked = logits(ids, attention_mask=hole, position_ids=positions)[:, -1]
        return not bool((logits(ids, attention_mask=hole)[:, -1] - masked).abs().max() <= tolerance)


def _settle_bitsandbytes(base: nn.Module) -> None:
    """Refuse what bitsandbytes' own layers cannot do exactly, and keep them from losing the gradient.

    On CPUs with AVX512-BF16 a 4-bit layer that runs in evaluation mode rewrites its weights into a layout
    whose kernel has no backward pass: the gradient would be lost without an error (bitsandbytes 0.50.2).
    """
    for name, module in base.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
        elif getattr(getattr(module, "state", None), "threshold", 0.0) > 0:
            raise UnsupportedModelError(
                f"{type(base).__name__}: {name} is LLM.int8(), which rounds by columns chosen from all "
                "tokens of a batch: tokens depend on later ones, so no KV cache stands for a text",
                hint="llm_int8_threshold=0.0 in BitsAndBytesConfig rounds each token by itself; better, "
                "prefixtune.load.load_base(..., quantize='int8') rounds weights only",
            )


def _device(base: nn.Module) -> torch.device:
    return next(base.parameters()).device


def _windows(config: Any) -> dict[int, int]:
    from transformers import DynamicCache

    windows = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if getattr(layer, "is_sliding", False):
            windows[index] = int(layer.sliding_window)
    for index, kind in enumerate(getattr(config, "attention_layers", None) or ()):  # GPT-Neo's local layers
        if kind == "local":
            windows[index] = int(config.window_size)
    return windows


def _position_limit(config: Any) -> tuple[int | None, bool]:
    rotary = bool(getattr(config, "rope_parameters", None))
    alibi = bool(getattr(config, "alibi", False)) or config.model_type == "bloom"
    if alibi:
        return None, True
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            return limit, rotary
    return None, True
