"""What has been summed up for the next logged numbers, over an interruption. Knows no rows and no model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["LogWindow"]


class LogWindow(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the steps since the last log in the checkpoints: a resumed run logs what a whole one does.

    To be added after the callbacks that ask for checkpoints.

    Args:
        kept: the callbacks' states in the checkpoint that `trainer` goes on from.
    """

    def __init__(self, trainer: Any, kept: dict[str, Any]) -> None:
        self.trainer = trainer
        # an earlier version kept none
        self.window: dict[str, Any] = kept.get(LogWindow.__name__, {}).get("attributes", {})

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": self.window}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.stateful_callbacks.setdefault(LogWindow.__name__, self.state())
        if self.window:
            self.trainer._tr_loss += self.window["loss"]
            self.trainer._total_loss_scalar -= self.window["loss"]  # the mean over the steps from here on
            self.trainer._globalstep_last_logged = self.window["logged"]
            if self.trainer.retention is not None:
                self.trainer.retention.totals = list(self.window["divergence"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            loss = self.trainer.accelerator.gather(self.trainer._tr_loss).mean()  # one process writes for all
            retention = self.trainer.retention
            self.window = {
                "loss": float(loss),
                "logged": self.trainer._globalstep_last_logged,
                "divergence": list(retention.totals) if retention is not None else [],
            }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):  # comes before the checkpoint of the same step
            self.window = {"loss": 0.0, "logged": state.global_step, "divergence": []}
