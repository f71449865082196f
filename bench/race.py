"""Contestants take turns: one trains an epoch, the others wait, round after round.

Interleaved, so that whatever else the machine does hits everybody. All stay in memory; where they do not fit
they run in heats, and the first contestant runs along in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from contestants import Contestant
from machine import free_memory
from runner import FailedError, Runner, Task

IDLE_SHARE = 0.05  # of a processor; who takes more while it waits disturbs the others


@dataclass(kw_only=True)
class Race:
    """All contestants of one model.

    Args:
        rounds: timed epochs of each.
        warm_up: untimed epochs before them.
        candidates: who has one more untimed epoch, the trial; the batch of the fastest of them is given to
            the contestants without one of their own.
        estimate: seconds of an epoch of a contestant that is ready and has not run yet.

    Attributes:
        finished: who ran all rounds, with its heat's number.
        anchors: by heat, the first contestant, which runs in all of them.
        skipped: who could not, and why.
    """

    contestants: Sequence[Contestant]
    task: Task
    folder: Path
    rounds: int
    warm_up: int
    candidates: Sequence[str]
    estimate: Callable[[Runner], float]
    finished: list[tuple[int, Runner]] = field(default_factory=list)
    anchors: list[Runner | None] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    best_batch: int | None = None

    def run(self) -> Race:
        waiting = list(self.contestants)
        while waiting:
            runners: list[Runner] = []
            try:
                self._heat(runners, waiting)
            finally:
                for runner in runners:
                    runner.end()
        return self

    def _heat(self, runners: list[Runner], waiting: list[Contestant]) -> None:
        """Start as many of the waiting as the memory holds, and run all their rounds."""
        heat, anchor = len(self.anchors), None
        if heat:
            first = self.anchors[0]
            anchor = self._enter(first.contestant, runners) if first else None
            click.echo(f"heat {heat + 1}: the memory did not hold everybody", err=True)
        entered = 0
        while waiting and (entered == 0 or _fits(runners)):
            contestant = self._with_batch(waiting.pop(0), runners)
            if contestant is not None:
                self._enter(contestant, runners)
            entered += 1
        everybody = list(runners)
        left = self.rounds * sum(runner.untimed[-1]["seconds"] for runner in runners)
        click.echo(f"all are warm; the {self.rounds} rounds take about {_minutes(left)}", err=True)
        for number in range(1, self.rounds + 1):
            self._round(number, runners)
        survivors = [runner for runner in everybody if runner in runners]
        self.anchors.append(
            (anchor if anchor in survivors else None) if heat else next(iter(survivors), None)
        )
        self.finished += [(heat, runner) for runner in survivors if runner is not anchor]

    def _enter(self, contestant: Contestant, runners: list[Runner]) -> Runner | None:
        """Start a contestant and warm it up."""
        try:
            runner = Runner.start(contestant, self.task, self.folder)
        except FailedError as error:
            self._skip(contestant.name, error)
            return None
        runners.append(runner)
        if not self.anchors and len(runners) == 1:
            epochs = len(self.contestants) * (self.warm_up + self.rounds)
            total = epochs * self.estimate(runner)
            entrants = len(self.contestants)
            click.echo(f"{epochs} epochs of {entrants} contestants: {_minutes(total)} at a guess", err=True)
        for _ in range(self.warm_up):
            self._epoch(runner, runners, timed=False)
            if runner not in runners:
                return None
        taken = f"loaded in {runner.ready_seconds:.1f} s, warm-up {runner.untimed[-1]['seconds']:.1f} s"
        click.echo(f"  {runner.name}: {taken}, {runner.peak / 1e9:.2f} GB", err=True)
        return runner

    def _round(self, number: int, runners: list[Runner]) -> None:
        for runner in list(runners):
            self._epoch(runner, runners, timed=True)
        times = ", ".join(f"{runner.name} {runner.rounds[-1]['seconds']:.1f}" for runner in runners)
        left = (self.rounds - number) * sum(runner.seconds for runner in runners)
        click.echo(f"round {number} of {self.rounds}: {times} s; {_minutes(left)} left", err=True)
        for runner in runners:
            if runner.idle_share > IDLE_SHARE:
                share = f"{runner.idle_share:.0%} of a processor"
                click.echo(f"  DISTURBED: {runner.name} took {share} while others ran", err=True)

    def _epoch(self, runner: Runner, runners: list[Runner], *, timed: bool) -> None:
        try:
            runner.epoch(timed=timed)
        except FailedError as error:
            runners.remove(runner)
            runner.end()
            self._skip(runner.name, error)

    def _with_batch(self, contestant: Contestant, runners: list[Runner]) -> Contestant | None:
        """The contestant, with the best batch where it has none; that is found when the first one asks."""
        if contestant.batch is not None or contestant.method == "prefixtune":
            return contestant
        if self.best_batch is None:
            entered = [runner for runner in runners if runner.name in self.candidates]
            for runner in entered:
                self._epoch(runner, runners, timed=False)
            tried = [runner for runner in entered if runner in runners]
            if not tried:
                self._skip(contestant.name, "none of PEFT's prefixes ran, of which it takes the best batch")
                return None
            best = min(tried, key=lambda runner: runner.untimed[-1]["seconds"])
            assert best.contestant.batch is not None
            self.best_batch = best.contestant.batch
            click.echo(f"  the best batch of PEFT's prefix is {self.best_batch}", err=True)
        return replace(contestant, batch=self.best_batch)

    def _skip(self, name: str, reason: object) -> None:
        self.skipped[name] = str(reason)
        click.echo(f"SKIPPED {name}: {reason}", err=True)


def _fits(runners: Sequence[Runner]) -> bool:
    """Whether one more can enter: as large as the largest, and room for one of them at its peak."""
    return free_memory() > 2 * max((runner.peak for runner in runners), default=0)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
