"""Runs a file of tests that needs a process of its own, with what the process must have from its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["on_a_real_gpu", "passes_alone"]


def on_a_real_gpu(value: str) -> Any:
    """The value of a parameter that is skipped where there is no GPU."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.param(value, marks=[pytest.mark.gpu, missing])


def passes_alone(name: str, **environment: str) -> None:
    """Fail, and say what was printed, unless all tests of the file pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
