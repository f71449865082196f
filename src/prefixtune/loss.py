"""The training loss: cross entropy of the target tokens alone, rows packed or grouped, logits never whole.

A batch of rows is run in passes of at most `capacity` tokens: documents packed end to end where the model can
be told where they begin, else rows of similar length side by side. The sum over the passes is the batch's.
Axes: S target tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefixtune.attachment import attach_pairs, head_of, last_hidden, packed, packs, splits
from prefixtune.errors import ConfigError, DataError

__all__ = ["PASS_TOKENS", "Passes", "RowTokens", "chunked_cross_entropy", "group_rows", "pack_rows"]

PASS_TOKENS = (
    512  # of one pass: larger matmuls were no faster, and activations leave the caches (bench/LOG.md)
)
STEP = 32  # tokens: few sizes of matmul, because oneDNN keeps a kernel for each that it meets (bench/LOG.md)
CHUNK_NUMBERS = 16 * 2**20  # logits at a time: 32 MiB in bfloat16
SOFTMAX_NUMBERS = 2**20  # of them at a time through the softmax: what a core's caches hold
WASTE = 0.25  # padded rows share a pass while the shortest has at least three quarters of the longest
IGNORED = -100
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowTokens:
    """One row: token ids [T], and labels [T] with -100 where a token is no target; not shifted."""

    input_ids: Tensor
    labels: Tensor

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor]) -> list[RowTokens]:
        """The rows of a padded batch [B, T] without their padding.

        Raises:
            DataError: a row's attention mask has a hole.
        """
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        rows = []
        for ids, labels, kept in zip(batch["input_ids"], batch["labels"], mask, strict=True):
            places = kept.nonzero().flatten()
            if len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places):
                raise DataError("attention_mask: a row of a training batch is empty, or has a hole")
            span = slice(int(places[0]), int(places[-1]) + 1)
            rows.append(cls(ids[span], labels[span]))
        return rows


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row numbers in packs of at most `capacity` tokens: best fit, the longest rows first.

    Example:
        >>> pack_rows([5, 9, 4, 1], 10)
        [[1, 3], [0, 2]]
    """
    if lengths and max(lengths) > capacity:
        raise ConfigError(f"a row of {max(lengths)} tokens does not fit a pack of {capacity}")
    packs_: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = [(free[i], i) for i in range(len(free)) if free[i] >= lengths[row]]
        if fits:
            _, best = min(fits)
            packs_[best].append(row)
            free[best] -= lengths[row]
        else:
            packs_.append([row])
            free.append(capacity - lengths[row])
    return packs_


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

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers of each pass."""
        return (pack_rows if self.packing else group_rows)(lengths, self.capacity)

    @contextmanager
    def loss(self, rows: Sequence[RowTokens], pairs: Pairs | None) -> Iterator[Tensor]:
        """The summed negative log likelihood (nats, float32) of the rows' targets, in one pass.

        A backward pass belongs into the block: layers that are recomputed need the prefix there.

        Args:
            pairs: (key, value) [K, P, D] of each layer; None for the bare model.
        """
        device = next(self.base.parameters()).device
        rows = [RowTokens(row.input_ids.to(device), row.labels) for row in rows]
        with torch.autocast(device.type, enabled=False):
            if self.packing:
                rows = _filled_up(rows)
                with packed(self.base, pairs, [len(row.input_ids) for row in rows]) as hidden_of:
                    hidden = hidden_of(torch.cat([row.input_ids for row in rows])[None])  # [T, d]
                    yield chunked_cross_entropy(hidden, _shifted(rows), head_of(self.base))
            else:
                with _attached(self.base, pairs):
                    yield self._padded(rows)

    def _padded(self, rows: Sequence[RowTokens]) -> Tensor:
        longest = max(len(row.input_ids) for row in rows)
        ids = _padded([row.input_ids for row in rows], self.pad_token_id, longest)  # [B, T]
        labels = _padded([F.pad(row.labels[1:], (0, 1), value=IGNORED) for row in rows], IGNORED, longest)
        mask = _padded([torch.ones_like(row.input_ids) for row in rows], 0, longest)
        inputs = {"input_ids": ids} | ({} if bool(mask.all()) else {"attention_mask": mask})
        if self.split:
            hidden = last_hidden(self.base, **inputs)
            return chunked_cross_entropy(hidden.flatten(0, 1), labels.flatten(), head_of(self.base))
        logits = self.base(use_cache=False, **inputs).logits
        labels = labels.to(logits.device)
        chosen = labels != IGNORED
        return F.cross_entropy(_wide(logits[chosen]), labels[chosen], reduction="sum")


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Summed cross entropy of `head(hidden)` at the labels, for a head that is frozen.

    The gradient by the hidden states is made in the same sweep, chunk by chunk, so that neither logits nor
    their gradient are ever whole, and nothing is computed twice.

    Args:
        hidden: [S, d].
        labels: [S] token ids; -100 is left out before the head.

    Returns:
        A scalar of float32 (float64 for a float64 model), in nats.
    """
    chosen = (labels != IGNORED).nonzero().flatten()  # on the host, where the labels are: a GPU need not wait
    spare = -len(chosen) % STEP
    targets = F.pad(labels[chosen], (0, spare), value=IGNORED).to(hidden.device)
    chosen = F.pad(chosen, (0, spare))
    wanted = hidden.index_select(0, chosen.to(hidden.device))
    loss: Tensor = _ChunkedCrossEntropy.apply(wanted, targets, head)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        vocabulary = head(hidden[:0].detach()).shape[1]
        chunks = max(1, -(-len(labels) * vocabulary // CHUNK_NUMBERS))
        size = max(1, -(-len(labels) // (chunks * STEP))) * STEP  # equal chunks, of few sizes
        for first in range(0, len(labels), size):
            piece = hidden[first : first + size].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(piece)  # [s, V]
            by_logits = logits.detach()  # in place of them
            if hasattr(logits.grad_fn, "_saved_result"):  # the head's last step needs what it gave
                by_logits = by_logits.clone()
            total += _cross_entropy_(by_logits, labels[first : first + size], gradient=wanted)
            if gradient is not None:
                (gradient[first : first + size],) = torch.autograd.grad(logits, piece, by_logits)
            del logits, by_logits
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * by_loss.to(gradient.dtype), None, None


def _cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Summed nats of [s, V] logits; softmax minus one-hot takes their place. float32 within."""
    total = torch.zeros((), dtype=_wide(logits[:0]).dtype, device=logits.device)
    size = max(1, SOFTMAX_NUMBERS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), size):
        part, picked = logits[first : first + size], labels[first : first + size, None]
        counts, picked = picked != IGNORED, picked.clamp_min(0)
        numbers = part.to(total.dtype, copy=True)
        numbers -= numbers.amax(dim=1, keepdim=True)
        of_target = numbers.gather(1, picked)
        sums = numbers.exp_().sum(dim=1, keepdim=True)
        total += ((sums.log() - of_target) * counts).sum()
        if gradient:
            by_target = (numbers.gather(1, picked) / sums - 1) * counts  # in bfloat16 0.999 - 1 would be 0
            torch.mul(numbers, counts / sums, out=part)
            part.scatter_(1, picked, by_target.to(part.dtype))
    return total


def _filled_up(rows: list[RowTokens]) -> list[RowTokens]:
    """The rows, and a last one without targets that makes their tokens a multiple of STEP."""
    spare = -sum(len(row.input_ids) for row in rows) % STEP
    ids = rows[0].input_ids[:1].expand(spare)
    return [*rows, RowTokens(ids, torch.full((spare,), IGNORED))] if spare else rows


def _shifted(rows: Sequence[RowTokens]) -> Tensor:
    """[T] the token that each place predicts: of its own row, and none at a row's end."""
    return torch.cat([F.pad(row.labels[1:], (0, 1), value=IGNORED) for row in rows])


def _padded(rows: Sequence[Tensor], value: int, length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in rows])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def _attached(base: nn.Module, pairs: Pairs | None) -> Iterator[None]:
    if pairs is None:
        yield
        return
    with attach_pairs(base, pairs, name="passes"):
        yield
