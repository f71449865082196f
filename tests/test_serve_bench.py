"""The server's measurements and its soak run on a tiny model, as a user starts them; their numbers agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import TOKENIZER, served_base

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "little"
    served_base(max_position_embeddings=2000).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def run(script: str, *options: Any) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, BENCH / script, *options]
    done = subprocess.run([*map(str, line)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ten_seconds_of_soak_violate_nothing(model: Path) -> None:
    # a tiny server is still warming up after so short a time
    said = run("soak.py", "--model", model, "--minutes", 1 / 6, "--no-grows")
    assert "0 violations" in said
    assert all(f"'{what}'" in said for what in ("ask", "by schema", "err", "leave", "replace"))


def test_store_is_measured_with_as_many_prefixes_as_told(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "store.json"
    run("store.py", "--model", model, "--prefixes", 30, "--kept", 5, "--uses", 20, "--output", output)
    found = json.loads(output.read_text())
    assert (found["prefixes"], found["in_memory"], found["first_uses"]) == (30, 5, 20)
    assert 0 < found["use_in_memory"] < found["first_use_p50"] <= found["first_use_p99"]


def test_load_is_answered_by_all_contestants(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    options = {
        "dtype": "float32",
        "clients": 3,
        "requests": 6,
        "peft-requests": 2,
        "new-tokens": 4,
        "rounds": 1,
    }
    told = [part for name, value in options.items() for part in (f"--{name}", value)]
    run("serve.py", "--model", model, *told, "--output", output)
    found = json.loads(output.read_text())
    made = {name: runs[0]["tokens"] for name, runs in found["runs"].items()}
    assert made["PEFT, adapters switched"] == 2 * 4
    assert 0 < made["3 prefixes"] <= 6 * 4  # an end token ends an answer
    rates = {name: runs[0]["tokens_per_second"] for name, runs in found["runs"].items()}
    assert found["of_base_only"] == pytest.approx(rates["3 prefixes"] / rates["base only"])
    assert all(runs[0]["cpu_per_token"] > 0 for runs in found["runs"].values())
