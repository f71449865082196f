"""What a prefix costs in the forward pass and per generated token, beside the bare model and PEFT's prefix.

Run: make bench, or python bench/attach.py [--model demo] [--length 32] [--rows 8] [--tokens 64]
Writes bench/results/attach.json and prints the table. One process, interleaved, warmed up, medians.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from prefixtune import PrefixKV, attach
from prefixtune.load import load_base

RESULTS = Path(__file__).parent / "results" / "attach.json"
REPEATS = 7


def contestants(
    model: Any, length: int, rows: int, tokens: int, steps: int
) -> dict[str, dict[str, Callable[[], Any]]]:
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    torch.manual_seed(0)
    text = torch.randint(100, 10_000, (rows, tokens))
    before = torch.randint(100, 10_000, (1, length))
    whole = torch.cat([before.expand(rows, -1), text], dim=1)
    kv = PrefixKV.from_tokens(model, before)
    mixed = [kv if row % 2 else None for row in range(rows)]

    def forward(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def generate(ids: torch.Tensor) -> Any:
        settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    def attached(prefixes: Any, job: Callable[[torch.Tensor], Any]) -> Any:
        with attach(model, prefixes):
            return job(text)

    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
    peft = get_peft_model(model, config)

    def peft_forward() -> Any:
        return peft(input_ids=text, attention_mask=torch.ones_like(text))

    return {
        "forward": {
            "bare model, text only": lambda: forward(text),
            "bare model, P tokens and text": lambda: forward(whole),
            "prefixtune": lambda: attached(kv, forward),
            "prefixtune, half of the rows without": lambda: attached(mixed, forward),
            "PEFT prefix": peft_forward,
        },
        "generate": {
            "bare model, text only": lambda: generate(text),
            "bare model, P tokens and text": lambda: generate(whole),
            "prefixtune": lambda: attached(kv, generate),
            "prefixtune, half of the rows without": lambda: attached(mixed, generate),
        },
    }


@torch.no_grad()
def measure(jobs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(REPEATS):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--length", default=32, show_default=True, help="virtual tokens")
@click.option("--rows", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="of each row's text")
@click.option("--steps", default=16, show_default=True, help="generated tokens")
def main(model: str, length: int, rows: int, tokens: int, steps: int) -> None:
    base = load_base(model)
    base.model.eval()
    found: dict[str, Any] = {
        "model": model,
        "dtype": str(base.model.dtype),
        "threads": torch.get_num_threads(),
        "length": length,
        "rows": rows,
        "tokens": tokens,
        "steps": steps,
        "repeats": REPEATS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for name, jobs in contestants(base.model, length, rows, tokens, steps).items():
        found[f"{name}_seconds"] = measure(jobs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name in ("forward", "generate"):
        click.echo(f"\n{name}, median of {REPEATS}")
        for contestant, seconds in found[f"{name}_seconds"].items():
            click.echo(f"  {contestant:<40} {1000 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
