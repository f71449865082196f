"""What a quantised base costs and gives: bytes, memory, step time, loss, and how far its gradient turns.

Run, once per setting, because the peak memory is the process's: python bench/quantised.py --data TRAIN.json
--eval-data DEV.json SETTING, where SETTING is float32, bfloat16, int8, nf4 (both compute in bfloat16), or
bnb-int8, bnb-nf4, torchao-int8: the layers that the libraries bring, as transformers loads them.
Rows, order, start and seed are the same for each. The setting `times` loads all bases; they take turns in
forward and backward passes, and the best pass of each counts: other people's load only ever adds time.
Prints one JSON document.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from prefixtune import PrefixConfig, PrefixModel
from prefixtune.config import DataConfig
from prefixtune.data import Collator, build_examples, load_rows
from prefixtune.evaluate import target_loss
from prefixtune.generate import ending
from prefixtune.load import load_base, load_tokenizer
from prefixtune.train import PrefixTrainer

LENGTH, RATE, WARM_UP, BATCH, SEED = 10, 2e-2, 3, 8, 0
OURS = ("float32", "bfloat16", "int8", "nf4")


def load(model: str, setting: str) -> Any:
    if setting in OURS:
        dtype = "float32" if setting == "float32" else "bfloat16"
        return load_base(model, dtype=dtype, quantize=setting if setting in ("int8", "nf4") else None).model
    if setting == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        config = BitsAndBytesConfig(**(four if setting == "bnb-nf4" else eight))
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config)


def weight_bytes(base: Any) -> int:
    """Bytes of parameters and buffers; scales that a library keeps beside its parameters included."""
    total = 0
    for tensor in {id(t): t for t in (*base.parameters(), *base.buffers())}.values():
        state, scales = getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)
        inner = [tensor.qdata, tensor.scale] if hasattr(tensor, "qdata") else [tensor]
        inner += [state.absmax] if state is not None else []
        inner += [scales] if scales is not None else []
        total += sum(part.nbytes for part in inner)
    return total


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()  # of this process only; ru_maxrss counts its parent too
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def gradient(base: Any, start: tuple[int, ...], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the loss with respect to every key and value number, at the start."""
    wrapped = PrefixModel(base, PrefixConfig(length=LENGTH, init="tokens", init_tokens=start)).train()
    wrapped(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in wrapped.prefix.parameters()])


def times(
    model: str, start: tuple[int, ...], batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, float]:
    """Seconds of the best forward and backward pass of each setting, which take turns."""
    settings = (*OURS, "torchao-int8", "bnb-nf4")
    config = PrefixConfig(length=LENGTH, init="tokens", init_tokens=start)
    models = {setting: PrefixModel(load(model, setting), config).train() for setting in settings}
    best = dict.fromkeys(settings, float("inf"))
    for setting, wrapped in list(models.items()) * rounds:
        begin = time.perf_counter()
        wrapped(**batch).loss.backward()
        best[setting] = min(best[setting], time.perf_counter() - begin)
    return best


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(base: Any, start: tuple[int, ...], rows: Any, pad: int, steps: int) -> tuple[PrefixModel, float]:
    set_seed(SEED)
    wrapped = PrefixModel(base, PrefixConfig(length=LENGTH, init="tokens", init_tokens=start))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=RATE,
            max_steps=steps,
            warmup_steps=WARM_UP,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="linear",
            report_to="none",
            save_strategy="no",
            logging_steps=steps,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=SEED,
        )
        PrefixTrainer(
            model=wrapped,
            args=arguments,
            train_dataset=rows,
            data_collator=Collator(pad),
            pad_token_id=pad,
            lengths=[len(example.input_ids) for example in rows],
            callbacks=[clock],
        ).train()
    return wrapped, statistics.median(clock.seconds)


@click.command()
@click.argument("setting", type=click.Choice([*OURS, "bnb-int8", "bnb-nf4", "torchao-int8", "times"]))
@click.option("--model", default="demo", show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--steps", default=40, show_default=True)
@click.option("--rows", default=320, show_default=True, help="training rows")
@click.option("--eval-rows", default=64, show_default=True)
@click.option("--max-length", default=160, show_default=True)
def main(
    setting: str,
    model: str,
    data: str,
    eval_data: str,
    steps: int,
    rows: int,
    eval_rows: int,
    max_length: int,
) -> None:
    tokenizer = load_tokenizer(model)
    config = DataConfig(max_length=max_length, on_no_target="drop")
    rows_read, _ = build_examples(load_rows(data, limit=rows), tokenizer, config)
    held_out, _ = build_examples(load_rows(eval_data, limit=eval_rows), tokenizer, config)
    start = tuple(token for example in rows_read for token in example.input_ids)[:LENGTH]
    if setting == "times":
        batch = Collator(tokenizer.pad_token_id)(rows_read[:BATCH])
        shape = list(batch["input_ids"].shape)
        best = times(model, start, batch, rounds=steps)
        click.echo(json.dumps({"setting": setting, "batch": shape, "rounds": steps, "best_seconds": best}))
        return
    before = peak_megabytes()
    begin = time.perf_counter()
    base = load(model, setting)
    found: dict[str, Any] = {"setting": setting, "load_seconds": round(time.perf_counter() - begin, 1)}
    found |= {"weight_megabytes": round(weight_bytes(base) / 2**20, 1), "megabytes_before": round(before)}
    found["peak_megabytes_loading"] = round(peak_megabytes())
    pad = ending(base, tokenizer)["pad_token_id"]
    wrapped, found["step_seconds"] = train(base, start, rows_read, pad, steps)
    found["peak_megabytes_training"] = round(peak_megabytes())
    found["bare_loss"] = round(target_loss(base, held_out, pad_token_id=pad)[0], 4)
    found["dev_loss"] = round(target_loss(wrapped, held_out, pad_token_id=pad)[0], 4)
    batch = Collator(pad)(rows_read[:BATCH])
    mine = gradient(base, start, batch)
    exact = gradient(load_base(model, dtype="float32").model, start, batch)
    found["gradient_cosine"] = round(torch.cosine_similarity(mine, exact, dim=0).item(), 4)
    click.echo(json.dumps(found | {"steps": steps, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
