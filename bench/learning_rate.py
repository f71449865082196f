"""The loss on held-out rows by parameterisation and learning rate: what the defaults were chosen from.

Run: python bench/learning_rate.py --data TRAIN.json --eval-data DEV.json direct:2e-2 projection:1e-3:64
A setting is parameterisation, learning rate, and for a projection its hidden size. Rows, order, start, seed
are the same for each.
"""

from __future__ import annotations

import tempfile
import time

import click
from transformers import TrainingArguments, set_seed

from prefixtune import PrefixConfig, PrefixModel
from prefixtune.config import DataConfig
from prefixtune.data import Collator, build_examples, load_rows
from prefixtune.evaluate import target_loss
from prefixtune.generate import ending
from prefixtune.load import load_base
from prefixtune.train import PrefixTrainer

LENGTH, STEPS, WARM_UP, BATCH, SEED = 10, 40, 3, 8, 0


@click.command()
@click.argument("settings", nargs=-1, required=True)
@click.option("--model", default="demo", show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--rows", default=320, show_default=True, help="training rows")
@click.option("--eval-rows", default=64, show_default=True)
@click.option("--max-length", default=160, show_default=True)
def main(
    settings: tuple[str, ...],
    model: str,
    data: str,
    eval_data: str,
    rows: int,
    eval_rows: int,
    max_length: int,
) -> None:
    base = load_base(model)
    config = DataConfig(max_length=max_length, on_no_target="drop")
    train, _ = build_examples(load_rows(data, limit=rows), base.tokenizer, config)
    held_out, _ = build_examples(load_rows(eval_data, limit=eval_rows), base.tokenizer, config)
    pad = ending(base.model, base.tokenizer)["pad_token_id"]
    start = tuple(token for example in train for token in example.input_ids)[:LENGTH]
    click.echo(
        f"{base.dtype_reason}\nbare model: {target_loss(base.model, held_out, pad_token_id=pad)[0]:.4f}"
    )
    for setting in settings:
        kind, rate, *hidden = setting.split(":")
        set_seed(SEED)
        prefix = PrefixConfig(
            length=LENGTH,
            init="tokens",
            init_tokens=start,
            projection=kind == "projection",
            hidden_size=int(hidden[0]) if hidden else None,
        )
        wrapped = PrefixModel(base.model, prefix)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                learning_rate=float(rate),
                max_steps=STEPS,
                warmup_steps=WARM_UP,
                per_device_train_batch_size=BATCH,
                lr_scheduler_type="linear",
                report_to="none",
                save_strategy="no",
                logging_steps=STEPS,
                remove_unused_columns=False,
                disable_tqdm=True,
                seed=SEED,
            )
            trainer = PrefixTrainer(
                model=wrapped,
                args=arguments,
                train_dataset=train,
                data_collator=Collator(pad),
                pad_token_id=pad,
                lengths=[len(example.input_ids) for example in train],
            )
            trainer.train()
        loss, _ = target_loss(wrapped, held_out, pad_token_id=pad)
        click.echo(f"{setting}: {loss:.4f} ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
