"""Finds a learning rate for a run by a range test: one short run in which the rate rises from step to step.

Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, set_seed

from prefixtune.config import PrefixConfig, TrainConfig
from prefixtune.data import Example
from prefixtune.load import LoadedBase
from prefixtune.loss import RowTokens
from prefixtune.model import PrefixModel
from prefixtune.progress import note, progress_bar
from prefixtune.train.build import make_trainer
from prefixtune.train.trainer import PrefixTrainer

__all__ = ["RangeTest", "find_learning_rate"]

STEPS = 48
BELOW, ABOVE = 1 / 30, 10.0  # the rates that are tried, as multiples of the default
SMOOTHED = 0.8  # weight of what came before in the running mean of the gains
MOST = 0.8  # of the largest gain
DIVERGED = 1.0  # nats above the lowest running mean: the test ends
# of the steps, and of the largest gain: a smaller rise of the mean at the end may be one batch's
LAST, NEAR = 1 / 12, 0.05
END, FELL = 1 / 4, 0.15  # of the steps, and of that gain: a smaller fall in so many steps at the end is noise


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What a range test saw.

    Attributes:
        rates: the learning rate of each step.
        gains: nats per target token before each step, beyond what the run's start has on the same rows: so
            how hard the rows are does not show. Less than 0 is learnt.
        smoothed: their running mean, corrected for its start.
        suggested: the middle, of logarithms, between the first rate at which most is learnt and the one with
            the lowest mean. In between the curve is flat, and its lowest point is chance.
    """

    rates: tuple[float, ...]
    gains: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested: float

    @property
    def still_falling(self) -> bool:
        """Whether the mean is lowest in the last steps, ends near that and came from above: a higher rate may
        be better."""
        place, steps = _lowest(self.smoothed), len(self.smoothed)
        lowest, gain = self.smoothed[place], abs(self.smoothed[place])
        before = self.smoothed[steps - 1 - round(END * steps)]
        last = place >= steps - max(1, round(LAST * steps))
        return last and self.smoothed[-1] <= lowest + NEAR * gain and before >= lowest + FELL * gain

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def find_learning_rate(
    base: LoadedBase,
    examples: list[Example],
    *,
    prefix: PrefixConfig,
    config: TrainConfig,
    resolved: Mapping[str, Any],
) -> RangeTest:
    """Train from the run's start for a few steps, at a rate that rises from step to step.

    Args:
        prefix: the start of the run, which the test begins from too.
        config: the run's options. The test trains without neutral text.
        resolved: what the run's defaults came to; its learning rate is the middle of those tried.
    """
    set_seed(config.seed)
    model = PrefixModel(base.model, prefix, tokenizer=base.tokenizer)
    middle = resolved["learning_rate"]
    rates = [middle * BELOW * (ABOVE / BELOW) ** (step / (STEPS - 1)) for step in range(STEPS)]
    short = dataclasses.replace(config, max_steps=STEPS, logging_steps=1, report_to="none")
    plan = {**resolved, "learning_rate": 1.0, "steps": STEPS, "save_steps": STEPS + 1}
    gains: list[float] = []
    kind = partial(_Rising, gains=gains)
    with tempfile.TemporaryDirectory() as scratch, progress_bar("learning rates", total=STEPS) as advance:
        trainer = make_trainer(
            model, short, plan, Path(scratch), rows=(examples, None), tokenizer=base.tokenizer, kind=kind
        )
        trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), lambda step: rates[min(step, STEPS - 1)])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(gains, advance))
        trainer.train()
    found = read(rates, gains)
    note(f"range test of {len(found.gains)} steps: learning rate {found.suggested:.2g}")
    if found.still_falling:
        note(
            f"the loss was still falling at the highest rate, {found.rates[-1]:.2g}: the range has found no "
            "optimum, which may lie higher"
        )
    return found


def read(rates: Sequence[float], gains: Sequence[float]) -> RangeTest:
    """A range test from the gain before each step; there may be fewer gains than rates."""
    smoothed, mean = [], 0.0
    for count, gain in enumerate(gains, start=1):
        mean = SMOOTHED * mean + (1 - SMOOTHED) * gain
        smoothed.append(mean / (1 - SMOOTHED**count))
    lowest = _lowest(smoothed)
    enough = next(
        step for step, gain in enumerate(smoothed) if gain <= MOST * smoothed[lowest] or step == lowest
    )
    return RangeTest(
        rates=tuple(rates[: len(gains)]),
        gains=tuple(gains),
        smoothed=tuple(smoothed),
        suggested=float(f"{math.sqrt(rates[enough] * rates[lowest]):.2g}"),
    )


def _lowest(means: Sequence[float]) -> int:
    return min(range(len(means)), key=means.__getitem__)


class _Rising(PrefixTrainer):
    """Notes in `gains` what the rows of each step have beyond their loss with the prefix at the start."""

    def __init__(self, *args: Any, gains: list[float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self.start = [(key.detach().clone(), value.detach().clone()) for key, value in model.prefix()]
        self.gains, self.gain = gains, 0.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rows = RowTokens.of_batch(inputs)
        at_start = 0.0
        with torch.no_grad():
            for group in self.passes.plan(rows):
                with self.passes.loss([rows[row] for row in group], self.start) as loss:
                    at_start += float(loss)
        found = super().training_step(model, inputs, num_items_in_batch)
        self.gain += float(found) - at_start / float(num_items_in_batch) * self.accelerator.num_processes
        if self.accelerator.sync_gradients:
            self.gains.append(self.gain)
            self.gain = 0.0
        return found


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, and ends the test when the training has diverged."""

    def __init__(self, gains: Sequence[float], advance: Any) -> None:
        self.gains, self.advance = gains, advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)
        smoothed = read(self.gains, self.gains).smoothed
        if not math.isfinite(smoothed[-1]) or smoothed[-1] > min(smoothed) + DIVERGED:
            control.should_training_stop = True
