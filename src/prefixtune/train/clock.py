"""How long a run has trained, over all of its interruptions. Knows no rows and no model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["Clock"]


class Clock(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the seconds of a run in its checkpoints, and goes on from those of `checkpoint`."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.start = time.perf_counter() - (_seconds(checkpoint) if checkpoint else 0.0)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a resumed Trainer takes these from the checkpoint, where an earlier version kept none
        state.stateful_callbacks.setdefault(Clock.__name__, self.state())


def _seconds(checkpoint: Path) -> float:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    kept = state.get("stateful_callbacks", {}).get(Clock.__name__)  # an earlier version kept none
    return float(kept["attributes"]["seconds"]) if kept else 0.0
