"""From options to a finished run: rows, model, start, training, and the prefix that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import set_seed

from prefixtune.config import DataConfig, PrefixConfig, TrainConfig
from prefixtune.data import (
    Example,
    build_examples,
    check_splits,
    default_template,
    fix_date,
    load_rows,
    parse_fields,
)
from prefixtune.errors import DataError, RunError
from prefixtune.evaluate import target_loss
from prefixtune.fingerprint import Fingerprint
from prefixtune.generate import check_ids
from prefixtune.geometry import quiet_eval
from prefixtune.load import LoadedBase, load_base
from prefixtune.memory import (
    Estimate,
    explain_full_memory,
    keep_few_kernels,
    measured_peak,
    readable,
    return_freed_memory,
)
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.train.build import add_retention, make_trainer
from prefixtune.train.callbacks import BEST
from prefixtune.train.defaults import (
    check_lengths,
    check_options,
    compiled_for,
    digest,
    packing_length_for,
    prefix_config_of,
    resolve,
)
from prefixtune.train.folder import (
    RATES,
    RETENTION,
    check_resumed,
    finished,
    in_use,
    last_checkpoint,
    open_run,
    record_run,
)
from prefixtune.train.forecast import advice_for, check_weights, forecast, pass_tokens_for, setup_of
from prefixtune.train.processes import first_alone, is_first, joined, least, one_process_only, told_once
from prefixtune.train.rate import find_learning_rate
from prefixtune.train.trainer import PrefixTrainer, run

__all__ = ["TrainResult", "train", "train_examples"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run reports. Losses are nats per target token on the evaluation rows.

    `train_loss` is on the training rows, the mean over the last `logging_steps` steps. `peak_bytes` is the
    process's peak, resident on the CPU and allocated on CUDA; `estimated_peak_bytes` is what was predicted
    for it before the training.
    """

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
    estimated_peak_bytes: int | None = None  # None in the records of earlier versions
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        lines = [
            f"{self.steps} steps on {self.train_rows} rows in {self.train_seconds:.0f} s; "
            f"{self.trainable_parameters:,} trainable parameters, {self.prefix_file_bytes:,} bytes on disk"
        ]
        if self.eval_loss is not None:
            lines.append(f"evaluation loss {self.base_loss:.4f} (bare model) -> {self.eval_loss:.4f}")
        if self.peak_bytes:
            estimated = ""
            if self.estimated_peak_bytes == self.peak_bytes:  # known when it was estimated
                estimated = ", of loading; no more were estimated for training"
            elif self.estimated_peak_bytes:
                error = self.estimated_peak_bytes / self.peak_bytes - 1
                estimated = f"; {readable(self.estimated_peak_bytes)} were estimated ({error:+.0%})"
            lines.append(f"peak memory {readable(self.peak_bytes)}{estimated}")
        return "\n".join([*lines, f"prefix: {self.output}"])


@told_once()
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
    force: bool = False,
) -> TrainResult:
    """Train a prefix for `model` on `data` and write it to `output`, in as many processes as were started.

    Args:
        model: hub name, folder, .gguf file or demo.
        data: rows to train on, see `prefixtune.data.load_rows`; `eval_data` likewise.
        prefix_options: fields of PrefixConfig. Without `init` the prefix starts from the KV of a whole
            training row, prompt and target.
        resume: go on from the last checkpoint in `output`, exactly as if never interrupted.
        overwrite: replace the run in `output`.
        force: begin although the memory will not do, by the estimate.

    Raises:
        OutOfMemoryError: the run does not fit in memory.
        RunError: `output` holds a run already, or none to resume.
        DataError, ModelError, ConfigError: the input cannot be used.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint was written.
    """
    data_config, config = data_config or DataConfig(), config or TrainConfig()
    asked: dict[str, Any] = {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "prefix": dict(prefix_options or {}),
        "data_config": data_config.to_dict(),
        "train_config": config.to_dict(),
    }
    check_options(prefix_options or {}, config)  # before the model is loaded
    if config.find_learning_rate:
        one_process_only("find_learning_rate", hint="find a rate in one process, then give --learning-rate")
    began = open_run(output, asked, resume=resume, overwrite=overwrite)
    joined().wait_for_everyone()  # before the first one writes the folder
    keep_few_kernels()
    check_weights(model, config, force=force)
    asked["date"] = (began["asked"].get("date") if began else None) or datetime.now().isoformat()
    examples, eval_examples, base = _load(model, data, eval_data, data_config, config, began, asked["date"])
    return train_examples(
        base,
        (examples, eval_examples),
        source=data,
        asked=asked,
        began=began,
        output=output,
        prefix_options=prefix_options or {},
        template=data_config.template or default_template(base.tokenizer),
        config=config,
        overwrite=overwrite,
        force=force,
    )


