"""The training loss: cross entropy of the target tokens alone, rows packed or grouped, logits never whole.

A batch of rows is run in passes of at most `capacity` tokens: documents packed end to end where the model can
be told where they begin, else rows of similar length side by side. The sum over the passes is the batch's.
What all rows of a pack begin with (a chat's system prompt, an instruction) is run once for all of them.
Axes: S target tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefixtune.attachment import (
    aligned_experts,
    attach_pairs,
    head_of,
    last_hidden,
    packed,
    packs,
    splits,
)
from prefixtune.chunked import IGNORED, STEP, chunked_cross_entropy, chunked_divergence
from prefixtune.errors import ConfigError, DataError
from prefixtune.geometry import has_values
from prefixtune.rotary import alike, settle

__all__ = [
    "GPU_PASS_TOKENS",
    "PASS_TOKENS",
    "Passes",
    "RowTokens",
    "common_start",
    "default_capacity",
    "first_target",
    "group_rows",
    "pack_rows",
    "planned",
    "share_passes",
]

PASS_TOKENS = (
    512  # of one pass: larger matmuls were no faster, and activations leave the caches (bench/LOG.md)
)
# The same on a GPU, which waits for its processor in small passes: the first of them that fits.
GPU_PASS_TOKENS = (2048, 1024, PASS_TOKENS)
FEWEST = 8  # tokens that rows begin with in common, for them to be run once; a template's first word is not
WASTE = 0.25  # padded rows share a pass while the shortest has at least three quarters of the longest
Pairs = Sequence[tuple[Tensor, Tensor]]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowTokens:
    """One row on the host: token ids [T], and labels [T], -100 where a token is no target; not shifted.

    Attributes:
        aims: what a teacher has at the places that predict the targets, from `Passes.aims`, [targets, d]: its
            distribution is then aimed at, and not the target.
    """

    input_ids: Tensor
    labels: Tensor
    aims: Tensor | None = None

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> list[RowTokens]:
        """The rows of a padded batch [B, T] without their padding, with the batch's aims where it has some.

        Raises:
            DataError: there are no labels, a row's attention mask has a hole, or its positions restart: it is
                several documents.
        """
        missing = sorted({"input_ids", "labels"} - set(batch))
        if missing:
            raise DataError(
                f"a training batch has no {' and no '.join(missing)}; it has {', '.join(sorted(batch))}",
                hint="give a data_collator that makes them: prefixtune.data.Collator",
            )
        ids_of, labels_of = batch["input_ids"].cpu(), batch["labels"].cpu()
        mask = batch.get("attention_mask", torch.ones_like(ids_of)).cpu() != 0
        aims = batch.get("aims") or [None] * len(mask)
        positions_of = batch.get("position_ids", torch.arange(mask.shape[1]).expand_as(mask)).cpu()
        if positions_of.dim() == 3:  # of several axes, which are alike for text
            positions_of = positions_of[0]
        rows = []
        for ids, labels, kept, aim, positions in zip(
            ids_of, labels_of, mask, aims, positions_of, strict=True
        ):
            places = kept.nonzero().flatten()
            if len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places):
                raise DataError("attention_mask: a row of a training batch is empty, or has a hole")
            span = slice(int(places[0]), int(places[-1]) + 1)
            if bool((positions[span].diff() != 1).any()):
                raise DataError(
                    "position_ids: they jump or restart within a row of a training batch, one document",
                    hint="give each document as a row (prefixtune.data.Collator): rows are packed afterwards",
                )
            rows.append(cls(ids[span], labels[span], aim))
        return rows


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row numbers in packs of at most `capacity` tokens: best fit, the longest rows first.

    Example:
        >>> pack_rows([5, 9, 4, 1], 10)
        [[1, 3], [0, 2]]
    """
    _check_fit(lengths, capacity)
    packs_: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, pack), ascending
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        best = bisect.bisect_left(room, (lengths[row], 0))
        free, pack = room.pop(best) if best < len(room) else (capacity, len(packs_))
        if pack == len(packs_):
            packs_.append([])
        packs_[pack].append(row)
        bisect.insort(room, (free - lengths[row], pack))
    return packs_


def _check_fit(lengths: Sequence[int], capacity: int) -> None:
    if lengths and max(lengths) > capacity:
        raise ConfigError(f"a row of {max(lengths)} tokens does not fit a pack of {capacity}")


