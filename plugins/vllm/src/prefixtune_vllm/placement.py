"""Where a layer's keys and values go: this rank's heads, and slots of the paged cache. Knows no vLLM.

Axes: H kv heads, P virtual tokens, D head dim, N tokens that are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefixtune_vllm.errors import PrefixError
from prefixtune_vllm.folder import StoredPrefix
from prefixtune_vllm.ledger import Load

__all__ = ["check_layers", "layer_index", "own_heads", "rows", "slots"]


def layer_index(name: str) -> int:
    """The number of a layer by its name in vLLM, such as model.layers.3.self_attn.attn.

    Raises:
        PrefixError: there is not exactly one number in it.
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise PrefixError(f"attention layer {name}: which layer of the model this is cannot be told")
    return int(numbers[0])


def own_heads(total: int, *, rank: int, ranks: int) -> slice:
    """The kv heads of a tensor-parallel rank; with fewer heads than ranks several ranks hold the same one."""
    if total >= ranks:
        return slice(rank * total // ranks, (rank + 1) * total // ranks)
    return slice(rank * total // ranks, rank * total // ranks + 1)


def slots(load: Load, block_size: int) -> Tensor:
    """[N] slots of the paged cache for the tokens start..stop-1."""
    positions = torch.arange(load.start, load.stop)
    return torch.tensor(load.blocks)[positions // block_size] * block_size + positions % block_size


def rows(tensor: Tensor, load: Load, heads: slice, like: Tensor) -> Tensor:
    """[H, P, D] → [N, own H, D], as attention writes new tokens, in the cache's precision."""
    part = tensor[heads, load.start : load.stop].transpose(0, 1)  # [N, own H, D]
    return part.to(device=like.device, dtype=like.dtype).contiguous()


def check_layers(prefix: StoredPrefix, layers: Mapping[str, Any], *, ranks: int, is_whole: bool) -> None:
    """Refuse a model whose cache has other shapes.

    Args:
        layers: vLLM's attention layers by name; each has num_kv_heads (of one rank), head_size, kv_cache.
        is_whole: all layers must be here; not so where a pipeline divides them.

    Raises:
        PrefixError: the prefix is for another model, or the cache is quantised.
    """
    found = {layer_index(name): layer for name, layer in layers.items()}
    missing = set(range(len(prefix.layers))) - set(found) if is_whole else set()
    if missing or not set(found) <= set(range(len(prefix.layers))) or len(found) != len(layers):
        raise PrefixError(
            f"{prefix.folder}: for a model of {len(prefix.layers)} layers; this one has {len(layers)} "
            "with a cache"
        )
    for index, layer in found.items():
        shape = prefix.layers[index]
        heads = own_heads(shape.kv_heads, rank=0, ranks=ranks)
        wanted = (heads.stop - heads.start, shape.key_dim, shape.value_dim)
        value_dim = getattr(layer, "head_size_v", layer.head_size)
        if (layer.num_kv_heads, layer.head_size, value_dim) != wanted:
            raise PrefixError(
                f"{prefix.folder}: layer {index} has (kv_heads, key_dim, value_dim) {wanted} on each rank; "
                f"this model has {(layer.num_kv_heads, layer.head_size, value_dim)}"
            )
        if not layer.kv_cache_torch_dtype.is_floating_point or layer.kv_cache_torch_dtype.itemsize < 2:
            raise PrefixError(f"layer {index}: a cache in {layer.kv_cache_dtype} would round the prefix")
        if not hasattr(layer.impl, "do_kv_cache_update"):
            raise PrefixError(
                f"layer {index}: {type(layer.impl).__name__} has no way to write into its cache"
            )
