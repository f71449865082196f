"""How a base model is recognised again: numbers sampled from its weights. Knows torch only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Fingerprint"]

# The fingerprint has 48 values from each of six matrices, the embedding and others over the depth, and 4 from
# each other parameter: a merged LoRA changes some kinds of layer alone, and norms and biases are tuned alone.
SKETCH_TENSORS, SKETCH_VALUES, SKETCH_OTHERS = 6, 48, 4


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A sketch of a model's weights: enough to refuse another model, loose enough for another precision.

    `values` holds sampled numbers of every parameter by its name, `dtype` their precision. Two loads of
    one checkpoint match; a fine-tuned copy does not, in the same precision even if it moved little, and even
    if one kind of layer moved alone.
    """

    values: dict[str, list[float]]
    dtype: str | None = None

    @property
    def digest(self) -> str:
        """A short name for people; equality is decided by `matches`."""
        rounded = {name: [f"{value:.2e}" for value in values] for name, values in self.values.items()}
        return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    @torch.no_grad()
    def of(cls, base: nn.Module) -> Fingerprint:
        """Sample `base`: as it was before `quantize_base`; other quantised tensors are passed over."""
        before: Fingerprint | None = getattr(base, "prefixtune_fingerprint", None)
        if before is not None:
            return before
        numbers = [(name, p) for name, p in base.named_parameters() if p.is_floating_point() and p.dim()]
        weights = [(name, p) for name, p in numbers if p.dim() == 2]
        here = [(name, p) for name, p in numbers if not p.is_meta]  # the others are on a disk, or nowhere
        if not weights or not here:
            return cls(values={})
        stride = (len(weights) - 1) / (SKETCH_TENSORS - 1)
        more = {weights[round(i * stride)][0] for i in range(SKETCH_TENSORS)}
        values = {}
        for name, weight in here:
            flat, count = weight.detach().reshape(-1), SKETCH_VALUES if name in more else SKETCH_OTHERS
            index = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).round().long()
            values[name] = flat[index.to(flat.device)].float().cpu().tolist()
        return cls(values=values, dtype=str(weights[0][1].dtype).removeprefix("torch."))

    def matches(self, other: Fingerprint) -> bool:
        """True where all that both sampled is equal, between precisions up to bfloat16's rounding."""
        shared = self.values.keys() & other.values.keys()
        rounding = 0.0 if self.dtype == other.dtype else 2**-7
        for name in shared:
            mine, theirs = torch.tensor(self.values[name]), torch.tensor(other.values[name])
            if mine.shape != theirs.shape or not torch.allclose(
                mine, theirs, rtol=rounding, atol=rounding * 1e-5
            ):
                return False
        return bool(shared)

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "values": self.values}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fingerprint:
        values = {str(name): [float(x) for x in sampled] for name, sampled in record["values"].items()}
        return cls(values=values, dtype=record["dtype"])
