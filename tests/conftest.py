"""No test reaches beyond this machine: hubs are offline, and sockets open to loopback only."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub client is first imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
# also in the processes that tests start: beside another worker two threads wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers


class NetworkBlockedError(RuntimeError):
    """A test tried to open a connection to another machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a path: a Unix socket
        return True
    host = str(address[0])
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def only_this_machine() -> Iterator[None]:
    """Connections to other machines fail at once, with a name for the reason."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


def _guarded(original: Any) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        if not _is_local(address):
            raise NetworkBlockedError(f"a test tried to connect to {address!r}; tests run without a network")
        return original(self, address)

    return connect


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """A run of training collects garbage several times, each time through all objects that libraries have."""
    import prefixtune.train  # noqa: F401  (with all that it imports)

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> None:
    """Tiny models run faster on one thread, and their numbers do not depend on the machine's cores."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
