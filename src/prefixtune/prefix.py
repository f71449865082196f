"""The prefix itself: the baked tensors (`PrefixKV`), the trainable module (`Prefix`) and how it starts.

Axes: H kv heads, P virtual tokens, D head dim, L layers. Knows no transformers and no disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.config import PrefixConfig, chosen_layers
from prefixtune.errors import ConfigError, UnsupportedModelError
from prefixtune.geometry import Geometry, quiet_eval
from prefixtune.optimizer import HeadwiseSoap

__all__ = [
    "LayerKV",
    "Prefix",
    "PrefixKV",
    "count_parameters",
    "fit_length",
    "measured_noise",
    "place_of",
    "start_ids",
]

PROBE_TOKENS = 32  # random tokens whose KV gives the scale of a random start


@dataclass(frozen=True)
class LayerKV:
    """One layer's baked prefix: `key` [H, P, key_dim], after rotary, and `value` [H, P, value_dim]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """The KV cache of P virtual tokens at positions 0..P-1: all that is ever served of a prefix.

    Example:
        >>> kv = PrefixKV.from_tokens(base, torch.tensor([[5, 6, 7]]))         # doctest: +SKIP
        >>> kv.length, kv.layers[0].key.shape                                  # doctest: +SKIP
        (3, torch.Size([3, 3, 64]))
    """

    layers: tuple[LayerKV, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ConfigError("a PrefixKV needs at least one layer")
        if self.layers[0].key.dim() == 3 and not self.length:
            raise ConfigError("a PrefixKV needs at least one virtual token")
        for index, layer in enumerate(self.layers):
            if layer.key.dim() != 3 or layer.key.shape[:2] != layer.value.shape[:2]:
                raise ConfigError(
                    f"layer {index}: expected key and value [kv_heads, P, dim]; got {tuple(layer.key.shape)} "
                    f"and {tuple(layer.value.shape)}"
                )
            if layer.key.shape[1] != self.length:
                raise ConfigError(
                    f"layer {index} holds {layer.key.shape[1]} virtual tokens, layer 0 {self.length}"
                )

    @property
    def length(self) -> int:
        """Virtual tokens P."""
        return self.layers[0].key.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """sha256 of the tensors: one prefix has one digest, wherever it is loaded."""
        digest = hashlib.sha256()
        for layer in self.layers:
            for tensor in (layer.key, layer.value):
                raw = tensor.detach().cpu().contiguous()
                digest.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
                digest.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, target: torch.device | torch.dtype | str) -> PrefixKV:
        """A copy on another device or in another precision."""
        return PrefixKV(tuple(LayerKV(layer.key.to(target), layer.value.to(target)) for layer in self.layers))

    def check(self, geometry: Geometry) -> None:
        """Raise UnsupportedModelError unless the tensors have the shapes of `geometry`'s cache."""
        if len(self.layers) != len(geometry.layers):
            raise UnsupportedModelError(
                f"the prefix has {len(self.layers)} layers, the model {len(geometry.layers)}",
                hint="it was made for another base model",
            )
        for index, (layer, shape) in enumerate(zip(self.layers, geometry.layers, strict=True)):
            expected = (shape.kv_heads, shape.key_dim, shape.value_dim)
            found = (layer.key.shape[0], layer.key.shape[2], layer.value.shape[2])
            if expected != found:
                raise UnsupportedModelError(
                    f"layer {index} of the prefix has (kv_heads, key_dim, value_dim) {found}, not {expected}",
                    hint="it was made for another base model",
                )

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, base: nn.Module, input_ids: Tensor) -> PrefixKV:
        """The KV of real text, all of it, on sliding layers too.

        Args:
            base: the base model, without a prefix attached.
            input_ids: [1, P] token ids.

        Raises:
            ConfigError: they are not that, or the model has no such ids or not as many positions.
        """
        from transformers import DynamicCache

        if not isinstance(input_ids, Tensor):
            raise ConfigError(f"input_ids: expected a tensor [1, P]; got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ConfigError(f"input_ids: expected [1, P] with P > 0; got {list(input_ids.shape)}")
        whole: Any = base
        known = getattr(whole.get_input_embeddings(), "num_embeddings", None)
        wrong = [token for token in input_ids[0].tolist() if known and not 0 <= token < known]
        if wrong:
            raise ConfigError(f"input_ids: token {wrong[0]} is not one of the model's {known}")
        if getattr(base, "prefixtune_attached", False):
            raise ConfigError(
                "from_tokens: a prefix is attached to this model", hint="leave attach(...) first"
            )
        geometry, count = Geometry.probe(base), input_ids.shape[1]
        limit = geometry.learned_positions
        if limit is not None and count > limit:
            raise ConfigError(
                f"from_tokens: {count} tokens do not fit into the {limit} positions of {geometry.model_type}"
            )
        cache = DynamicCache()  # without a config no layer forgets what left its window
        with quiet_eval(base):
            base(
                input_ids=input_ids.to(next(base.parameters()).device), past_key_values=cache, use_cache=True
            )
        return cls(tuple(LayerKV(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers))


class _DirectKV(nn.Module):
    """Every key and value number is a parameter: key.{i} and value.{i} [H, P, D]."""

    def __init__(self, start: PrefixKV) -> None:
        super().__init__()
        self.key = nn.ParameterList(_parameter(layer.key) for layer in start.layers)
        self.value = nn.ParameterList(_parameter(layer.value) for layer in start.layers)
        self.sizes = [size for layer in start.layers for size in (_size(layer.key), _size(layer.value))]

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        tensors = [tensor for pair in zip(self.key, self.value, strict=True) for tensor in pair]
        return [
            {"params": [tensor], "lr": rate * size} for tensor, size in zip(tensors, self.sizes, strict=True)
        ]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.key, self.value, strict=True))


