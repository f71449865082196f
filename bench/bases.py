"""Base models of the benchmarks: by name, or of a BLOOM with random weights. Knows no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefixtune.load import LoadedBase

# The tutorial's model (bloom-1b4-zh), and the same cut down to four layers, which two cores train in seconds.
TUTORIAL_BLOOM = {"vocab_size": 46_145, "hidden_size": 2048, "n_layer": 24, "n_head": 16}
FOUR_LAYERS = {**TUTORIAL_BLOOM, "n_layer": 4}
SMALL_BLOOM = {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}
WEIGHTS_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model on its device, and what a trainer needs of its tokenizer."""

    model: Any
    tokenizer: Any | None
    pad_token_id: int
    name: str

    def loaded(self) -> LoadedBase:
        return LoadedBase(model=self.model, tokenizer=self.tokenizer, name=self.name, dtype_reason="")


def read_base(source: str | dict[str, int], *, dtype: str, device: str, quantize: str | None = None) -> Base:
    """A model by name, or BLOOM of the given sizes.

    Args:
        dtype: float32, bfloat16, or auto for what `load_base` chooses on this machine.
        quantize: int8 or nf4; only of BLOOM with random weights.
    """
    if isinstance(source, str):
        from prefixtune.generate import ending
        from prefixtune.load import load_base

        assert quantize is None
        base = load_base(source, dtype=dtype, device=device)
        pad = ending(base.model, base.tokenizer)["pad_token_id"]
        return Base(model=base.model, tokenizer=base.tokenizer, pad_token_id=pad, name=base.name)
    model = _random_bloom(source, _precision(dtype, device), device, quantize)
    return Base(model=model, tokenizer=None, pad_token_id=3, name="random BLOOM")  # 3: BLOOM's own


def _precision(dtype: str, device: str) -> Any:
    import torch

    from prefixtune.precision import choose_dtype

    return choose_dtype(dtype, torch.device(device))[0]


def _random_bloom(sizes: dict[str, int], dtype: Any, device: str, quantize: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BloomConfig

    from prefixtune.quantize import quantize_base

    config = BloomConfig(**sizes)
    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(device):  # 1.3 billion random numbers take a processor half a minute
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if quantize is None:
        return model
    return quantize_base(model.to("cpu"), quantize).to(device)  # packed on the CPU, as load_base does


def matmul_parameters(model: Any) -> int:
    """Weights that every token is multiplied by: an embedding is looked up, unless it is the head too."""
    from prefixtune.compare.peers import matmul_layers
    from prefixtune.quantize import QuantizedLinear

    packed = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    plain = sum(layer.weight.numel() for layer in matmul_layers(model).values())
    return plain + sum(layer.in_features * layer.out_features for layer in packed)
