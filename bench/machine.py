"""What a number must carry: machine, matmul peak, versions, command; and the memory of a process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("prefixtune", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
PEAK_SIZE, PEAK_RUNS = 2048, 12


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator, as far as a benchmark needs them."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted({"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags").split())),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu,
    }


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def matmul_peak() -> dict[str, float]:
    """Floating-point operations per second of a square matmul, by dtype: the best run, the two in turns."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    matrices = {name: torch.randn(PEAK_SIZE, PEAK_SIZE).to(kind) for name, kind in kinds.items()}
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(PEAK_RUNS):
        for name, matrix in matrices.items():
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2 * PEAK_SIZE**3 / seconds for name, seconds in best.items()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed among those that matter."""
    installed = {package.metadata["Name"] for package in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


def command() -> str:
    """The command line, without the folders of this machine."""
    return shlex.join(
        ["python", *(_shown(word) for word in (f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]))]
    )


def _shown(word: str) -> str:
    option, _, value = word.rpartition("=")
    name = Path(value).name if Path(value).is_absolute() else value
    return f"{option}={name}" if option else name


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
