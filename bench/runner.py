"""One contestant's process, seen from outside: starts it, says go, keeps what it reports (see child.py)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contestants import Contestant

CHILD = Path(__file__).parent / "child.py"


class FailedError(Exception):
    """A contestant's process ended before its time; with the last thing that it said."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a child is told beside its contestant.

    Attributes:
        source: a model's name, or the sizes of a BLOOM with random weights.
        rows: a JSON file of [ids, labels] pairs.
        saves: keep each trainer's default of writing checkpoints.
    """

    source: str | dict[str, int]
    rows: str
    epochs: int
    seed: int
    device: str = "cpu"
    saves: bool = False


@dataclass
class Runner:
    """A contestant that is loaded and waits, with its epochs so far.

    Attributes:
        ready_seconds: from the start of the process until it could train.
        peak: the most memory that it has had, in bytes.
        idle_share: the largest part of a processor that it took while others ran.
    """

    contestant: Contestant
    process: subprocess.Popen[str]
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    ready_seconds: float = 0.0
    untimed: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    idle_share: float = 0.0
    _waits_since: float = 0.0

    @classmethod
    def start(cls, contestant: Contestant, task: Task, folder: Path) -> Runner:
        """A new process, loaded, before its first epoch. Its log and its Trainer's output go to `folder`.

        Raises:
            FailedError: it could not load, or its Trainer could not be made.
        """
        log, begin = folder / f"{contestant.name}.log", time.perf_counter()
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        runner = cls(contestant=contestant, process=process, log=log)
        try:
            output = str(folder / contestant.name)
            runner._send({"contestant": asdict(contestant), "output": output, **asdict(task)})
            runner.ready = runner._receive("ready")
        except BaseException:
            runner.end()
            raise
        runner.ready_seconds = time.perf_counter() - begin
        runner.peak = runner.ready["memory"]["peak"]
        return runner

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def seconds(self) -> float:
        """Of a timed epoch: the median."""
        return statistics.median(found["seconds"] for found in self.rounds)

    def epoch(self, *, timed: bool) -> dict[str, Any]:
        """Let it train one epoch and wait for its report.

        Raises:
            FailedError: it ended instead.
        """
        self._send({"go": True})
        if self.untimed or self.rounds:
            waited = time.perf_counter() - self._waits_since
            used = self._receive("awake")["idle_processor_seconds"]
            if waited > 1:  # threads of its last matmul may spin for some milliseconds
                self.idle_share = max(self.idle_share, used / waited)
        found = self._receive("epoch")
        self._waits_since = time.perf_counter()
        self.peak = max(self.peak, found["memory"]["peak"])
        (self.rounds if timed else self.untimed).append(found)
        return found

    def end(self) -> None:
        """Let the process go: kindly where it waits for a word, else at once."""
        if self.process.poll() is None and (self.untimed or self.rounds):
            try:
                self._send({"go": False})
                self.process.wait(timeout=30)
            except (FailedError, subprocess.TimeoutExpired):
                pass  # it is killed below
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()  # closes the pipes

    def _send(self, values: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(values) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise FailedError(self._last_words()) from None

    def _receive(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise FailedError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        assert found.pop("event") == event, line
        return found

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "\t"))]
        return said[-1][:300].removesuffix(".") if said else f"ended with code {code} and said nothing"