def group_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row numbers in groups of similar length, padded size at most `capacity`, or one row.

    Example:
        >>> group_rows([5, 9, 4, 1], 10)
        [[1], [0, 2], [3]]
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        longest = lengths[groups[-1][0]] if groups else 0
        similar = lengths[row] >= (1 - WASTE) * longest
        if groups and similar and longest * (len(groups[-1]) + 1) <= capacity:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def first_target(labels: Sequence[int]) -> int:
    """The place of the first target that a loss counts; the row's length where there is none."""
    return next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))


def common_start(ids: Sequence[tuple[int, ...]], first_targets: Sequence[int]) -> int:
    """How many tokens all rows begin with, before the one that predicts a target; 0 where they are few.

    Example:
        >>> rows = [(*range(1, 11), 31), (*range(1, 11), 32)]
        >>> common_start(rows, [10, 10])
        9
    """
    if len(ids) < 2:
        return 0
    lowest, highest = min(ids), max(ids)
    shortest = min(map(len, ids))
    limit = min(shortest, *first_targets) - 1
    found = next((place for place in range(limit) if lowest[place] != highest[place]), limit)
    return found if found >= FEWEST else 0


def default_capacity(
    ids: Sequence[tuple[int, ...]],
    first_targets: Sequence[int],
    *,
    packing: bool,
    tokens: int = PASS_TOKENS,
) -> int:
    """Tokens of a pass of such rows, unless someone says: so many of their own, beside what all of them
    begin with where they are packed; the longest row's at least.

    Example:
        >>> default_capacity([(*range(1, 701), 801), (*range(1, 701), 802)], [700, 700], packing=True)
        1211
    """
    common = common_start(ids, first_targets) if packing else 0
    return max(common + tokens, *map(len, ids))


def planned(
    model: Any, lengths: Sequence[int], capacity: int, *, packing: bool, common: int = 0
) -> list[list[int]]:
    """Row numbers of each pass through a model: packs or groups of rows that its rotary turns alike.

    Args:
        common: tokens that the rows of a pack begin with, which it holds once.
    """
    passes = []
    for rows in alike(model, lengths):
        groups = share_passes([lengths[row] for row in rows], capacity, packing=packing, common=common)
        passes += [[rows[place] for place in group] for group in groups]
    return passes


def share_passes(lengths: Sequence[int], capacity: int, *, packing: bool, common: int = 0) -> list[list[int]]:
    """As `planned`, for rows that a model's rotary turns alike."""
    if packing:
        _check_fit(lengths, capacity)
    plan = pack_rows if packing else group_rows
    return plan([length - common for length in lengths], capacity - common)


