"""Trainer with target-token evaluation and batches of similar length, its arguments, and a run of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from prefixtune.chunked import IGNORED
from prefixtune.config import TrainConfig
from prefixtune.data import Collator, Example, as_example
from prefixtune.errors import ConfigError, MissingExtraError, RunError
from prefixtune.evaluate import target_loss
from prefixtune.generate import check_ids
from prefixtune.loss import PASS_TOKENS, Passes, RowTokens
from prefixtune.progress import note, progress_bar
from prefixtune.train.callbacks import Epoch, Metrics, Progress, restore_best
from prefixtune.train.clock import Clock
from prefixtune.train.defaults import warmup_steps_for
from prefixtune.train.folder import cut_metrics
from prefixtune.train.retention import Retention
from prefixtune.train.sampler import LengthGroupedSampler
from prefixtune.train.step import SilentLayers, Step, smoothing_of
from prefixtune.train.window import LogWindow

__all__ = ["PrefixTrainer", "run", "training_arguments"]


class PrefixTrainer(Trainer):  # type: ignore[misc]
    """Trainer with our loss: rows in passes of bounded size, target tokens only, the prefix made once a step.

    Every target token of an optimizer step counts the same, whatever row, pass, batch or process it is in.
    Checkpoints hold the prefix only. With `label_smoothing_factor` the loss that is logged, and that of
    `evaluate`, is the one without it; in the last third of the steps so is the one that is trained.

    Args:
        pad_token_id: fills shorter rows where rows cannot be packed.
        passes: how a batch is run through the model; packed in passes of 512 tokens by default.
        lengths: tokens of each training row, to put rows of similar length into a batch. Not needed where
            rows are packed.
        retention: neutral text on which the base's distribution is aimed at, beside the rows.
        damping: of the steps of virtual tokens with most of the attention (`HeadwiseSoap`).

    Raises:
        ConfigError: a loss or metrics of one's own, which only a plain Trainer has.
    """

    def __init__(
        self,
        *args: Any,
        pad_token_id: int,
        passes: Passes | None = None,
        lengths: Sequence[int] | None = None,
        retention: Retention | None = None,
        damping: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.lengths, self.retention, self.damping = lengths, retention, damping
        self.step: Step | None = None
        self.silent = SilentLayers()
        self.optimizer: Any = None
        super().__init__(*args, **kwargs)
        self.add_callback(Epoch())
        self._refuse_what_has_no_effect()
        base = self.accelerator.unwrap_model(self.model).base_model
        self.passes = passes or Passes.of(base, capacity=PASS_TOKENS, pad_token_id=pad_token_id)

    def _refuse_what_has_no_effect(self) -> None:
        arguments = ("torch_compile", "bf16_full_eval", "fp16_full_eval")
        own = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
        for name, holder in [*((name, self.args) for name in arguments), *((name, self) for name in own)]:
            if getattr(holder, name):
                raise ConfigError(
                    f"{name}: PrefixTrainer has its own passes and no whole logits, so it has no effect",
                    hint="transformers.Trainer with a PrefixModel takes it",
                )
        if not self.args.average_tokens_across_devices:
            raise ConfigError(
                "average_tokens_across_devices: a step's target tokens count the same in all processes",
                hint="leave it at its default, True",
            )
        base = self.accelerator.unwrap_model(self.model).base_model
        if self.args.bf16 and base.dtype == torch.float32:
            raise ConfigError(
                "bf16: the base computes in its own precision, float32, so it would have no effect",
                hint="load the base in bfloat16; the prefix is trained in float32 all the same",
            )
        if self.args.fp16:  # Trainer would divide the gradients by the scale of a loss that has none
            raise ConfigError("fp16: the prefix is trained in float32", hint="load the base in float16")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = 1 if self.passes.packing else self.args.train_batch_size
        return LengthGroupedSampler(self.lengths, size, seed=self.args.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        """The prefix's own (`Prefix.optimizer`), unless the arguments' `optim` is not their default."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            prefix = self.accelerator.unwrap_model(self.model).prefix
            rate, options["weight_decay"] = options.pop("lr"), self.args.weight_decay
            if self.args.optim == TrainingArguments.optim:  # its default: nothing was asked for
                options.pop("fused", None)
                if self.damping:
                    options["damping"] = self.damping
                self.optimizer = prefix.optimizer(rate, **options)
            elif self.damping:
                raise ConfigError(
                    f"damping: optim={self.args.optim.value} has none", hint="leave one of the two out"
                )
            else:
                self.optimizer = kind(prefix.parameter_groups(rate), **options)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise RunError(
                f"{checkpoint}: its optimizer.pt cannot be used: {error}",
                hint="a run of an earlier version cannot be resumed; --overwrite begins it anew",
            ) from error

    def _get_learning_rate(self) -> float:
        """For the log: the rate that the groups are shares of."""
        first: float = self.optimizer.param_groups[0]["lr"]
        begin = self.optimizer.param_groups[0].get("initial_lr", first)
        return self.args.learning_rate * first / begin if begin else 0.0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(self._each_row_once(epoch_iterator), num_batches, device)

    def _each_row_once(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, the last one without the rows that accelerate fills it up with, the epoch's first.

        It does so to give each process as many batches; one may be left with a batch of no row.
        """
        batches = map(_without_first_targets, batches)
        shards = self.callback_handler.train_dataloader.batch_sampler
        filled = isinstance(shards, BatchSamplerShard) and shards.even_batches and not shards.drop_last
        for batch in batches:
            if filled and shards.num_processes > 1 and self.accelerator.gradient_state.end_of_dataloader:
                size = len(batch["input_ids"])
                over = len(self.train_dataset) % (size * shards.num_processes)
                own = max(0, over - size * shards.process_index) if over else size
                read = ("input_ids", "attention_mask", "labels", "aims")
                yield {name: batch[name][:own] for name in read if name in batch}
            else:
                yield batch

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.step = None  # an attempt that ended in an exception left one, with its gradient
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch; the last one of an optimizer step ends it in the prefix."""
        model.train()
        if self.step is None:
            self.step = Step(self.accelerator.unwrap_model(model).prefix())
            self._retain(self.step)
        rows = RowTokens.of_batch(inputs)
        check_ids(self.passes.base, (ids.tolist() for row in rows for ids in (row.input_ids, row.labels)))
        total, smoothing = torch.zeros((), device=self.args.device), smoothing_of(self.args, self.state)
        plain = torch.zeros_like(total) if smoothing else None
        for group in self.passes.plan(rows):
            some = [rows[row] for row in group]
            with self.passes.loss(some, self.step.leaves, smoothing=smoothing, plain=plain) as loss:
                mean = loss / num_items_in_batch
                mean.backward()  # type: ignore[no-untyped-call]
            total += mean.detach()
        if self.accelerator.sync_gradients:
            self.silent.see(self.step, last=self.state.max_steps)
            self.step.finish(self.accelerator)
            self.step = None
        if plain is not None:
            total = plain / num_items_in_batch
        shown: torch.Tensor = total * self.accelerator.num_processes  # Trainer logs the mean over processes
        return shown

    def _retain(self, step: Step) -> None:
        """Forward and backward of this optimizer step's neutral text; each process has other texts."""
        if self.retention is None:
            return
        processes = self.accelerator.num_processes
        rows = self.retention.rows_of(self.state.global_step * processes + self.accelerator.process_index)
        tokens, total = sum(len(row.input_ids) - 1 for row in rows), 0.0
        passes = self.retention.passes
        for group in passes.plan(rows):
            with passes.loss([rows[row] for row in group], step.leaves) as divergence:
                weighted = self.retention.weight * divergence / (tokens * processes)
                weighted.backward()  # type: ignore[no-untyped-call]
            total += float(divergence.detach())
        self.retention.seen(total, tokens)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.retention is not None and "loss" in logs:
            logs = {**logs, "divergence": self.retention.mean()}
        super().log(logs, *args, **kwargs)

    def _examples(self, rows: Any) -> list[Example]:
        """Evaluation rows as training reads its own: a collator may decide what is a target."""
        collator = self.data_collator
        if collator is default_data_collator or isinstance(collator, (Collator, DataCollatorWithPadding)):
            return [as_example(row) for row in rows]
        batches = DataLoader(
            self._remove_unused_columns(rows, "evaluation") if isinstance(rows, datasets.Dataset) else rows,
            batch_size=self.args.eval_batch_size,
            collate_fn=self._get_collator_with_removed_columns(collator, "evaluation"),
        )
        return [
            Example(
                input_ids=tuple(row.input_ids.tolist()),
                labels=tuple(row.labels.tolist()),
                origin="",
                truncated=0,
                aims=row.aims,
            )
            for batch in batches
            for row in RowTokens.of_batch(batch)
        ]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(rows, Mapping):  # several sets by name, as Trainer has them
            named = {
                name: self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, one in rows.items()
            }
            return {key: value for found in named.values() for key, value in found.items()}
        model = self.accelerator.unwrap_model(self.model)
        loss, tokens = target_loss(
            model,
            self._examples(rows),
            pad_token_id=self.passes.pad_token_id,
            capacity=self.passes.capacity,
            packing=self.passes.packing,
            progress="evaluating",
        )
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_target_tokens": tokens}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _without_first_targets(batch: Any) -> Any:
    """Nothing predicts a row's first token; Trainer would count it as a target behind padding on the left."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None or labels is None:
        return batch
    rows, first = torch.arange(len(labels), device=labels.device), (mask != 0).int().argmax(dim=1)
    labels = labels.index_put((rows, first.to(labels.device)), torch.full_like(rows, IGNORED))
    return {**batch, "labels": labels}


def training_arguments(
    config: TrainConfig, output: Path, resolved: Mapping[str, Any], *, evaluates: bool
) -> Any:
    """TrainingArguments of a run; `resolved` has what its defaults came to."""
    same = {
        name: getattr(config, name)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "lr_scheduler_type",
            "weight_decay",
            "max_grad_norm",
            "label_smoothing_factor",
            "logging_steps",
            "save_total_limit",
            "seed",
        )
    }
    same["logging_steps"] = min(config.logging_steps, resolved["steps"])  # a short run tells its loss too
    if config.gradient_checkpointing:
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        # renamed within transformers 5
        same[
            "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        ] = True
    args = TrainingArguments(
        **same,
        output_dir=str(output),
        learning_rate=resolved["learning_rate"],
        num_train_epochs=resolved.get("epochs", 1.0),  # a run of an earlier version: the default was 1
        max_steps=config.max_steps or -1,
        warmup_steps=warmup_steps_for(config.warmup_ratio, resolved["steps"]),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=resolved["eval_steps"] if evaluates else None,
        save_strategy="steps",
        save_steps=resolved["save_steps"],
        report_to=_report_to(config.report_to),
        logging_nan_inf_filter=False,  # it shows a loss of 0 where there is none
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return on_one_device(args)


def on_one_device(args: TrainingArguments) -> TrainingArguments:
    """Let Trainer take one GPU where it sees several: by itself it would split each batch between them
    (torch's DataParallel), and count rows and steps by that."""
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def _report_to(asked: str | None) -> list[str] | str:
    installed = importlib.util.find_spec("tensorboard") is not None
    if asked is None:
        return ["tensorboard"] if installed else "none"
    names = [name.strip() for name in asked.split(",")]
    if ("none" in names and len(names) > 1) or "" in names:
        raise ConfigError(f"report_to: expected none, or names with commas between them; got {asked!r}")
    if "tensorboard" in names and not installed:
        raise MissingExtraError(
            "report_to=tensorboard: TensorBoard is not installed",
            hint="pip install 'prefixtune[tensorboard]'",
        )
    return "none" if names == ["none"] else names


def run(trainer: PrefixTrainer, output: Path, *, steps: int, checkpoint: Path | None) -> float:
    """Train to the end, in seconds of the whole run; Ctrl-C finishes the step and writes a checkpoint.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C.
    """
    trainer.remove_callback(PrinterCallback)
    kept = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if kept:
        note(f"resuming from {checkpoint}")
    if trainer.is_world_process_zero():
        cut_metrics(output, kept.global_step if kept else 0)
        if checkpoint:
            restore_best(output, checkpoint)
    trainer.accelerator.wait_for_everyone()  # what the first one restores is read by all
    stop = threading.Event()
    clock = Clock(checkpoint)
    trainer.add_callback(Metrics(output))
    if kept and kept.global_step >= steps:  # killed after its last step: Trainer would take one more
        trainer._load_from_checkpoint(str(checkpoint))
        kept.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state = kept
        return clock.seconds
    with progress_bar("training", total=steps) as advance, _interruptible(stop):
        trainer.add_callback(clock)
        trainer.add_callback(Progress(advance, stop, trainer.accelerator))
        trainer.add_callback(LogWindow(trainer, kept.stateful_callbacks if kept else {}))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.is_set() and trainer.state.global_step < steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; go on with --resume")
    return clock.seconds


@contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sets `stop`, the second interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)  # the second is what docker stop and SLURM send
    before = {number: signal.getsignal(number) for number in signals}

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    for number in signals:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, before[number])
