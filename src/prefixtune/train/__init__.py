"""Trains a prefix with transformers' Trainer, in a folder that can be resumed at any time.

Reading order: `session` (from options to a finished run), `defaults` (what options leave open), `build` (its
trainer), `trainer` (Trainer, its arguments, what happens at a step), `callbacks` (beside it), `sampler` (the
order of the rows), `clock` and `window` (what goes on in a resumed run), `folder` (what is on disk),
`processes` (who does what where there are several).
Knows data and models by name only.
"""

from prefixtune.train.build import trainer_for
from prefixtune.train.defaults import (
    AUTO,
    LONGEST_LENGTH,
    default_learning_rate,
    default_length,
    default_start,
    planned_epochs,
    planned_steps,
    prefix_config_of,
    telling_rows,
    warmup_steps_for,
)
from prefixtune.train.processes import is_first, leave, one_process_only
from prefixtune.train.session import TrainResult, train, train_examples
from prefixtune.train.trainer import PrefixTrainer

__all__ = [
    "AUTO",
    "LONGEST_LENGTH",
    "PrefixTrainer",
    "TrainResult",
    "default_learning_rate",
    "default_length",
    "default_start",
    "is_first",
    "leave",
    "one_process_only",
    "planned_epochs",
    "planned_steps",
    "prefix_config_of",
    "telling_rows",
    "train",
    "train_examples",
    "trainer_for",
    "warmup_steps_for",
]
