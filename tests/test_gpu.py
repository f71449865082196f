"""What runs on a GPU: on one that pretends (`pretend_gpu.py`), and on a real one where there is some.

Each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


REAL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)


@pytest.mark.parametrize("gpu", ["pretend", REAL])
def test_nothing_is_made_on_the_wrong_device(gpu: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_pretend_gpu.py"]
    environment = {**os.environ, "PREFIXTUNE_TEST_GPU": gpu}
    done = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
