"""What a number must carry: machine, matmul peak, versions, command; and the memory of a process."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune.compare import describe_machine, shown_command, versions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "command",
    "describe_machine",
    "forget_peak",
    "free_memory",
    "matmul_peak",
    "memory_of_process",
    "versions",
]

PEAK_SIZE, PEAK_RUNS = 2048, 12
# a processor without a dtype's instructions takes a minute for a large matrix:
# where a small one is slow, that one is measured
SMALL_SIZE, SLOW_SECONDS = 512, 0.1


def matmul_peak() -> dict[str, float]:
    """Floating-point operations per second of a square matmul, by dtype: the best run, the two in turns."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    small = {name: torch.randn(SMALL_SIZE, SMALL_SIZE).to(kind) for name, kind in kinds.items()}
    matrices = {
        name: torch.randn(PEAK_SIZE, PEAK_SIZE).to(kinds[name])
        if min(_seconds(matrix) for _ in range(2)) < SLOW_SECONDS
        else matrix
        for name, matrix in small.items()
    }
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(PEAK_RUNS):
        for name, matrix in matrices.items():
            best[name] = min(best[name], _seconds(matrix))
    return {name: 2 * len(matrices[name]) ** 3 / seconds for name, seconds in best.items()}


def _seconds(matrix: Tensor) -> float:
    start = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - start


def command() -> str:
    """The command line, without the folders of this machine."""
    return shown_command(f"python bench/{Path(sys.argv[0]).name}", sys.argv[1:])


def memory_of_process() -> dict[str, int]:
    """Bytes in memory now (`now`) and at most since the last `forget_peak` (`peak`); Linux only."""
    names = {"VmRSS": "now", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":") for line in lines if line.split(":")[0] in names)
    return {names[name]: 1024 * int(value.split()[0]) for name, value in pairs}


def forget_peak() -> None:
    """Let VmHWM begin anew at what is in memory now (5: see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
