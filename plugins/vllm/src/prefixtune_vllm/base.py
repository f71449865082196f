"""Whether a checkpoint holds the weights that a prefix was trained on, by numbers sampled from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefixtune_vllm.errors import PrefixError
from prefixtune_vllm.folder import StoredPrefix

__all__ = ["check_base", "local_checkpoint"]

ROUNDING = 2**-7  # between precisions: bfloat16's
Slices = dict[str, tuple[Path, str]]  # a tensor's name → its file, and its name there


def check_base(prefix: StoredPrefix, checkpoint: Path) -> None:
    """Refuse a folder of safetensors whose weights are not the ones that `prefix` was trained on.

    Raises:
        PrefixError: a sampled number differs, or none can be compared.
    """
    slices = dict(_slices(checkpoint))
    compared = 0
    for name, values in prefix.fingerprint["values"].items():
        place = _find(slices, name)
        if place is None:
            continue
        found, dtype = _sample(*place, len(values))
        same = dtype == prefix.fingerprint["dtype"]
        rounding = 0.0 if same else ROUNDING
        wanted = torch.tensor(values)
        if not torch.allclose(found, wanted, rtol=rounding, atol=rounding * 1e-5):
            raise PrefixError(
                f"{prefix.folder}: trained on {prefix.base_name}; {checkpoint} has other weights ({name})"
            )
        compared += 1
    if not compared:
        raise PrefixError(
            f"{prefix.folder}: trained on {prefix.base_name}; no tensor of {checkpoint} has a name by which "
            "it could be recognised"
        )


def _slices(checkpoint: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, (path, name)


def _find(slices: Slices, name: str) -> tuple[Path, str] | None:
    """A tensor by its name in the model, which checkpoints may have without the first part."""
    if name in slices:
        return slices[name]
    return slices.get(name.partition(".")[2])


def _sample(path: Path, name: str, count: int) -> tuple[torch.Tensor, str]:
    with safe_open(path, "pt") as file:
        tensor = file.get_slice(name)  # a row at a time: every matrix is sampled, and none is read whole
        rows, *rest = tensor.get_shape()
        width = math.prod(rest)
        index = torch.linspace(0, rows * width - 1, count, dtype=torch.float64).round().long().tolist()
        found = torch.stack([tensor[at // width : at // width + 1].reshape(-1)[at % width] for at in index])
    return found.float(), str(found.dtype).removeprefix("torch.")


def local_checkpoint(model: str, revision: str | None) -> Path:
    """The folder of a model that vLLM has loaded: itself, or the hub client's.

    Raises:
        PrefixError: there is none.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    options: dict[str, Any] = {"revision": revision, "local_files_only": True}
    try:
        from huggingface_hub import snapshot_download  # vLLM brings it

        return Path(snapshot_download(model, **options))
    except Exception as error:  # the hub client raises dozens of kinds
        raise PrefixError(f"{model}: its weights cannot be looked at ({type(error).__name__})") from None
