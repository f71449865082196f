"""A real vLLM server of an export, and what transformers says to the same tokens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from prefixtune_vllm import Export
from prefixtune_vllm.folder import read_tensors

HERE = str(Path(__file__).parent)  # where an engine finds sabotage.py
START = 900  # seconds; 13 on two quiet cores, 50 on busy ones, and a slow machine is no failure
SETTINGS: dict[str, Any] = {"max_model_len": 768, "enforce_eager": True, "block_size": 32, "max_num_seqs": 32}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")])),
    "VLLM_ENGINE_READY_TIMEOUT_S": str(START),
}


@dataclass(frozen=True)
class Server:
    """Where it listens; the client is for one thread at a time."""

    client: httpx.Client

    @contextmanager
    def apart(self) -> Iterator[Server]:
        """The same server for another thread, over a connection of its own.

        Threads must not share a client: httpcore 1.0 looks whether a connection is idle and then whether it
        can be read, so one thread closes the connection that another is being answered on ([Errno 9] Bad file
        descriptor).
        """
        with httpx.Client(base_url=self.client.base_url, timeout=START) as client:
            yield Server(client)

    def chat(self, model: str, content: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **more})

    def complete(self, model: str, prompt: Any, **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, "prompt": prompt, **more})

    def counter(self, name: str) -> float:
        """A counter of ours at /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith(f"vllm:prefixtune_{name}_total{{")]
        return float(line.split()[-1])


def options() -> list[str]:
    """SETTINGS for the command line."""
    found: list[str] = []
    for name, value in SETTINGS.items():
        found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


def launch(folder: Path, log: Path, *more: str, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    """serve.sh in a process group of its own, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(folder / "serve.sh"), "--port", str(port), *options(), *more]
    values = {**os.environ, **ENVIRONMENT, "PYTHON": sys.executable, **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=values, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return process, f"http://127.0.0.1:{port}"


@contextmanager
def serving(folder: Path, log: Path, *more: str) -> Iterator[Server]:
    """A server that has started."""
    process, address = launch(folder, log, *more)
    try:
        with httpx.Client(base_url=address, timeout=START) as client:
            deadline = time.monotonic() + START
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"no server:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield Server(client)
    finally:
        stop(process)


def fails_to_start(folder: Path, log: Path, *more: str, **environment: str) -> str:
    """What a server says that does not start; it must never have answered, and its exit status tells."""
    process, address = launch(folder, log, *more, **environment)
    try:
        with httpx.Client(base_url=address, timeout=5) as client:
            deadline = time.monotonic() + START
            while process.poll() is None and time.monotonic() < deadline:
                assert not _answers(client)
                time.sleep(0.5)
        assert process.poll(), f"exit status {process.poll()}:\n{log.read_text()[-4000:]}"
    finally:
        stop(process)
    return log.read_text()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the group that `launch` made, engine and workers included."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


class Reference:
    """transformers alone, one request at a time, with a prefix as the past of its cache."""

    def __init__(self, place: Path) -> None:
        self.export = Export.read(place / "served")
        self.model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = AutoTokenizer.from_pretrained(place / "model")

    def chat_ids(self, content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    @torch.no_grad()
    def greedy(self, name: str | None, ids: Sequence[int], *, count: int) -> list[int]:
        """`count` tokens after prefix and ids, end tokens ignored."""
        cache, length = DynamicCache(), 0
        if name is not None:
            prefix = self.export.find(name)
            length = prefix.stored.length
            for index, (key, value) in enumerate(read_tensors(prefix.stored)):
                cache.update(key[None], value[None], index)
        whole = torch.tensor([[0] * length + list(ids)])  # generate passes over what the cache has
        found = self.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
        )
        return found[0, whole.shape[1] :].tolist()
