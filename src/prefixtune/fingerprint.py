"""How a base model is recognised again: numbers sampled from its weights and rotary. Knows torch only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Fingerprint", "weights_digest"]

# The fingerprint has 48 values from each of six matrices, the embedding and others over the depth, and 4 from
# each other parameter: a merged LoRA changes some kinds of layer alone, and norms and biases are tuned alone.
SKETCH_TENSORS, SKETCH_VALUES, SKETCH_OTHERS = 6, 48, 4
FREQUENCIES, FIRST = "inv_freq", "original_inv_freq"  # ends of names; the first are those before any change
ROUNDING = 2**-7  # bfloat16's
Samples = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A sketch of a model: enough to refuse another one, loose enough for another precision.

    `values` holds sampled numbers of every parameter by its name, `dtype` their precision. Two loads of
    one checkpoint match; a fine-tuned copy does not, in the same precision even if it moved little, and even
    if one kind of layer moved alone. `rotary` holds the frequencies (and the attention's scale) of rotary
    embeddings by their buffer's name: with others (`rope_theta`, YaRN) the same weights read the same cached
    keys otherwise.
    """

    values: Samples
    dtype: str | None = None
    rotary: Samples = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A short name for people; equality is decided by `matches`."""
        everything = {**self.values, **self.rotary}.items()
        rounded = {name: [f"{value:.2e}" for value in values] for name, values in everything}
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
            values[name] = _sampled(weight, SKETCH_VALUES if name in more else SKETCH_OTHERS)
        dtype = str(weights[0][1].dtype).removeprefix("torch.")
        return cls(values=values, dtype=dtype, rotary=_rotary(base))

    def matches(self, other: Fingerprint) -> bool:
        """True where nothing differs."""
        return self.difference(other) is None

    def difference(self, other: Fingerprint) -> str | None:
        """What is not the same: of all that both sampled, between precisions up to bfloat16's rounding."""
        rounding = 0.0 if self.dtype == other.dtype else ROUNDING
        if not self.values.keys() & other.values.keys():  # all on a disk, or of other names
            return "no weight in memory, under the same name, to know it by"
        if not _alike(self.values, other.values, rounding):
            return "other weights"
        if not _alike(self.rotary, other.rotary, ROUNDING):  # which a cast of the model rounds
            return "another rotary embedding (rope_parameters in its configuration)"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "values": self.values, "rotary": self.rotary}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fingerprint:
        values, rotary = (
            {str(name): [float(x) for x in sampled] for name, sampled in samples.items()}
            for samples in (record["values"], record.get("rotary") or {})  # earlier folders have none
        )
        return cls(values=values, dtype=record["dtype"], rotary=rotary)


@torch.no_grad()
def weights_digest(base: nn.Module) -> str:
    """sha256 of all weights and buffers in memory: any other number is another digest."""
    found = hashlib.sha256()
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor.detach()):
            if not part.is_meta:  # else it is on a disk
                found.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a quantised one is made of; itself where it is plain."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _sampled(tensor: torch.Tensor, count: int) -> list[float]:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).round().long()
    sampled: list[float] = flat[index.to(flat.device)].float().cpu().tolist()
    return sampled


def _rotary(base: nn.Module) -> Samples:
    """The frequencies that short passes have, whatever longer ones there were."""
    found = {}
    for place, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith(FIRST) or not name.endswith(FREQUENCIES):
                continue
            kind = name.removesuffix(FREQUENCIES)  # where the layers' kinds have frequencies of their own
            first = getattr(module, f"{kind}{FIRST}", buffer)
            if not first.is_meta:
                scale = float(getattr(module, f"{kind}attention_scaling", 1.0))
                found[f"{place}.{name}"] = [*_sampled(first, min(first.numel(), SKETCH_VALUES)), scale]
    return found


def _alike(mine: Samples, theirs: Samples, rounding: float) -> bool:
    for name in mine.keys() & theirs.keys():
        one, other = torch.tensor(mine[name]), torch.tensor(theirs[name])
        if one.shape != other.shape or not torch.allclose(one, other, rtol=rounding, atol=rounding * 1e-5):
            return False
    return True
