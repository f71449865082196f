"""One request while it runs: from the engine's thread to the event loop, as text. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.prefix import PrefixKV
from prefixtune.serve.answers import Piece, TokenChance
from prefixtune.serve.engine import Engine
from prefixtune.serve.job import Job, Step
from prefixtune.serve.metrics import Metrics
from prefixtune.serve.sampling import Sampling
from prefixtune.serve.spelling import Speller
from prefixtune.serve.text import Writer

__all__ = ["Asked", "Running"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that was found good.

    Attributes:
        prompts: token ids of each.
        prefix: None for the bare base.
        samplings: one per answer to each prompt.
        ends: tokens that end an answer.
        timeout: seconds.
    """

    prompts: Sequence[Sequence[int]]
    prefix: PrefixKV | None
    samplings: Sequence[Sampling]
    max_tokens: int
    ends: frozenset[int]
    stops: Sequence[str]
    timeout: float

    @property
    def answers(self) -> int:
        return len(self.prompts) * len(self.samplings)


@dataclass(eq=False)
class _Growing:
    """An answer as the engine's thread sees it."""

    writer: Writer
    last: float = 0.0
    is_begun: bool = False  # whether a token has come that adds text


class Running:
    """The jobs of one request. Iterate over it for what is new; `cancel` it when nobody listens any more.

    Raises:
        OverloadedError: the engine takes nothing now.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, metrics: Metrics, asked: Asked, *, speller: Speller
    ) -> None:
        self._engine, self._metrics, self.asked, self._speller = engine, metrics, asked, speller
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._open = asked.answers
        self._growing = [_Growing(Writer(tokenizer, asked.stops)) for _ in range(asked.answers)]
        self.arrived = time.monotonic()
        self.first: float | None = None  # seconds to the first token
        self.made = 0
        self._jobs = [self._job(number, ids) for number, ids in enumerate(asked.prompts)]
        engine.submit(*self._jobs)

    def cancel(self) -> None:
        for job in self._jobs:
            self._engine.cancel(job)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self._open:
            piece = await self._pieces.get()
            self._open -= piece.ended is not None
            self.made += len(piece.tokens)
            yield piece
            if piece.failure is not None:
                return

    def _job(self, number: int, ids: Sequence[int]) -> Job:
        first = number * len(self.asked.samplings)
        return Job(
            ids=ids,
            prefix=self.asked.prefix,
            samplings=self.asked.samplings,
            max_tokens=self.asked.max_tokens,
            ends=self.asked.ends,
            deadline=self.arrived + self.asked.timeout,
            listener=lambda step: self._hear(first + step.answer, step),
        )

    # --- in the engine's thread

    def _hear(self, index: int, step: Step) -> bool:
        try:
            return self._read(index, step)
        except Exception:  # of the tokenizer: the client must hear of it, or it waits for ever
            logging.getLogger(__name__).exception("an answer has no text, and its request is ended")
            return self._put(Piece(index=index, failure="unreadable", ended="error"))

    def _read(self, index: int, step: Step) -> bool:
        if step.failure is not None:
            return self._put(Piece(index=index, failure=step.failure, ended="error"))
        answer = self._growing[index]
        if step.choice is None:
            text = answer.writer.finish()  # in which a stop string may come to its end
            ended = "stop" if answer.writer.stopped else step.ended
            return self._put(Piece(index=index, text=text, ended=ended))
        choice = step.choice
        self._measure(answer)
        start = answer.writer.length
        text = answer.writer.add(choice.token)
        chances: tuple[TokenChance, ...] = ()
        if choice.logprob is not None:
            chances = (self._chance(answer, choice.token, choice.logprob, choice.top, start),)
        ended = "stop" if answer.writer.stopped else None
        self._put(Piece(index=index, text=text, tokens=(choice.token,), chances=chances, ended=ended))
        return answer.writer.stopped

    def _put(self, piece: Piece) -> bool:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        return piece.ended is not None

    def _measure(self, answer: _Growing) -> None:
        now = time.monotonic()
        self._metrics.generated_tokens.inc()
        if self.first is None:
            self.first = now - self.arrived
            self._metrics.first_token.observe(self.first)
        if answer.last:
            self._metrics.next_token.observe(now - answer.last)
        answer.last = now

    def _chance(
        self, answer: _Growing, token: int, logprob: float, top: Sequence[tuple[int, float]], start: int
    ) -> TokenChance:
        is_first = not answer.is_begun
        answer.is_begun |= self._speller.adds_text(token)
        spelled = self._speller.spell(token, is_first=is_first)
        return TokenChance(
            token=spelled,
            logprob=logprob,
            top=tuple((self._speller.spell(other, is_first=is_first), chance) for other, chance in top),
            # after a part of a character that never came to its end, the text grew by more than this token
            offset=max(start, answer.writer.length - len(spelled.text)),
        )
