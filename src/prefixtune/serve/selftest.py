"""What the engine's passes give, against one row at a time, on the model that is about to be served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixtune.attachment import attach, empty_rows, no_flat
from prefixtune.errors import UnsupportedModelError
from prefixtune.geometry import is_exact, quiet_eval, text_config
from prefixtune.prefix import PrefixKV
from prefixtune.serve.passes import Flat, Padded, Passes, Prompt, Result

__all__ = ["Way", "batch_error", "check_batches"]

PREFIXES, TEXTS = (5, 0, 11, 2), (4, 9, 3, 14)  # tokens of each row's prefix and prompt
STEPS = 3  # tokens that follow a prompt
TRIAL = (LookupError, ValueError, AttributeError, TypeError, RuntimeError, UnsupportedModelError)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the engine may run a model.

    Attributes:
        together: whether rows of different prefixes are exact together; else they are one at a time only.
        notes: what is not done because it is not exact, or not possible, for the log.
    """

    passes: Passes
    together: bool = True
    notes: tuple[str, ...] = ()


def check_batches(base: Any) -> Way:
    """The fastest way to run rows of different prefixes that is exact on this model.

    Raises:
        UnsupportedModelError: a row is not exact even alone.
    """
    tolerance = 1e-3 if is_exact(base) else 0.25  # of the logits' spread, as where prefixes are attached
    why = no_flat(base)
    if not why:
        flat = Flat(base)
        try:
            error = batch_error(base, flat, together=True)
            why = "" if error <= tolerance else f"their logits differ by {error:.2g} of their spread"
        except TRIAL as failure:
            why = f"{type(failure).__name__}: {failure}"
        if not why:
            return Way(passes=flat)
    padded, notes = Padded(base), (f"prompts are read in passes of their own, not beside answers: {why}",)
    if batch_error(base, padded, together=True) <= tolerance:
        return Way(passes=padded, notes=notes)
    error = batch_error(base, padded, together=False)
    if error <= tolerance:
        alone = "rows are not exact together on this model: one at a time"
        return Way(passes=padded, together=False, notes=(*notes, alone))
    raise UnsupportedModelError(
        f"{type(base).__name__}: the engine's logits differ by {error:.2g} of their spread from the model's",
        hint="this architecture is refused rather than served inexactly; please report it",
    )


@torch.no_grad()
def batch_error(base: Any, passes: Passes, *, together: bool) -> float:
    """The largest relative error of the logits; two rows are read beside the answers of two others."""
    device, vocabulary = next(base.parameters()).device, text_config(base).vocab_size

    def ids(count: int, salt: int) -> Tensor:
        row: Tensor = (torch.arange(count, device=device) * 131 + 7 * salt + 3) % vocabulary
        return row[None]

    with quiet_eval(base):
        prefixes = [PrefixKV.from_tokens(base, ids(n, row)) if n else None for row, n in enumerate(PREFIXES)]
        texts = [ids(n + STEPS, row + 9) for row, n in enumerate(TEXTS)]
        expected = [_alone(base, kv, text) for kv, text in zip(prefixes, texts, strict=True)]
        groups = [list(range(len(texts)))] if together else [[row] for row in range(len(texts))]
        worst = 0.0
        for group in groups:
            rows = [(prefixes[i], texts[i][0].tolist()) for i in group]
            for row, step, logits in _batched(base, passes, rows):
                wanted = expected[group[row]][step]
                error = (logits.float() - wanted).norm() / (wanted - wanted.mean()).norm().clamp_min(1e-12)
                worst = max(worst, float(error) if error == error else float("inf"))
    return worst


def _alone(base: Any, prefix: PrefixKV | None, text: Tensor) -> Tensor:
    """[STEPS + 1, V]: what the model gives after the prompt and after each token that follows it."""
    with attach(base, [prefix]):
        logits: Tensor = base(input_ids=text, use_cache=False).logits[0, -(STEPS + 1) :].float()
    return logits


def _batched(
    base: Any, passes: Passes, rows: list[tuple[PrefixKV | None, list[int]]]
) -> Iterator[tuple[int, int, Tensor]]:
    """(row, step, logits [V]): two prompts whole and together, two more in halves beside the answers."""
    batch, inside = empty_rows(base), list[tuple[int, int]]()  # (row, step) of each row of the batch
    prompts = [Prompt(ids=text[: len(text) - STEPS], prefix=prefix) for prefix, text in rows]
    while inside or any(prompt.left for prompt in prompts):
        reading = [row for row, prompt in enumerate(prompts) if prompt.left][:2]
        for row in reading:
            whole = row < 2 or prompts[row].read
            prompts[row].next = prompts[row].left if whole else prompts[row].left // 2
        tokens = [rows[row][1][len(prompts[row].ids) + step] for row, step in inside]
        logits, read = passes(batch, tokens, [prompts[row] for row in reading])
        inside = [(row, step + 1) for row, step in inside]
        if inside:
            yield from ((*place, found) for place, found in zip(inside, _sound(logits), strict=True))
        for place in reversed([place for place, (_, step) in enumerate(inside) if step == STEPS]):
            batch.leave(place)
            inside[place] = inside[-1]
            inside.pop()
        for row, result in zip(reading, read, strict=True):
            if result is not None:
                yield row, 0, _sound(result)
                held = prompts[row].rows
                assert held is not None
                batch.join(held, prompts[row].row)
                inside.append((row, 0))


def _sound(result: Result) -> Tensor:
    if isinstance(result, Tensor):
        return result
    raise result or AssertionError("no logits")
