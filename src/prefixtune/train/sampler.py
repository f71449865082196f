"""The order of the rows: random, with rows of similar length in a batch. Knows torch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthGroupedSampler"]

WINDOW = 8  # batches: short enough to keep the order random, long enough to bring similar lengths together


class LengthGroupedSampler(Sampler[int]):
    """A new random order each epoch, with rows of similar length in a batch; the longest batch comes first.

    Sorted within windows of 8 batches, and the batches are shuffled again, so that lengths do not drift over
    an epoch. The longest comes first because a batch that does not fit should fail at once.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: with the epoch's number, decides the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, window = self.batch_size, self.batch_size * WINDOW
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: self.lengths[row])
            batches += [rows[first : first + size] for first in range(0, len(rows), size)]
        full = [batch for batch in batches if len(batch) == size]
        rest = [
            batch for batch in batches if len(batch) < size
        ]  # one at most, and only the last may be short
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        longest = max(range(len(shuffled)), key=lambda i: self.lengths[shuffled[i][-1]], default=0)
        ordered = [*shuffled[longest : longest + 1], *shuffled[:longest], *shuffled[longest + 1 :], *rest]
        return (row for batch in ordered for row in batch)
