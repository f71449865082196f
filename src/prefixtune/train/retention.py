"""Keeps a prefix close to the bare model on text that is none of its task: less is forgotten.

Beside the rows, every optimizer step aims at the base's own distribution on a little text that the base has
sampled itself (Li & Hoiem 2016, learning without forgetting; the text as in Liu et al. 2023, LLM-QAT, section
3.1: a random first token, so that no data and no language has to be chosen).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.data import added_tokens
from prefixtune.errors import DataError
from prefixtune.generate import ending, generate_ids, sampling, seeded
from prefixtune.geometry import quiet_eval, text_config
from prefixtune.loss import Passes, RowTokens
from prefixtune.memory import give_back_freed
from prefixtune.train.folder import RETENTION

__all__ = ["BATCH", "PER_STEP", "SHORTEST", "TOKENS", "Retention", "kept_texts", "sample_texts"]

TEXTS, TOKENS = 64, 64
SHORTEST = 4  # tokens of a text that says anything
PER_STEP = 2  # of the texts in an optimizer step
BATCH = 32  # few steps, as each reads all weights; a sample depends on its batch, so the size is no option


@dataclass
class Retention:
    """Neutral text with the base's hidden states.

    Attributes:
        rows: each with aims.
        passes: how they run through the model.
        weight: of the divergence (nats per token) beside the loss (nats per target token).
        per_step: rows of an optimizer step.
    """

    rows: Sequence[RowTokens]
    passes: Passes
    weight: float
    per_step: int = PER_STEP
    totals: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def of(cls, passes: Passes, texts: Sequence[Sequence[int]], *, weight: float) -> Retention:
        """The texts as rows that aim at the bare model of the passes.

        A run that is resumed with shorter passes has its longer texts still, in passes that hold them.
        """
        longest = max(len(ids) for ids in texts)
        passes = replace(passes, capacity=max(passes.capacity, longest))
        rows = [RowTokens(torch.tensor(ids), torch.tensor(ids)) for ids in texts]
        with quiet_eval(passes.base):
            aims = passes.aims(rows)
        aimed = [RowTokens(row.input_ids, row.labels, aim) for row, aim in zip(rows, aims, strict=True)]
        return cls(rows=aimed, passes=passes, weight=weight)

    def rows_of(self, step: int) -> list[RowTokens]:
        """A step's rows: one after the other, from the first again after the last."""
        return [self.rows[(step * self.per_step + place) % len(self.rows)] for place in range(self.per_step)]

    def seen(self, nats: float, tokens: int) -> None:
        """Note a divergence, for the log."""
        self.totals.append((nats, tokens))

    def mean(self) -> float:
        """Nats per token since it was asked last."""
        nats, tokens = (sum(part) for part in zip(*self.totals, strict=True)) if self.totals else (0.0, 0)
        self.totals = []
        return nats / max(tokens, 1)


def kept_texts(
    output: Path, base: Any, tokenizer: Any, *, seed: int, tokens: int = TOKENS
) -> list[list[int]]:
    """The texts of a run: those in its folder, where it is resumed; else new ones, which the folder gets."""
    path = output / RETENTION
    if path.exists():
        texts: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return texts
    texts = sample_texts(base, tokenizer, seed=seed, tokens=tokens)
    give_back_freed()  # the cache of the sampling, before a step's activations come on top
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{RETENTION}.draft")
    draft.write_text(json.dumps(texts), encoding="utf-8")
    draft.replace(path)
    return texts


def sample_texts(
    base: Any, tokenizer: Any, *, seed: int, texts: int = TEXTS, tokens: int = TOKENS
) -> list[list[int]]:
    """Token ids, up to `tokens` of a text, that the bare model samples at temperature 1 after a random token.

    Raises:
        DataError: the model ends every text at once.
    """
    generator = torch.Generator().manual_seed(seed)
    special = {*tokenizer.all_special_ids, ending(base, tokenizer)["pad_token_id"]}
    words = torch.randperm(min(len(tokenizer), text_config(base).vocab_size), generator=generator).tolist()
    start, _ = added_tokens(tokenizer)
    asked = [[*start, word] for word in words if word not in special][:texts]
    with seeded(seed):
        answers = generate_ids(
            base,
            tokenizer,
            asked,
            max_new_tokens=tokens - len(start) - 1,
            batch_size=BATCH,
            settings=sampling(temperature=1.0, top_p=1.0),
            progress="sampling neutral text",
        )
    found = [[*begin, *new] for begin, new in zip(asked, answers, strict=True) if new]
    if not found:
        raise DataError(
            "the model ends every text that it is to sample at once",
            hint="--retain 0 does without neutral text",
        )
    return found