@dataclass(frozen=True)
class Passes:
    """How a batch of rows is run through a model.

    Attributes:
        base: the model.
        capacity: tokens of a pass, at most; a longer row has a pass of its own where rows are not packed.
        packing: documents end to end in one row.
        split: the head runs on target tokens only; without, the whole logits are made.
        pad_token_id: fills shorter rows where rows are not packed.
    """

    base: Any
    capacity: int
    packing: bool
    split: bool
    pad_token_id: int

    @classmethod
    def of(cls, base: nn.Module, *, capacity: int, pad_token_id: int, packing: bool = True) -> Passes:
        """What the model allows, found by trying it on a few tokens."""
        split = splits(base)
        return cls(base, capacity, packing and split and not packs(base), split, pad_token_id)

    def plan(self, rows: Sequence[RowTokens]) -> list[list[int]]:
        """Row numbers of each pass."""
        lengths, common = [len(row.input_ids) for row in rows], _common(rows) if self.packing else 0
        return planned(self.base, lengths, self.capacity, packing=self.packing, common=common)

    @contextmanager
    def loss(
        self,
        rows: Sequence[RowTokens],
        pairs: Pairs | None,
        *,
        smoothing: float = 0.0,
        plain: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The summed negative log likelihood (nats, float32) of the rows' targets, in one pass.

        Of rows with aims the summed divergence from the teacher's distribution; all rows have them, or none.
        A backward pass belongs into the block: layers that are recomputed need the prefix there.

        Args:
            pairs: (key, value) [K, P, D] of each layer; None for the bare model.
            smoothing, plain: of the targets, see `chunked_cross_entropy`.

        Raises:
            ConfigError: a teacher's distribution is to be smoothed.
        """
        aims = [row.aims for row in rows if row.aims is not None]
        with self._states(rows, pairs) as (states, labels, head):
            if aims:
                if smoothing:
                    raise ConfigError("label_smoothing_factor: a teacher's distribution is not smoothed")
                chosen = (labels != IGNORED).nonzero().flatten().to(states.device)
                aimed = torch.cat(aims).to(states.device)
                yield chunked_divergence(states.index_select(0, chosen), aimed, head)
            else:
                yield chunked_cross_entropy(states, labels, head, smoothing=smoothing, plain=plain)

    @torch.no_grad()
    def aims(self, rows: Sequence[RowTokens], pairs: Pairs | None = None) -> list[Tensor]:
        """What the model has where it predicts each row's targets, [targets, d]: the `aims` of a student.

        Hidden states, which the head turns into logits; the logits of a model that has no head of its own.
        """
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for group in self.plan(rows):
            with self._states([rows[row] for row in group], pairs) as (states, labels, _):
                chosen = states[(labels != IGNORED).to(states.device)]
            counts = [int((rows[row].labels[1:] != IGNORED).sum()) for row in group]
            for row, part in zip(group, torch.split(chosen, counts), strict=True):
                found[row] = part.clone()
        return found

    @contextmanager
    def _states(
        self, rows: Sequence[RowTokens], pairs: Pairs | None
    ) -> Iterator[tuple[Tensor, Tensor, Head]]:
        """Hidden states [S, d], the token that each place is to predict [S], and the head, in one pass."""
        device = next(self.base.parameters()).device
        # an estimate makes passes of its own
        assert not has_values(self.base) or len(alike(self.base, [len(row.input_ids) for row in rows])) == 1
        settle(self.base)
        with torch.autocast(device.type, enabled=False):
            if self.packing:
                documents, common = _documents(rows)
                lengths = [len(row.input_ids) for row in documents]
                with packed(self.base, pairs, lengths, common=common) as hidden_of:
                    ids = torch.cat([row.input_ids for row in documents])[None]  # [1, T]
                    yield hidden_of(ids.to(device)), _shifted(documents), head_of(self.base)  # [T, d]
            else:
                with _attached(self.base, pairs), aligned_experts(self.base):
                    yield self._padded(rows, device)

    def _padded(self, rows: Sequence[RowTokens], device: torch.device) -> tuple[Tensor, Tensor, Head]:
        longest = max(len(row.input_ids) for row in rows)
        ids = _padded([row.input_ids for row in rows], self.pad_token_id, longest)  # [B, T]
        labels = _padded([F.pad(row.labels[1:], (0, 1), value=IGNORED) for row in rows], IGNORED, longest)
        mask = _padded([torch.ones_like(row.input_ids) for row in rows], 0, longest)
        inputs = {"input_ids": ids.to(device)}
        inputs |= {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
        if self.split:
            return last_hidden(self.base, **inputs).flatten(0, 1), labels.flatten(), head_of(self.base)
        logits = self.base(use_cache=False, **inputs).logits
        return logits.flatten(0, 1), labels.flatten(), lambda chosen: chosen * 1


def _common(rows: Sequence[RowTokens]) -> int:
    return common_start(
        [tuple(row.input_ids.tolist()) for row in rows], [first_target(row.labels.tolist()) for row in rows]
    )


def _documents(rows: Sequence[RowTokens]) -> tuple[list[RowTokens], int]:
    """A pack's documents, and how many tokens all rows begin with: the first document then, which the others
    continue. After them others without targets make the tokens of all a multiple of STEP.

    None of these is longer than the longest row, so that they take no position that the rows do not.
    """
    common, first = _common(rows), rows[0].input_ids
    head = [RowTokens(first[:common], torch.full((common,), IGNORED))] if common else []
    own = [RowTokens(row.input_ids[common:], row.labels[common:]) for row in rows]
    longest = max(len(row.input_ids) for row in own)
    spare = -sum(len(row.input_ids) for row in (*head, *own)) % STEP
    sizes = [min(longest, spare - start) for start in range(0, spare, longest)]
    fill = [RowTokens(first[:1].expand(size), torch.full((size,), IGNORED)) for size in sizes]
    return [*head, *own, *fill], common


def _shifted(rows: Sequence[RowTokens]) -> Tensor:
    """[T] the token that each place predicts: of its own row, and none at a row's end."""
    return torch.cat([F.pad(row.labels[1:], (0, 1), value=IGNORED) for row in rows])


def _padded(rows: Sequence[Tensor], value: int, length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in rows])


@contextmanager
def _attached(base: nn.Module, pairs: Pairs | None) -> Iterator[None]:
    if pairs is None:
        yield
        return
    with attach_pairs(base, pairs, name="passes"):
        yield
