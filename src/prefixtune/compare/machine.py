"""What a number must carry: machine, versions and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "shown_command", "versions"]

PACKAGES = (
    *("prefixtune", "torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("sacrebleu", "rouge_score"),
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted({"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags").split())),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
    }


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def shown_command(program: str, words: Sequence[str]) -> str:
    """The command line, without the folders of this machine."""
    return shlex.join([*program.split(), *map(_shown, words)])


def _shown(word: str) -> str:
    option, _, value = word.rpartition("=")
    name = Path(value).name if Path(value).is_absolute() else value
    return f"{option}={name}" if option else name
