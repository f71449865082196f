"""The loss of training (packed rows, target tokens only, in chunks) is the model's own cross entropy."""

import pytest
import torch
from tests.families import EXTRA, FAMILIES, VOCAB, tiny_model
from torch.nn import functional as F

from prefixtune import PrefixKV
from prefixtune.attachment import attach_pairs, packs
from prefixtune.loss import Passes, RowTokens

LENGTHS = (9, 4, 12, 1, 7)
PREFIX = 5
NEVER_PACKED = ("bloom", "falcon-alibi", "mpt", "gptj", "codegen", "falcon", "llama4")


def rows_of(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.6, ids, -100)
        rows.append(RowTokens(ids, labels))
    return rows


def live_pairs(base):
    text = torch.randint(3, VOCAB, (1, PREFIX), generator=torch.Generator().manual_seed(2))
    kv = PrefixKV.from_tokens(base, text)
    return [(layer.key.requires_grad_(), layer.value.requires_grad_()) for layer in kv.layers]


def gradients(pairs):
    return torch.cat([tensor.grad.flatten() for pair in pairs for tensor in pair])


def reference(base, rows, pairs):
    """Each row alone, with its whole logits."""
    total = 0.0
    for row in rows:
        with attach_pairs(base, pairs, name="reference"):
            logits = base(input_ids=row.input_ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], row.labels[1:], reduction="sum")
            loss.backward()
        total += loss.item()
    return total, gradients(pairs)


def by_passes(base, rows, pairs, *, packing, capacity=20):
    passes = Passes.of(base, capacity=capacity, pad_token_id=0, packing=packing)
    total = 0.0
    for group in passes.plan([len(row.input_ids) for row in rows]):
        with passes.loss([rows[i] for i in group], pairs) as loss:
            loss.backward()
        total += loss.item()
    return passes, total, gradients(pairs)


@pytest.mark.parametrize("family", FAMILIES + EXTRA)
def test_loss_and_gradient_of_packed_rows_equal_each_row_alone_with_whole_logits(family):
    base = tiny_model(family).requires_grad_(False)
    rows = rows_of()
    expected, expected_gradient = reference(base, rows, live_pairs(base))
    for packing in (True, False):
        passes, total, gradient = by_passes(base, rows, live_pairs(base), packing=packing)
        print(family, passes.packing, passes.split, packs(base))
        assert total == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
