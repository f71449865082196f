"""The knobs of the server. Knows no torch and no HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from prefixtune.config import _Config, _positive, option
from prefixtune.errors import ConfigError

__all__ = ["ServeConfig"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig(_Config):
    """How the server listens, and what it takes on."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every network, for which give a key")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_name: str | None = option(None, "what clients call the base; the last part of --model by default")
    rows: int = option(32, "answers at once")
    queue: int = option(256, "requests that wait; more are answered with 429")
    chunk: int | None = option(
        None,
        "prompt tokens that are read beside one token of each answer; by default 128 in flat passes on a "
        "CPU, and 256 elsewhere",
    )
    cached_tokens: int = option(65_536, "rows times columns of the batch's KV cache, which bounds its memory")
    max_length: int | None = option(
        None, "prefix, prompt and answer together; the model's positions by default"
    )
    max_tokens: int = option(2048, "longest answer that may be asked for")
    prefix_memory: int = option(1024, "megabytes of prefixes in memory; the least recently used leave first")
    watch: float = option(2.0, "seconds between two looks at the prefix folders; 0 does not look")
    timeout: float = option(300.0, "seconds that a request may take, waiting included")
    startup_timeout: float = option(300.0, "seconds that the check of the engine may take at the start")
    drain: float = option(30.0, "seconds that running answers may go on after SIGTERM or Ctrl-C")
    body_limit: int = option(1_048_576, "bytes of a request's body")
    log_prompts: bool = option(False, "write prompts and answers to the log")

    def check(self) -> None:
        _positive(
            self, "rows", "queue", "chunk", "cached_tokens", "max_length", "max_tokens", "prefix_memory"
        )
        _positive(self, "timeout", "startup_timeout", "body_limit")
        if not 0 <= self.port < 65_536:
            raise ConfigError(f"port: expected 0 to 65535; got {self.port}")
        for name in ("watch", "drain"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more; got {getattr(self, name)}")
        if self.served_name is not None and not self.served_name.strip():
            raise ConfigError("served_name: expected a name; got an empty text")
