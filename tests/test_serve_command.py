"""Laws of `prefixtune serve` as a process: it starts, answers, and ends what runs in good order."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from prefixtune.cli import main
from prefixtune.cli.serve import _other_bases
from serving import TOKENIZER, served_base, write_prefix

CODE = "import torch; torch.set_num_threads(1); from prefixtune.cli import main; main()"


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("served")
    base = served_base(max_position_embeddings=100_000)
    base.save_pretrained(folder / "little-0.5B")
    TOKENIZER.save_pretrained(folder / "little-0.5B")
    write_prefix(base, folder / "prefixes" / "mail", length=4, seed=1, template="human")
    write_prefix(base, folder / "other", length=3, seed=2)
    return folder


@contextmanager
def process(place: Path, *options: Any) -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-c", CODE, "serve", "--model", place / "little-0.5B", "--dtype", "float32"]
    line += ["--port", port, *options]
    with subprocess.Popen(
        [*map(str, line)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            end = time.monotonic() + 120
            while running.poll() is None and time.monotonic() < end:
                try:
                    client.get("/healthz").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield running, client
        finally:
            running.kill()


def test_server_answers_and_finishes_what_runs_when_it_is_told_to_end(place: Path) -> None:
    options = ["--prefix", f"own={place / 'other'}", "--prefix-dir", place / "prefixes"]
    with process(
        place,
        *options,
        "--cached-tokens",
        10**7,
        "--max-tokens",
        10**5,
        "--drain",
        1,
        "--allowed-host",
        "proxy.example",
    ) as (
        running,
        client,
    ):
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["little-0.5B", "little-0.5B:mail", "little-0.5B:own"]
        idle = HTTPConnection(client.base_url.host, client.base_url.port)
        for pause in (0, 6):  # longer than clients keep a connection, so that it never closes under a request
            time.sleep(pause)
            idle.request("GET", "/healthz")
            assert idle.getresponse().read()
        idle.close()
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/v1/models", headers={"host": "proxy.example"}).status_code == 200
        body = {"model": "little-0.5B:mail", "prompt": "x", "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 90_000}) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert last == "data: [DONE]" or json.loads(last[6:])["error"]["code"] == "shutdown"
        out, log = running.communicate(timeout=60)
    assert running.returncode == 0
    assert out == ""
    assert "Traceback" not in log
    assert json.loads(log.splitlines()[-1])["event"] == "end"


def fail(*args: Any, code: int) -> str:
    result = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--prefix", "mail"], 2, "expected NAME=FOLDER"),
        (["--prefix", "a=x", "--prefix", "a=y"], 2, "named twice"),
        (["--prefix", "../a={place}/other"], 2, "cannot be a prefix's name"),
        (["--prefix", "a={place}/nothing"], 1, "no prefix folder"),
        (["--prefix-dir", "{place}/nothing"], 2, "does not exist"),
        (["--api-key", " "], 2, "--api-key"),
        (["--api-key", ""], 2, "--api-key"),
        (["--admin-key", "key\n"], 2, "spaces at its ends"),
        (["--port", "70000"], 2, "port"),
        (["--rows", "0"], 2, "rows"),
        (["--host", "256.1.1.1"], 2, "cannot be listened on"),
    ],
)
def test_wrong_option_is_told(place: Path, options: Sequence[str], code: int, said: str) -> None:
    filled = [option.format(place=place) for option in options]
    assert said in fail("--model", place / "little-0.5B", *filled, code=code)


@pytest.mark.parametrize("variable", ["PREFIXTUNE_API_KEY", "PREFIXTUNE_ADMIN_KEY"])
def test_empty_key_in_the_environment_is_no_open_door(
    place: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    assert f"{variable}: expected a key" in fail("--model", place / "little-0.5B", code=2)


def test_prefixes_of_a_base_in_another_precision_are_told(place: Path, tmp_path: Path) -> None:
    plain = {"name": "mail", "folder": str(place / "other"), "problem": None}
    assert _other_bases([plain], None) == []
    (told,) = _other_bases([plain], "int8")
    assert told.startswith("mail: trained on a base in full precision, but served on one in int8; ")
    copied = shutil.copytree(place / "other", tmp_path / "packed")
    info = json.loads((copied / "prefix.json").read_text(encoding="utf-8"))
    text = json.dumps({**info, "quantization": {"scheme": "int8"}})
    (copied / "prefix.json").write_text(text, encoding="utf-8")
    packed = {**plain, "folder": str(copied)}
    assert _other_bases([packed], "int8") == []
    (told,) = _other_bases([packed], None)
    assert told.endswith("served on one in full precision; as trained is --quantize int8")


def test_port_that_is_taken_is_told(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = fail("--model", place / "little-0.5B", "--port", port, code=2)
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in said


def test_missing_package_is_told_with_its_install_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["prefixtune.cli.serve"]  # by its name prefixtune.cli has the command
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install 'prefixtune[serve]'" in fail("--model", place / "little-0.5B", code=1)