@told_once()
def train_examples(
    base: LoadedBase,
    rows: tuple[list[Example], list[Example] | None],
    *,
    source: str,
    asked: dict[str, Any],
    began: dict[str, Any] | None,
    output: Path,
    prefix_options: Mapping[str, Any],
    template: str,
    config: TrainConfig,
    overwrite: bool = False,
    force: bool = False,
    files: Mapping[str, str] | None = None,
) -> TrainResult:
    """`train` from its (training, evaluation) rows and its model on.

    Args:
        source: what the rows are called where they are not those that the run was begun with.
        asked: all options, for run.json.
        began: the record of the run that is resumed, from `open_run`; None begins one.
        files: texts by name that the run folder keeps.
    """
    examples, eval_examples = rows
    resume, processes = began is not None, joined().num_processes
    set_seed(config.seed)
    prefix_config = prefix_config_of(began, prefix_options, base, examples, eval_examples or ())
    everything = [*examples, *(eval_examples or [])]
    check_ids(base.model, (example.input_ids for example in everything))
    check_lengths(base, prefix_config, everything)
    same = {  # what a run that is resumed must find as it was
        "rows": (source, digest(examples)),
        "eval_rows": (str(asked.get("eval_data") or source), digest(eval_examples or [])),
        "base": (base.name, Fingerprint.of(base.model).digest),
    }
    prefix_model = PrefixModel(base.model, prefix_config, tokenizer=base.tokenizer)
    prefix_model.record |= {"template": template, "training": None}

    def room() -> int:  # of all processes: what is recorded is the first one's
        return least(
            pass_tokens_for(prefix_model, config, examples=examples, eval_examples=eval_examples or ())
        )

    if began:
        resolved = began["resolved"]
        check_resumed(output, resolved, same, processes=processes)
        if record := finished(output, resolved):
            note(f"{output}: the run has come to its end already; nothing to do")
            return TrainResult(output=str(output), **record)
        before = began["asked"]["train_config"]
        if config.packing_length != before.get("packing_length"):
            length = packing_length_for(config, examples, base.model, pass_tokens=room())
            resolved = {**resolved, "packing_length": length}
        if (config.compile, config.liger) != (before.get("compile"), before.get("liger", False)):
            resolved = {**resolved, "compile": compiled_for(config, base, examples, processes=processes)}
    else:
        resolved = resolve(config, prefix_config, base, examples, processes=processes, pass_tokens=room())
        resolved |= {name: found for name, (_, found) in same.items()}
    trainer = make_trainer(prefix_model, config, resolved, output, rows=rows, tokenizer=base.tokenizer)
    setup = setup_of(
        dataclasses.replace(config, packing_length=resolved["packing_length"]),
        prefix_config,
        examples,
        eval_examples or (),
        packing=trainer.passes.packing,
        dtype=base.model.dtype,
        device=str(base.model.device),
        texts_kept=resume and (output / RETENTION).exists(),  # of a run that is replaced they go
    )
    estimate = forecast(prefix_model, setup, force=force)
    if (size := setup.frees_from(base.model)) is not None:
        return_freed_memory(size)
    if config.find_learning_rate and not resume:
        with explain_full_memory("the range test", hint=lambda: advice_for(prefix_model, setup, estimate)):
            test = find_learning_rate(base, examples, prefix=prefix_config, config=config, resolved=resolved)
        resolved = {**resolved, "learning_rate": test.suggested}
        trainer.args.learning_rate = test.suggested
        files = {**(files or {}), RATES: test.to_json()}
        set_seed(config.seed)
    record = _record(asked, prefix_config, base, resolved)
    full = explain_full_memory(str(output), hint=lambda: advice_for(prefix_model, setup, estimate))
    with in_use(output) if is_first() else nullcontext(), full:
        with first_alone():
            if is_first():
                record_run(output, record, resume=resume, overwrite=overwrite, files=files)
            add_retention(trainer, config, output, base.tokenizer)
        base_loss = None
        if eval_examples:
            passes = trainer.passes
            base_loss, _ = target_loss(
                base.model,
                eval_examples,
                pad_token_id=passes.pad_token_id,
                capacity=passes.capacity,
                packing=passes.packing,
                progress="bare model",
            )
            kind = "evaluation loss" if eval_examples[0].aims is None else "divergence from the teacher"
            note(f"bare model: {kind} {base_loss:.4f}")
        steps, rate = resolved["steps"], resolved["learning_rate"]
        note(f"{steps} steps, learning rate {rate:g}; Ctrl-C stops with a checkpoint, --resume goes on")
        checkpoint = last_checkpoint(output, processes=processes) if resume else None
        seconds = run(trainer, output, steps=steps, checkpoint=checkpoint)
        return _finish(trainer, output, prefix_model, base_loss, seconds, rate, base, estimate)


