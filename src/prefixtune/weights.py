"""What files of weights hold, beside what a model makes of them. Knows no tokenizer and no device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from prefixtune.errors import ModelError, OutOfMemoryError, memory_is_full

__all__ = ["let_go_of", "made_anew", "stored_tensors"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
LITTLE = 0.05  # of the weights: what is made anew beside a mapped file, and not worth a copy of the others
Tensors = set[tuple[tuple[int, ...], torch.dtype | None]]


def stored_tensors(files: Sequence[Path]) -> Tensors:
    """Shape and precision of each tensor in safetensors and pytorch_model.bin files.

    A precision without arithmetic is None.

    Raises:
        ModelError: a file is damaged.
    """
    found: Tensors = set()
    for file in files:
        try:
            found |= _torch_tensors(file) if file.suffix == ".bin" else _safe_tensors(file)
        except Exception as error:  # OSError, SafetensorError, UnpicklingError, …: each reader has its own
            if memory_is_full(error):
                raise OutOfMemoryError(
                    f"{file}: its weights cannot be read: the memory is full",
                    hint="close other programs, or take a smaller model",
                ) from error
            raise ModelError(
                f"{file}: its weights cannot be read: {error}", hint="fetch or save the model again"
            ) from error
    return found


def _safe_tensors(file: Path) -> Tensors:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        parts = [tensors.get_slice(name) for name in names]
        return {(tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for part in parts}


def _torch_tensors(file: Path) -> Tensors:
    stored = torch.load(file, map_location="meta", weights_only=True)
    return {(tuple(tensor.shape), tensor.dtype) for tensor in stored.values()}


def made_anew(model: nn.Module, stored: Tensors, dtype: torch.dtype | None = None) -> float:
    """The share of a model's numbers that no file holds as they are.

    The others are pages of the mapped file. transformers merges matrices while it reads them, those of a
    mixture's experts for one, and what is merged is new memory beside the file.

    Args:
        dtype: the precision that a model without weights will be read in; else each tensor has its own.
    """
    saved = model.state_dict().keys()  # a mask that is never saved may be large, and says nothing of a file
    tensors = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
    new = sum(t.numel() for t in tensors if (tuple(t.shape), dtype or t.dtype) not in stored)
    return new / max(1, sum(t.numel() for t in tensors))


def let_go_of(model: nn.Module, files: Sequence[Path]) -> None:
    """Copy what a model on the CPU has of mapped files, where most of these is mapped for nothing.

    A file stays in memory as a whole while one tensor of it is used, be it a router's buffer. Nothing is
    done where nearly all tensors are used as they are.
    """
    if not files or any(file.suffix == ".gguf" for file in files):
        return
    stored = stored_tensors(files)
    if made_anew(model, stored) <= LITTLE:
        return
    for parameter in model.parameters():
        if (tuple(parameter.shape), parameter.dtype) in stored:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if (tuple(buffer.shape), buffer.dtype) in stored:
                setattr(module, name, buffer.clone())  # with new `data` its base would still be the file's
