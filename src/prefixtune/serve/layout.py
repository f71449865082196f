"""How the base's weights lie in memory. Their values, and what a caller sees of them, stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["lay_out"]


@torch.no_grad()
def lay_out(base: Any) -> None:
    """Store the linear weights of a float32 model on a CPU by columns.

    A batch multiplies a few dozen rows of activations by each weight. Where that lies in rows, [out, in], the
    matmul library spends a good part of each pass on turning it around; see bench/LOG.md. That holds for a
    head that is the input embedding too: it gains more than looking up its rows loses.
    """
    for module in base.modules():
        if type(module) is not nn.Linear:
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
            weight.data = weight.data.t().contiguous().t()
