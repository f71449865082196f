"""The processes that train one run together (torchrun). Knows no run.

Each loads the model and takes its share of every step's rows. The first one holds and writes the folder,
which all must see, and alone tells what happens.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from prefixtune.errors import ConfigError
from prefixtune.progress import muted

__all__ = ["first_alone", "is_first", "joined", "least", "leave", "one_process_only", "told_once"]


def joined() -> Any:
    """accelerate's state, after the other processes, where there are any, have come this far too."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_first() -> bool:
    return bool(joined().is_main_process)


@contextmanager
def told_once() -> Iterator[None]:
    """Notes and bars within come from the first process only."""
    with muted(not is_first()):
        yield


@contextmanager
def first_alone() -> Iterator[None]:
    """What is within runs in the first process, then in the others."""
    with joined().main_process_first():
        yield


def least(number: int) -> int:
    """The least of the processes' numbers; each has to come here."""
    return min(gather_object([number])) if joined().num_processes > 1 else number


def leave() -> None:
    """End what this process has with the others, as torch.distributed asks before an exit.

    gloo's threads may hold tensors, and abort a process that lets go of them while its interpreter ends
    (pytorch/pytorch#179291). What is left of a trainer holds the group: the caller has dropped it.
    """
    gc.collect()
    joined().destroy_process_group()


def one_process_only(what: str, *, hint: str) -> None:
    """Raise ConfigError where there are several."""
    if (count := joined().num_processes) > 1:
        raise ConfigError(f"{what}: expected one process; got {count}", hint=hint)
