"""What runs on a GPU: on one that pretends (`pretend_gpu.py`), and on a real one where there is some.

Each in a process of its own.
"""

from __future__ import annotations

import pytest

from own_process import on_a_real_gpu, passes_alone


@pytest.mark.parametrize("gpu", ["pretend", on_a_real_gpu("cuda")])
def test_nothing_is_made_on_the_wrong_device(gpu: str) -> None:
    passes_alone("on_pretend_gpu.py", PREFIXTUNE_TEST_GPU=gpu)
