"""Trains a prefix with transformers' Trainer, in a folder that can be resumed at any time.

The run folder: run.json (all options), checkpoint-N/ (exact resumption), metrics.jsonl, best/, and for the
result the prefix folder's own files. Knows data and models by name only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from prefixtune.config import DataConfig, PrefixConfig, TrainConfig
from prefixtune.data import Collator, DataReport, Example, build_examples, load_rows, parse_fields
from prefixtune.errors import DataError, RunError
from prefixtune.evaluate import target_loss
from prefixtune.generate import ending
from prefixtune.geometry import quiet_eval
from prefixtune.load import LoadedBase, load_base
from prefixtune.model import PrefixModel
from prefixtune.progress import note, progress_bar

__all__ = ["LEARNING_RATES", "PrefixTrainer", "TrainResult", "train"]

# KV numbers are of size 1 to 2 and need large steps; the projection moves all of them at once
LEARNING_RATES = {"direct": 2e-2, "projection": 5e-4}
RUN, METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run reports. Losses are nats per target token on the evaluation rows."""

    output: str
    steps: int
    train_rows: int
    target_tokens: int
    train_loss: float | None
    base_loss: float | None
    eval_loss: float | None
    best_step: int | None
    trainable_parameters: int
    prefix_file_bytes: int
    train_seconds: float
    learning_rate: float
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        lines = [
            f"{self.steps} steps on {self.train_rows} rows in {self.train_seconds:.0f} s; "
            f"{self.trainable_parameters:,} trainable parameters, {self.prefix_file_bytes:,} bytes on disk"
        ]
        if self.eval_loss is not None:
            lines.append(f"evaluation loss {self.base_loss:.4f} (bare model) -> {self.eval_loss:.4f}")
        return "\n".join([*lines, f"prefix: {self.output}"])


class PrefixTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose evaluation counts every target token the same; its checkpoints hold the prefix only."""

    def __init__(self, *args: Any, pad_token_id: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad_token_id = pad_token_id

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        batch = self.args.per_device_eval_batch_size
        loss, tokens = target_loss(model, rows, pad_token_id=self.pad_token_id, batch_size=batch)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_target_tokens": tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(
    *,
    model: str,
    data: str,
    output: Path,
    eval_data: str | None = None,
    prefix_options: Mapping[str, Any] | None = None,
    data_config: DataConfig | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Train a prefix for `model` on `data` and write it to `output`.

    Args:
        model: hub name, folder, .gguf file or demo.
        data: rows to train on, see `prefixtune.data.load_rows`; `eval_data` likewise.
        prefix_options: fields of PrefixConfig. Without `init` the prefix starts from the KV of the first
            training rows.
        resume: go on from the last checkpoint in `output`, exactly as if never interrupted.
        overwrite: replace the run in `output`.

    Raises:
        RunError: `output` holds a run already, or none to resume.
        DataError, ModelError, ConfigError: the input cannot be used.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint was written.
    """
    data_config, config = data_config or DataConfig(), config or TrainConfig()
    asked = {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "prefix": dict(prefix_options or {}),
        "data_config": data_config.to_dict(),
        "train_config": config.to_dict(),
    }
    began = _open_run(output, asked, resume=resume, overwrite=overwrite)
    examples, eval_examples, base, report = _load(model, data, eval_data, data_config, config, began)
    set_seed(config.seed)
    prefix_config = _prefix_config(began, prefix_options or {}, base, examples)
    _check_lengths(base, prefix_config, [*examples, *(eval_examples or [])])
    prefix_model = PrefixModel(base.model, prefix_config, tokenizer=base.tokenizer)
    prefix_model.record = {"template": data_config.template, "training": None, "quantization": None}
    steps = _planned_steps(config, len(examples))
    learning_rate = config.learning_rate or LEARNING_RATES[_kind(prefix_config)]
    _record_run(output, asked, prefix_config, base)
    pad = ending(base.model, base.tokenizer)["pad_token_id"]
    batch = config.per_device_eval_batch_size
    base_loss = None
    if eval_examples:
        base_loss, _ = target_loss(
            base.model, eval_examples, pad_token_id=pad, batch_size=batch, progress="bare model"
        )
    trainer = PrefixTrainer(
        model=prefix_model,
        args=_arguments(config, output, steps, learning_rate, bool(eval_examples)),
        train_dataset=examples,
        eval_dataset=eval_examples,
        data_collator=Collator(pad),
        callbacks=[_Best(output), _Metrics(output)],
        pad_token_id=pad,
    )
    seconds = _run(trainer, steps, _last_checkpoint(output) if resume else None)
    return _finish(trainer, output, prefix_model, base_loss, seconds, learning_rate, report, base)


