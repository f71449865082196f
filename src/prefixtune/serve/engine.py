"""Schedules rows of token ids: one batch of different prefixes and none. Knows no text, no HTTP, no disk.

A thread owns the model. Between two passes of the batch rows join and leave, and waiting prompts are read:
those of about one length together, a long one in pieces, each in its turn, so that it holds up neither the
rows that answer nor a short one behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attachment import Rows, empty_rows, row_runner
from prefixtune.geometry import quiet_eval
from prefixtune.serve.job import Job, OverloadedError, Step
from prefixtune.serve.sampling import Choice, Chooser, choose

__all__ = ["Engine"]

NORMAL, LENGTH, CUT = "stop", "length", "cut"  # an answer's end: its end token, its limit, by its listener
PASS_TOKENS = 32  # a pass costs about as much as so many tokens, whatever is in it; see bench/LOG.md


@dataclass(eq=False)
class _Reading:
    """A job whose prompt is being read; `rows` holds what was read of it in pieces."""

    job: Job
    rows: Rows | None = None
    read: int = 0

    @property
    def left(self) -> int:
        return len(self.job.ids) - self.read


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
        rows: answers at once.
        queue: jobs that wait; more are refused.
        cached_tokens: columns times rows that the batch may come to, which bounds its memory.
        chunk: prompt tokens that are read between two passes of the batch.
        observe: called after each pass with the rows in the batch.
        report: called with what went wrong in the model or in the engine itself.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly.
    """

    def __init__(
        self,
        base: Any,
        *,
        rows: int = 32,
        queue: int = 256,
        cached_tokens: int = 65_536,
        chunk: int = 256,
        observe: Callable[[int], None] = lambda rows: None,
        report: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._base, self._run = base, row_runner(base)
        self._device = next(base.parameters()).device
        self.rows, self.queue, self.cached_tokens, self._chunk = rows, queue, cached_tokens, chunk
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
            if len(self._waiting) + len(jobs) > self.queue:
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
                    self._read_prompts()
                    self._decode()
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
            self._reading.append(_Reading(job))

    def _has_room(self, job: Job) -> bool:
        jobs = {id(row.job): row.job for row in self._batch}
        reading = [reading.job for reading in self._reading]
        rows = len(self._batch) + sum(len(other.samplings) for other in reading) + len(job.samplings)
        if rows == len(job.samplings):
            return True  # alone, it was checked on arrival
        longest = max(other.longest for other in (*jobs.values(), *reading, job))
        return rows <= self.rows and rows * longest <= self.cached_tokens

    def _read_prompts(self) -> None:
        """At most `chunk` tokens, padding included: whole prompts together, or a piece of one."""
        budget = self._chunk
        while self._reading and budget > 0:
            group = self._next_group(budget)
            if group:
                budget -= len(group) * max(one.left for one in group)
                self._read_whole(group)
            else:
                budget -= self._read_piece(self._reading.popleft(), budget)

    def _next_group(self, budget: int) -> list[_Reading]:
        """Takes the first prompt out, and those of about its length; none if it must be read in pieces."""
        first = self._reading[0]
        if first.rows is not None or first.left > budget:
            return []
        group = [first]
        others = [one for one in self._reading if one.rows is None and one is not first]
        for other in sorted(others, key=lambda one: abs(one.left - first.left)):
            columns = max(one.left for one in (*group, other)) * (len(group) + 1)
            padding = columns - sum(one.left for one in (*group, other))
            if columns > budget or padding > PASS_TOKENS * len(group):
                break
            group.append(other)
        taken = {id(one) for one in group}
        self._reading = deque(one for one in self._reading if id(one) not in taken)
        return group

    def _read_whole(self, group: list[_Reading]) -> None:
        """Prompts in one pass, right-aligned; if it fails, each on its own."""
        counts = [one.left for one in group]
        longest = max(counts)
        ids = [[*one.job.ids[:1]] * (longest - one.left) + [*one.job.ids] for one in group]
        try:
            rows = self._cache.fresh([one.job.prefix for one in group], room=longest)
            logits = self._run(rows, torch.tensor(ids, device=self._device), counts)
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0].job, "broken", error)
                return
            logging.getLogger(__name__).warning("prompts failed together and are read alone", exc_info=True)
            for one in group:
                self._read_whole([one])
            return
        for row, one in enumerate(group):
            self._begin(one.job, rows, row, logits[row : row + 1])

    def _read_piece(self, reading: _Reading, budget: int) -> int:
        """The next tokens of a prompt, the others then coming first; how many."""
        ids = reading.job.ids[reading.read : reading.read + budget]
        try:
            if reading.rows is None:
                reading.rows = self._cache.fresh([reading.job.prefix], room=len(reading.job.ids))
            logits = self._run(reading.rows, torch.tensor([ids], device=self._device))
        except Exception as error:
            self._fail(reading.job, "broken", error)
            return len(ids)
        reading.read += len(ids)
        if reading.left:
            self._reading.append(reading)
        else:
            self._begin(reading.job, reading.rows, 0, logits)
        return len(ids)

    def _begin(self, job: Job, rows: Rows, index: int, logits: torch.Tensor) -> None:
        """The prompt is read: its answers join the batch, each from the same logits [1, V]."""
        for answer, sampling in enumerate(job.samplings):
            chooser = Chooser(sampling)
            choice = choose(logits, [chooser])[0]
            row = _Row(job, answer, chooser, choice.token if choice else 0)
            if self._goes_on(row, choice):
                self._cache.join(rows, index)
                self._batch.append(row)

    def _decode(self) -> None:
        """One pass of the batch: each row's next token."""
        if not self._batch:
            return
        ids = torch.tensor([[row.token] for row in self._batch], device=self._device)
        try:
            logits = self._run(self._cache, ids)
            choices = choose(logits, [row.chooser for row in self._batch])
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
