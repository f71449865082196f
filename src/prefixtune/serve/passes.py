"""How the next tokens of a batch and the prompts beside it go through the model: in one pass, or in several.

`Flat` reads all of them in one pass without padding. `Padded` reads prompts in passes of their own, which
every architecture can do. Knows no jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prefixtune.attachment import Piece, Rows, empty_rows, flat_runner, row_runner
from prefixtune.prefix import PrefixKV

__all__ = ["Flat", "Padded", "Passes", "Prompt", "Result"]

PASS_TOKENS = 32  # a pass costs about as much as so many tokens, whatever is in it; see bench/LOG.md
Result = Tensor | Exception | None


@dataclass(eq=False)
class Prompt:
    """A prompt that is being read.

    Attributes:
        ids: the prompt; not empty.
        rows: holds what was read of it, in its row `row`.
        read: how many tokens that is.
        next: how many tokens are to be read now.
    """

    ids: Sequence[int]
    prefix: PrefixKV | None
    rows: Rows | None = None
    row: int = 0
    read: int = 0
    next: int = 0

    @property
    def left(self) -> int:
        return len(self.ids) - self.read

    @property
    def ends(self) -> bool:
        """Whether its next tokens are its last."""
        return self.next == self.left

    @property
    def piece(self) -> Sequence[int]:
        return self.ids[self.read : self.read + self.next]


class Passes(Protocol):
    """Reads one token of each row of the batch, and the next tokens of each prompt.

    Attributes:
        chunk: prompt tokens of one call that are a good measure; see bench/LOG.md.

    Returns:
        the logits [R, V] of the batch's rows, or why they have none; and for each prompt the logits [V] of
        its last token, None where more of it is to be read, or why it cannot be read.
    """

    chunk: int

    def __call__(
        self, batch: Rows, tokens: Sequence[int], prompts: Sequence[Prompt]
    ) -> tuple[Result, list[Result]]: ...


class Flat:
    """All in one pass; where that fails, the rows and each prompt in one of their own."""

    def __init__(self, base: Any) -> None:
        self._run, self._empty = flat_runner(base), empty_rows(base)
        self.chunk = 128 if self._empty.device.type == "cpu" else 256

    def __call__(
        self, batch: Rows, tokens: Sequence[int], prompts: Sequence[Prompt]
    ) -> tuple[Result, list[Result]]:
        parts = bool(tokens) + len(prompts)
        try:
            pieces = [self._piece(prompt) for prompt in prompts]
            logits = self._run(batch, tokens, pieces)
        except Exception as error:
            if parts == 1:
                return (error, []) if tokens else (None, [error])
            logging.getLogger(__name__).warning("a pass failed and is done in parts", exc_info=True)
            rows = self(batch, tokens, [])[0] if tokens else None
            return rows, [self(batch, [], [prompt])[1][0] for prompt in prompts]
        ends = iter(logits[len(tokens) :])
        found: list[Result] = [next(ends) if prompt.ends else None for prompt in prompts]
        for prompt in prompts:
            prompt.read += prompt.next
        return logits[: len(tokens)], found

    def _piece(self, prompt: Prompt) -> Piece:
        if prompt.rows is None:
            prompt.rows = self._empty.fresh([prompt.prefix], room=len(prompt.ids))
        return Piece(rows=prompt.rows, ids=prompt.piece, ends=prompt.ends)


class Padded:
    """Prompts in passes before the batch's: whole ones of about one length together, right-aligned."""

    def __init__(self, base: Any) -> None:
        self._run, self._empty = row_runner(base), empty_rows(base)
        self.chunk = 256

    def __call__(
        self, batch: Rows, tokens: Sequence[int], prompts: Sequence[Prompt]
    ) -> tuple[Result, list[Result]]:
        found: dict[int, Result] = {}
        for group in _alike(prompts):
            for prompt, result in zip(group, self._read(group), strict=True):
                found[id(prompt)] = result
        rows: Result = None
        if tokens:
            ids = torch.tensor(tokens, device=batch.device)[:, None]
            rows = _or_error(lambda: self._run(batch, ids))
        return rows, [found[id(prompt)] for prompt in prompts]

    def _read(self, group: Sequence[Prompt]) -> list[Result]:
        """Prompts in one pass; if it fails, each on its own."""
        counts = [prompt.next for prompt in group]
        longest = max(counts)
        ids = [[*prompt.ids[:1]] * (longest - prompt.next) + [*prompt.piece] for prompt in group]

        def run() -> tuple[Rows, Tensor]:
            room = max(len(prompt.ids) for prompt in group)
            rows = group[0].rows or self._empty.fresh([prompt.prefix for prompt in group], room=room)
            return rows, self._run(rows, torch.tensor(ids, device=rows.device), counts)

        try:
            rows, logits = run()
        except Exception as error:
            if len(group) == 1:
                return [error]
            logging.getLogger(__name__).warning("prompts failed together and are read alone", exc_info=True)
            return [result for prompt in group for result in self._read([prompt])]
        found: list[Result] = [logits[row] if prompt.ends else None for row, prompt in enumerate(group)]
        for row, prompt in enumerate(group):
            prompt.rows, prompt.row, prompt.read = rows, row, prompt.read + prompt.next
        return found


def _alike(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Groups to be read together: whole prompts of about one length; a piece is alone."""
    groups = [[prompt] for prompt in prompts if prompt.rows is not None or not prompt.ends]
    whole: list[list[Prompt]] = []
    for prompt in sorted((one for one in prompts if one.rows is None and one.ends), key=lambda one: one.left):
        if whole:
            padding = sum(prompt.left - other.left for other in whole[-1])
            if padding <= PASS_TOKENS * len(whole[-1]):
                whole[-1].append(prompt)
                continue
        whole.append([prompt])
    return groups + whole


def _or_error(run: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return run()
    except Exception as error:
        return error
