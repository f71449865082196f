"""How much memory weights take while they are read from their files. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from prefixtune.weights import LITTLE, made_anew, stored_tensors

__all__ = ["loading_bytes"]


def loading_bytes(
    files: Sequence[Path],
    weights: int,
    dtype: torch.dtype,
    *,
    base: nn.Module,
    largest: int,
    packed: int = 0,
) -> int:
    """Bytes at the peak of loading the `weights` bytes of `base` in `dtype`, mapped files included.

    A safetensors or pytorch_model.bin file is mapped. In its own precision its pages are the weights; in
    another one, and where tensors are merged, file and weights are resident when the last tensor is
    converted. A .gguf file is mapped, and its tensors are dequantised to float32 one by one: `largest` is the
    number of values in the largest. `packed` are the bytes of what is quantised then: it grows beside a file
    that is mapped, and in place of weights that are not.
    """
    stored = sum(file.stat().st_size for file in files)
    if any(file.suffix == ".gguf" for file in files):
        return weights + stored + 4 * largest
    tensors = stored_tensors(files)
    as_they_are = {kind for _, kind in tensors} <= {dtype}
    if as_they_are and (not tensors or made_anew(base, tensors, dtype) <= LITTLE):
        return weights + packed
    return weights + stored
