"""What a `.gguf` file says of its tokenizer, where transformers does not read it, or reads it wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from prefixtune.errors import MissingExtraError

__all__ = ["need_gguf", "set_special_tokens"]


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