class _ProjectedKV(nn.Module):
    """Embedding -> Linear -> Tanh -> Linear (Li & Liang 2021, section 4.3), one row per virtual token."""

    def __init__(self, start: PrefixKV, geometry: Geometry, hidden_size: int) -> None:
        super().__init__()
        self.geometry = geometry
        device = start.layers[0].key.device
        self.embedding = nn.Embedding(start.length, geometry.hidden_size, device=device)
        self.down = nn.Linear(geometry.hidden_size, hidden_size, device=device)
        self.up = nn.Linear(hidden_size, geometry.numbers_per_token, device=device)
        self._fit(start)

    @torch.no_grad()
    def _fit(self, start: PrefixKV) -> None:
        """Set `up` so that the output is `start`: P equations in hidden_size unknowns, minimum norm.

        With P > hidden_size + 1 the fit is the least-squares one.
        """
        target = torch.cat([_row(layer.key, layer.value) for layer in start.layers], dim=1)  # [P, numbers]
        mean = target.mean(dim=0)
        features = torch.tanh(self.down(self.embedding.weight))  # [P, hidden]
        solution = torch.linalg.pinv(features.double()) @ (target - mean).double()  # [hidden, numbers]
        self.up.weight.copy_(solution.T)
        self.up.bias.copy_(mean)

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": rate}]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        rows = self.up(torch.tanh(self.down(self.embedding.weight)))  # [P, numbers]
        pairs, start = [], 0
        for layer in self.geometry.layers:
            keys = rows[:, start : start + layer.kv_heads * layer.key_dim]
            start += layer.kv_heads * layer.key_dim
            values = rows[:, start : start + layer.kv_heads * layer.value_dim]
            start += layer.kv_heads * layer.value_dim
            pairs.append((_heads(keys, layer.kv_heads), _heads(values, layer.kv_heads)))
        return pairs


class _FrozenKV(nn.Module):
    """The KV of the layers that do not train, as buffers: key_{i} and value_{i} [H, P, D] of layer i."""

    def __init__(self, layers: Mapping[int, LayerKV]) -> None:
        super().__init__()
        self.numbers = tuple(layers)
        for number, layer in layers.items():
            self.register_buffer(f"key_{number}", layer.key.detach().clone())
            self.register_buffer(f"value_{number}", layer.value.detach().clone())

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.get_buffer(f"key_{i}"), self.get_buffer(f"value_{i}")) for i in self.numbers]


class Prefix(nn.Module):
    """The trainable prefix, in fp32 whatever the base's precision.

    Layers that `config.layers` leaves out keep their start, as buffers: without parameters, gradient and
    optimizer state. The state_dict has them, so that a checkpoint restores the whole prefix to the bit.

    Args:
        config: length, parameterisation, and which layers train.
        geometry: the base model's cache.
        start: the KV that the prefix equals before training; [H, P, D] per layer.
    """

    def __init__(self, config: PrefixConfig, geometry: Geometry, start: PrefixKV) -> None:
        super().__init__()
        start.check(geometry)
        if start.length != config.length:
            raise ConfigError(
                f"the start has {start.length} virtual tokens, the configuration {config.length}"
            )
        start = start.to(torch.float32)
        self.config = config
        self.trained = chosen_layers(config.layers, len(geometry.layers))  # the numbers of the layers
        begin = PrefixKV(tuple(start.layers[i] for i in self.trained))
        self.parameterisation: nn.Module = (
            _ProjectedKV(begin, _only(geometry, self.trained), config.hidden_size or geometry.hidden_size)
            if config.projection
            else _DirectKV(begin)
        )
        self.frozen = _FrozenKV({i: kv for i, kv in enumerate(start.layers) if i not in self.trained})

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer (key, value), [H, P, D]; with gradient in the layers that train, and only there."""
        pairs = dict(zip(self.trained, self.parameterisation(), strict=True))
        pairs |= zip(self.frozen.numbers, self.frozen(), strict=True)
        return [pairs[number] for number in range(len(pairs))]

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Groups for an optimizer whose steps are as large as its learning rate, as AdamW's are.

        The keys of a layer, and its values, step in proportion to their size at the start (root mean square),
        which differs by a factor of 40 within one model: a step that moves one layer's values far is nothing
        to another's (docs/adr/0007). The parameters of a projection are one group.

        Args:
            rate: share of that size; the learning rate itself with a projection.

        Example:
            >>> torch.optim.AdamW(model.prefix.parameter_groups(4e-2), weight_decay=0.0)   # doctest: +SKIP
        """
        groups: list[dict[str, Any]] = self.parameterisation.parameter_groups(rate)  # type: ignore[operator]
        return groups

    def optimizer(self, rate: float, **options: Any) -> torch.optim.Optimizer:
        """The optimizer that `train` uses, on `parameter_groups(rate)`; without weight decay unless given.

        Keys and values train with `HeadwiseSoap` (docs/adr/0010), a projection's weights with AdamW.

        Args:
            rate: see `parameter_groups`.
            options: betas, eps and weight_decay; of keys and values also damping.

        Raises:
            ConfigError: the prefix was cast to less than float32.

        Example:
            >>> optimizer = model.prefix.optimizer(5e-2)                           # doctest: +SKIP
        """
        dtype = next(self.parameters()).dtype
        if dtype.itemsize < torch.float32.itemsize:
            raise ConfigError(
                f"the prefix is in {str(dtype).removeprefix('torch.')}; it trains in float32, on any base",
                hint="call model.prefix.float() after a model.to(dtype)",
            )
        options = {"weight_decay": 0.0, **options}
        if isinstance(self.parameterisation, _DirectKV):
            return HeadwiseSoap(self.parameter_groups(rate), **options)
        return torch.optim.AdamW(self.parameter_groups(rate), fused=True, **options)

    @torch.no_grad()
    def bake(self) -> PrefixKV:
        """The prefix as it stands now: detached copies, [kv_heads, P, head_dim] per layer."""
        return PrefixKV(tuple(LayerKV(key.detach().clone(), value.detach().clone()) for key, value in self()))


