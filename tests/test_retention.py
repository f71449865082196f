"""Neutral text in a run: sampled by the bare model, the same when resumed, and less is forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from families import tiny_model
from prefixtune import PrefixModel
from prefixtune.cli import main
from prefixtune.load import load_base
from prefixtune.memory import Estimate
from prefixtune.storage import read_info
from prefixtune.train.forecast import forecast
from prefixtune.train.retention import Retention, sample_texts
from small_runs import write_place
from tokenizers_for_tests import byte_tokenizer

WORDS = ("yes", "no", "so", "and")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": f"say {i % 7}", "input": "", "output": "yes " * 8} for i in range(48)]
    return write_place(tmp_path_factory.mktemp("retention"), rows)


def train(place: Path, output: Path, *more: Any) -> Any:
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", output, "--json"]
    line += ["--report-to", "none", "--dtype", "float32", "--max-steps", 12, "--learning-rate", 0.2, *more]
    found = CliRunner().invoke(main, [*map(str, line)])
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


def test_texts_are_the_seeds_and_begin_differently(place: Path) -> None:
    base = load_base(str(place / "model"), dtype="float32")
    first, again, other = (sample_texts(base.model, base.tokenizer, seed=seed, texts=8) for seed in (1, 1, 2))
    assert first == again != other
    assert len({text[0] for text in first}) == 8
    assert all(2 <= len(text) <= 64 for text in first)


@pytest.mark.parametrize(("around", "begin"), [("<s> $A", ["<s>"]), ("</s> $A", ["</s>"]), ("$A </s>", [])])
def test_texts_begin_with_what_the_tokenizer_puts_before_each_text(around: str, begin: list[str]) -> None:
    tokenizer = byte_tokenizer(around=around)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    texts = sample_texts(base, tokenizer, seed=1, texts=4, tokens=9)
    start = tokenizer.convert_tokens_to_ids(begin)
    assert all(text[: len(start)] == start for text in texts)
    assert not any(text[len(start)] in tokenizer.all_special_ids for text in texts)


def test_neutral_text_is_forgotten_less(place: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0, 3):
        train(place, tmp_path / str(weight), "--retain", weight)
        base = load_base(str(place / "model"), dtype="float32")
        model = PrefixModel.from_pretrained(base.model, tmp_path / str(weight))
        texts = sample_texts(base.model, base.tokenizer, seed=99, texts=16)
        with torch.no_grad():
            losses = [
                [float(one(input_ids=ids, labels=ids).loss) for one in (model, base.model)]
                for ids in (torch.tensor([text]) for text in texts)
            ]
        found[weight] = sum(tuned - bare for tuned, bare in losses) / len(losses)
    assert found[0] > 0
    assert found[3] < 0.7 * found[0]


def test_resumed_run_has_the_same_text_and_ends_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", "--retain", 1, "--save-steps", 4)
    texts = (tmp_path / "run" / "retention.json").read_text()
    whole = read_info(tmp_path / "run")["sha256"]
    for name in ("prefix.json", "prefix.safetensors"):
        (tmp_path / "run" / name).unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-12"):
        for file in sorted(checkpoint.rglob("*")):
            file.unlink()
        checkpoint.rmdir()
    train(place, tmp_path / "run", "--retain", 1, "--save-steps", 4, "--resume")
    assert (tmp_path / "run" / "retention.json").read_text() == texts
    assert read_info(tmp_path / "run")["sha256"] == whole


def test_a_run_resumed_with_shorter_passes_has_its_longer_texts(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", "--retain", 1, "--save-steps", 4)
    texts = (tmp_path / "run" / "retention.json").read_text()
    longest = max(map(len, json.loads(texts)))
    (tmp_path / "run" / "prefix.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    whole = load_file(tmp_path / "run" / "prefix.safetensors")
    shorter = ["--retain", 1, "--save-steps", 4, "--resume", "--packing-length", 60]
    assert longest > 60
    train(place, tmp_path / "run", *shorter)
    assert (tmp_path / "run" / "retention.json").read_text() == texts
    for name, tensor in load_file(tmp_path / "run" / "prefix.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)


def test_sampling_is_estimated_where_texts_are_to_be_sampled_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed has its texts: what sampling them takes is no reason to refuse it."""
    found: list[Estimate | None] = []

    def kept(*args: Any, **options: Any) -> Estimate | None:
        found.append(forecast(*args, **options))
        return found[-1]

    monkeypatch.setattr("prefixtune.train.session.forecast", kept)
    run = tmp_path / "run"

    def train_again(*more: Any, without: str = "") -> int:
        for name in filter(None, ("prefix.json", without)):
            (run / name).unlink()
        train(place, run, "--retain", 1, *more)
        estimated = found[-1]
        assert estimated is not None
        assert estimated.setup.neutral_lengths  # which each step has in any case
        return estimated.sampling

    train(place, run, "--retain", 1)
    assert found[-1] is not None
    assert found[-1].sampling > 0
    assert train_again("--resume") == 0
    assert train_again("--resume", without="retention.json") > 0  # killed before they were written
    assert train_again("--overwrite") > 0
    line = ["estimate", "--model", place / "model", "--data", place / "rows.json", "--retain", 1, "--json"]
    told = CliRunner().invoke(main, [*map(str, line)])
    assert json.loads(told.stdout)["sampling_peak_bytes"] > 0


def test_divergence_is_logged_beside_the_loss(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", "--retain", 1, "--logging-steps", 4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["divergence"] for line in lines if "loss" in line]
    assert len(logged) == 3
    assert all(value > 0 for value in logged)


def test_steps_go_through_the_texts_in_turn() -> None:
    retention = Retention(rows=list("abcde"), passes=None, weight=1.0, per_step=2)  # type: ignore[arg-type]
    assert ["".join(retention.rows_of(step)) for step in range(4)] == ["ab", "cd", "ea", "bc"]  # type: ignore[arg-type]
