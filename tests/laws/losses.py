"""Loss and gradient of rows behind a prefix: each alone with whole logits, and in the passes of training."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from families import VOCAB
from prefixtune.attachment import attach_pairs
from prefixtune.loss import Passes, RowTokens

LENGTHS = (9, 4, 12, 1, 7)


def rows_of(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.6, ids, -100)
        rows.append(RowTokens(ids, labels))
    return rows


def gradients(pairs):
    return torch.cat([tensor.grad.flatten().cpu() for pair in pairs for tensor in pair])


def reference(base, rows, pairs, smoothing=0.0):
    """Each row alone, with its whole logits."""
    total = 0.0
    for row in rows:
        with attach_pairs(base, pairs, name="reference"):
            logits = base(input_ids=row.input_ids[None], use_cache=False).logits[0]
            options = {"reduction": "sum", "label_smoothing": smoothing}
            loss = F.cross_entropy(logits[:-1], row.labels[1:], **options)
            loss.backward()
        total += loss.item()
    return total, gradients(pairs)


def by_passes(base, rows, pairs, *, packing, capacity=20, split=True, smoothing=0.0):
    passes = Passes.of(base, capacity=capacity, pad_token_id=0, packing=packing)
    passes = replace(passes, split=passes.split and split)
    total = 0.0
    for group in passes.plan(rows):
        with passes.loss([rows[i] for i in group], pairs, smoothing=smoothing) as loss:
            loss.backward()
        total += loss.item()
    return passes, total, gradients(pairs)


def continued(rows, common, seed=6):
    """The rows after `common` tokens, which are no targets; nor is what the last of them predicts."""
    head = torch.randint(3, VOCAB, (common,), generator=torch.Generator().manual_seed(seed))
    front = torch.full((common + 1,), -100)
    return [RowTokens(torch.cat([head, r.input_ids]), torch.cat([front, r.labels[1:]])) for r in rows]