def count_parameters(geometry: Geometry, config: PrefixConfig, hidden_size: int | None = None) -> int:
    """Trainable numbers of a prefix, without making it.

    Raises:
        ConfigError: `config.layers` names a layer that the geometry does not have.

    Example:
        >>> count_parameters(bloom_1b4_geometry, PrefixConfig(length=10))      # doctest: +SKIP
        983040
    """
    numbers = _only(geometry, chosen_layers(config.layers, len(geometry.layers))).numbers_per_token
    if not config.projection:
        return config.length * numbers
    model = hidden_size or geometry.hidden_size
    width = config.hidden_size or model
    return config.length * model + (model + 1) * width + (width + 1) * numbers


def start_ids(tokenizer: Any, text: str | None) -> tuple[int, list[int]]:
    """The tokens of a text to start from, and how many of them the tokenizer puts before every text."""
    whole, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    front = place_of(bare, whole)
    if front is None:  # it reads the text differently beside its special tokens
        return 0, list(whole)
    return front, list(whole[: front + len(bare)])


def place_of(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where the ids of `part` first stand in `whole`, one after the other; None where they do not."""
    places = range(len(whole) - len(part) + 1)
    return next((place for place in places if whole[place : place + len(part)] == part), None)


def fit_length(token_ids: Sequence[int], length: int) -> list[int]:
    """The first `length` ids; a shorter text is repeated from its start until it is long enough."""
    if not token_ids:
        raise ConfigError("the text to start from has no tokens")
    repeats = -(-length // len(token_ids))
    return (list(token_ids) * repeats)[:length]


@torch.no_grad()
def measured_noise(base: nn.Module, geometry: Geometry, length: int) -> PrefixKV:
    """Gaussian KV with the mean and spread that the model's own KV has, per layer, head and channel.

    Measured on random tokens; the first position is left out, where models park attention.
    """
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = PROBE_TOKENS + 1
    if geometry.max_positions is not None:
        tokens = min(tokens, geometry.max_positions)
    sample = PrefixKV.from_tokens(base, torch.randint(0, vocabulary, (1, tokens)))

    def like(measured: Tensor) -> Tensor:
        rest = measured.float()[:, 1:] if tokens > 2 else measured.float()
        mean, spread = rest.mean(dim=1, keepdim=True), rest.std(dim=1, keepdim=True)
        noise = torch.randn(measured.shape[0], length, measured.shape[2]).to(measured.device)
        return mean + spread * noise

    return PrefixKV(tuple(LayerKV(like(layer.key), like(layer.value)) for layer in sample.layers))


def _only(geometry: Geometry, numbers: Sequence[int]) -> Geometry:
    """The geometry with these of its layers."""
    return replace(geometry, layers=tuple(geometry.layers[number] for number in numbers))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32).clone())


def _size(tensor: Tensor) -> float:
    """Root mean square of [H, P, D]; the first token is left out, where models park attention."""
    if tensor.is_meta:  # a prefix whose memory alone is asked for
        return 1.0
    rest = tensor[:, 1:] if tensor.shape[1] > 1 else tensor
    return float(rest.detach().float().square().mean().sqrt()) or 1.0


def _row(key: Tensor, value: Tensor) -> Tensor:
    return torch.cat(
        [key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=1
    )  # [P, H*(D+D)]


def _heads(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(rows.shape[0], heads, -1).transpose(0, 1)  # [P, H*D] -> [H, P, D]