def _load(
    model: str,
    data: str,
    eval_data: str | None,
    data_config: DataConfig,
    config: TrainConfig,
    began: dict[str, Any] | None,
    date: str,
) -> tuple[list[Example], list[Example] | None, LoadedBase]:
    """Rows before the model: a wrong data file is told at once."""
    fields = parse_fields(data_config.fields)
    split, eval_split = data_config.split, data_config.evaluated_split
    if eval_data is not None:
        check_splits(data, eval_data, split=split, eval_split=eval_split)
    rows = load_rows(data, fields=fields, split=split, limit=data_config.limit)
    eval_rows = load_rows(eval_data, fields=fields, split=eval_split) if eval_data is not None else None
    base = load_base(model, dtype=began["dtype"] if began else config.dtype, quantize=config.quantize)
    if base.tokenizer is None:
        raise DataError(
            f"{model} has no tokenizer, so rows of text cannot be read", hint="save one in its folder"
        )
    note(f"{base.name}: {base.dtype_reason}")
    fix_date(base.tokenizer, date)
    examples, report = build_examples(rows, base.tokenizer, data_config, progress=True)
    note(f"training rows: {report.summary()}")
    eval_examples = None
    if eval_rows is not None:
        eval_examples, eval_report = build_examples(eval_rows, base.tokenizer, data_config, progress=True)
        note(f"evaluation rows: {eval_report.summary()}")
    if not examples:
        raise DataError(f"{data}: no row with target tokens is left to train on")
    return examples, eval_examples, base


def _record(
    asked: dict[str, Any], prefix: PrefixConfig, base: LoadedBase, resolved: dict[str, Any]
) -> dict[str, Any]:
    from prefixtune import __version__

    dtype = str(base.model.dtype).removeprefix("torch.")
    return {
        "version": __version__,
        "asked": asked,
        "resolved": resolved,
        "prefix": prefix.to_dict(),
        "dtype": dtype,
        "quantization": base.quantization,
    }


def _finish(
    trainer: PrefixTrainer,
    output: Path,
    model: PrefixModel,
    base_loss: float | None,
    seconds: float,
    learning_rate: float,
    base: LoadedBase,
    estimate: Estimate | None,
) -> TrainResult:
    """Write the prefix: the best by evaluation loss where there was an evaluation, else the last."""
    eval_loss = best_step = None
    if trainer.eval_dataset:
        measured = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
        if trainer.state.global_step not in measured:
            trainer.evaluate()
        eval_loss, best_step = trainer.state.best_metric, trainer.state.best_global_step
    if not all(bool(tensor.isfinite().all()) for tensor in model.prefix.state_dict().values()) or (
        trainer.eval_dataset and best_step is None
    ):
        raise RunError(
            f"{output}: the training diverged: the prefix or its loss is no longer finite",
            hint=f"begin another run with a --learning-rate below {learning_rate:g}",
        )
    result = TrainResult(
        output=str(output),
        steps=trainer.state.global_step,
        train_rows=sum(example.part == 0 for example in trainer.train_dataset),
        target_tokens=sum(example.target_tokens for example in trainer.train_dataset),
        train_loss=_last_loss(trainer.state.log_history, trainer.args.logging_steps),
        base_loss=base_loss,
        eval_loss=eval_loss,
        best_step=best_step,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        prefix_file_bytes=0,
        train_seconds=seconds,
        learning_rate=learning_rate,
        dtype=str(base.model.dtype).removeprefix("torch."),
        estimated_peak_bytes=estimate.peak if estimate else None,
        peak_bytes=measured_peak(str(base.model.device)),
    )
    if best_step is not None and best_step != trainer.state.global_step:
        best = PrefixModel.from_pretrained(base.model, output / BEST, is_trainable=True)
        model.prefix.load_state_dict(best.prefix.state_dict())
    model.record["training"] = {
        k: v for k, v in result.to_dict().items() if k not in ("output", "prefix_file_bytes")
    }
    with first_alone(), quiet_eval(model):
        if is_first():
            model.save_pretrained(output)
    size = (output / "prefix.safetensors").stat().st_size
    return dataclasses.replace(result, prefix_file_bytes=size)


def _last_loss(history: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """The mean over the last `steps` steps at least: what is logged is the mean since the log before."""
    logged = [(0, 0.0), *((entry["step"], entry["loss"]) for entry in history if "loss" in entry)]
    total = covered = 0.0
    for (before, _), (step, loss) in reversed(list(pairwise(logged))):
        total, covered = total + loss * (step - before), covered + step - before
        if covered >= steps:
            break
    return total / covered if covered else None
