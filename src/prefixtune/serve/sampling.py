"""Chooses the next token of each row, as its request asks. Knows no model and no text.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Choice", "Chooser", "Sampling", "choose"]

COLDEST = 1e-5  # below it logits divided by the temperature may be no numbers
FIRST_TRY = 256  # most probable tokens that are looked at before all V are sorted for top_p


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What one answer asks of the choice of its tokens.

    Attributes:
        temperature: 0, or less than 1e-5 as on vLLM, takes the most probable token.
        top_p: sample from the most probable tokens that share this much probability.
        seed: makes the answer repeatable, whatever else is in the batch; None draws one.
        presence_penalty: subtracted from the logits of tokens that the answer has already.
        frequency_penalty: subtracted as often as the answer has the token.
        logprobs: how many alternatives are told at each token; None tells no probabilities at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the highest logit is the answer and nothing else is asked for."""
        return self.is_greedy and self.logprobs is None and not self.has_penalties

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own: before penalties and temperature.

    Attributes:
        logprob: of the token; None unless asked for.
        top: the most probable tokens with theirs, as (token, logprob), as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Chooser:
    """What one answer's choices depend on: its settings, its own random numbers, and its tokens so far."""

    sampling: Sampling
    generator: torch.Generator = field(init=False)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)

    def choose(self, logits: Tensor) -> Choice:
        """The next token by logits [V]."""
        asked = self.sampling
        scores = self._penalised(logits) if asked.has_penalties and self.counts else logits
        token = int(scores.argmax()) if asked.is_greedy else self._sample(scores)
        if asked.has_penalties:
            self.counts[token] += 1
        if asked.logprobs is None:
            return Choice(token=token)
        logprobs = logits.log_softmax(dim=-1)
        values, tokens = logprobs.topk(min(asked.logprobs, len(logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Choice(token=token, logprob=float(logprobs[token]), top=top)

    def _penalised(self, logits: Tensor) -> Tensor:
        tokens = torch.tensor(list(self.counts), device=logits.device)
        times = torch.tensor(list(self.counts.values()), device=logits.device, dtype=logits.dtype)
        asked = self.sampling
        scores = logits.clone()
        scores[tokens] -= asked.presence_penalty + asked.frequency_penalty * times
        return scores

    def _sample(self, scores: Tensor) -> int:
        # by one number per token and the cumulated probability: nothing that other rows could use up
        draw = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        probabilities = (scores / self.sampling.temperature).softmax(dim=-1)
        order: Tensor | None = None
        if self.sampling.top_p < 1:
            probabilities, order = _likeliest(probabilities, self.sampling.top_p)
        total = probabilities.double().cumsum(dim=-1)
        index = int(torch.searchsorted(total, total[-1:] * draw, right=True)[0])
        index = min(index, len(total) - 1)
        return index if order is None else int(order[index])


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | None]:
    """The next token of each row by logits [B, V]; None for a row whose logits are no numbers."""
    logits = logits.float()
    fine = logits.isfinite().any(dim=-1).tolist()
    plain = logits.argmax(dim=-1).tolist()
    highest = logits.amax(dim=-1).isnan().tolist()
    return [
        None
        if nan or not finite
        else Choice(token=token)
        if chooser.sampling.is_plain
        else chooser.choose(row)
        for row, token, nan, finite, chooser in zip(logits, plain, highest, fine, choosers, strict=True)
    ]


def _likeliest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The fewest most probable tokens that have this share (Holtzman et al. 2020), and which they are."""
    for count in (FIRST_TRY, len(probabilities)):
        values, order = probabilities.topk(min(count, len(probabilities)))
        before = values.cumsum(dim=-1) - values
        if bool(before[-1] >= share) or count >= len(probabilities):
            break
    kept = before < share
    kept[0] = True
    return values[kept], order[kept]
