"""From what the runners reported to entries of training.json and the table in docs/speed.md. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from contestants import BASELINES, RECIPE
from race import Race
from runner import Runner
from tables import gigabytes, markdown

BEST = "peft-best"


def entries(
    race: Race, *, model: str, tokens: int, peaks: dict[str, float], prefix: str
) -> list[dict[str, Any]]:
    """One entry per contestant that ran all rounds, and `peft-best`: the fastest of PEFT's plain prefixes.

    Args:
        model: the label of the model; `prefix` stands before the names.
        tokens: real tokens of an epoch: prompt and target, no padding, no virtual tokens.
        peaks: floating-point operations per second of a matmul, by dtype.
    """
    found = [_entry(runner, tokens, peaks) | {"heat": heat + 1} for heat, runner in race.finished]
    baselines = [entry for entry in found if entry["name"] in BASELINES]
    if baselines:
        best = max(baselines, key=lambda entry: entry["tokens_per_second"])
        found.insert(len(baselines), {**best, "name": BEST, "which": best["name"]})
    relative = [_relative(entry, race) for entry in found]
    by_name = {entry["name"]: speed for entry, speed in zip(found, relative, strict=True)}
    for entry, speed in zip(found, relative, strict=True):
        entry["model"] = model
        for ratio, name in (("ratio_to_recipe", RECIPE), ("ratio_to_peft_best", BEST)):
            other = by_name.get(name)
            entry[ratio] = speed / other if speed and other else None
        entry["name"] = prefix + entry["name"]
        if "which" in entry:
            entry["which"] = prefix + entry["which"]
    return found


def _relative(entry: dict[str, Any], race: Race) -> float | None:
    """Speed beside the anchor's in the same heat: of two heats only these can be compared."""
    anchor = race.anchors[entry["heat"] - 1]
    return anchor.seconds / entry["seconds"] if anchor else None


def _entry(runner: Runner, tokens: int, peaks: dict[str, float]) -> dict[str, Any]:
    ready, contestant, seconds = runner.ready, runner.contestant, runner.seconds
    # forward 2, gradient of the activations 2, of the weights 2: a frozen weight has none of the last
    per_token = (6 if contestant.method == "full" else 4) * ready["matmul_parameters"]
    beyond = max(0.0, runner.untimed[0]["seconds"] - seconds)
    return {
        "name": runner.name,
        "method": contestant.method,
        "dtype": ready["dtype"],
        "batch": contestant.batch,
        "options": dict(contestant.options),
        "projection": contestant.projection,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_rss_bytes": runner.peak,
        "steady_rss_bytes": max(found["memory"]["peak"] for found in runner.rounds),
        "idle_rss_bytes": runner.rounds[-1]["memory"]["now"],
        "startup_seconds": runner.ready_seconds + beyond,
        "startup": {
            "import": ready["import_seconds"],
            "load": ready["load_seconds"],
            "first_epoch_beyond_a_normal_one": beyond,
        },
        "matmul_peak_percent": 100 * per_token * tokens / seconds / peaks[ready["dtype"]],
        "trainable_parameters": ready["trainable_parameters"],
        "learning_rate": ready["learning_rate"],
        "rounds": [
            {
                "seconds": found["seconds"],
                "tokens_per_second": tokens / found["seconds"],
                "processor_seconds": found["processor_seconds"],
                "loss": statistics.fmean(found["losses"]),
                "peak_rss_bytes": found["memory"]["peak"],
            }
            for found in runner.rounds
        ],
        "untimed_seconds": [found["seconds"] for found in runner.untimed],
        "step_losses": [found["losses"] for found in (*runner.untimed, *runner.rounds)],
        "idle_processor_share": runner.idle_share,
    }


def speed_table(found: dict[str, Any]) -> str:
    """The page's part: a table per model, the command and the machine, and who could not run."""
    machine = found["machine"]
    parts = [
        f"`{found['command']}` on {found['date']}: {machine['processor']}, {machine['cores']} cores, torch "
        f"{found['versions']['torch']}, transformers {found['versions']['transformers']}, PEFT "
        f"{found['versions']['peft']}. {found['rows']} rows of {found['data']}, {found['tokens']:,} tokens, "
        f"{found['target_tokens']:,} of them targets. Medians of {found['rounds']} interleaved rounds; "
        f"measured matmul peak {found['matmul_peak']['float32'] / 1e12:.2f} (fp32) and "
        f"{found['matmul_peak']['bfloat16'] / 1e12:.2f} TFLOP/s (bf16)."
    ]
    for model in found["models"]:
        mine = [entry for entry in found["contestants"] if entry["model"] == model]
        if mine:
            parts += [f"**{model}**", _table(mine)]
    parts += [f"Not run: `{name}`: {reason}." for name, reason in found["skipped"].items()]
    if "epoch" in found:
        parts += [_epoch_table(found["epoch"])]
    return "\n\n".join(parts)


def _table(found: Sequence[dict[str, Any]]) -> str:
    head = (
        *("contestant", "precision", "real tok/s", "x recipe", "x peft-best", "peak RSS GB"),
        *("while training GB", "start-up s", "% of matmul peak", "trainable"),
    )
    rows = [
        [
            f"{entry['name']} ({entry['which']})" if "which" in entry else entry["name"],
            entry["dtype"],
            f"{entry['tokens_per_second']:.0f}",
            _ratio(entry["ratio_to_recipe"]),
            _ratio(entry["ratio_to_peft_best"]),
            gigabytes(entry["peak_rss_bytes"]),
            gigabytes(entry["steady_rss_bytes"]),
            f"{entry['startup_seconds']:.1f}",
            f"{entry['matmul_peak_percent']:.0f}",
            f"{entry['trainable_parameters']:,}",
        ]
        for entry in found
    ]
    return markdown(head, rows)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _epoch_table(epoch: dict[str, Any]) -> str:
    head = ("one epoch", "training s", "with start-up s", "real tok/s", "mean loss", "last 10 steps")
    rows = [
        [
            f"{entry['name']} ({entry['which']})" if "which" in entry else entry["name"],
            f"{entry['train_seconds']:.0f}",
            f"{entry['wall_seconds']:.0f}",
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['mean_loss']:.3f}",
            f"{entry['last_loss']:.3f}",
        ]
        for entry in epoch["contestants"]
    ]
    text = (
        f"`{epoch['command']}`: {epoch['rows']:,} rows of {epoch['data']}, {epoch['tokens']:,} tokens, once."
    )
    return f"{text}\n\n{markdown(head, rows)}"
