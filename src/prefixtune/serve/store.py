"""Names to prefixes: what may be served, what is in memory, what has changed on disk. Knows no HTTP.

A prefix is what its tensors are: its identity is their content hash, and a name is only where it is found
now. Whoever was given a prefix keeps these tensors, whatever becomes of the name meanwhile.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prefixtune.attachment import supported
from prefixtune.errors import ConfigError, PrefixTuneError, StorageError
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import Geometry, compute_dtype
from prefixtune.prefix import PrefixKV
from prefixtune.storage import StoredPrefix, check_base, load_prefix, read_info

__all__ = ["NAME", "PrefixUnavailableError", "Served", "Store", "UnknownPrefixError"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILES = ("prefix.json", "prefix.safetensors")

NEW, PAUSE = 2.0, 0.1  # seconds since a file was written, and until one that is being replaced is whole

Signature = tuple[tuple[int, int, int], ...]


class UnknownPrefixError(PrefixTuneError):
    """There is no prefix of this name."""


class PrefixUnavailableError(PrefixTuneError):
    """The prefix is known, but its folder cannot be read now."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A prefix in memory: `kv` in the base's precision and on its device, `digest` of the stored tensors."""

    name: str
    kv: PrefixKV
    digest: str
    template: str | None


@dataclass(eq=False)
class _Entry:
    """What is known of a name. `seen` is what the files were like when they were last looked at.

    `problem` says why the files as they are now are refused; then `served` is the one from before, if it was
    in memory.
    """

    folder: Path
    seen: Signature | None = None
    info: dict[str, Any] | None = None
    served: Served | None = None
    problem: str | None = None


