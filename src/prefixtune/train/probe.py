"""Times a few real steps, to say how long a thousand rows take. Knows no disk."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from prefixtune.config import PrefixConfig, TrainConfig
from prefixtune.load import load_base
from prefixtune.memory import Setup
from prefixtune.memory.step import training_step
from prefixtune.model import PrefixModel
from prefixtune.prefix import Prefix
from prefixtune.train.build import quicken
from prefixtune.train.retention import PER_STEP, TOKENS

__all__ = ["seconds_per_1000_rows"]

WARM_UP, STEPS = 1, 3  # the first step pays for memory pages and kernels


def seconds_per_1000_rows(model: str, setup: Setup, config: TrainConfig) -> float:
    """Load the model, run a few passes of made-up tokens of the setup's shape, and take the fastest.

    The neutral text of each optimizer step counts (`config.retain`); sampling it at a run's start does not.
    """
    dtype = str(setup.dtype).removeprefix("torch.")
    base = load_base(model, dtype=dtype, device=setup.device, quantize=setup.quantize).model
    trained = PrefixModel(base, PrefixConfig(length=setup.prefix.length))
    trained.prefix = Prefix(setup.prefix, trained.geometry, trained.prefix.bake())
    trained.train()
    quicken(base, config, packing=setup.packing, compiled=config.compile)
    if setup.checkpointing:
        trained.gradient_checkpointing_enable()
    optimizer = trained.prefix.optimizer(0.0)
    once = replace(setup, passes=1, neutral_lengths=())
    taken = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        training_step(trained, once)
        optimizer.step()
        optimizer.zero_grad()
        if setup.device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps  # of an optimizer step
    neutral = PER_STEP * TOKENS / rows if config.retain else 0.0
    return 1000 * (setup.row_tokens + neutral) * min(taken[WARM_UP:]) / sum(setup.lengths)
