"""How much memory weights take while they are read from their files. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

__all__ = ["loading_bytes"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def loading_bytes(
    files: Sequence[Path], weights: int, dtype: torch.dtype, *, largest: int, packed: int = 0
) -> int:
    """Bytes at the peak of loading `weights` bytes in `dtype`, files mapped into memory included.

    A safetensors file is mapped. In its own precision its pages are the weights; in another one both are
    resident when the last tensor is converted. A .gguf file is mapped, and its tensors are dequantised to
    float32 one by one: `largest` is the number of values in the largest. `packed` are the bytes of what is
    quantised then: it grows beside a file that is mapped, and in place of weights that are not.
    """
    stored = sum(file.stat().st_size for file in files)
    if any(file.suffix == ".gguf" for file in files):
        return weights + stored + 4 * largest
    kinds = {kind for file in files for kind in _kinds(file)}
    return weights + (packed if kinds <= {dtype} else stored)


def _kinds(file: Path) -> set[torch.dtype | None]:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return {DTYPES.get(tensors.get_slice(name).get_dtype()) for name in names}
