"""The prefix folder: written whole or not at all, and checked on the way back.

    prefix.safetensors      layers.{i}.key, layers.{i}.value: [kv_heads, P, head_dim]
    prefix.json             schema, base, geometry, parameterisation, template, training record, sha256
    trainable.safetensors   the projection's weights, where there is one, so that training can go on, and
                            the KV of the layers that do not train, whose names tell which these are
    README.md               the model card

Knows no model; never unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from prefixtune.config import PrefixConfig, chosen_layers
from prefixtune.errors import PrefixTuneError, StorageError
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import Geometry, LayerGeometry
from prefixtune.prefix import LayerKV, PrefixKV
from prefixtune.progress import note

__all__ = ["SCHEMA", "StoredPrefix", "check_base", "load_prefix", "read_info", "save_prefix", "write_folder"]

SCHEMA = 1
TENSORS, TRAINABLE, INFO, CARD = "prefix.safetensors", "trainable.safetensors", "prefix.json", "README.md"
DRAFT = ".prefixtune."


ENTRIES: dict[str, type | tuple[type, ...]] = {  # what prefix.json must have
    "base_name": str,
    "length": int,
    "parameterisation": str,
    "quantization": (dict, str, type(None)),
    "template": (str, type(None)),
    "training": (dict, type(None)),
    "sha256": dict,
    "config": dict,
    "geometry": dict,
    "fingerprint": dict,
}


@dataclass(frozen=True, kw_only=True)
class StoredPrefix:
    """What a prefix folder holds. `trainable` is the projection's state, None for a direct prefix."""

    kv: PrefixKV
    config: PrefixConfig
    geometry: Geometry
    fingerprint: Fingerprint
    info: dict[str, Any]
    trainable: dict[str, Tensor] | None


