"""The benchmarks run, and their numbers agree with each other: on tiny models, as a user starts them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from families import tiny_model
from prefixtune.config import DataConfig
from prefixtune.data import build_examples, load_rows
from tokenizers_for_tests import byte_tokenizer

BENCH = Path(__file__).parent.parent / "bench"
ROWS, ROUNDS, MAX_LENGTH = 8, 2, 64
BEGIN, END = "<!-- bench: {}: begin -->", "<!-- bench: {}: end -->"


ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@dataclass
class Place:
    """A folder with a tiny model, rows, a page with markers, and room for results."""

    folder: Path

    @property
    def arguments(self) -> list[str]:
        options = {"model": "model", "data": "rows.json", "output": "results.json", "page": "page.md"}
        named = [f"--{name}={self.folder / file}" for name, file in options.items()]
        return [*named, f"--rows={ROWS}", f"--max-length={MAX_LENGTH}", "--no-bloom"]

    @property
    def found(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    @property
    def page(self) -> str:
        return (self.folder / "page.md").read_text(encoding="utf-8")


def make_place(folder: Path) -> Place:
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"instruction": "Count to", "input": str(number), "output": " ".join("ab" * number)}
        for number in range(1, ROWS + 3)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    page = f"before\n{BEGIN.format('training')}\nold\n{END.format('training')}\nafter\n"
    (folder / "page.md").write_text(page, encoding="utf-8")
    return Place(folder)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("race"))
    names = "tutorial-recipe,peft-b4,prefixtune,peft-lora"
    result = run(str(BENCH / "training.py"), *place.arguments, f"--rounds={ROUNDS}", f"--only={names}")
    assert result.returncode == 0, result.stderr
    assert "round 2 of 2" in result.stderr
    return place


def test_training_benchmark_counts_real_tokens_of_the_rows(raced: Place) -> None:
    found = raced.found
    rows = load_rows(str(raced.folder / "rows.json"), limit=ROWS)
    examples, _ = build_examples(rows, byte_tokenizer(), DataConfig(max_length=MAX_LENGTH))
    assert (found["rows"], found["rounds"]) == (ROWS, ROUNDS)
    assert found["tokens"] == sum(len(example.input_ids) for example in examples)
    assert found["target_tokens"] == sum(example.target_tokens for example in examples)


def test_speeds_are_tokens_by_the_median_round_and_ratios_their_quotients(raced: Place) -> None:
    found = raced.found
    entries = {entry["name"]: entry for entry in found["contestants"]}
    assert list(entries) == ["tutorial-recipe", "peft-b4", "peft-best", "prefixtune", "peft-lora"]
    recipe, best = entries["tutorial-recipe"], entries["peft-best"]
    for entry in entries.values():
        seconds = statistics.median(each["seconds"] for each in entry["rounds"])
        assert len(entry["rounds"]) == ROUNDS
        assert entry["tokens_per_second"] == pytest.approx(found["tokens"] / seconds)
        speed = entry["tokens_per_second"]
        assert entry["ratio_to_recipe"] == pytest.approx(speed / recipe["tokens_per_second"])
        assert entry["ratio_to_peft_best"] == pytest.approx(speed / best["tokens_per_second"])
    assert best["tokens_per_second"] == max(
        recipe["tokens_per_second"], entries["peft-b4"]["tokens_per_second"]
    )
    assert best["rounds"] == entries[best["which"]]["rounds"]


def test_entries_hold_memory_losses_and_share_of_the_matmul_peak(raced: Place) -> None:
    found = raced.found
    weights = next(iter(found["models"].values()))["matmul_parameters"]
    for entry in found["contestants"]:
        peak = found["matmul_peak"][entry["dtype"]]
        percent = 100 * 4 * weights * entry["tokens_per_second"] / peak  # 4: the base is frozen
        assert entry["matmul_peak_percent"] == pytest.approx(percent)
        assert entry["peak_rss_bytes"] >= entry["steady_rss_bytes"] >= entry["idle_rss_bytes"] > 1e8
        assert entry["startup_seconds"] >= entry["startup"]["import"] + entry["startup"]["load"]
        losses = entry["step_losses"]
        epochs = len(entry["untimed_seconds"]) + ROUNDS
        assert [len(epoch) for epoch in losses] == [1] * epochs  # 8 rows are one optimizer step
        assert [each["loss"] for each in entry["rounds"]] == [epoch[0] for epoch in losses[-ROUNDS:]]
        assert entry["idle_processor_share"] < 0.2


def test_lora_has_about_as_many_trainable_parameters_as_the_prefix(raced: Place) -> None:
    counts = {entry["name"]: entry["trainable_parameters"] for entry in raced.found["contestants"]}
    assert (
        counts["prefixtune"] == counts["peft-best"] == 10 * 2 * 2 * 2 * 8
    )  # tokens, layers, KV, heads, size
    one_rank = 2 * (32 + 32 + 32 + 16)  # of queries and values in two layers
    assert counts["peft-lora"] % one_rank == 0
    assert abs(counts["peft-lora"] - counts["prefixtune"]) <= one_rank / 2


def test_table_replaces_what_stands_between_the_markers(raced: Place) -> None:
    before, _, rest = raced.page.partition(BEGIN.format("training"))
    table, _, after = rest.partition(END.format("training"))
    assert (before, after) == ("before\n", "\nafter\n")
    assert "old" not in table
    for entry in raced.found["contestants"]:
        assert f"| {entry['name']} " in table
    assert str(raced.folder) not in raced.page  # a command is shown without this machine's folders


def test_one_epoch_is_compared_with_the_best_of_the_race(raced: Place) -> None:
    race = raced.found
    result = run(str(BENCH / "training.py"), *raced.arguments, "--epoch")
    assert result.returncode == 0, result.stderr
    found = raced.found
    epoch = found.pop("epoch")
    assert found == race  # the race's results stay
    ours, peers = epoch["contestants"]
    best = next(entry for entry in race["contestants"] if entry["name"] == "peft-best")
    assert (ours["name"], peers["name"], peers["which"]) == ("prefixtune", "peft-best", best["which"])
    assert epoch["time_ratio"] == pytest.approx(ours["train_seconds"] / peers["train_seconds"])
    assert ours["wall_seconds"] > ours["train_seconds"]


def test_without_memory_for_all_the_first_runs_along_in_each_heat(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "import race, training\n"
        "race.free_memory = lambda: 0\n"
        "training.main()"
    )
    only = "--only=tutorial-recipe,prefixtune"
    result = run("-c", script, *place.arguments, "--rounds=1", only)
    assert result.returncode == 0, result.stderr
    recipe, _, ours = place.found["contestants"]
    assert (recipe["name"], recipe["heat"], ours["name"], ours["heat"]) == (
        *("tutorial-recipe", 1),
        *("prefixtune", 2),
    )
    assert recipe["ratio_to_recipe"] == 1
    # of the recipe's rounds in the second heat, which are others than those in the first
    assert ours["ratio_to_recipe"] > 0
    assert ours["ratio_to_recipe"] != ours["tokens_per_second"] / recipe["tokens_per_second"]


def test_training_from_the_start_of_a_peft_prefix_has_the_losses_of_peft(tmp_path: Path) -> None:
    make_place(tmp_path)
    options = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'rows.json'}", "--max-length=64"]
    output = tmp_path / "same.json"
    for batch in (1, 2):
        result = run(str(BENCH / "same_method.py"), *options, f"--batch={batch}", f"--output={output}")
        assert result.returncode == 0, result.stderr
        losses = json.loads(output.read_text(encoding="utf-8"))["step_losses"]
        assert len(losses["peft"]) == 2  # 10 rows, 8 to a step
        assert losses["prefixtune"] == pytest.approx(losses["peft"], rel=2e-4)


def test_gpu_benchmark_measures_each_contestant_in_a_small_model_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    names = ["full", "prefixtune-int8", "prefixtune-nf4", "prefixtune-projection-bf16"]
    options = ["--device=cpu", "--config=small", "--steps=3", f"--only={','.join(names)}"]
    result = run(str(BENCH / "gpu.py"), *options, f"--output={output}")
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["skipped"] == {}
    full, *quantised, ours = found["contestants"]
    assert [entry["quantize"] for entry in quantised] == ["int8", "nf4"]
    assert full["trainable_parameters"] == full["base_parameters"]
    assert {entry["base_parameters"] for entry in found["contestants"]} == {full["base_parameters"]}
    hidden, numbers = 64, 2 * 2 * 64  # layers, keys and values, hidden size
    assert ours["trainable_parameters"] == 10 * hidden + (hidden + 1) * hidden + (hidden + 1) * numbers
    assert (full["dtype"], ours["dtype"]) == ("float32", "bfloat16")
    for entry in found["contestants"]:
        assert 0 < entry["initial_bytes"] <= entry["peak_bytes"]
        assert entry["step_seconds"] > 0
        assert len(entry["losses"]) == 3


def test_gpu_benchmark_that_is_stopped_leaves_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    options = ["--device=cpu", "--config=small", "--steps=3", "--only=prefixtune-fp32,prefixtune-bf16"]
    command = [sys.executable, str(BENCH / "gpu.py"), *options, f"--output={output}"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stderr is not None
        assert any("1 of 2: prefixtune-fp32" in line for line in bench.stderr)
        bench.terminate()  # the second is being loaded
        bench.communicate()
    assert bench.returncode != 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [entry["name"] for entry in found["contestants"]] == ["prefixtune-fp32"]


def test_gpu_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    result = run(str(BENCH / "gpu.py"), f"--output={tmp_path / 'gpu.json'}")
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr
