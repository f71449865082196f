"""Prefix-tuning as a trained KV cache.

from prefixtune import PrefixConfig, PrefixModel, PrefixKV, attach
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefixtune.config import PrefixConfig
from prefixtune.errors import PrefixTuneError, UnsupportedModelError

if TYPE_CHECKING:
    from prefixtune.attachment import attach
    from prefixtune.geometry import Geometry
    from prefixtune.model import PrefixModel
    from prefixtune.prefix import Prefix, PrefixKV

__version__ = "0.1.0"
__all__ = [
    "Geometry",
    "Prefix",
    "PrefixConfig",
    "PrefixKV",
    "PrefixModel",
    "PrefixTuneError",
    "UnsupportedModelError",
    "attach",
]

# torch is imported when a name that needs it is first used, so that `prefixtune --help` answers at once
_LAZY = {
    "Geometry": "prefixtune.geometry",
    "Prefix": "prefixtune.prefix",
    "PrefixKV": "prefixtune.prefix",
    "PrefixModel": "prefixtune.model",
    "attach": "prefixtune.attachment",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
