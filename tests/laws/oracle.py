"""The oracle's side of the laws: rows of token ids, bare models, and what they answer to [A; B].

A (P tokens) is the text whose KV becomes the prefix, B (T tokens) the text behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, VOCAB, tiny_model
from prefixtune import PrefixKV, PrefixModel
from prefixtune.attachment import attach

TOLERANCE = 1e-4  # absolute, on logits of size 1 to 10 in float32
NEW = 6  # tokens generated

every_family = pytest.mark.parametrize("family", FAMILIES)
both_ways = pytest.mark.parametrize("way", ["attach", "model"])


def tokens(length: int, *, seed: int) -> Tensor:
    """[1, length] random ids that are no special token."""
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


A, SHORT, LONG = tokens(5, seed=1), tokens(3, seed=2), tokens(9, seed=3)  # LONG exceeds every window
B, C = tokens(9, seed=4), tokens(6, seed=5)


@cache
def bare(family: str) -> Any:
    """The family's frozen model, made once; tests that change a model make their own."""
    return tiny_model(family)


@cache
def _kv(family: str, ids: tuple[int, ...]) -> PrefixKV:
    return PrefixKV.from_tokens(bare(family), torch.tensor([ids]))


def kv_of(family: str, ids: Tensor) -> PrefixKV:
    return _kv(family, tuple(ids[0].tolist()))


@contextmanager
def prefixed(way: str, family: str, kv: PrefixKV) -> Iterator[Any]:
    """The bare model behind the prefix, in either public form."""
    if way == "model":
        yield PrefixModel(bare(family), kv).eval()
    else:
        with attach(bare(family), kv) as base:
            yield base


DROPOUTS = (
    *("p", "dropout", "attn_dropout", "attention_dropout"),
    *("hidden_dropout", "resid_pdrop", "attn_dropout_p"),
)


def without_dropout(model: Any) -> Any:
    """Training mode with every dropout at zero, so that two passes agree."""
    model.train()
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def joined(*texts: Tensor) -> Tensor:
    return torch.cat(texts, dim=1)


def outcome(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What the call returns, or the one of these errors that it ends in."""
    try:
        return call()
    except errors as error:
        return error


def left_padded(texts: Sequence[Tensor], *, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask [B, longest]."""
    longest = max(text.shape[1] for text in texts)
    ids = torch.full((len(texts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - text.shape[1] :] = text[0]
        mask[row, longest - text.shape[1] :] = 1
    return ids, mask


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, **options).logits


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> list[list[int]]:
    """The new tokens of each row; greedy unless the options say otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


def step_logits(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """[B, NEW, vocabulary]: the logits from which greedy decoding took each new token."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits, dim=1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding; what is expected must itself vary, or equality would say nothing."""
    assert found.shape == expected.shape
    assert expected.std() > 100 * tolerance
    assert (found - expected).abs().max().item() <= tolerance
