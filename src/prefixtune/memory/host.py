"""What the machine has and what this process has taken. Knows no model.

On the CPU memory is what is resident (VmHWM in /proc on Linux), on CUDA what torch has allocated.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from prefixtune.errors import OutOfMemoryError, PrefixTuneError, memory_is_full

__all__ = [
    "budget",
    "explain_full_memory",
    "forget_peak",
    "give_back_freed",
    "group_room",
    "keep_few_kernels",
    "measured_peak",
    "resident",
    "return_freed_memory",
    "take_workspaces",
]

M_MMAP_THRESHOLD = -3  # malloc.h
# of oneDNN, in each of two caches (docs/memory.md)
KERNELS, KERNEL_CACHES = 64, ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
GROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # cgroup v1 writes "no limit" as the largest multiple of a page
# v2 has one tree, v1 one for each controller: (limit, usage, the page cache that can be given back)
FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def measured_peak(device: str = "cpu") -> int:
    """The most bytes that this process has had so far: resident on the CPU, allocated by torch on CUDA."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one, if it was larger
        words = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()
        return int(words[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def resident(device: str = "cpu") -> int:
    """The bytes that this process has now, counted as in `measured_peak`."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def take_workspaces(device: str, dtype: torch.dtype) -> None:
    """Let torch take what its matrix library keeps for good on a CUDA device, so that `resident` counts it.

    It is a workspace for each thread that multiplies, the one of forward and that of backward passes: 64 MiB
    on a Hopper GPU. Where even these find no room the device is full, which an estimate says then.
    """
    if torch.device(device).type != "cuda":
        return
    try:
        with torch.enable_grad():
            matrix = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
            torch.autograd.backward((matrix @ matrix).sum())
    except RuntimeError as error:  # torch.OutOfMemoryError, or CUBLAS_STATUS_ALLOC_FAILED
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise


def give_back_freed() -> None:
    """Give the host's memory that is free, and that glibc has kept, back to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak(device: str = "cpu") -> bool:
    """Let `measured_peak` begin anew at what is in use now, freed memory given back. False where it cannot.

    So that a peak while loading does not hide that of what comes after.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    give_back_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
    except OSError:  # not Linux, or not allowed
        return False
    return True


def budget(device: str = "cpu") -> int:
    """The bytes that a process may come to have: what is free, and what this one has already.

    On the CPU the smaller of the machine's memory and that of the control groups that the process is in.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    free = int(psutil.virtual_memory().available)
    own = Path("/proc/self/cgroup")
    room = group_room(own.read_text(), GROUPS) if own.is_file() else None
    return resident() + (free if room is None else min(free, room))


def group_room(membership: str, root: Path) -> int | None:
    """The bytes left in the tightest of the control groups above a process; None where none has a limit.

    Args:
        membership: what /proc/self/cgroup says: a line `number:controllers:path` for each tree.
        root: where the trees are mounted.
    """
    rooms = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, tree = "v2", root
        elif "memory" in controllers.split(","):
            version, tree = "v1", root / "memory"
        else:
            continue
        inside = tree / path.lstrip("/")
        # in a container the path may be the host's, and the group's own files lie at the root
        for group in (inside, *inside.parents):
            if group.is_relative_to(tree):
                rooms.append(_room(group, *FILES[version]))
    found = [room for room in rooms if room is not None]
    return min(found) if found else None


def _room(group: Path, limit: str, usage: str, cache: str) -> int | None:
    if not (group / limit).is_file() or not (group / usage).is_file():
        return None
    most = (group / limit).read_text().strip()
    if most == "max" or int(most) >= UNLIMITED:
        return None
    stat = group / "memory.stat"
    counters = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    used = int((group / usage).read_text()) - int(counters.get(cache, 0))
    return max(0, int(most) - used)


def return_freed_memory(from_bytes: int) -> bool:
    """Have this process give memory back when it is freed, in blocks of so many bytes. False without glibc.

    glibc keeps freed blocks of up to 32 MiB and fragments: with gradient checkpointing a step took 941 MiB
    where 498 were enough. It costs page faults: up to a third more time for small batches.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, from_bytes))


def keep_few_kernels() -> None:
    """Have oneDNN keep few of the kernels that it makes in 16 bits on a CPU, one for each size of matmul.

    PyTorch and oneDNN keep 1,024 of them, about a gigabyte once rows of many lengths have come by. Both
    caches are made with the process's first such matmul, so this comes before it; what the environment says
    of them already holds.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS))


@contextmanager
def explain_full_memory(doing: str, *, hint: Callable[[], str]) -> Iterator[None]:
    """Within the block, memory that runs out is an OutOfMemoryError, with a hint that is asked for then."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, PrefixTuneError) or not memory_is_full(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no memory is left"
        error.__traceback__ = None  # its frames hold the step's tensors
        gc.collect()
        raise OutOfMemoryError(f"{doing}: the memory is full ({reason[:200]})", hint=hint()) from None