def save_prefix(
    folder: str | Path,
    kv: PrefixKV,
    *,
    config: PrefixConfig,
    geometry: Geometry,
    fingerprint: Fingerprint,
    base_name: str,
    trainable: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a prefix folder, replacing one that is there; on any failure the old one stays.

    Args:
        kv: the baked prefix, [kv_heads, P, head_dim] per layer.
        trainable: the projection's state, so that training can go on exactly.
        extra: entries of prefix.json: template, training record, quantisation of the base.
    """
    target = Path(folder)
    if not all(bool(tensor.isfinite().all()) for layer in kv.layers for tensor in (layer.key, layer.value)):
        note(f"{target}: saved, but the prefix has numbers that are not finite: its training diverged")
    tensors = {}
    for index, layer in enumerate(kv.layers):
        tensors[f"layers.{index}.key"] = layer.key.detach().cpu().contiguous()
        tensors[f"layers.{index}.value"] = layer.value.detach().cpu().contiguous()
    with write_folder(target) as draft:
        save_file(tensors, draft / TENSORS, metadata={"format": "pt"})
        digests = {TENSORS: _sha256(draft / TENSORS)}
        if trainable is not None:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable.items()}
            save_file(plain, draft / TRAINABLE, metadata={"format": "pt"})
            digests[TRAINABLE] = _sha256(draft / TRAINABLE)
        info = {
            "schema": SCHEMA,
            "base_name": base_name,
            "length": kv.length,
            "positions": [0, kv.length - 1],
            "parameterisation": "projection" if config.projection else "direct",
            "quantization": None,
            "template": None,
            "training": None,
            **(extra or {}),
            "digest": kv.digest,
            "sha256": digests,
            "config": config.to_dict(),
            "geometry": geometry.to_dict(),
            "fingerprint": fingerprint.to_dict(),
        }
        (draft / INFO).write_text(_written(info), encoding="utf-8")
        (draft / CARD).write_text(_card(info), encoding="utf-8")
    return target


def _written(info: Mapping[str, Any]) -> str:
    """JSON for people too: a list of numbers takes one line. Within a string there is no newline to match."""
    text = json.dumps(info, indent=2, ensure_ascii=False)
    return re.sub(r"\[\n([-+\d.eE,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def read_info(folder: str | Path) -> dict[str, Any]:
    """prefix.json of a folder, checked for its schema.

    Raises:
        StorageError: there is no prefix folder, or it is broken or of another schema.
    """
    path = Path(folder) / INFO
    if not path.is_file():
        raise StorageError(f"{folder}: no prefix folder (there is no {INFO})", hint=_what_it_is(Path(folder)))
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path}: not valid JSON ({error})", hint="the folder is damaged; restore or retrain"
        ) from None
    if not isinstance(info, dict) or info.get("schema") != SCHEMA:
        found = info.get("schema") if isinstance(info, dict) else type(info).__name__
        raise StorageError(f"{path}: expected schema {SCHEMA}; got {found}", hint="update prefixtune")
    wrong = [name for name, kinds in ENTRIES.items() if name not in info or not isinstance(info[name], kinds)]
    if wrong:
        raise StorageError(
            f"{path}: no {', '.join(wrong)}, or not of the right kind",
            hint="the folder is damaged; restore or retrain it",
        )
    return info


def _what_it_is(folder: Path) -> str:
    if any((place / "run.json").is_file() for place in (folder, folder.absolute().parent)):
        return "this is a run that has not come to its end: finish it with prefixtune train … --resume"
    if (folder / "training_args.bin").is_file():
        return "transformers' Trainer wrote this: model.save_pretrained(folder) writes a prefix folder"
    return "give the --output of a training, or a folder of model.save_pretrained"


def load_prefix(folder: str | Path, *, is_trainable: bool = True) -> StoredPrefix:
    """Read a prefix folder; schema, checksums and shapes are checked before anything is believed.

    Args:
        is_trainable: read the projection's weights too, where the folder has them.

    Raises:
        StorageError: the folder is incomplete, damaged or of another schema.
    """
    folder = Path(folder)
    info = read_info(folder)
    try:
        config = PrefixConfig.from_dict(info["config"])
        geometry = Geometry.from_dict(info["geometry"])
        chosen_layers(config.layers, len(geometry.layers))  # raises where the model has no such layers
        fingerprint = Fingerprint.from_dict(info["fingerprint"])
        digests = dict(info["sha256"])
        tensors = _read_tensors(folder / TENSORS, digests[TENSORS])
        trainable = (
            _read_tensors(folder / TRAINABLE, digests[TRAINABLE])
            if is_trainable and TRAINABLE in digests
            else None
        )
        kv = PrefixKV(
            tuple(
                LayerKV(tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"])
                for i in range(len(geometry.layers))
            )
        )
        kv.check(geometry)
        if not config.length == info["length"] == kv.length:
            raise StorageError(
                f"{folder}: {INFO} tells of {info['length']} virtual tokens, the tensors hold {kv.length}",
                hint="the folder is damaged; restore or retrain it",
            )
    except StorageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, PrefixTuneError) as error:
        raise StorageError(
            f"{folder}: {INFO} and the tensors do not fit together ({type(error).__name__}: {error})",
            hint="the folder is damaged; restore or retrain it",
        ) from None
    return StoredPrefix(
        kv=kv, config=config, geometry=geometry, fingerprint=fingerprint, info=info, trainable=trainable
    )


def check_base(stored: StoredPrefix, *, geometry: Geometry, fingerprint: Fingerprint, name: str) -> None:
    """Refuse a base model that the prefix was not trained on.

    Raises:
        StorageError: the cache's shapes or the weights are another model's.
    """
    trained_on = stored.info.get("base_name")
    difference = _difference(stored.geometry.layers, geometry.layers)
    if difference:
        raise StorageError(
            f"the prefix was trained on {trained_on}, which has another KV cache than {name}: {difference}",
            hint=f"load it on {trained_on}",
        )
    other = stored.fingerprint.difference(fingerprint)
    if other is not None:
        raise StorageError(
            f"the prefix was trained on {trained_on}; {name} has the same shapes but {other}",
            hint=f"load it on {trained_on}; a prefix is exact on the model that it was trained with only",
        )


def _difference(trained: Sequence[LayerGeometry], base: Sequence[LayerGeometry]) -> str:
    """What differs first between the layers of two caches; "" where none does."""
    if len(trained) != len(base):
        return f"{len(trained)} layers, not {len(base)}"
    for index, pair in enumerate(zip(trained, base, strict=True)):
        ours, others = map(asdict, pair)
        for name, value in ours.items():
            if value != others[name]:
                return f"layer {index} has {name} {value}, not {others[name]}"
    return ""


@contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """A draft folder that takes `target`'s place when the block ends well: synced to disk, then renamed.

    It lies in a target that exists, whose parent may be of another disk (a mount, a link) or not be writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if target.is_dir() else target.parent
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place))
    try:
        yield draft
        for file in draft.iterdir():
            _sync(file)
        _sync_names(draft)
        draft.chmod(0o755)
        _exchange(draft, target)
        _sync_names(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _exchange(draft: Path, target: Path) -> None:
    """Move the draft's files over the target's; other files of the target stay."""
    if not target.exists():
        draft.rename(target)
        return
    names = sorted((file.name for file in draft.iterdir()), key=lambda name: name == INFO)  # checksums last
    with tempfile.TemporaryDirectory(prefix=DRAFT, dir=target) as old:
        for name in {*names, TRAINABLE}:
            if (target / name).exists():
                _keep(target / name, Path(old) / name)
        try:
            for name in names:
                os.replace(draft / name, target / name)
            if TRAINABLE not in names:
                (target / TRAINABLE).unlink(missing_ok=True)
        except BaseException:
            for file in Path(old).iterdir():
                os.rename(file, target / file.name)
            raise
    _sync_names(target)


def _keep(file: Path, kept: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(file, kept)
    except OSError:
        shutil.copy2(file, kept)
        _sync(kept)


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise StorageError(f"{path}: missing", hint="the folder is incomplete; restore or retrain it")
    # the bytes that were checked are those that are used: tensors mapped from the file would change with it,
    # and a file that is cut off while it is mapped ends the process
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise StorageError(
            f"{path}: the checksum is {found[:12]}…, expected {expected[:12]}…",
            hint="the file is damaged or was replaced; restore or retrain it",
        )
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, OSError) as error:
        raise StorageError(f"{path}: not a safetensors file ({error})") from None
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # some file systems sync files only
        _sync(folder)


def _card(info: Mapping[str, Any]) -> str:
    training = info.get("training") or {}
    record = "\n".join(
        f"| {name} | {value} |" for name, value in training.items() if not isinstance(value, dict)
    )
    chosen = info["config"]["layers"]
    where = f"\nTrained in layers {chosen}; the others keep the KV they started with." if chosen else ""
    table = f"\n## Training\n\n| | |\n|---|---|\n{record}\n" if record else ""
    return f"""---
library_name: prefixtune
base_model: {info["base_name"]}
tags: [prefix-tuning]
---

# A prefix of {info["length"]} virtual tokens for {info["base_name"]}

A trained KV cache (Li & Liang 2021), parameterisation: {info["parameterisation"]}.
The base is unchanged.{where}

```python
from prefixtune import PrefixModel
model = PrefixModel.from_pretrained(base, "this folder")
```
{table}"""
