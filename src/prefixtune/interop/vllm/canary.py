"""A few greedy tokens by the toolkit itself, which a server must give again before it serves a prefix.

They are worth something only where nothing else gives them: not the bare model, and not a model that computes
the placeholders. And they must not hang on rounding: where two tokens are nearly as likely, the canary ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attachment import attach
from prefixtune.config import DataConfig
from prefixtune.data import build_prompts
from prefixtune.errors import ConfigError, StorageError
from prefixtune.generate import prompt_row
from prefixtune.geometry import is_exact, quiet_eval
from prefixtune.interop.vllm.reserved import Placeholder
from prefixtune.prefix import PrefixKV

__all__ = ["Canary", "find_canary"]

LONGEST, SHORTEST = 12, 3  # tokens
MARGINS = {True: 1e-2, False: 0.5}  # between the logits of the best two tokens, in float32 and below it
TEXTS = (
    "Where is my parcel? Order 4711 was due on Monday.",
    "Give three tips for staying healthy.",
    "The weather today is",
    "什么是三原色？",
    "Translate to French: the red house",
    "name: Alimentum, area: city centre",
    "1, 2, 3,",
    "I liked the film very much.",
)


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Greedy `tokens` after the prefix and `prompt`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def find_canary(
    base: Any, tokenizer: Any, kv: PrefixKV, *, template: str | None, placeholder: Placeholder, name: str
) -> Canary:
    """The first of a few prompts whose greedy tokens tell the prefix from its absence.

    Raises:
        StorageError: none does, so that a server could not know whether the prefix is there.
    """
    margin = MARGINS[is_exact(base)]
    stand_in = [placeholder.id] * kv.length
    for prompt in _prompts(tokenizer, template):
        with attach(base, kv):
            tokens = _greedy(base, prompt, count=LONGEST, margin=margin)
        if len(tokens) < SHORTEST:
            continue
        absent = [_greedy(base, [*start, *prompt], count=len(tokens)) for start in ([], stand_in)]
        if tokens not in absent:
            return Canary(prompt=tuple(prompt), tokens=tuple(tokens))
    raise StorageError(
        f"{name}: on {len(TEXTS)} prompts the first tokens are the same with the prefix and without",
        hint="a server could not tell whether the prefix is there; train it longer",
    )


@torch.no_grad()
def _greedy(base: Any, prompt: Sequence[int], *, count: int, margin: float = 0.0) -> list[int]:
    """Up to `count` most likely tokens, end tokens included; it ends where the best is not `margin` ahead."""
    ids = list(prompt)
    with quiet_eval(base):
        while len(ids) < len(prompt) + count:
            logits = base(input_ids=torch.tensor([ids], device=base.device), use_cache=False).logits[0, -1]
            best, second = logits.float().topk(2).values.tolist()
            if best - second < margin:
                break
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def _prompts(tokenizer: Any, template: str | None) -> list[list[int]]:
    """The texts as the prefix was trained to read them, else as they are."""
    try:
        rows = [prompt_row(text, template) for text in TEXTS]
        built = build_prompts(rows, tokenizer, DataConfig(template=template))
    except ConfigError:
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    return [list(prompt.input_ids) for prompt in built]