class Store:
    """The prefixes of one base model.

    Args:
        base: loaded; every prefix must have been trained on it.
        base_name: for messages.
        budget: bytes of prefixes in memory; the least recently used go first. One always fits.
        folder: each folder in it that holds a prefix.json is a prefix under its own name.
        on_event: told ("loaded" | "evicted" | "refused" | "replaced" | "added" | "removed", name, why).
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        base_name: str,
        budget: int,
        folder: Path | None = None,
        on_event: Callable[[str, str, str], None] = lambda event, name, why: None,
    ) -> None:
        self._geometry: Geometry = supported(base)
        self._fingerprint = Fingerprint.of(base)
        self._dtype, self._device = compute_dtype(base), next(base.parameters()).device
        self._base_name, self._budget, self._folder, self._tell = base_name, budget, folder, on_event
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[str, int] = OrderedDict()  # names in memory and their bytes, oldest first
        self._hidden: set[str] = set()  # unloaded by hand, so the watch leaves them
        self._odd: set[str] = set()  # folders whose name cannot be served, told once
        self._lock = threading.RLock()
        self.hits = self.misses = 0

    # --- who is there

    def names(self) -> list[str]:
        """All names that can be asked for, in order."""
        with self._lock:
            return sorted(name for name, entry in self._entries.items() if entry.info or entry.served)

    def describe(self) -> list[dict[str, Any]]:
        """What the admin route lists."""
        with self._lock:
            return [
                {
                    "name": name,
                    "folder": str(entry.folder),
                    "digest": entry.served.digest if entry.served else (entry.info or {}).get("digest"),
                    "length": (entry.info or {}).get("length"),
                    "in_memory": name in self._recent,
                    "problem": entry.problem,
                }
                for name, entry in sorted(self._entries.items())
            ]

    @property
    def bytes_in_memory(self) -> int:
        return sum(self._recent.values())

    @property
    def count_in_memory(self) -> int:
        return len(self._recent)

    def get(self, name: str) -> Served:
        """The prefix of this name, from memory or read now.

        Raises:
            UnknownPrefixError: there is no such name.
            PrefixUnavailableError: its folder is damaged and it is not in memory.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or not (entry.info or entry.served):
                raise UnknownPrefixError(f"there is no prefix {name!r}")
            if entry.served is not None:
                self.hits += 1
                self._recent.move_to_end(name)
                return entry.served
            self.misses += 1
            try:
                return self._read(name, entry)
            except PrefixTuneError as error:
                self._refuse(name, entry, error)
                raise PrefixUnavailableError(f"the prefix {name!r} cannot be read: {error.message}") from None

    # --- names come and go

    def add(self, name: str, folder: Path, *, lazily: bool = True) -> None:
        """Serve the prefix of `folder` as `name` from now on; if not `lazily`, its tensors are read first.

        Raises:
            ConfigError: the name cannot be one.
            StorageError: the folder holds no prefix of this base; what the name meant before goes on.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a prefix's name",
                hint="letters, digits, '.', '_' and '-', at most 128, the first a letter or a digit",
            )
        signature = _signature(folder)
        fresh = _Entry(folder=folder, seen=signature, info=self._checked_info(folder))
        served = None if lazily else self._load(name, folder)  # raises before anything has changed
        with self._lock:
            before = self._entries.get(name)
            self._forget(name)
            self._entries[name] = fresh
            if served is not None:
                self._keep(name, fresh, served)
            self._hidden.discard(name)
        self._tell("added" if before is None else "replaced", name, "")

    def remove(self, name: str) -> None:
        """Serve the name no more; requests that run keep what they have."""
        with self._lock:
            if name not in self._entries:
                raise UnknownPrefixError(f"there is no prefix {name!r}")
            self._forget(name)
            del self._entries[name]
            self._hidden.add(name)
        self._tell("removed", name, "")

    def add_within(self, name: str, relative: str) -> None:
        """`add`, read at once, for a folder named from outside: within the prefix folder, links followed."""
        if self._folder is None:
            raise ConfigError("the server has no --prefix-dir to load from")
        root = self._folder.resolve()
        try:
            place = (root / relative).resolve()
        except (OSError, ValueError, RuntimeError):
            place = root
        if "\0" in relative or place == root or not place.is_relative_to(root):
            raise ConfigError("the folder is not within --prefix-dir")
        # spelled as `refresh` finds it, so that one that vanishes is known to have been in there
        self.add(name, self._folder / place.relative_to(root), lazily=False)

    def refresh(self, name: str | None = None) -> None:
        """Look at the disk again: new, changed and vanished folders. With a name, at its folder only.

        Raises:
            UnknownPrefixError: there is no such name.
            StorageError: the named one cannot be used as it is now; the old one goes on.
        """
        if name is not None:
            with self._lock:
                entry = self._entries.get(name)
                if entry is None:
                    raise UnknownPrefixError(f"there is no prefix {name!r}")
                entry.seen = None
                self._look_again(name, entry, lazily=False)
                if name not in self._entries:
                    raise StorageError("its folder is gone")
                if entry.problem is not None:
                    raise StorageError(entry.problem)
            return
        if self._folder is not None:
            self._discover(self._folder)
        for known, entry in list(self._entries.items()):
            with self._lock:
                if self._entries.get(known) is entry:
                    self._look_again(known, entry)

    def _discover(self, folder: Path) -> None:
        try:
            found = [item for item in os.scandir(folder) if item.is_dir() and not item.name.startswith(".")]
        except OSError as error:
            self._tell("refused", str(folder), str(error))
            return
        for item in found:
            if item.name in self._entries or item.name in self._hidden:
                continue
            if not NAME.fullmatch(item.name):
                if item.name not in self._odd:
                    self._odd.add(item.name)
                    self._tell("refused", item.name, "its name cannot be served")
                continue
            if not (Path(item.path) / FILES[0]).is_file():
                continue
            with self._lock:
                self._entries[item.name] = _Entry(folder=Path(item.path))

    def _look_again(self, name: str, entry: _Entry, *, lazily: bool = True) -> None:
        signature = _signature(entry.folder)
        if signature == entry.seen:
            return
        is_new, entry.seen = entry.info is None and entry.served is None, signature
        if not (entry.folder / FILES[0]).exists() and self._folder in entry.folder.parents:
            self._forget(name)
            del self._entries[name]
            self._tell("removed", name, "its folder is gone")
            return
        try:
            info = self._checked_info(entry.folder)
            served = self._load(name, entry.folder) if entry.served is not None or not lazily else None
        except (PrefixTuneError, OSError) as error:
            self._refuse(name, entry, error)
            return
        entry.info, entry.problem = info, None
        if served is None:
            self._tell("added" if is_new else "replaced", name, "")
        elif entry.served is None or _identity(served) != _identity(entry.served):
            self._forget(name)
            self._keep(name, entry, served)
            self._tell("replaced", name, "")

    def _refuse(self, name: str, entry: _Entry, error: Exception) -> None:
        """The files are no good: what is in memory goes on; without it there is nothing to ask for."""
        why = error.message if isinstance(error, PrefixTuneError) else str(error)
        entry.problem = why
        self._tell("refused", name, why)

    # --- reading

    def _checked_info(self, folder: Path) -> dict[str, Any]:
        """prefix.json, if it tells of a prefix for this base. Reads no tensors."""
        try:
            info = read_info(folder)
        except OSError as error:
            raise StorageError(f"{str(folder)[:200]}: {error.strerror or error}") from None
        try:
            geometry = Geometry.from_dict(info["geometry"])
            fingerprint = Fingerprint.from_dict(info["fingerprint"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{folder}: prefix.json is damaged ({type(error).__name__}: {error})"
            ) from None
        if geometry.layers != self._geometry.layers or fingerprint != self._fingerprint:
            check_base(
                _Told(geometry, fingerprint, info),  # type: ignore[arg-type]
                geometry=self._geometry,
                fingerprint=self._fingerprint,
                name=self._base_name,
            )
        return {key: info.get(key) for key in ("digest", "length", "template")}

    def _read(self, name: str, entry: _Entry) -> Served:
        served = self._load(name, entry.folder, patient=entry.problem is None)
        entry.problem = None
        self._keep(name, entry, served)
        self._tell("loaded", name, "")
        return served

    def _load(self, name: str, folder: Path, *, patient: bool = True) -> Served:
        """Read a folder; if `patient`, one that is just being replaced, file by file, is read once more."""
        try:
            return self._load_now(name, folder)
        except StorageError:
            if not (patient and _is_new(folder)):
                raise
        time.sleep(PAUSE)
        return self._load_now(name, folder)

    def _load_now(self, name: str, folder: Path) -> Served:
        try:
            stored: StoredPrefix = load_prefix(folder, is_trainable=False)
        except OSError as error:
            raise StorageError(f"{folder}: {error}") from None
        check_base(stored, geometry=self._geometry, fingerprint=self._fingerprint, name=self._base_name)
        for layer in stored.kv.layers:
            if not bool(layer.key.isfinite().all() and layer.value.isfinite().all()):
                raise StorageError(f"{folder}: the tensors hold what is no finite number")
        kv = stored.kv.to(self._dtype).to(self._device)
        return Served(name=name, kv=kv, digest=stored.kv.digest, template=stored.info.get("template"))

    def _keep(self, name: str, entry: _Entry, served: Served) -> None:
        entry.served = served
        self._recent[name] = served.kv.nbytes
        self._recent.move_to_end(name)
        for other in list(self._recent):
            if self.bytes_in_memory <= self._budget or other == name:
                break
            if self._entries[other].problem is None:  # with damaged files, memory is all there is
                self._forget(other)
                self._tell("evicted", other, "")

    def _forget(self, name: str) -> None:
        self._recent.pop(name, None)
        if name in self._entries:
            self._entries[name].served = None


@dataclass(frozen=True)
class _Told:
    """What `check_base` reads of a stored prefix."""

    geometry: Geometry
    fingerprint: Fingerprint
    info: Mapping[str, Any]


def _identity(served: Served) -> tuple[str, str | None]:
    return served.digest, served.template


def _signature(folder: Path) -> Signature:
    """Changes when a file is written anew; a missing file is (0, 0, 0)."""
    found = []
    for name in FILES:
        try:
            state = os.stat(folder / name)
            found.append((state.st_mtime_ns, state.st_size, state.st_ino))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _is_new(folder: Path) -> bool:
    """Whether a file was written just now."""
    newest = max(written for written, _, _ in _signature(folder))
    return abs(time.time() - newest / 1e9) < NEW
