"""One JSON object per line. Prompts and answers are not in it unless they are asked for."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO, Any

__all__ = ["Log"]


class Log:
    """Writes events to a stream, stderr unless given."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Fields that are None are left out."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, **{k: v for k, v in fields.items() if v is not None}}
        text = json.dumps(
            line, default=str
        )  # ASCII: no line break or half character of a client gets through
        with self._lock:
            stream = self._stream or sys.stderr
            # the log's reader may be gone; the server is not
            with suppress(OSError, ValueError):
                print(text, file=stream, flush=True)
