"""Listens: uvicorn around the application, and an end that finishes what runs. Knows no routes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from prefixtune.errors import ConfigError
from prefixtune.serve.service import Service

__all__ = ["run"]

KEEP_ALIVE = 75  # seconds; clients leave an idle connection earlier, so none closes under a request


class _Server(uvicorn.Server):
    """At the first signal nothing new is taken, and what runs has `drain` seconds; at the second none."""

    service: Service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.close(0 if self.should_exit else self.service.config.drain)
        self.should_exit = True  # uvicorn's own way would raise the signal again after a clean end


def run(service: Service, app: ASGIApp, *, on_ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until a signal comes.

    Args:
        on_ready: called with the server's address when it listens.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    config = service.config
    listener = _listen(config.host, config.port)
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(config.drain) + 10,
        h11_max_incomplete_event_size=65_536,
        ws="none",
    )
    server = _Server(settings)
    server.service = service
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    on_ready(f"http://{shown}:{port}")
    service.log.write("start", address=f"http://{shown}:{port}", model=service.name)
    asyncio.run(server.serve(sockets=[listener]))
    service.log.write("end")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
    listener.set_inheritable(True)
    return listener
