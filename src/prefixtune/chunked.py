"""Losses through a frozen head, in chunks: neither the logits nor their gradient are ever whole.

The gradient by the hidden states is made in the same sweep as the loss, so that nothing is computed twice.
Axes: S tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORED", "STEP", "chunked_cross_entropy", "chunked_divergence", "wide"]

STEP = 32  # tokens: few sizes of matmul, because oneDNN keeps a kernel for each that it meets (bench/LOG.md)
CHUNK_NUMBERS = 8 * 2**20  # logits at a time: 16 MiB in bfloat16
CHUNK_TOKENS = 128  # at a time at least, however large the vocabulary: matmuls of fewer are slow
SOFTMAX_NUMBERS = 2**19  # of them at a time through the softmax: what a core's caches hold
NEVER = -1e4  # logits so far below the highest are of tokens that a model rules out (Chameleon's images)
IGNORED = -100
Head = Callable[[Tensor], Tensor]
# (logits [s, V], the chunk's place among the tokens, whether a gradient is wanted) -> summed loss;
# the gradient takes the place of the logits
Sweep = Callable[[Tensor, slice, bool], Tensor]


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, smoothing: float = 0.0, plain: Tensor | None = None
) -> Tensor:
    """Summed cross entropy of `head(hidden)` at the labels, for a head that is frozen.

    Args:
        hidden: [S, d].
        labels: [S] token ids; -100 is left out before the head.
        smoothing: share of each target that is spread evenly over all tokens (Szegedy et al. 2016, section
            7); over those that the model can give, where it rules some out.
        plain: a scalar to which the loss without smoothing is added.

    Returns:
        A scalar of float32 (float64 for a float64 model), in nats.
    """
    chosen = (labels != IGNORED).nonzero().flatten()  # on the host, where the labels are: a GPU need not wait
    spare = -len(chosen) % STEP
    targets = F.pad(labels[chosen], (0, spare), value=IGNORED).to(hidden.device)
    wanted = hidden.index_select(0, F.pad(chosen, (0, spare)).to(hidden.device))

    def sweep(logits: Tensor, part: slice, gradient: bool) -> Tensor:
        return _cross_entropy_(logits, targets[part], gradient=gradient, smoothing=smoothing, plain=plain)

    loss: Tensor = _Chunked.apply(wanted, head, sweep)  # type: ignore[no-untyped-call]
    return loss


def chunked_divergence(hidden: Tensor, teacher: Tensor, head: Head) -> Tensor:
    """Summed KL(softmax(head(teacher)) || softmax(head(hidden))) over the tokens, for a head that is frozen.

    The teacher's whole distribution counts, not its likeliest tokens alone: hidden states are all that has to
    be kept of it.

    Args:
        hidden: [S, d] of the model that learns.
        teacher: [S, d] of the one that it is to resemble; gets no gradient.

    Returns:
        A scalar of float32 (float64 for a float64 model), in nats.
    """
    places = F.pad(torch.arange(len(hidden)), (0, -len(hidden) % STEP)).to(hidden.device)
    counted = (torch.arange(len(places)) < len(hidden)).to(hidden.device)
    wanted, aim = hidden.index_select(0, places), teacher.detach().index_select(0, places)

    def sweep(logits: Tensor, part: slice, gradient: bool) -> Tensor:
        with torch.no_grad():
            aimed = head(aim[part])
        return _divergence_(logits, aimed, counted[part], gradient=gradient)

    loss: Tensor = _Chunked.apply(wanted, head, sweep)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, sweep: Sweep) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=wide(hidden[:0]).dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        vocabulary = head(hidden[:0].detach()).shape[1]
        chunks = max(1, min(-(-len(hidden) * vocabulary // CHUNK_NUMBERS), -(-len(hidden) // CHUNK_TOKENS)))
        size = max(1, -(-len(hidden) // (chunks * STEP))) * STEP  # equal chunks, of few sizes
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            piece = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(piece)  # [s, V]
            by_logits = logits.detach()  # in place of them
            if hasattr(logits.grad_fn, "_saved_result"):  # the head's last step needs what it gave
                by_logits = by_logits.clone()
            total += sweep(by_logits, part, wanted)
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(logits, piece, by_logits)
            del logits, by_logits
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * by_loss.to(gradient.dtype), None, None


def _cross_entropy_(
    logits: Tensor, labels: Tensor, *, gradient: bool, smoothing: float, plain: Tensor | None
) -> Tensor:
    """Summed nats of [s, V] logits; softmax minus the target takes their place. float32 within."""
    total, pieces = torch.zeros((), dtype=wide(logits[:0]).dtype, device=logits.device), _pieces(logits)
    buffer = _buffer(logits, pieces, total.dtype)
    for rows in pieces:
        part, picked = logits[rows], labels[rows, None]
        counts, picked = picked != IGNORED, picked.clamp_min(0)
        numbers = buffer[: len(part)].copy_(part)
        numbers -= numbers.amax(dim=1, keepdim=True)
        of_target = aimed = numbers.gather(1, picked)
        if smoothing:
            even, spread = _even_(numbers, smoothing)
            aimed = (1 - smoothing) * of_target + even
        sums = numbers.exp_().sum(dim=1, keepdim=True)
        total += ((sums.log() - aimed) * counts).sum()
        if plain is not None:
            plain += ((sums.log() - of_target) * counts).sum()
        if gradient:
            by_target = numbers.gather(1, picked) / sums - 1  # in bfloat16 0.999 - 1 would be 0
            numbers *= counts / sums
            if smoothing:
                by_target += smoothing - spread
                numbers -= spread * counts
            part.copy_(numbers).scatter_(1, picked, (by_target * counts).to(part.dtype))
    return total


def _even_(numbers: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """`smoothing` times the mean of [s, V] logits, the highest 0, [s, 1]; and each token's share of it.

    Those of tokens that are ruled out, the same in all rows, are cut to NEVER: they may be infinite.
    """
    out = (numbers.clamp_(min=NEVER)[0] == NEVER).sum().to(numbers.dtype)
    spread = smoothing / (numbers.shape[1] - out)
    return (numbers.sum(dim=1, keepdim=True) - NEVER * out) * spread, spread


def _divergence_(logits: Tensor, aimed: Tensor, counted: Tensor, *, gradient: bool) -> Tensor:
    """Summed KL(softmax(aimed) || softmax(logits)) in nats, [s, V] each; the gradient replaces the logits.

    Three pieces of memory for all: new ones for each piece left several hundred MB resident (bench/LOG.md).
    """
    total, pieces = torch.zeros((), dtype=wide(logits[:0]).dtype, device=logits.device), _pieces(logits)
    buffers = [_buffer(logits, pieces, total.dtype) for _ in range(3)]
    for rows in pieces:
        counts = counted[rows, None]
        ours, theirs, likely = (buffer[: len(counts)] for buffer in buffers)
        _log_softmax_(ours.copy_(logits[rows]), likely)
        _log_softmax_(theirs.copy_(aimed[rows]), likely)
        torch.exp(theirs, out=likely)
        total += (theirs.sub_(ours).mul_(likely).sum(dim=1, keepdim=True) * counts).sum()
        if gradient:
            logits[rows] = ours.exp_().sub_(likely).mul_(counts)
    return total


def _buffer(logits: Tensor, pieces: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """Memory for the largest piece, the first."""
    return logits.new_empty(logits[pieces[0]].shape if pieces else (0, 0), dtype=dtype)


def _log_softmax_(numbers: Tensor, spare: Tensor) -> None:
    """In place, over the last dimension; `spare` is overwritten."""
    numbers -= numbers.amax(dim=1, keepdim=True)
    numbers -= torch.exp(numbers, out=spare).sum(dim=1, keepdim=True).log()


def _pieces(logits: Tensor) -> list[slice]:
    size = max(1, SOFTMAX_NUMBERS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return [slice(first, first + size) for first in range(0, len(logits), max(1, size))]


def wide(tensor: Tensor) -> Tensor:
    """In float32 where it is of less."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
