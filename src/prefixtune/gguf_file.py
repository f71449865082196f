"""What a `.gguf` file says where transformers does not read it, or reads it wrong."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from prefixtune.errors import MissingExtraError, ModelError
from prefixtune.geometry import text_config

__all__ = ["check_read_whole", "need_gguf", "set_special_tokens"]


def need_gguf(name: str) -> None:
    """Raise MissingExtraError where the package that reads `.gguf` files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            f"{name}: reading .gguf files needs the package gguf", hint="pip install 'prefixtune[gguf]'"
        )


def set_special_tokens(tokenizer: Any, file: Path) -> None:
    """Give the tokenizer the BOS and the EOS that the file names.

    transformers 5.17 takes the BOS of a Llama's file for its EOS: a target would end with the token that
    begins a turn, and an answer would never end.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    for name in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is None:
            continue
        token = int(field.parts[field.data[0]][0])
        if getattr(tokenizer, f"{name}_token_id") != token:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))


def check_read_whole(model: Any, file: Path) -> None:
    """Refuse a file of which transformers has left out something: it passes over what it has no name for.

    Raises:
        ModelError: the file has more numbers than the model, or its rotary embedding is another one.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    told = {name: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = [name for name in tensors if name.startswith("rope_")]
    kinds = _rotary_kinds(text_config(model))
    unread = ""
    if not any(kind.get("rope_type", "default") != "default" for kind in kinds):
        scaled = [name for name in factors if bool((tensors[name].data != 1).any())]
        types = [
            name for name, value in told.items() if name.endswith(".rope.scaling.type") and value != "none"
        ]
        factor = next((v for name, v in told.items() if name.endswith(".rope.scaling.factor")), None)
        unread = next(iter(scaled), "") or (types[0] if types and factor != 1 else "")
    base = next(((name, v) for name, v in told.items() if name.endswith(".rope.freq_base")), None)
    bases = [kind["rope_theta"] for kind in kinds if kind.get("rope_theta")]
    if base is not None and bases and not any(math.isclose(base[1], own, rel_tol=1e-4) for own in bases):
        unread = base[0]
    tied = text_config(model).tie_word_embeddings
    counted = [
        t for name, t in tensors.items() if name not in factors and not (tied and name == "output.weight")
    ]
    more = sum(int(t.n_elements) for t in counted) - sum(p.numel() for p in model.parameters())
    if more > 0:
        unread = f"{more:,} of its numbers"
    if unread:
        raise ModelError(
            f"{file}: transformers does not read {unread}, so the model would be another one",
            hint="use the model's folder of safetensors",
        )


def _rotary_kinds(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = rope and all(isinstance(value, dict) for value in rope.values())
    return list(rope.values()) if nested else [rope]
