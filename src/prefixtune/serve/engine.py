"""Schedules rows of token ids: one batch of different prefixes and none. Knows no text, no HTTP, no disk.

A thread owns the model. Each pass takes the next token of every row and the next tokens of waiting prompts, a
long one in pieces, each in its turn, so that it holds up neither the rows that answer nor a short one behind
it. Between two passes rows join and leave.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attachment import empty_rows
from prefixtune.geometry import quiet_eval
from prefixtune.serve.job import Job, OverloadedError, Step
from prefixtune.serve.passes import Padded, Passes, Prompt, Result
from prefixtune.serve.sampling import Choice, Chooser, choose

__all__ = ["Engine"]

NORMAL, LENGTH, CUT = "stop", "length", "cut"  # an answer's end: its end token, its limit, by its listener


@dataclass(eq=False, kw_only=True)
class _Reading(Prompt):
    """A job whose prompt is being read."""

    job: Job


@dataclass(eq=False)
class _Row:
    """One answer in the batch; `token` is the one that the next pass reads."""

    job: Job
    answer: int
    chooser: Chooser
    token: int
    made: int = 1


class Engine:
    """Continuous batching of one base model with prefixes.

    Args:
        base: a causal language model of transformers; nobody else may run it meanwhile.
        passes: how tokens go through the base; the way of every architecture unless told.
        rows: answers at once.
        queue: jobs that wait; more are refused.
        cached_tokens: columns times rows that the batch may come to, which bounds its memory.
        chunk: prompt tokens that are read beside one token of each row; what suits the passes by default.
        vocabulary: only the tokens below it are chosen; None: any that the model has logits for.
        observe: called after each pass with the rows in the batch.
        report: called with what went wrong in the model or in the engine itself.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly.
    """

    def __init__(
        self,
        base: Any,
        *,
        passes: Passes | None = None,
        rows: int = 32,
        queue: int = 256,
        cached_tokens: int = 65_536,
        chunk: int | None = None,
        vocabulary: int | None = None,
        observe: Callable[[int], None] = lambda rows: None,
        report: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._base, self._passes = base, passes or Padded(base)
        self.rows, self.queue, self.cached_tokens = rows, queue, cached_tokens
        self._chunk, self._vocabulary = chunk or self._passes.chunk, vocabulary
        self._observe, self._report = observe, report
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: deque[_Reading] = deque()
        self._batch: list[_Row] = []
        self._cache = empty_rows(base)
        self._closing_at: float | None = None
        self._pace = 1.0  # seconds between two jobs that end, smoothed: for Retry-After
        self._last_end = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="prefixtune-engine", daemon=True)

    # --- from any thread

    def start(self) -> None:
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all of them or none; their listeners get the rest.

        Raises:
            OverloadedError: the queue is full, or the engine is closing.
        """
        with self._wake:
            if self._closing_at is not None:
                raise OverloadedError("the server is shutting down", retry_after=10, closing=True)
            if self._waiting and len(self._waiting) + len(jobs) > self.queue:  # what is alone never waits on
                wait = min(60, max(1, round(self._pace * (len(self._waiting) + 1))))
                raise OverloadedError(
                    f"the queue is full: {self.queue} requests are waiting", retry_after=wait
                )
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job, wherever it is; its rows are free before the next pass."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def close(self, seconds: float) -> None:
        """Take nothing new; what runs may go on for so long and is then ended with "shutdown"."""
        with self._wake:
            at = time.monotonic() + seconds
            self._closing_at = at if self._closing_at is None else min(at, self._closing_at)
            self._wake.notify()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        return self._closing_at is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Rows that answer, and prompts that are being read."""
        return len(self._batch) + len(self._reading)

    # --- the engine's thread

    def _loop(self) -> None:
        with quiet_eval(self._base):
            while True:
                with self._wake:
                    while not (self._waiting or self._reading or self._batch or self._closing_at):
                        self._wake.wait()
                    idle = not (self._waiting or self._reading or self._batch)
                if idle:
                    return  # closing, and nothing is left
                try:
                    self._sweep()
                    self._admit()
                    self._pass()
                except Exception as error:  # a mistake of ours must not end the thread in silence
                    self._give_up(error)

    def _sweep(self) -> None:
        """Take out what was cancelled, or is too late."""
        now = time.monotonic()
        closed = self._closing_at is not None and now >= self._closing_at

        def gone(job: Job) -> bool:
            if not (job.cancelled or job.over) and (closed or now >= job.deadline):
                self._fail(job, "shutdown" if closed else "timeout")
            return job.cancelled or job.over

        with self._wake:
            waiting = list(self._waiting)
        left = {id(job) for job in waiting if gone(job)}
        if left:
            with self._wake:
                self._waiting = deque(job for job in self._waiting if id(job) not in left)
        self._reading = deque(reading for reading in self._reading if not gone(reading.job))
        for index in reversed(range(len(self._batch))):
            if gone(self._batch[index].job):
                self._leave(index)

    def _admit(self) -> None:
        """Begin to read waiting prompts, in order, while there are rows and memory for their answers."""
        while True:
            with self._wake:
                job = self._waiting[0] if self._waiting else None
                if job is None or not self._has_room(job):
                    return
                self._waiting.popleft()
            self._reading.append(_Reading(job=job, ids=job.ids, prefix=job.prefix))

    def _has_room(self, job: Job) -> bool:
        jobs = {id(row.job): row.job for row in self._batch}
        reading = [reading.job for reading in self._reading]
        rows = len(self._batch) + sum(len(other.samplings) for other in reading) + len(job.samplings)
        if rows == len(job.samplings):
            return True  # alone, it was checked on arrival
        longest = max(other.longest for other in (*jobs.values(), *reading, job))
        return rows <= self.rows and rows * longest <= self.cached_tokens

    def _next_prompts(self) -> list[_Reading]:
        """Those that the next pass reads, `chunk` tokens of them at most, in order of their turns."""
        budget, taken = self._chunk, list[_Reading]()
        for reading in self._reading:
            if not budget:
                break
            reading.next = min(reading.left, budget)
            budget -= reading.next
            taken.append(reading)
        return taken

    def _pass(self) -> None:
        """Each row's next token, and the next tokens of prompts."""
        prompts, tokens = self._next_prompts(), [row.token for row in self._batch]
        if not (prompts or tokens):
            return
        rows, found = self._passes(self._cache, tokens, prompts)
        self._continue(rows)
        for reading, result in zip(prompts, found, strict=True):
            if result is None:  # one that had a pass to itself lets the others go first
                self._reading.rotate(-1 if reading.next == self._chunk else 0)
                continue
            if isinstance(result, Exception):
                self._fail(reading.job, "broken", result)
            else:
                self._begin(reading, result)
            self._reading.popleft()

    def _begin(self, reading: _Reading, logits: torch.Tensor) -> None:
        """The prompt is read: its answers join the batch, each from the same logits [V]."""
        assert reading.rows is not None
        job = reading.job
        for answer, sampling in enumerate(job.samplings):
            chooser = Chooser(sampling)
            choice = choose(logits[None, : self._vocabulary], [chooser])[0]
            row = _Row(job, answer, chooser, choice.token if choice else 0)
            if self._goes_on(row, choice):
                self._cache.join(reading.rows, reading.row)
                self._batch.append(row)

    def _continue(self, logits: Result) -> None:
        """The next token of each row of the batch by logits [R, V]."""
        if not self._batch:
            return
        try:
            if not isinstance(logits, torch.Tensor):
                raise logits or AssertionError("no logits")
            choices = choose(logits[:, : self._vocabulary], [row.chooser for row in self._batch])
        except Exception as error:  # out of memory, or a mistake: these answers end, the server does not
            self._drop_batch(error)
            return
        self._observe(len(self._batch))
        for index in reversed(range(len(self._batch))):
            row, choice = self._batch[index], choices[index]
            row.made += 1
            row.token = choice.token if choice else 0
            if not self._goes_on(row, choice):
                self._leave(index)

    def _goes_on(self, row: _Row, choice: Choice | None) -> bool:
        """Tell the listener of the row's new token; whether the answer goes on."""
        job = row.job
        if job.cancelled or job.over:
            return False
        if choice is None:
            self._fail(job, "broken", ValueError("the model's logits are no numbers"))
            return False
        if choice.token in job.ends:
            return self._end(row, NORMAL)
        if job.tell(Step(answer=row.answer, choice=choice)):
            return self._end(row, CUT)
        if row.made >= job.max_tokens:
            return self._end(row, LENGTH)
        return True

    def _end(self, row: _Row, how: str) -> bool:
        if how != CUT:
            row.job.tell(Step(answer=row.answer, ended=how))
        now = time.monotonic()
        self._pace = 0.9 * self._pace + 0.1 * (now - self._last_end)
        self._last_end = now
        return False

    def _leave(self, index: int) -> None:
        self._cache.leave(index)
        last = self._batch.pop()
        if index < len(self._batch):
            self._batch[index] = last

    def _fail(self, job: Job, why: str, error: Exception | None = None) -> None:
        if job.over:
            return
        job.over = True
        if error is not None:
            self._report(error)
        job.tell(Step(failure=why))

    def _drop_batch(self, error: Exception) -> None:
        for row in self._batch:
            self._fail(row.job, "broken", error)
        self._batch, self._cache = [], self._cache.fresh()

    def _give_up(self, error: Exception) -> None:
        """End all that runs or waits."""
        self._report(error)
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        for job in [*(reading.job for reading in self._reading), *waiting]:
            self._fail(job, "broken")
        self._reading.clear()
        self._drop_batch(error)
