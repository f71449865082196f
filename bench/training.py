"""Training speed: prefixtune beside PEFT's prefix, LoRA and full tuning, on the same rows, taking turns.

Run: make bench, or python bench/training.py [--model demo] [--data demo:train] [--rows 64] [--rounds 5]
     python bench/training.py --epoch --data FILE --rows 1000      one epoch, ours beside PEFT's best
One process per contestant, interleaved, warmed up, medians. Writes bench/results/training.json and the table
in docs/speed.md; docs/speed.md says what the columns mean. Linux only: it reads /proc.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bases import FOUR_LAYERS
from contestants import BASELINES, TRAINING, Contestant, missing_options
from machine import command, describe_machine, matmul_peak, versions
from prefixtune.config import DataConfig
from prefixtune.data import Example, build_examples, load_rows
from prefixtune.errors import PrefixTuneError
from prefixtune.load import load_tokenizer
from race import Race
from report import BEST, entries, speed_table
from runner import FailedError, Runner, Task
from tables import put_between

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "training.json", ROOT.parent / "docs" / "speed.md"
MARKER = "bench: training"
GUESSED_SHARE = 0.1  # of the matmul peak that a contestant reaches; for the first estimate of the time only


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option(
    "--data", default="demo:train", show_default=True, help="a file of rows, as for prefixtune train"
)
@click.option("--rows", default=64, show_default=True)
@click.option("--max-length", default=256, show_default=True, help="tokens; the tutorial's")
@click.option("--rounds", default=5, show_default=True, help="timed epochs of each contestant")
@click.option("--warm-up", default=1, show_default=True, help="untimed epochs before them")
@click.option("--seed", default=42, show_default=True)
@click.option("--only", help="contestants, with commas between them")
@click.option("--bloom/--no-bloom", default=True, show_default=True, help="4 layers of BLOOM 1.4B too")
@click.option("--epoch", is_flag=True, help="only compare one epoch over the rows; adds to the results file")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="the results file")
@click.option(
    "--page", type=click.Path(path_type=Path), help="whose table is replaced; docs/speed.md by default"
)
def main(
    model: str,
    data: str,
    rows: int,
    max_length: int,
    rounds: int,
    warm_up: int,
    seed: int,
    only: str | None,
    bloom: bool,
    epoch: bool,
    output: Path,
    page: Path | None,
) -> None:
    if importlib.util.find_spec("peft") is None:
        raise click.UsageError("PEFT is not installed: pip install 'prefixtune[compare]'")
    if warm_up < 1 or rounds < 1:
        raise click.UsageError("at least one untimed and one timed epoch")
    page = page or (PAGE if output == RESULTS else None)
    try:
        examples, origin = _examples(model, data, rows, max_length)
    except PrefixTuneError as error:
        raise click.ClickException(str(error)) from None
    about = {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "data": origin,
        "rows": len(examples),
        "tokens": sum(len(example.input_ids) for example in examples),
        "target_tokens": sum(example.target_tokens for example in examples),
        "max_length": max_length,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        if epoch:
            found = _read(output)
            found["epoch"] = about | _one_epoch(model, examples, seed, found, Path(folder))
        else:
            models: dict[str, Any] = {"smollm2" if model == "demo" else Path(model).name: model}
            if bloom:
                models["bloom4"] = FOUR_LAYERS
            about |= {"rounds": rounds, "warm_up": warm_up}
            found = _races(models, about, examples, _chosen(only), Path(folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        put_between(page, MARKER, speed_table(found))
    click.echo(speed_table(found))


def _examples(model: str, data: str, rows: int, max_length: int) -> tuple[list[Example], str]:
    """The rows that everybody trains on, and where they are from; the tokenizer is the model's."""
    config = DataConfig(max_length=max_length, on_no_target="drop")
    examples, report = build_examples(load_rows(data, limit=rows), load_tokenizer(model), config)
    click.echo(report.summary(), err=True)
    return examples, data if data.startswith("demo") else Path(data).name


def _write_rows(examples: Sequence[Example], folder: Path, vocabulary: int | None) -> str:
    """For the children; ids beyond a smaller vocabulary are folded into it."""

    def folded(ids: Sequence[int]) -> list[int]:
        return [token % vocabulary if vocabulary and token > 0 else token for token in ids]

    path = folder / f"rows-{vocabulary}.json"
    pairs = [[folded(example.input_ids), folded(example.labels)] for example in examples]
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return str(path)


