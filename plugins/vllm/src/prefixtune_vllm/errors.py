"""What goes wrong with prefix folders and requests. Knows nothing else."""

from __future__ import annotations

__all__ = ["PrefixError", "RefusalError"]


class PrefixError(ValueError):
    """A prefix folder or an export is incomplete, damaged, or for another model."""


class RefusalError(Exception):
    """A request that must not reach the engine.

    Args:
        status: the HTTP status; 4xx where the client can do something about it.
        param: the field that is at fault.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
