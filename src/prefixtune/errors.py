"""The errors a user can meet. Each says what was expected, what came, where, and what to do."""

from __future__ import annotations

__all__ = [
    "AttachError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "OutOfMemoryError",
    "PrefixTuneError",
    "RunError",
    "StorageError",
    "UnsupportedModelError",
    "memory_is_full",
]

FULL = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class PrefixTuneError(Exception):
    """Base of all errors that are the input's fault, not ours.

    Args:
        message: what was expected, what came and where (file and line where there is one).
        hint: what to do about it; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class ConfigError(PrefixTuneError, ValueError):
    """An option has a value that cannot be used; the command was called wrongly."""

    exit_code = 2


class DataError(PrefixTuneError, ValueError):
    """A data file or a row in it cannot be used."""


class ModelError(PrefixTuneError, ValueError):
    """A base model cannot be found or loaded."""


class UnsupportedModelError(PrefixTuneError, ValueError):
    """The model has layers through which a prefix cannot be carried exactly."""


class AttachError(PrefixTuneError, ValueError):
    """A forward pass was asked for that has no exact meaning with the attached prefix."""


class StorageError(PrefixTuneError, ValueError):
    """A prefix folder is incomplete, corrupted, of another schema, or for another model."""


class RunError(PrefixTuneError, RuntimeError):
    """A run cannot start or go on: the folder holds one already, or there is nothing to resume."""


class OutOfMemoryError(PrefixTuneError, MemoryError):
    """A run does not fit in memory, by its estimate or in fact; the hint says what makes it fit."""


class MissingExtraError(PrefixTuneError, ImportError):
    """An optional dependency is not installed; the hint is its install line."""


def memory_is_full(error: BaseException) -> bool:
    """Whether a library says that no memory is left: torch does by type on CUDA and by text on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in FULL)
