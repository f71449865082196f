"""What a run does beside its steps: the best prefix, the log, the bar and Ctrl-C, the sampler's epoch."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from prefixtune.progress import note
from prefixtune.storage import write_folder
from prefixtune.train.folder import METRICS

__all__ = ["BEST", "Epoch", "KeepBest", "Metrics", "Progress", "restore_best"]

BEST = "best"


class Epoch(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch: neither Trainer nor accelerate reaches it where several processes resume
    in the middle of one."""

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Keeps the prefix with the lowest evaluation loss in best/; the checkpoints have it and its step too."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if (
            loss is None
            or not math.isfinite(loss)
            or (state.best_metric is not None and loss >= state.best_metric)
        ):
            return
        state.best_metric, state.best_global_step = loss, state.global_step
        if state.is_world_process_zero:
            model.save_pretrained(self.output / BEST)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and state.best_metric is not None and (self.output / BEST).is_dir():
            _copy(self.output / BEST, self.output / f"checkpoint-{state.global_step}" / BEST)


def restore_best(output: Path, checkpoint: Path) -> None:
    """Bring the best prefix back to what it was at a checkpoint: a run that was killed may have gone further.

    A checkpoint without one is the last thing that its run did, or has had no evaluation.
    """
    if (checkpoint / BEST).is_dir():
        _copy(checkpoint / BEST, output / BEST)


def _copy(folder: Path, target: Path) -> None:
    with write_folder(target) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Appends every logged number to metrics.jsonl, where a killed run may have put its last evaluation."""

    def __init__(self, output: Path) -> None:
        self.file = output / METRICS
        self.there = set(self.file.read_text(encoding="utf-8").split("\n")) if self.file.is_file() else set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        numbers = {name: _or_null(value) for name, value in (logs or {}).items()}
        line = json.dumps({"step": state.global_step, **numbers}, allow_nan=False)
        if line not in self.there:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _or_null(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, and turns a Ctrl-C into a checkpoint and an orderly end."""

    def __init__(self, advance: Any, stop: threading.Event, accelerator: Any) -> None:
        self.advance, self.stop, self.accelerator, self.last = advance, stop, accelerator, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step)
        self.last = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps  # the last steps too
        self.advance(state.global_step - self.last)
        self.last = state.global_step
        if self.accelerator.num_processes > 1:  # all stop after one step, whichever saw the signal
            if self.stop.is_set():
                self.accelerator.set_trigger()
            if self.accelerator.check_trigger():
                self.stop.set()
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {"loss": "loss", "eval_loss": "evaluation loss"}
        for name in shown.keys() & (logs or {}).keys():
            note(f"step {state.global_step}: {shown[name]} {float(logs[name]):.4f}")
