"""vLLM as a contestant of bench/serve.py: an export of the same prefixes, and each request answered."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import pytest

from prefixtune.load import load_base
from tiny import write_base, write_prefix

BENCH = Path(__file__).resolve().parents[3] / "bench"


@pytest.mark.vllm
def test_vllm_answers_the_benchmarks_load_with_and_without_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from serve import ask_server, make_load
    from servers import export_for_vllm, start_vllm, stop

    model = write_base(tmp_path / "model")
    base = load_base(str(model), dtype="float32", device="cpu").model
    folders = [write_prefix(tmp_path / f"c{number}", base, 4 + number, seed=number) for number in range(2)]
    reserved = export_for_vllm(str(model), folders, "float32", tmp_path / "export", reserved_token=None)
    load = make_load(
        clients=2,
        requests=4,
        rate=50,
        new_tokens=3,
        vocabulary=base.config.vocab_size,
        seed=0,
        without=reserved,
    )
    assert all(reserved not in prompt for prompt in load.prompts)
    process, url = start_vllm(Path(sys.prefix), tmp_path / "export", 2, log=tmp_path / "log")
    try:
        for with_prefix in (True, False):
            answers = asyncio.run(ask_server(url, load, with_prefix=with_prefix))
            assert len(answers) == 4
            assert all(1 <= len(timed.tokens) <= 3 for timed in answers)  # an end token ends an answer
    finally:
        stop(process)


def test_what_vllm_says_is_told_where_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from servers import start_vllm

    script = tmp_path / "serve.sh"
    script.write_text("#!/bin/sh\necho no such engine\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    with pytest.raises(click.ClickException, match="did not start:\nno such engine"):
        start_vllm(Path(sys.prefix), tmp_path, 2, log=tmp_path / "log")
