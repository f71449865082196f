"""Where the method is the same, so is the curve: our packed training from PEFT's start, beside PEFT's own.

Run: python bench/same_method.py [--model demo] [--data demo:train] [--rows 64] [--learning-rate 5e-3]
PEFT's prefix and ours begin with the same keys and values, see the same rows in the same order, 8 to a step,
and have the same optimizer and schedule, in float32. PEFT runs padded batches of --batch rows, ours packs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from contestants import PREFIX_LENGTH, ROWS_PER_STEP
from machine import command, describe_machine, versions
from prefixtune.data import Collator, Example


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--data", default="demo:train", show_default=True)
@click.option("--rows", default=64, show_default=True)
@click.option("--max-length", default=256, show_default=True)
@click.option("--batch", default=1, show_default=True, help="rows of a forward pass of PEFT")
@click.option("--learning-rate", default=5e-3, show_default=True)
@click.option("--seed", default=42, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="a JSON file for both curves")
def main(
    model: str,
    data: str,
    rows: int,
    max_length: int,
    batch: int,
    learning_rate: float,
    seed: int,
    output: Path | None,
) -> None:
    from bases import read_base
    from prefixtune.config import DataConfig
    from prefixtune.data import build_examples, load_rows

    base = read_base(model, dtype="float32", device="cpu")
    config = DataConfig(max_length=max_length, on_no_target="drop")
    examples, report = build_examples(load_rows(data, limit=rows), base.tokenizer, config)
    click.echo(report.summary(), err=True)
    losses = curves(base, examples, batch=batch, learning_rate=learning_rate, seed=seed)
    steps = list(zip(losses["peft"], losses["prefixtune"], strict=True))
    for number, (theirs, ours) in enumerate(steps, start=1):
        click.echo(f"step {number}: PEFT {theirs:.5f}, prefixtune {ours:.5f}, apart {abs(ours - theirs):.1e}")
    worst = max(abs(ours - theirs) / theirs for theirs, ours in steps)
    click.echo(f"largest relative distance of {len(steps)} steps: {worst:.1e}")
    if output is not None:
        found = {"command": command(), "machine": describe_machine(), "versions": versions()}
        found |= {"rows": len(examples), "step_losses": losses, "largest_relative_distance": worst}
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def curves(
    base: Any, examples: Sequence[Example], *, batch: int, learning_rate: float, seed: int
) -> dict[str, list[float]]:
    """The loss of each optimizer step of one epoch, of PEFT and of ours."""
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import Trainer, set_seed

    from prefixtune.loss import PASS_TOKENS, Passes
    from prefixtune.model import PrefixModel
    from prefixtune.train.trainer import PrefixTrainer

    set_seed(seed)
    pad, longest = base.pad_token_id, max(len(example.input_ids) for example in examples)
    settings = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PREFIX_LENGTH)
    theirs = get_peft_model(base.model, settings)
    start = start_of(theirs, base.model)
    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(Path(folder), batch=batch, learning_rate=learning_rate, seed=seed)
        trainer = Trainer(theirs, arguments, train_dataset=rows, data_collator=Collator(pad))
        found["peft"] = _losses(trainer)
        arguments = _arguments(Path(folder), batch=ROWS_PER_STEP, learning_rate=learning_rate, seed=seed)
        ours = PrefixModel(base.model, start)
        plain = torch.optim.AdamW(ours.prefix.parameters(), lr=learning_rate, weight_decay=0.0)
        trainer = PrefixTrainer(
            ours,
            arguments,
            optimizers=(plain, None),  # PEFT has one learning rate for all numbers
            train_dataset=list(examples),
            data_collator=Collator(pad),
            pad_token_id=pad,
            passes=Passes.of(base.model, capacity=max(PASS_TOKENS, longest), pad_token_id=pad),
        )
        found["prefixtune"] = _losses(trainer)
    return found


def start_of(model: Any, base: Any) -> Any:
    """The keys and values that a PEFT prefix begins with, as a PrefixKV."""
    from prefixtune import PrefixKV
    from prefixtune.geometry import Geometry
    from prefixtune.prefix import LayerKV

    geometry = Geometry.probe(base)
    numbers = model.prompt_encoder["default"].embedding.weight.detach().clone()  # [P, L*2*H*D]
    by_layer = numbers.view(PREFIX_LENGTH, 2 * len(geometry.layers), geometry.layers[0].kv_heads, -1)
    keys_and_values = by_layer.permute(1, 2, 0, 3).contiguous()  # [2L, H, P, D]
    pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
    return PrefixKV(tuple(LayerKV(key, value) for key, value in pairs))


def _arguments(folder: Path, *, batch: int, learning_rate: float, seed: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS_PER_STEP // batch,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=True,
        seed=seed,
    )


def _losses(trainer: Any) -> list[float]:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
