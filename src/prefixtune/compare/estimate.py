"""How long a comparison will take: a guess from the speed of the model, corrected by the cells that ran."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from prefixtune.compare.plan import Cell, Plan
from prefixtune.compare.rows import Rows
from prefixtune.config import TrainConfig
from prefixtune.train import planned_epochs

__all__ = ["Forecast", "spelled"]

START_SECONDS = 12.0  # interpreter, imports, loading a small model
BATCH = 16  # answers at a time, as in `cell`
CHARACTERS = 3.5  # of a token of an answer; the longest of a batch counts, and most are shorter
# passes forward that a token of training costs, with the backward pass: more where weights have gradients
COST = {"full": 4.5, "lora": 3.5}


@dataclass
class Forecast:
    """Seconds of cells; `learn` tells what one of a method took."""

    plan: Plan
    rows: Rows
    taken: dict[tuple[str, int | None], list[float]] = field(default_factory=dict)
    guessed: float = 0.0  # of the cells that ran, all together

    def learn(self, cell: Cell, seconds: float) -> None:
        self.taken.setdefault((cell.method.name, cell.rows), []).append(seconds)
        self.guessed += self._guess(cell)

    def total(self, cells: Iterable[Cell]) -> float:
        return sum(self.of(cell) for cell in cells)

    def of(self, cell: Cell) -> float:
        """As long as the cells of its kind took; else a guess, by how far the guesses were wrong so far."""
        own = self.taken.get((cell.method.name, cell.rows))
        if own:
            return statistics.fmean(own)
        error = sum(map(sum, self.taken.values())) / self.guessed if self.guessed else 1.0
        return self._guess(cell) * error

    def _guess(self, cell: Cell) -> float:
        about, config = self.rows.about, self.plan.config
        measured = [*self.rows.eval, *self.rows.neutral]
        tokens = float(sum(len(example.input_ids) for example in measured))
        if cell.method.trains:
            examples = self.rows.first(cell.rows)
            shared = TrainConfig(**config.schedule)
            passes = planned_epochs(shared, [example.target_tokens for example in examples])
            if shared.max_steps:
                passes = shared.max_steps * shared.per_device_train_batch_size / len(examples)
            trained = sum(len(example.input_ids) for example in examples)
            tokens += COST.get(cell.method.of, 2.5) * passes * trained
        seconds = START_SECONDS + tokens / about["tokens_per_second"]
        if config.metrics:
            seconds += self._answering()
        return float(seconds)

    def _answering(self) -> float:
        a_token = self.rows.about["seconds_per_new_token"] or 0.1
        longest = max(len(text) for question in self.rows.questions for text in question.references)
        new = self.plan.config.max_new_tokens or longest / CHARACTERS
        return float(a_token * new * -(-len(self.rows.questions) // BATCH))


def spelled(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
