"""A tiny served model and its prefixes, for the tests of the server. Knows no test."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from starlette.testclient import TestClient

from families import tiny_model
from prefixtune import PrefixKV, PrefixModel, attach
from prefixtune.serve.api import build_app
from prefixtune.serve.config import ServeConfig
from prefixtune.serve.log import Log
from prefixtune.serve.service import Service
from tokenizers_for_tests import CHATML, byte_tokenizer

NAME = "tiny"


def tokenizer_of(chat_template: str | None = CHATML) -> Any:
    tokenizer = byte_tokenizer(chat_template=chat_template)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZER = tokenizer_of()


def served_base(family: str = "llama", **extra: Any) -> Any:
    return tiny_model(family, vocab_size=len(TOKENIZER), **extra)


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, len(TOKENIZER), (count,), generator=generator).tolist()


def write_prefix(base: Any, folder: Path, *, length: int, seed: int, template: str | None = None) -> PrefixKV:
    """A prefix folder, written as training writes it; the prefix that is in it."""
    model = PrefixModel(base, PrefixKV.from_tokens(base, torch.tensor([random_ids(length, seed)])))
    model.record["template"] = template
    model.save_pretrained(folder)
    return model.prefix.bake()


def alone(
    base: Any, prefix: PrefixKV | None, ids: Sequence[int], tokens: int, *, end: int | None = None
) -> list[int]:
    """What transformers' own generate gives, greedily, for this row alone, before the end token."""
    with attach(base, [prefix]), torch.no_grad():
        whole = base.generate(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=end,
        )
    new: list[int] = whole[0, len(ids) :].tolist()
    return new[: new.index(end)] if end in new else new


@contextmanager
def client_of(
    base: Any,
    *,
    prefix_dir: Path | None = None,
    prefixes: dict[str, Path] | None = None,
    tokenizer: Any = TOKENIZER,
    raises: bool = True,
    keys: dict[str, Any] | None = None,
    endless: bool = False,
    **config: Any,
) -> Iterator[Any]:
    """A client of a server in this process; `client.service` and `client.lines()` show what is inside.

    Args:
        endless: no token ends an answer.
    """
    stream = io.StringIO()
    service = Service(
        base,
        tokenizer,
        name=NAME,
        config=ServeConfig(**{"watch": 0.0, **config}),
        prefixes=prefixes,
        prefix_dir=prefix_dir,
        log=Log(stream),
    )
    if endless:
        service._ends = service._chat_ends = frozenset()
    app = build_app(service, **(keys or {}))
    with TestClient(app, raise_server_exceptions=raises) as client:
        client.service = service
        client.lines = lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
        yield client


def events(response: Any) -> list[Any]:
    """The data of a stream of events; the last one is "[DONE]"."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


def copy_prefix(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


@contextmanager
def live(base: Any, **options: Any) -> Iterator[Any]:
    """A server that listens on loopback: its address as `server.url`, its service as `server.service`."""
    keys, tokenizer = options.pop("keys", {}), options.pop("tokenizer", TOKENIZER)
    endless = options.pop("endless", False)
    places = {name: options.pop(name) for name in ("prefix_dir", "prefixes") if name in options}
    stream = io.StringIO()
    service = Service(
        base,
        tokenizer,
        name=NAME,
        config=ServeConfig(**{"watch": 0.0, **options}),
        log=Log(stream),
        **places,
    )
    if endless:
        service._ends = service._chat_ends = frozenset()
    server = uvicorn.Server(uvicorn.Config(build_app(service, **keys), port=0, log_config=None, ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield SimpleNamespace(
            url=url,
            service=service,
            lines=lambda: [json.loads(line) for line in stream.getvalue().splitlines()],
        )
    finally:
        server.should_exit = True
        thread.join(20)


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)
