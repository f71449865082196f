"""What the engine's batches give, against one row at a time, on the model that is about to be served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prefixtune.attachment import Rows, attach, empty_rows, row_runner
from prefixtune.errors import UnsupportedModelError
from prefixtune.geometry import is_exact, quiet_eval, text_config
from prefixtune.prefix import PrefixKV

__all__ = ["batch_error", "check_batches"]

PREFIXES, TEXTS = (5, 0, 11, 2), (4, 9, 3, 14)  # tokens of each row's prefix and prompt
PASSES = 3


def check_batches(base: Any) -> bool:
    """Whether rows of different prefixes are exact together; False where they are one at a time only.

    Raises:
        UnsupportedModelError: a row is not exact even alone.
    """
    tolerance = 1e-3 if is_exact(base) else 0.25  # of the logits' spread, as where prefixes are attached
    if batch_error(base, together=True) <= tolerance:
        return True
    error = batch_error(base, together=False)
    if error <= tolerance:
        return False
    raise UnsupportedModelError(
        f"{type(base).__name__}: the engine's logits differ by {error:.2g} of their spread from the model's",
        hint="this architecture is refused rather than served inexactly; please report it",
    )


@torch.no_grad()
def batch_error(base: Any, *, together: bool) -> float:
    """The largest relative error of the logits; rows are read and join in pairs, the first leaves early."""
    device, vocabulary = next(base.parameters()).device, text_config(base).vocab_size

    def ids(count: int, salt: int) -> Tensor:
        row: Tensor = (torch.arange(count, device=device) * 131 + 7 * salt + 3) % vocabulary
        return row[None]

    with quiet_eval(base):
        prefixes = [PrefixKV.from_tokens(base, ids(n, row)) if n else None for row, n in enumerate(PREFIXES)]
        texts = [ids(n + PASSES, row + 9) for row, n in enumerate(TEXTS)]
        expected = [_alone(base, kv, text) for kv, text in zip(prefixes, texts, strict=True)]
        groups = [list(range(len(texts)))] if together else [[row] for row in range(len(texts))]
        worst = 0.0
        for group in groups:
            for row, step, logits in _batched(base, [prefixes[i] for i in group], [texts[i] for i in group]):
                wanted = expected[group[row]][step]
                error = (logits.float() - wanted).norm() / (wanted - wanted.mean()).norm().clamp_min(1e-12)
                worst = max(worst, float(error) if error == error else float("inf"))
    return worst


def _alone(base: Any, prefix: PrefixKV | None, text: Tensor) -> Tensor:
    """[PASSES + 1, V]: what the model gives after the prompt and after each token that follows it."""
    with attach(base, [prefix]):
        logits: Tensor = base(input_ids=text, use_cache=False).logits[0, -(PASSES + 1) :].float()
    return logits


def _batched(
    base: Any, prefixes: list[PrefixKV | None], texts: list[Tensor]
) -> list[tuple[int, int, Tensor]]:
    """(row, step, logits [V]) of rows in one batch."""
    run, batch = row_runner(base), empty_rows(base)
    found: list[tuple[int, int, Tensor]] = []
    inside: list[tuple[int, int]] = []  # (row, step) of each row of the batch
    for first in range(0, len(texts), 2):
        pair = list(range(first, min(first + 2, len(texts))))
        read, logits = _read(run, batch, [prefixes[row] for row in pair], [texts[row] for row in pair])
        for place, row in enumerate(pair):
            found.append((row, 0, logits[place]))
            batch.join(read, place)
            inside.append((row, 0))
        while inside:
            ids = torch.cat([texts[i][:, texts[i].shape[1] - PASSES + step][None] for i, step in inside])
            logits = run(batch, ids.reshape(-1, 1))
            inside = [(i, step + 1) for i, step in inside]
            found += [(i, step, logits[place]) for place, (i, step) in enumerate(inside)]
            done = [place for place, (_, step) in enumerate(inside) if step == PASSES]
            for place in reversed(done):
                batch.leave(place)
                inside[place] = inside[-1]
                inside.pop()
            if pair[-1] + 1 < len(texts):
                break  # the next rows join those that are left
    return found


def _read(
    run: Callable[..., Tensor], like: Rows, prefixes: list[PrefixKV | None], texts: list[Tensor]
) -> tuple[Rows, Tensor]:
    """Prompts of unequal length, read together in two passes; the logits [B, V] after each."""
    prompts = [text[0, : text.shape[1] - PASSES] for text in texts]
    rows = like.fresh(prefixes, room=sum(map(len, prompts)))
    for half in (0, 1):
        pieces = [(prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :])[half] for prompt in prompts]
        columns = max(map(len, pieces))
        ids = torch.stack([functional.pad(piece, (columns - len(piece), 0)) for piece in pieces])
        logits: Tensor = run(rows, ids, [len(piece) for piece in pieces])
    return rows, logits
