"""One prefix folder, the only contract with the toolkit: prefix.safetensors, and prefix.json with its sha256.

Reads safetensors and JSON, and nothing else. Axes: H kv heads, P virtual tokens, D head dim.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from prefixtune_vllm.errors import PrefixError

__all__ = ["LayerShape", "StoredPrefix", "read_folder", "read_json", "read_tensors"]

SCHEMA = 1
TENSORS, INFO = "prefix.safetensors", "prefix.json"


@dataclass(frozen=True)
class LayerShape:
    """One layer's cache per token: `kv_heads` keys of `key_dim` numbers, and values of `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class StoredPrefix:
    """What prefix.json says. `digest`, the sha256 of the tensors' file, is the prefix's identity.

    `fingerprint` has numbers sampled from the base's weights by tensor name, and the precision they had.
    """

    folder: Path
    digest: str
    length: int
    layers: tuple[LayerShape, ...]
    base_name: str
    fingerprint: dict[str, Any]


def read_folder(folder: Path) -> StoredPrefix:
    """prefix.json, checked; the tensors are not looked at.

    Raises:
        PrefixError: there is no prefix folder, or it is of another schema, or broken.
    """
    info = read_json(folder / INFO)
    if info.get("schema") != SCHEMA:
        raise PrefixError(f"{folder / INFO}: expected schema {SCHEMA}; got {info.get('schema')!r}")
    try:
        layers = tuple(
            LayerShape(int(layer["kv_heads"]), int(layer["key_dim"]), int(layer["value_dim"]))
            for layer in info["geometry"]["layers"]
        )
        stored = StoredPrefix(
            folder=folder,
            digest=str(info["sha256"][TENSORS]),
            length=int(info["length"]),
            layers=layers,
            base_name=str(info["base_name"]),
            fingerprint={
                "dtype": info["fingerprint"]["dtype"],
                "values": dict(info["fingerprint"]["values"]),
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PrefixError(f"{folder / INFO}: damaged ({type(error).__name__}: {error})") from None
    if stored.length < 1 or not layers or len(stored.digest) != 64:
        raise PrefixError(f"{folder / INFO}: damaged (length, layers or sha256 cannot be right)")
    return stored


def read_tensors(prefix: StoredPrefix) -> list[tuple[Tensor, Tensor]]:
    """(key, value) [H, P, D] of each layer; checksum and shapes are checked before anything is believed.

    Raises:
        PrefixError: the file is missing, or is not the one that `prefix` was read for.
    """
    path = prefix.folder / TENSORS
    try:
        raw = path.read_bytes()  # once: what is hashed is what is used
    except OSError as error:
        raise PrefixError(f"{path}: cannot be read ({error.strerror})") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != prefix.digest:
        raise PrefixError(f"{path}: the checksum is {found[:12]}…, expected {prefix.digest[:12]}…")
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError) as error:
        raise PrefixError(f"{path}: not a safetensors file ({error})") from None
    pairs = []
    for index, shape in enumerate(prefix.layers):
        key, value = tensors.get(f"layers.{index}.key"), tensors.get(f"layers.{index}.value")
        wanted = [(shape.kv_heads, prefix.length, dim) for dim in (shape.key_dim, shape.value_dim)]
        if key is None or value is None or [tuple(key.shape), tuple(value.shape)] != wanted:
            raise PrefixError(f"{path}: layer {index} is not of the shapes {wanted}")
        pairs.append((key, value))
    return pairs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        PrefixError: it is not there, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrefixError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise PrefixError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise PrefixError(f"{path}: expected a JSON object")
    return found
