"""Laws of the range test: it reads its curve as it says, runs from the run's start, and the run uses it. And
when the steps of virtual tokens are damped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from families import tiny_model
from prefixtune.cli import main
from prefixtune.compare.settings import methods_of
from prefixtune.config import TrainConfig
from prefixtune.data import Example
from prefixtune.errors import ConfigError
from prefixtune.load import LoadedBase
from prefixtune.train import trainer_for
from prefixtune.train.rate import ABOVE, BELOW, STEPS, read
from small_runs import write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "yes" * (4 + i % 3)} for i in range(12)]
    return write_place(tmp_path_factory.mktemp("rates"), rows)


def train(place: Path, output: Path, *more: Any) -> Result:
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", output, "--json"]
    line += ["--length", 4, "--max-steps", 2, "--retain", 0, "--report-to", "none", *more]
    return CliRunner().invoke(main, [str(arg) for arg in line])


def test_suggestion_lies_between_most_and_the_lowest() -> None:
    rates = [10.0**power for power in range(-4, 4)]
    gains = [0.0, -0.5, -2.0, -2.2, -2.3, -2.4, 3.0, 6.0]
    found = read(rates, gains)
    lowest = found.smoothed.index(min(found.smoothed))
    first = next(step for step, gain in enumerate(found.smoothed) if gain <= 0.8 * min(found.smoothed))
    assert first < lowest == 5
    assert found.suggested == pytest.approx(math.sqrt(rates[first] * rates[lowest]), rel=0.05)
    assert found.smoothed[0] == gains[0]
    assert gains[1] < found.smoothed[1] < gains[0]


def test_where_nothing_is_learnt_the_lowest_rate_is_suggested() -> None:
    assert read([1.0, 2.0, 3.0], [0.0, 1.0, 5.0]).suggested == 1.0
    assert read([1.0, 2.0, 3.0], [1e-8, 1.0, 5.0]).suggested == 1.0  # rounding


def test_a_test_that_ended_early_has_the_rates_that_it_came_to() -> None:
    found = read([1.0, 2.0, 3.0], [-1.0, 5.0])
    assert found.rates == (1.0, 2.0)
    assert found.suggested == 1.0


@pytest.mark.parametrize(
    ("gains", "falling"),
    [
        ([0.0, -1.0, -2.0, -3.0], True),
        ([0.0, -3.0, -2.0, 5.0], False),
        ([0.0, -1.0, -2.0, math.nan], False),  # it diverged
    ],
)
def test_a_loss_that_fell_up_to_the_highest_rate_is_seen(gains: list[float], falling: bool) -> None:
    assert read([1.0, 2.0, 3.0, 4.0], gains).still_falling == falling


@pytest.mark.parametrize(
    ("turns", "after", "falling"),
    [
        (47, 0.0, True),
        (40, 0.1, False),  # a twentieth of the gain is lost in each step
        (36, 0.05, False),
        (24, 0.05, False),
        (24, 0.0, False),  # flat from there on
    ],
)
def test_the_noise_of_batches_does_not_decide_whether_a_loss_fell(
    turns: int, after: float, falling: bool
) -> None:
    curve = [-2 * min(step / turns, 1) + after * max(step - turns, 0) for step in range(STEPS)]
    seen = []
    for seed in range(50):
        noise = random.Random(seed)
        gains = [gain + noise.gauss(0, 0.2) for gain in curve]  # a tenth of what is learnt
        seen.append(read([1.0] * STEPS, gains).still_falling == falling)
    assert sum(seen) >= 48


def test_a_last_batch_that_was_hard_does_not_hide_that_the_loss_fell() -> None:
    gains = [-2 * step / (STEPS - 1) for step in range(STEPS)]
    for last in range(1, 4):
        noisy = [*gains[:-last], *(gain + 0.3 for gain in gains[-last:])]
        assert read([1.0] * STEPS, noisy).still_falling


@pytest.mark.parametrize(("above", "falling"), [(BELOW * 2, True), (ABOVE * 100, False)])
def test_a_range_without_an_optimum_is_told(
    above: float, falling: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixtune.train.rate.ABOVE", above)
    result = train(place, tmp_path / "run", "--find-learning-rate")
    assert result.exit_code == 0, result.stderr
    told = "the loss was still falling at the highest rate" in " ".join(result.stderr.split())
    assert told == falling


def test_run_trains_with_the_rate_that_it_found_and_keeps_the_curve(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "run", "--find-learning-rate")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    curve = json.loads((tmp_path / "run" / "learning_rates.json").read_text())
    assert facts["learning_rate"] == curve["suggested"]
    assert f"learning rate {curve['suggested']:.2g}" in result.stderr
    assert 1 < len(curve["rates"]) == len(curve["gains"]) <= STEPS
    assert all(map(math.isfinite, curve["gains"]))
    assert curve["gains"][0] == pytest.approx(0, abs=1e-5)  # nothing is learnt before the first step
    assert abs(curve["gains"][-1]) > 1e-3
    assert curve["rates"][0] == pytest.approx(7e-2 * BELOW)
    if len(curve["rates"]) == STEPS:
        assert curve["rates"][-1] == pytest.approx(7e-2 * ABOVE)


def test_run_with_a_found_rate_is_the_run_that_was_given_it(place: Path, tmp_path: Path) -> None:
    found = json.loads(train(place, tmp_path / "found", "--find-learning-rate").stdout)
    given = train(place, tmp_path / "given", "--learning-rate", found["learning_rate"])
    assert given.exit_code == 0, given.stderr
    first, second = (load_file(tmp_path / name / "prefix.safetensors") for name in ("found", "given"))
    assert all(first[name].equal(second[name]) for name in first)


def test_resumed_run_does_not_search_again(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "run", "--find-learning-rate").exit_code == 0
    for path in (tmp_path / "run").glob("checkpoint-2/*"):
        path.unlink()
    (tmp_path / "run" / "prefix.safetensors").unlink()
    again = train(place, tmp_path / "run", "--find-learning-rate", "--save-steps", 1, "--resume")
    assert again.exit_code == 1  # other options: told, not trained
    assert "save_steps" in again.stderr
    again = train(place, tmp_path / "run", "--find-learning-rate", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "range test" not in again.stderr


def test_a_given_rate_and_a_search_for_one_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="find_learning_rate"):
        TrainConfig(learning_rate=1e-2, find_learning_rate=True)


def test_who_does_not_look_for_a_rate_says_so(tmp_path: Path) -> None:
    base = LoadedBase(model=tiny_model("llama"), tokenizer=None, name="tiny", dtype_reason="")
    rows = [Example(input_ids=(1, 2, 3), labels=(-100, 2, 3), origin="", truncated=0)]
    config = TrainConfig(find_learning_rate=True, retain=0, report_to="none")
    with pytest.raises(ConfigError, match="only train looks"):
        trainer_for(base, rows, prefix_options={"init": "random"}, config=config, output=tmp_path / "run")
    with pytest.raises(ConfigError, match="find_learning_rate"):
        methods_of(("prefix",), {"prefix": {"find_learning_rate": True}})


@pytest.mark.parametrize(
    ("options", "damping", "rate"),
    [
        ({"max_steps": 125}, 0.5, 7e-2),
        ({"max_steps": 126}, 0.0, 5e-2),
        ({"max_steps": 125, "token_damping": 0.0}, 0.0, 5e-2),
        ({"max_steps": 125, "learning_rate": 1e-2}, 0.5, 1e-2),
        ({"max_steps": 126, "token_damping": 0.7}, 0.7, 7e-2),
        ({"max_steps": 125, "targets": 10}, 0.0, 5e-2),  # labels
        ({"max_steps": 125, "targets": 10, "token_damping": 0.5}, 0.5, 7e-2),
    ],
    ids=str,
)
def test_tokens_of_short_runs_are_damped(
    options: dict[str, Any], damping: float, rate: float, tmp_path: Path
) -> None:
    options = dict(options)
    targets = options.pop("targets", 11)
    base = LoadedBase(model=tiny_model("llama"), tokenizer=None, name="tiny", dtype_reason="")
    ids = (5,) * (1 + targets)
    rows = [Example(input_ids=ids, labels=(-100, *ids[1:]), origin="", truncated=0)]
    config = TrainConfig(**options, retain=0, report_to="none")
    trainer, _ = trainer_for(
        base, rows, prefix_options={"init": "random"}, config=config, output=tmp_path / "run", pad_token_id=0
    )
    assert {group["damping"] for group in trainer.create_optimizer().param_groups} == {damping}
    assert trainer.args.learning_rate == rate


def test_label_smoothing_is_seen_in_the_prefix_and_not_in_the_evaluation(place: Path, tmp_path: Path) -> None:
    found, curves = {}, {}
    for smoothing in (0, 0.3):
        given = ["--label-smoothing-factor", smoothing]
        output = tmp_path / str(smoothing)
        result = train(place, output, *given, "--dtype", "float32", "--eval-data", place / "rows.json")
        assert result.exit_code == 0, result.output
        found[smoothing] = load_file(output / "prefix.safetensors")
        curves[smoothing] = json.loads(result.stdout)["eval_loss"]
    assert not all(tensor.equal(found[0][name]) for name, tensor in found[0.3].items())
    assert abs(curves[0.3] - curves[0]) < 0.1


def test_damping_is_seen_in_the_prefix_and_a_short_run_has_it_by_default(place: Path, tmp_path: Path) -> None:
    found = {}
    for damping in ("default", 0.5, 0):
        given: list[Any] = ["--dtype", "float32"]  # what is measured faster may differ from run to run
        given += [] if damping == "default" else ["--token-damping", damping, "--learning-rate", 7e-2]
        result = train(place, tmp_path / str(damping), *given)
        assert result.exit_code == 0, result.output
        found[damping] = load_file(tmp_path / str(damping) / "prefix.safetensors")
    for name, tensor in found["default"].items():
        assert tensor.equal(found[0.5][name])
    assert not all(tensor.equal(found[0][name]) for name, tensor in found[0.5].items())
