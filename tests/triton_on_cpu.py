"""Triton's interpreter, so that Liger's kernels run on a machine without a GPU.

A process must have TRITON_INTERPRET=1 from its start: `test_liger.py` runs `on_liger.py` in one of its own.
Without it the kernels are compiled, for a real GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter

__all__ = ["DEVICE", "IS_REAL"]

IS_REAL = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if IS_REAL else "cpu")
_converted = interpreter._implicit_cvt


def _with_floats(argument: Any) -> Any:
    """A kernel's argument; a float is float32, as in a compiled kernel, and no number of Python's."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _converted(argument)


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.rsqrt(x)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


if not IS_REAL:
    interpreter._implicit_cvt = _with_floats
    # instead of CUDA's, of which the interpreter knows the name only
    rms_norm.rsqrt, geglu.tanh = _rsqrt, _tanh