def _chosen(only: str | None) -> list[Contestant]:
    names = [contestant.name for contestant in TRAINING]
    asked = names if only is None else only.split(",")
    if unknown := sorted(set(asked) - set(names)):
        raise click.UsageError(f"no contestant {', '.join(unknown)}; there are {', '.join(names)}")
    return [contestant for contestant in TRAINING if contestant.name in asked]


def _races(
    models: dict[str, Any],
    about: dict[str, Any],
    examples: Sequence[Example],
    chosen: Sequence[Contestant],
    folder: Path,
) -> dict[str, Any]:
    peaks = matmul_peak()
    found: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions(),
        **about,
        "matmul_peak": peaks,
        "models": {},
        "contestants": [],
        "skipped": {},
    }
    able = []
    for contestant in chosen:
        if missing := missing_options(contestant):
            reason = f"this version has no option {', '.join(missing)}"
            click.echo(f"SKIPPED {contestant.name}: {reason}", err=True)
            found["skipped"][contestant.name] = reason
        else:
            able.append(contestant)
    for label, source in models.items():
        click.echo(f"--- {label}", err=True)
        vocabulary = None if isinstance(source, str) else source["vocab_size"]
        prefix = "bloom4/" if label == "bloom4" else ""
        place = folder / label
        place.mkdir()
        race = Race(
            contestants=able,
            task=Task(
                source=source,
                rows=_write_rows(examples, folder, vocabulary),
                epochs=about["warm_up"] + 1 + about["rounds"],  # 1: the trial of some
                seed=about["seed"],
            ),
            folder=place,
            rounds=about["rounds"],
            warm_up=about["warm_up"],
            candidates=BASELINES,
            estimate=lambda runner: _guess(runner, about["tokens"], peaks),
        ).run()
        found["models"][label] = _model(source, race)
        found["contestants"] += entries(race, model=label, tokens=about["tokens"], peaks=peaks, prefix=prefix)
        found["skipped"] |= {prefix + name: reason for name, reason in race.skipped.items()}
    return found


def _guess(runner: Runner, tokens: int, peaks: dict[str, float]) -> float:
    """Seconds of an epoch."""
    return 4 * runner.ready["matmul_parameters"] * tokens / (GUESSED_SHARE * max(peaks.values()))


def _model(source: str | dict[str, int], race: Race) -> dict[str, Any]:
    name = "BLOOM, random weights" if isinstance(source, dict) else Path(source).name
    sizes = source if isinstance(source, dict) else {}
    ready = race.finished[0][1].ready if race.finished else {}
    counts = {key: ready.get(key) for key in ("base_parameters", "matmul_parameters")}
    return {"name": name, **sizes, **counts}


def _read(output: Path) -> dict[str, Any]:
    if not output.is_file():
        raise click.UsageError(f"{output}: --epoch adds to the results of a race, and there are none")
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def _one_epoch(
    model: str, examples: Sequence[Example], seed: int, race: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Ours with default options and PEFT's best, one after the other, with the checkpoints of each."""
    best = next((entry for entry in race["contestants"] if entry["name"] == BEST), None)
    if best is None:
        raise click.UsageError(f"the results have no {BEST}, so which of PEFT's is the best is not known")
    task = Task(source=model, rows=_write_rows(examples, folder, None), epochs=1, seed=seed, saves=True)
    by_name = {contestant.name: contestant for contestant in TRAINING}
    found = []
    for name, which in (("prefixtune", None), (BEST, best["which"])):
        contestant = by_name[which or name]
        try:
            runner = Runner.start(replace(contestant, name=name), task, folder)
            try:
                epoch = runner.epoch(timed=True)
            finally:
                runner.end()
        except FailedError as error:
            raise click.ClickException(f"{name}: {error}") from None
        losses, tokens = epoch["losses"], sum(len(example.input_ids) for example in examples)
        found.append(
            {
                "name": name,
                **({"which": which} if which else {}),
                "train_seconds": epoch["seconds"],
                "wall_seconds": runner.ready_seconds + epoch["seconds"],
                "tokens_per_second": tokens / epoch["seconds"],
                "mean_loss": statistics.fmean(losses),
                "last_loss": statistics.fmean(losses[-10:]),
                "step_losses": losses,
                "peak_rss_bytes": runner.peak,
            }
        )
        click.echo(f"{name}: {epoch['seconds']:.0f} s", err=True)
    ours, peers = found
    return {
        "contestants": found,
        "time_ratio": ours["train_seconds"] / peers["train_seconds"],
        "wall_time_ratio": ours["wall_seconds"] / peers["wall_seconds"],
    }


if __name__ == "__main__":
    main()
