"""Predicts how much memory a run takes, and compares it with what the run took.

Reading order: `tracker` (counts live bytes without weights), `step` (one training step under it), `estimate`
(a prediction, and what would lower it), `host` (what the machine has). Knows no data and no files.
"""

from prefixtune.memory.estimate import Advice, Estimate, check_fit, estimate, readable, reading_bytes
from prefixtune.memory.host import (
    budget,
    explain_full_memory,
    forget_peak,
    give_back_freed,
    keep_few_kernels,
    measured_peak,
    resident,
    return_freed_memory,
    take_workspaces,
)
from prefixtune.memory.step import (
    Setup,
    StepBytes,
    measure_step,
    pass_tokens,
    training_step,
    without_weights,
)
from prefixtune.memory.tracker import LiveBytes

__all__ = [
    "Advice",
    "Estimate",
    "LiveBytes",
    "Setup",
    "StepBytes",
    "budget",
    "check_fit",
    "estimate",
    "explain_full_memory",
    "forget_peak",
    "give_back_freed",
    "keep_few_kernels",
    "measure_step",
    "measured_peak",
    "pass_tokens",
    "readable",
    "reading_bytes",
    "resident",
    "return_freed_memory",
    "take_workspaces",
    "training_step",
    "without_weights",
]
