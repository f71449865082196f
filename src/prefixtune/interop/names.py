"""What clients call a base, whatever serves it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["default_name"]


def default_name(source: str) -> str:
    """The last part of a hub name or path, without `.gguf`; what a client may not have in a name is a "-"."""
    name = Path(source).expanduser().absolute().name.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)
