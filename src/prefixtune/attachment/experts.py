"""The experts of a mixture on a CPU, each with its rows filled up to a multiple of 16.

In 16 bits oneDNN keeps a kernel of half a megabyte for each size of matmul that it meets, and a router sends
every expert of every pass another number of rows: some hundred megabytes that are never used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from prefixtune.geometry import has_values, text_config

__all__ = ["aligned_experts", "keeps_kernels"]

ROWS = 16  # a tile of AMX, so that filling up takes little time
NAME, LIBRARY, OPTION = "prefixtune_aligned", "grouped_mm", "_experts_implementation"


def keeps_kernels(base: nn.Module, dtype: torch.dtype, device: str) -> bool:
    """Whether a mixture's experts would be run by oneDNN, which keeps kernels for their sizes."""
    grouped = getattr(text_config(base), OPTION, None) == LIBRARY
    return grouped and torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16)


@contextmanager
def aligned_experts(base: nn.Module) -> Iterator[None]:
    """Within the block a model on a CPU in 16 bits, whose experts transformers would run, runs them so.

    A backward pass through recomputed layers belongs into the block too.
    """
    config, weight = text_config(base), next(base.parameters())
    if not has_values(base) or not keeps_kernels(base, weight.dtype, weight.device.type):
        yield
        return
    setattr(config, OPTION, NAME)
    try:
        yield
    finally:
        setattr(config, OPTION, LIBRARY)


def _aligned(module: nn.Module, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """As `grouped_mm_experts_forward`: hidden [T, d], of each token k experts and their shares [T, k]."""
    tokens, k = chosen.shape
    experts = int(module.num_experts)  # type: ignore[arg-type]
    missing = -torch.bincount(chosen.flatten(), minlength=experts) % ROWS
    spare = torch.arange(experts).repeat_interleave(missing)
    found = grouped_mm_experts_forward(
        module,
        torch.cat([hidden.repeat_interleave(k, 0), hidden.new_zeros(len(spare), hidden.shape[1])]),
        torch.cat([chosen.flatten(), spare])[:, None],
        torch.cat([shares.flatten(), shares.new_zeros(len(spare))])[:, None],
    )
    whole: Tensor = found[: tokens * k].view(tokens, k, -1).sum(1)
    return whole


ExpertsInterface.register(NAME, _aligned)
