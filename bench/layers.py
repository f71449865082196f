"""What training in some layers only saves: seconds and memory of a step, beside training in all of them.

Run: python bench/layers.py --data ROWS.json all top:8 [--model demo] [--length 10] [--rows 64]
A step is a batch of 8 rows: forward, backward, AdamW. Each setting runs in processes of its own, which take
turns; the first step of a process is not counted. Rows, batches, start and seed are the same for each.
Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from prefixtune import PrefixConfig, PrefixModel
from prefixtune.config import DataConfig
from prefixtune.data import Collator, build_examples, load_rows
from prefixtune.generate import ending
from prefixtune.load import load_base

BATCH, RATE, SEED, TURNS = 8, 2e-2, 0, 2


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="demo", show_default=True)
@click.option("--data", required=True)
@click.option("--length", default=10, show_default=True, help="virtual tokens")
@click.option("--rows", default=64, show_default=True)
@click.option("--max-length", default=160, show_default=True, help="longest row in tokens")
@click.option("--checkpointing", is_flag=True, help="with gradient checkpointing")
def main(settings: tuple[str, ...], **options: Any) -> None:
    found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in settings}
    processes = multiprocessing.get_context("spawn")
    for _ in range(TURNS):
        for setting in settings:
            with processes.Pool(1) as pool:  # a process of its own: its peak is this setting's
                found[setting].append(pool.apply(measure, (setting,), options))
    click.echo("layers      trained numbers   s per step   peak MB   kept MB   loss of the last step")
    for setting, turns in found.items():
        seconds = statistics.median(value for turn in turns for value in turn["seconds"])
        peak, kept = (max(turn[name] for turn in turns) / 1e6 for name in ("peak", "kept"))
        trainable, loss = turns[0]["trainable"], turns[0]["loss"]
        click.echo(f"{setting:<11} {trainable:>15,} {seconds:>12.3f} {peak:>9.0f} {kept:>9.0f}   {loss:.4f}")


def measure(
    setting: str, *, model: str, data: str, length: int, rows: int, max_length: int, checkpointing: bool
) -> dict[str, Any]:
    """Seconds of each step; bytes by which the process grew at most; bytes kept for backward, both of the
    largest batch."""
    base = load_base(model, dtype="bfloat16")
    config = DataConfig(max_length=max_length, on_no_target="drop")
    examples, _ = build_examples(load_rows(data, limit=rows), base.tokenizer, config)
    start = tuple(token for example in examples for token in example.input_ids)[:length]
    examples.sort(key=lambda example: -len(example.input_ids))
    collate = Collator(ending(base.model, base.tokenizer)["pad_token_id"])
    batches = [collate(examples[first : first + BATCH]) for first in range(0, len(examples), BATCH)]
    torch.manual_seed(SEED)
    layers = None if setting == "all" else setting
    prefix = PrefixConfig(length=length, init="tokens", init_tokens=start, layers=layers)
    wrapped = PrefixModel(base.model, prefix).train()
    if checkpointing:
        wrapped.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(wrapped.prefix.parameters(), lr=RATE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not while the model was loaded
    before = resident("VmRSS")
    seconds = []
    for batch in [batches[0], *batches]:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": seconds[1:],
        "peak": resident("VmHWM") - before,
        "kept": kept_for_backward(wrapped, batches[0]),
        "trainable": wrapped.get_nb_trainable_parameters()[0],
        "loss": loss.item(),
    }


def resident(field: str) -> int:
    """Bytes of memory that the process holds (VmRSS), or held at most (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def kept_for_backward(model: PrefixModel, batch: Any) -> int:
    """Bytes of activations that autograd holds when the forward pass is over; each storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad  # the graph, and with it all that was counted, was alive until here
    return sum(held.values())


if __name__ == "__main__":
    main()