def _open_run(output: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check the folder; the recorded run where one is resumed."""
    record = output / RUN
    if resume:
        if not record.is_file():
            raise RunError(
                f"{output}: no run to resume (there is no {RUN})", hint="leave --resume out to begin one"
            )
        began: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in asked if began["asked"].get(name) != json.loads(json.dumps(asked[name]))]
        if changed:
            raise RunError(
                f"{output}: the run was begun with other options ({', '.join(changed)})",
                hint=f"give the options that {record} records, or begin another run",
            )
        return began
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise RunError(
                f"{output}: exists already and is not empty",
                hint="--resume goes on with the run in it, --overwrite replaces it; or give another --output",
            )
        if not record.is_file():
            raise RunError(
                f"{output}: holds no run, so it is not overwritten", hint="choose another --output"
            )
        shutil.rmtree(output)
    return None


def _load(
    model: str,
    data: str,
    eval_data: str | None,
    data_config: DataConfig,
    config: TrainConfig,
    began: dict[str, Any] | None,
) -> tuple[list[Example], list[Example] | None, LoadedBase, DataReport]:
    """Rows before the model: a wrong data file is told at once."""
    fields = parse_fields(data_config.fields)
    rows = load_rows(data, fields=fields, split=data_config.split, limit=data_config.limit)
    eval_rows = load_rows(eval_data, fields=fields, split=data_config.split) if eval_data else None
    base = load_base(model, dtype=began["dtype"] if began else config.dtype)
    if base.tokenizer is None:
        raise DataError(
            f"{model} has no tokenizer, so rows of text cannot be read", hint="save one in its folder"
        )
    note(f"{base.name}: {base.dtype_reason}")
    examples, report = build_examples(rows, base.tokenizer, data_config, progress=True)
    note(f"training rows: {report.summary()}")
    eval_examples = None
    if eval_rows:
        eval_examples, eval_report = build_examples(eval_rows, base.tokenizer, data_config, progress=True)
        note(f"evaluation rows: {eval_report.summary()}")
    if not examples:
        raise DataError(f"{data}: no row with target tokens is left to train on")
    return examples, eval_examples, base, report


def _prefix_config(
    began: dict[str, Any] | None, options: Mapping[str, Any], base: LoadedBase, examples: list[Example]
) -> PrefixConfig:
    """The user's options; where they say nothing of a start, the KV of the first training rows."""
    if began:
        return PrefixConfig.from_dict(began["prefix"])
    given = {name: value for name, value in options.items() if value is not None}
    if "init" not in given and "init_text" in given:
        given["init"] = "text"
    if "init" not in given and "init_tokens" in given:
        given["init"] = "tokens"
    if "init" not in given:
        length = given.get("length", PrefixConfig().length)
        tokens: list[int] = []
        for example in examples:
            tokens += example.input_ids
            if len(tokens) >= length:
                break
        given |= {"init": "tokens", "init_tokens": tuple(tokens[:length])}
        shown = base.tokenizer.decode(tokens[:length]) if base.tokenizer is not None else tokens[:length]
        note(f"the prefix starts from the KV of: {shown!r:.200}")
    return PrefixConfig(**given)


def _check_lengths(base: LoadedBase, prefix: PrefixConfig, examples: list[Example]) -> None:
    config = base.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(examples, key=lambda example: len(example.input_ids))
    needed = prefix.length + len(longest.input_ids)
    if isinstance(limit, int) and needed > limit:
        raise DataError(
            f"{longest.origin}: {len(longest.input_ids)} tokens and a prefix of {prefix.length} take "
            f"{needed} positions; {base.name} has {limit}",
            hint=f"use --max-length {max(1, limit - prefix.length)}, or a shorter prefix",
        )


def _planned_steps(config: TrainConfig, rows: int) -> int:
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(rows / config.per_device_train_batch_size)
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    return max(1, math.ceil(config.num_train_epochs * per_epoch))


def _record_run(output: Path, asked: dict[str, Any], prefix: PrefixConfig, base: LoadedBase) -> None:
    from prefixtune import __version__

    output.mkdir(parents=True, exist_ok=True)
    dtype = str(base.model.dtype).removeprefix("torch.")
    record = {"version": __version__, "asked": asked, "prefix": prefix.to_dict(), "dtype": dtype}
    draft = output / f".{RUN}.draft"
    draft.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(output / RUN)


def _arguments(config: TrainConfig, output: Path, steps: int, learning_rate: float, evaluates: bool) -> Any:
    save_steps = config.save_steps or max(1, min(50, steps // 10))  # a killed run repeats a tenth at most
    eval_steps = config.eval_steps or max(1, math.ceil(steps / 4))
    report_to = [name.strip() for name in config.report_to.split(",")]
    if "tensorboard" in report_to and importlib.util.find_spec("tensorboard") is None:
        note(
            f"TensorBoard is not installed: logging to {METRICS} only (pip install 'prefixtune[tensorboard]')"
        )
        report_to.remove("tensorboard")
    same = {
        name: getattr(config, name)
        for name in (
            "num_train_epochs",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lr_scheduler_type",
            "weight_decay",
            "max_grad_norm",
            "logging_steps",
            "save_total_limit",
            "seed",
            "gradient_checkpointing",
        )
    }
    return TrainingArguments(
        **same,
        output_dir=str(output),
        learning_rate=learning_rate,
        max_steps=config.max_steps or -1,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_steps if evaluates else None,
        save_strategy="steps",
        save_steps=save_steps,
        report_to=report_to or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _run(trainer: PrefixTrainer, steps: int, checkpoint: str | None) -> float:
    """Train to the end; Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        note(f"resuming from {checkpoint}")
    stop = threading.Event()
    start = time.perf_counter()
    with progress_bar("training", total=steps) as advance, _interruptible(stop):
        trainer.add_callback(_Progress(advance, stop))
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.is_set() and trainer.state.global_step < steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; go on with --resume")
    return time.perf_counter() - start


@contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`, the second interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint; half-written ones (no sound trainer_state.json) are passed over."""
    found = []
    for folder in output.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), str(folder)))
        except (OSError, ValueError, KeyError):
            note(f"{folder} is incomplete and is passed over")
    return max(found)[1] if found else None


def _finish(
    trainer: PrefixTrainer,
    output: Path,
    model: PrefixModel,
    base_loss: float | None,
    seconds: float,
    learning_rate: float,
    report: DataReport,
    base: LoadedBase,
) -> TrainResult:
    """Write the prefix: the best by evaluation loss where there was an evaluation, else the last."""
    eval_loss = best_step = None
    if trainer.eval_dataset:
        if (
            not trainer.state.log_history
            or trainer.state.log_history[-1].get("step") != trainer.state.global_step
        ) or "eval_loss" not in trainer.state.log_history[-1]:
            trainer.evaluate()
        eval_loss, best_step = trainer.state.best_metric, trainer.state.best_global_step
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = TrainResult(
        output=str(output),
        steps=trainer.state.global_step,
        train_rows=report.examples,
        target_tokens=report.target_tokens,
        train_loss=losses[-1] if losses else None,
        base_loss=base_loss,
        eval_loss=eval_loss,
        best_step=best_step,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        prefix_file_bytes=0,
        train_seconds=seconds,
        learning_rate=learning_rate,
        dtype=str(base.model.dtype).removeprefix("torch."),
    )
    if best_step is not None and best_step != trainer.state.global_step:
        best = PrefixModel.from_pretrained(base.model, output / "best", is_trainable=True)
        model.prefix.load_state_dict(best.prefix.state_dict())
    model.record["training"] = {
        k: v for k, v in result.to_dict().items() if k not in ("output", "prefix_file_bytes")
    }
    with quiet_eval(model):
        model.save_pretrained(output)
    size = (output / "prefix.safetensors").stat().st_size
    return dataclasses.replace(result, prefix_file_bytes=size)


def _kind(config: PrefixConfig) -> str:
    return "projection" if config.projection else "direct"


class _Best(TrainerCallback):  # type: ignore[misc]
    """Keeps the prefix with the lowest evaluation loss in best/; its step travels with the checkpoints."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is None or (state.best_metric is not None and loss >= state.best_metric):
            return
        state.best_metric, state.best_global_step = loss, state.global_step
        model.save_pretrained(self.output / "best")


class _Metrics(TrainerCallback):  # type: ignore[misc]
    """Appends every logged number to metrics.jsonl."""

    def __init__(self, output: Path) -> None:
        self.file = output / METRICS

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, and turns a Ctrl-C into a checkpoint and an orderly end."""

    def __init__(self, advance: Any, stop: threading.Event) -> None:
        self.advance, self.stop, self.last = advance, stop, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step - self.last)
        self.last = state.global_step
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {"loss": "loss", "eval_loss": "evaluation loss"}
        for name in shown.keys() & (logs or {}).keys():
            note(f"step {state.global_step}: {shown[name]} {float(logs[name]):.4f}")
