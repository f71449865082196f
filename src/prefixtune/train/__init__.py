"""Trains a prefix with transformers' Trainer, in a folder that can be resumed at any time.

Reading order: `session` (from options to a finished run), `build` (its trainer alone), `trainer` (Trainer,
its arguments, what happens at a step), `folder` (what is on disk). Knows data and models by name only.
"""

from prefixtune.train.build import planned_steps, trainer_for
from prefixtune.train.session import TrainResult, default_learning_rate, train
from prefixtune.train.trainer import PrefixTrainer

__all__ = ["PrefixTrainer", "TrainResult", "default_learning_rate", "planned_steps", "train", "trainer_for"]
