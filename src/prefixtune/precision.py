"""Where a base runs and in which precision: the faster one, measured where no one says. Knows no model."""

from __future__ import annotations

import time

import torch

from prefixtune.errors import ConfigError

__all__ = ["choose_dtype", "device_of"]

PROBE_SIZE = 512  # rows and columns of the matmul that decides the precision
PROBE_RUNS = 5
HOPELESS = 0.1  # a processor without bfloat16 of its own takes a second for each run: two show it
BF16_GAIN = 1.3  # below this, bfloat16's rounding buys too little time


def device_of(name: str | None) -> torch.device:
    """The device of that name; a CUDA device where there is one, else the CPU, where none is named.

    Raises:
        ConfigError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cpu":  # there is one, whatever its number: tensors come from "cpu"
            return torch.device("cpu")
        torch.zeros(1, device=device).item()  # it holds values: not so meta
    except (RuntimeError, AssertionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device {name!r} cannot be used: {said}") from None
    return device


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of a frozen base on `device`, and the reason in one line.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 where it is measurably faster.

    Raises:
        ConfigError: any other `dtype`.
    """
    if dtype in ("float32", "bfloat16"):
        return getattr(torch, dtype), f"{dtype}: as asked"
    if dtype != "auto":
        raise ConfigError(f"dtype: expected auto, float32 or bfloat16; got {dtype!r}")
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one
            has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        if has_it:
            return torch.bfloat16, "bfloat16: this GPU has it"
        return torch.float32, "float32: this GPU has no bfloat16 of its own"
    gain = _bfloat16_gain(device)
    if gain >= BF16_GAIN:
        return torch.bfloat16, f"bfloat16: a matmul is {gain:.1f}x faster than float32 here"
    slower = f"takes {1 / gain:.0f}x as long" if gain < 0.5 else f"is only {gain:.1f}x as fast"
    return torch.float32, f"float32: a matmul in bfloat16 {slower} here"


@torch.no_grad()
def _bfloat16_gain(device: torch.device) -> float:
    """How many times faster a matmul is in bfloat16 than in float32.

    The two take turns and the best run of each counts: other people's load only ever adds time.
    """
    kinds = (torch.float32, torch.bfloat16)
    matrices = [torch.randn(PROBE_SIZE, PROBE_SIZE, device=device).to(kind) for kind in kinds]
    seconds: list[list[float]] = [[], []]
    for run in range(PROBE_RUNS + 1):
        for matrix, taken in zip(matrices, seconds, strict=True):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # item: waits for devices that answer before they are done
            if run > 0:  # the first run sets up threads and kernels
                taken.append(time.perf_counter() - start)
        if run > 0 and min(seconds[0]) < HOPELESS * min(seconds[1]):
            break
    return min(seconds[0]) / min(seconds[1])
