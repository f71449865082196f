"""What `prefixtune export --to vllm` wrote: the reserved token, and prefixes by name with their canaries.

    export.json                      schema, base (the served name), model, dtype, placeholder {id, text}
    prefixes/NAME/                   a prefix folder
    prefixes/NAME/vllm.json          how a chat is written, and the canary: ids in, greedy tokens out

Knows no HTTP and no engine. A prefix that was replaced on disk is found at the next request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_vllm.errors import PrefixError, RefusalError
from prefixtune_vllm.folder import INFO, StoredPrefix, read_folder, read_json

__all__ = ["PARAMS", "Canary", "Export", "Prefix"]

SCHEMA = 1
SERVING, PREFIXES, EXPORT = "vllm.json", "prefixes", "export.json"
PARAMS = "prefixtune"  # in kv_transfer_params: which prefix a request is for
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Greedy `tokens` that the toolkit itself gave after `prompt`; neither holds placeholders."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A prefix that can be asked for. `chat`: the chat template's arguments; None: no chats."""

    name: str
    stored: StoredPrefix
    canary: Canary
    chat: dict[str, Any] | None

    @property
    def params(self) -> dict[str, Any]:
        """kv_transfer_params of a request with this prefix."""
        return {
            PARAMS: {"name": self.name, "digest": self.stored.digest, "length": self.stored.length},
        }

    @property
    def salt(self) -> str:
        """Of the content, not of the name: no block of another or of an older prefix is ever taken for it."""
        return self.stored.digest


@dataclass(kw_only=True)
class Export:
    """A folder that `prefixtune export --to vllm` wrote."""

    folder: Path
    base: str
    placeholder: int
    text: str
    _known: dict[str, tuple[tuple[int, ...], Prefix]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Export:
        """Read export.json.

        Raises:
            PrefixError: there is no export, or it is broken.
        """
        path = Path(folder).absolute()
        record = read_json(path / EXPORT)
        if record.get("schema") != SCHEMA:
            raise PrefixError(f"{path / EXPORT}: expected schema {SCHEMA}; got {record.get('schema')!r}")
        try:
            token = record["placeholder"]
            found = cls(
                folder=path, base=str(record["base"]), placeholder=int(token["id"]), text=str(token["text"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrefixError(f"{path / EXPORT}: damaged ({type(error).__name__}: {error})") from None
        if not found.base or ":" in found.base or not found.text or found.placeholder < 0:
            raise PrefixError(f"{path / EXPORT}: damaged (base or placeholder cannot be right)")
        return found

    def names(self) -> list[str]:
        """The names of all prefixes, sorted."""
        try:
            entries = list((self.folder / PREFIXES).iterdir())
        except OSError as error:
            raise PrefixError(f"{self.folder / PREFIXES}: cannot be read ({error.strerror})") from None
        return sorted(
            entry.name for entry in entries if NAME.fullmatch(entry.name) and (entry / INFO).is_file()
        )

    def find(self, name: str) -> Prefix:
        """The prefix as it is on disk now.

        Raises:
            KeyError: there is none of this name.
            PrefixError: its folder cannot be used.
        """
        if not NAME.fullmatch(name):  # no path can be made of a name
            raise KeyError(name)
        folder = self.folder / PREFIXES / name
        try:
            state = _state(folder)
        except FileNotFoundError:
            raise KeyError(name) from None
        known = self._known.get(name)
        if known is None or known[0] != state:
            known = (state, _read_prefix(folder, name, self.placeholder))
            self._known[name] = known
        return known[1]

    def place(self, name: str, ids: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """For `vllm.LLM.generate`: the prompt with its placeholders and salt, and SamplingParams' extra_args.

        Args:
            ids: the text's tokens, at least one.

        Raises:
            KeyError: there is no prefix of this name.
            RefusalError: there is no text, or it holds the reserved token.
            PrefixError: the prefix cannot be used.
        """
        prefix = self.find(name)
        prompt = {"prompt_token_ids": self.placed(prefix, ids), "cache_salt": prefix.salt}
        return prompt, {"kv_transfer_params": prefix.params}

    def placed(self, prefix: Prefix, ids: Sequence[int]) -> list[int]:
        """P placeholders, then the text's `ids`, which must be there and hold no placeholder."""
        if not ids:
            raise RefusalError(400, "the prompt is empty: a prefix needs a text after it", param="prompt")
        if self.placeholder in ids:
            raise RefusalError(400, f"the prompt holds the reserved token {self.text}", param="prompt")
        return [self.placeholder] * prefix.stored.length + list(ids)


def _state(folder: Path) -> tuple[int, ...]:
    """What changes when one of a prefix's records is written anew."""
    numbers: list[int] = []
    for name in (INFO, SERVING):
        stat = os.stat(folder / name)
        numbers += [stat.st_ino, stat.st_mtime_ns, stat.st_size]
    return tuple(numbers)


def _read_prefix(folder: Path, name: str, placeholder: int) -> Prefix:
    stored, record = read_folder(folder), read_json(folder / SERVING)
    path = folder / SERVING
    if record.get("sha256") != stored.digest:
        raise PrefixError(f"{path}: its canary belongs to other tensors; export the prefix again")
    try:
        canary = Canary(
            prompt=tuple(int(token) for token in record["canary"]["prompt"]),
            tokens=tuple(int(token) for token in record["canary"]["tokens"]),
        )
        chat = None if record["chat"] is None else dict(record["chat"])
    except (KeyError, TypeError, ValueError) as error:
        raise PrefixError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if not canary.prompt or not canary.tokens or placeholder in canary.prompt:
        raise PrefixError(f"{path}: damaged (the canary is empty, or holds the reserved token)")
    return Prefix(name=name, stored=stored, canary=canary, chat=chat)
