"""One contestant in its own process: loads, trains an epoch when its parent says so, and waits in between.

Reads JSON lines on stdin: first the task, then `{"go": true}` for one more epoch, or `{"go": false}` to end.
Writes JSON lines on stdout: `{"event": "ready", …}` once, then `{"event": "epoch", …}`. Started by race.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from machine import forget_peak, memory_of_process


class Line:
    """The pipe to the parent."""

    def __init__(self) -> None:
        # what libraries print goes to stderr, so that stdout holds our lines only
        self.out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, event: str, **values: Any) -> None:
        self.out.write(json.dumps({"event": event, **values}) + "\n")
        self.out.flush()

    def hear(self) -> Any:
        line = sys.stdin.readline()  # blocks in read(): an idle contestant takes no processor time
        if not line:
            raise SystemExit("the parent is gone")
        return json.loads(line)


def gate(line: Line, describe: dict[str, Any], *, device: str) -> Any:
    """The callback that waits before each epoch and reports after it; times are seconds, sizes bytes."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.steps: list[float] = []

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                line.say("ready", **describe, memory=_memory(device))
                line.hear()
                self._start()

        def _start(self) -> None:
            self.losses, self.steps = [], []
            _forget_peak(device)
            self.processor = time.process_time()
            self.start = self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _finish(device)
            now = time.perf_counter()
            self.steps.append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _finish(device)
            seconds = time.perf_counter() - self.start
            idle_from = time.process_time()
            line.say(
                "epoch",
                seconds=seconds,
                processor_seconds=idle_from - self.processor,
                step_seconds=self.steps,
                losses=self.losses,
                memory=_memory(device),
            )
            again = line.hear()["go"]
            line.say("awake", idle_processor_seconds=time.process_time() - idle_from)
            if again:
                self._start()
            else:
                control.should_training_stop = True

    return Gate()


def _finish(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _memory(device: str) -> dict[str, int]:
    """Of the GPU where it is used, else of the process: bytes `now`, and `peak` since the epoch's start."""
    if device == "cuda":
        import torch

        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    return memory_of_process()


def _forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def main() -> None:
    line = Line()
    task = line.hear()
    begin = time.perf_counter()
    import transformers

    from bases import matmul_parameters, read_base
    from contestants import Contestant, Job, make_trainer
    from prefixtune.data import Example
    from prefixtune.quantize import count_numbers

    transformers.logging.set_verbosity_error()
    contestant, device = Contestant(**task["contestant"]), task["device"]
    if contestant.method == "prefixtune":
        from prefixtune.memory import keep_few_kernels

        keep_few_kernels()  # as `prefixtune train` begins
    imported = time.perf_counter()
    base = read_base(task["source"], dtype=contestant.dtype, device=device, quantize=contestant.quantize)
    loaded = time.perf_counter()
    rows = json.loads(Path(task["rows"]).read_text(encoding="utf-8"))
    examples = [
        Example(input_ids=tuple(ids), labels=tuple(labels), origin=f"row {number}", truncated=0)
        for number, (ids, labels) in enumerate(rows, start=1)
    ]
    job = Job(
        rows=examples,
        epochs=task["epochs"],
        seed=task["seed"],
        output=Path(task["output"]),
        device=device,
        saves=task["saves"],
    )
    describe = {
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "base_parameters": count_numbers(base.model),
        "matmul_parameters": matmul_parameters(base.model),
    }
    trainer = make_trainer(contestant, base, job)
    describe["trainable_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    describe["learning_rate"] = trainer.args.learning_rate
    describe["import_seconds"], describe["load_seconds"] = imported - begin, loaded - imported
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(gate(line, describe, device=device))
    trainer.train()


if __name__ == "__main__":
    main()
