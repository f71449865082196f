"""What the engine is asked, and what it tells. Knows no model and no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefixtune.errors import PrefixTuneError
from prefixtune.prefix import PrefixKV
from prefixtune.serve.sampling import Choice, Sampling

__all__ = ["Job", "OverloadedError", "Step"]


class OverloadedError(PrefixTuneError):
    """The queue is full, or nothing new is taken; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int, closing: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.closing = retry_after, closing


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happened to one answer of a job: a token, or its end, or, to the whole job, a failure.

    Attributes:
        answer: which of the job's answers, from 0.
        choice: the new token; never an end token.
        ended: "stop" or "length", or None while it goes on.
        failure: why there will be no more: "timeout", "shutdown", "broken" (the model failed).
    """

    answer: int = 0
    choice: Choice | None = None
    ended: str | None = None
    failure: str | None = None


@dataclass(eq=False, kw_only=True)
class Job:
    """One request: a prompt behind a prefix, and as many answers as there are samplings.

    Attributes:
        ids: the prompt; not empty.
        prefix: in the engine's precision; None for the bare base.
        ends: tokens that end an answer.
        deadline: by time.monotonic().
        listener: called from the engine's thread with each step; True ends that answer (a stop string). It
            must not block.
    """

    ids: Sequence[int]
    prefix: PrefixKV | None
    samplings: Sequence[Sampling]
    max_tokens: int
    ends: frozenset[int]
    deadline: float
    listener: Callable[[Step], bool]
    cancelled: bool = False
    over: bool = False
    arrived: float = field(default_factory=time.monotonic)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that this can become."""
        return (self.prefix.length if self.prefix else 0) + len(self.ids) + self.max_tokens

    def tell(self, step: Step) -> bool:
        """Whether the answer is over for its listener; one that fails loses its job, not the engine."""
        try:
            return self.listener(step)
        except Exception:  # of whatever stands behind the engine; told on stderr, without the prompt
            logging.getLogger(__name__).exception("a listener failed, and its job is dropped")
            self.cancelled = True
            return True
