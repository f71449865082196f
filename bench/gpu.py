"""The tutorial's memory table: BLOOM 1.4B (24 layers) trained with 256 tokens, batch 1 x accumulation 8.

Run: make bench-gpu, or python bench/gpu.py [--only NAMES] [--steps 8]           on a machine with CUDA
     python bench/gpu.py --device cpu --config small    to try the harness: a tiny model, RSS for bytes
One fresh process per contestant; they train one after the other. Writes bench/results/gpu.json and the table
in docs/memory.md. The weights are random: memory and time do not depend on them.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from bases import SMALL_BLOOM, TUTORIAL_BLOOM
from contestants import ROWS_PER_STEP, Contestant
from machine import command, describe_machine, versions
from runner import FailedError, Runner, Task
from tables import gigabytes, markdown, put_between

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "gpu.json", ROOT.parent / "docs" / "memory.md"
MARKER = "bench: gpu"
CONFIGS = {"tutorial": (TUTORIAL_BLOOM, 256), "small": (SMALL_BLOOM, 32)}  # sizes, and tokens of a row
SEED = 42
UNTIMED_STEPS = 2  # the first sets up kernels and the optimizer's state
NO_TARGET = -100
# GB in the tutorial's table: of its GPU and its versions, so no measurement of ours.
TUTORIAL = {"full": 23.4, "peft-prefix": 9.4, "peft-projection": 12.3}


def _peer(name: str, method: str, *, dtype: str = "float32", projection: bool = False) -> Contestant:
    return Contestant(name=name, method=method, dtype=dtype, batch=1, projection=projection)


def _ours() -> list[Contestant]:
    """By precision of the base, without and with projection."""
    bases: dict[str, dict[str, Any]] = {
        "fp32": {"dtype": "float32"},
        "bf16": {},
        "bf16-checkpointing": {"options": {"gradient_checkpointing": True}},
        "int8": {"quantize": "int8"},
        "nf4": {"quantize": "nf4"},
    }
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP}
    # the rows of a step side by side, in passes of as many tokens as the default has, and of 512
    found = [
        Contestant(name="prefixtune-defaults", method="prefixtune", dtype="auto"),
        Contestant(name="prefixtune-512", method="prefixtune", dtype="auto", options={"packing_length": 512}),
    ]
    for projection in (False, True):
        for base, differing in bases.items():
            name = f"prefixtune-{'projection-' if projection else ''}{base}"
            options = {**batch, **differing.get("options", {})}
            settings = {**differing, "options": options}
            found.append(Contestant(name=name, method="prefixtune", projection=projection, **settings))
    return found


CONTESTANTS = (
    _peer("full", "full"),
    _peer("peft-prefix", "peft-prefix"),
    _peer("peft-projection", "peft-prefix", projection=True),
    _peer("peft-p-tuning", "p-tuning"),
    _peer("peft-prefix-bf16", "peft-prefix", dtype="bfloat16"),
    _peer("peft-projection-bf16", "peft-prefix", dtype="bfloat16", projection=True),
    *_ours(),
)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--config", type=click.Choice(sorted(CONFIGS)), default="tutorial", show_default=True)
@click.option("--steps", default=8, show_default=True, help="optimizer steps, of 8 rows each")
@click.option("--only", help="contestants, with commas between them")
@click.option(
    "--loaded",
    default=1,
    show_default=True,
    help="contestants that are loaded at the same time, and wait; more take less time and more memory",
)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="the results file")
@click.option("--page", type=click.Path(path_type=Path), help="whose table is replaced")
def main(
    device: str, config: str, steps: int, only: str | None, loaded: int, output: Path, page: Path | None
) -> None:
    _check(device, config, steps, loaded)
    names = [contestant.name for contestant in CONTESTANTS]
    if unknown := sorted(set((only or "").split(",")) - {*names, ""}):
        raise click.UsageError(f"no contestant {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [contestant for contestant in CONTESTANTS if only is None or contestant.name in only.split(",")]
    sizes, length = CONFIGS[config]
    found: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions(),
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "bytes_are": "max_memory_allocated" if device == "cuda" else "VmHWM of the process",
        "model": {"name": "BLOOM, random weights", **sizes},
        "tokens": length,
        "target_tokens": length // 2,
        "batch": 1,
        "accumulation": ROWS_PER_STEP,
        "steps": steps,
        "seed": SEED,
        "contestants": [],
        "skipped": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = _write_rows(Path(folder), ROWS_PER_STEP * steps, length, sizes["vocab_size"])
        task = Task(source=sizes, rows=rows, epochs=1, seed=SEED, device=device)
        for number, (contestant, runner) in enumerate(
            _started(chosen, task, Path(folder), together=loaded), start=1
        ):
            try:
                entry = _measure(contestant, runner)
            except FailedError as error:
                found["skipped"][contestant.name] = str(error)
                click.echo(f"SKIPPED {contestant.name}: {error}", err=True)
                continue
            found["contestants"].append(entry)
            _write(output, found)  # a run that is cut short leaves what it has
            peak = gigabytes(entry["peak_bytes"])
            done = f"{number} of {len(chosen)}: {contestant.name}"
            click.echo(f"{done}: peak {peak} GB, {entry['step_seconds']:.3f} s a step", err=True)
    _write(output, found)
    page = page or (PAGE if output == RESULTS else None)
    if page is not None:
        put_between(page, MARKER, memory_table(found))
    click.echo(memory_table(found))


def _write(output: Path, found: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _check(device: str, config: str, steps: int, loaded: int) -> None:
    """Exit 2 with the reason where this machine cannot run it."""
    if importlib.util.find_spec("peft") is None:
        raise click.UsageError("PEFT is not installed: pip install 'prefixtune[compare]'")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(
            "there is no CUDA device that torch can use; to try the harness: --device cpu --config small"
        )
    if device == "cuda" and torch.cuda.device_count() > 1:
        raise click.UsageError("Trainer would use all GPUs: choose one with CUDA_VISIBLE_DEVICES=0")
    if device == "cpu" and config != "small":
        raise click.UsageError("on a CPU only the small configuration runs: --device cpu --config small")
    if device == "cpu" and torch.cuda.is_available():
        raise click.UsageError("hide the GPU from Trainer with CUDA_VISIBLE_DEVICES= for --device cpu")
    if loaded < 1:
        raise click.UsageError("--loaded: expected at least one")
    if steps <= UNTIMED_STEPS:
        raise click.UsageError(f"--steps: expected more than {UNTIMED_STEPS}, which are not timed")


def _write_rows(folder: Path, count: int, length: int, vocabulary: int) -> str:
    """Rows of random ids, all of the same length, the second half of each the target."""
    draw = random.Random(SEED)
    pairs = []
    for _ in range(count):
        ids = [draw.randrange(4, vocabulary) for _ in range(length)]
        pairs.append((ids, [NO_TARGET] * (length - length // 2) + ids[length - length // 2 :]))
    path = folder / "rows.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return str(path)


def _started(
    chosen: Sequence[Contestant], task: Task, folder: Path, *, together: int
) -> Iterator[tuple[Contestant, Runner | FailedError]]:
    """Each contestant, loaded and waiting for its turn, so many at the same time; or why it is not."""

    def start(contestant: Contestant) -> Runner | FailedError:
        try:
            return Runner.start(contestant, task, folder)
        except FailedError as error:
            return error

    for first in range(0, len(chosen), together):
        some = chosen[first : first + together]
        with ThreadPoolExecutor(len(some)) as pool:
            runners = list(pool.map(start, some))
        try:
            yield from zip(some, runners, strict=True)
        finally:
            for runner in runners:
                if isinstance(runner, Runner):
                    runner.end()


def _measure(contestant: Contestant, runner: Runner | FailedError) -> dict[str, Any]:
    if isinstance(runner, FailedError):
        raise runner
    try:
        epoch = runner.epoch(timed=True)
    finally:
        runner.end()
    return {
        "name": contestant.name,
        "method": contestant.method,
        "dtype": runner.ready["dtype"],
        "quantize": contestant.quantize,
        "projection": contestant.projection,
        "options": dict(contestant.options),
        "base_parameters": runner.ready["base_parameters"],
        "trainable_parameters": runner.ready["trainable_parameters"],
        "initial_bytes": runner.ready["memory"]["now"],
        "peak_bytes": epoch["memory"]["peak"],
        "step_seconds": statistics.median(epoch["step_seconds"][UNTIMED_STEPS:]),
        "losses": epoch["losses"],
    }


def memory_table(found: dict[str, Any]) -> str:
    """The page's part: command and machine, the table, and who could not run."""
    place = found["machine"]["gpu"] if found["device"] == "cuda" else found["machine"]["processor"]
    head = (
        "contestant",
        "base",
        "batch",
        "trainable",
        "initial GB",
        "peak GB",
        "tutorial's peak GB",
        "s a step",
    )
    theirs = TUTORIAL if found["model"]["n_layer"] == TUTORIAL_BLOOM["n_layer"] else {}
    text = (
        f"`{found['command']}` on {found['date']}: {place}, torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}, PEFT {found['versions']['peft']}. {_sizes(found['model'])}; "
        f"{found['tokens']} tokens, {ROWS_PER_STEP} rows a step; bytes are {found['bytes_are']}."
    )
    skipped = [f"Not run: `{name}`: {reason}." for name, reason in found["skipped"].items()]
    return "\n\n".join([text, markdown(head, _lines(found["contestants"], theirs)), *skipped])


def _batch(options: dict[str, Any]) -> str:
    rows = options.get("per_device_train_batch_size", ROWS_PER_STEP)
    return f"{rows} x {options.get('gradient_accumulation_steps', 1)}"


def _sizes(model: dict[str, Any]) -> str:
    return (
        f"{model['name']}: {model['n_layer']} layers, hidden size {model['hidden_size']}, {model['n_head']} "
        f"heads, vocabulary {model['vocab_size']:,}"
    )


def _lines(entries: Sequence[dict[str, Any]], theirs: dict[str, float]) -> list[list[str]]:
    return [
        [
            entry["name"],
            entry["quantize"] or entry["dtype"],
            _batch(entry["options"]) if entry["method"] == "prefixtune" else f"1 x {ROWS_PER_STEP}",
            f"{entry['trainable_parameters']:,}",
            gigabytes(entry["initial_bytes"]),
            gigabytes(entry["peak_bytes"]),
            str(theirs.get(entry["name"], "")),
            f"{entry['step_seconds']:.3f}",
        ]
        for entry in entries
    ]


if __name__ == "__main__":
    main()
