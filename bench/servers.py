"""The servers that are measured: ours, and vLLM with an export of the same prefixes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import click
import httpx
import psutil

START_SECONDS = 900  # a .gguf file takes its time on a busy machine, and vLLM compiles


def start_server(
    model: str,
    prefixes: Path,
    dtype: str,
    rows: int,
    *,
    name: str = "bench",
    options: Sequence[str] = (),
    log: Path = Path(os.devnull),
) -> tuple[subprocess.Popen[bytes], str]:
    """`prefixtune serve`, when it answers: its process and address."""
    port = _free_port()
    line = ["-c", "from prefixtune.cli import main; main()", "serve", "--model", model, "--dtype", dtype]
    line += ["--prefix-dir", str(prefixes), "--served-name", name, "--port", str(port), "--rows", str(rows)]
    return _started([sys.executable, *line, *options], port, log, "/healthz", os.environ)


def export_for_vllm(
    model: str, prefixes: Iterable[Path], dtype: str, output: Path, *, reserved_token: str | None
) -> int:
    """Write what vLLM serves, as `prefixtune export` does.

    Returns:
        The id of the reserved token, which no prompt may hold.
    """
    from prefixtune.interop.vllm import export
    from prefixtune.load import load_base

    written = export(
        load_base(model, dtype=dtype),
        {folder.name: folder for folder in prefixes},
        output,
        source=model,
        served_name="bench",
        reserved_token=reserved_token,
    )
    return written.placeholder.id


def start_vllm(
    environment: Path, export: Path, rows: int, *, log: Path
) -> tuple[subprocess.Popen[bytes], str]:
    """The export's serve.sh, by the Python of `environment`, with vLLM's defaults but for the rows.

    Each core computes, as with the other contestants: on a CPU vLLM would leave one to its own server, and
    take its KV cache from half of the memory.
    """
    port = _free_port()
    line = [str(export / "serve.sh"), "--port", str(port)]
    line += ["--max-num-seqs", str(rows), "--max-model-len", "1024"]
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    told = {
        "PYTHON": str(environment.absolute() / "bin" / "python"),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": threads,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(START_SECONDS),
    }
    return _started(line, port, log, "/health", {**os.environ, **told})


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, and what it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _started(
    line: Sequence[str], port: int, log: Path, route: str, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], str]:
    with log.open("wb") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=dict(environment))
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}{route}").status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise click.ClickException("the server did not start" + (f":\n{_end_of(log)}" if log.is_file() else ""))


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
