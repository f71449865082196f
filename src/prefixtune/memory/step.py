"""One training step without weights: how many bytes are live at its peak, and what they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefixtune.config import PrefixConfig
from prefixtune.geometry import Geometry, text_config
from prefixtune.loss import PASS_TOKENS, Passes, RowTokens
from prefixtune.memory.tracker import LiveBytes, fake_copy_in_place
from prefixtune.model import PrefixModel
from prefixtune.prefix import LayerKV, Prefix, PrefixKV
from prefixtune.quantize import saved_bytes

__all__ = ["Setup", "StepBytes", "measure_step", "pass_tokens", "rows_of", "training_step", "without_weights"]


# bytes of a block that is given back when it is freed: where all large tensors are, and logits alone
ALL_LARGE, COPIED_LOGITS = 2**20, 8 * 2**20
# the step of each base that was measured, by its setup: advice asks for the same ones again and again
_MEASURED: WeakKeyDictionary[nn.Module, dict[Setup, StepBytes]] = WeakKeyDictionary()
_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def pass_tokens(lengths: Sequence[int], common: int, *, packing: bool) -> int:
    """Tokens of a pass of such rows, padding included; a pack holds their common beginning once."""
    return sum(lengths) - common * (len(lengths) - 1) if packing else len(lengths) * max(lengths)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides how much memory a training step takes.

    Attributes:
        prefix: length and parameterisation; how it starts does not matter.
        lengths: tokens of each row in the largest pass through the model.
        packing: the rows of a pass lie end to end; else they are padded to the longest.
        passes: of an optimizer step; from the second on there are gradients beside it.
        common: tokens that all rows of that pass begin with, which a pack holds once.
        target_share: share of the other tokens that are targets.
        longest: tokens of the longest row of all.
        row_tokens: tokens of a row on the average.
        checkpointing: activations are recomputed in the backward pass.
        dtype: of the frozen base; the prefix is float32.
        device: where it runs.
        quantize: the scheme that the base's linear weights are held in.
        eval_lengths, eval_common: the same of an evaluation's largest pass; empty without one.
        aims: the rows aim at a teacher's distribution, whose logits are made beside the model's.
        neutral_lengths: tokens of each neutral text of a step, which aims at the bare model's distribution.
        sampled_rows: neutral texts that the base writes at once before the first step.
    """

    prefix: PrefixConfig
    lengths: tuple[int, ...]
    packing: bool = True
    passes: int = 1
    common: int = 0
    target_share: float = 1.0
    longest: int = 0
    row_tokens: float = 0.0
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    quantize: str | None = None
    eval_lengths: tuple[int, ...] = ()
    eval_common: int = 0
    aims: bool = False
    neutral_lengths: tuple[int, ...] = ()
    sampled_rows: int = 0

    @property
    def tokens(self) -> int:
        """Of the largest pass, padding included."""
        return self.tokens_of(self.lengths, self.common)

    @property
    def frees_at_once(self) -> bool:
        """Whether a run on a CPU gives freed blocks back: who recomputes asks for less memory at more time,
        and of large padded passes one's blocks hardly fit the next one's, of other sizes (docs/memory.md)."""
        return self.checkpointing or (not self.packing and self.tokens > PASS_TOKENS)

    def frees_from(self, base: nn.Module) -> int | None:
        """The size in bytes from which a run has freed blocks given back; None where glibc decides.

        A soft cap makes several copies of a chunk of logits, of other sizes in each pass; where they are
        below the 32 MiB that glibc gives back, they leave holes (docs/memory.md).
        """
        if self.frees_at_once:
            return ALL_LARGE
        return COPIED_LOGITS if getattr(text_config(base), "final_logit_softcapping", None) else None

    @property
    def eval_tokens(self) -> int:
        """The same of an evaluation's; 0 without one."""
        return self.tokens_of(self.eval_lengths, self.eval_common) if self.eval_lengths else 0

    @property
    def evaluation_may_take_more(self) -> bool:
        """It keeps no activations: a pass that is no larger than training's takes less."""
        if not self.eval_lengths:
            return False
        return self.eval_tokens > self.tokens or max(self.eval_lengths) > max(self.lengths)

    def tokens_of(self, lengths: Sequence[int], common: int = 0) -> int:
        """Of a pass of rows that begin with as many common tokens."""
        return pass_tokens(lengths, common, packing=self.packing)


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What is live at the peak of a step, in bytes; the parts add up to `total`.

    Attributes:
        logits: tensors over the vocabulary.
        activations: all else that the step needs beside weights, prefix, optimizer and gradients.
    """

    weights: int
    prefix: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.prefix + self.optimizer + self.gradients + self.activations + self.logits


def training_step(model: PrefixModel, setup: Setup) -> None:
    """The pass of an optimizer step that takes most, run as the trainer does: change both together.

    Where there are several it is one of the later, which finds the gradients of those before it.
    """
    made = [tensor for pair in model.prefix() for tensor in pair]
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in made]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    width = model.geometry.hidden_size
    rows = rows_of(setup.lengths, setup, common=setup.common, width=width)
    for leaf in leaves if setup.passes > 1 else ():
        if leaf.requires_grad:
            leaf.grad = torch.zeros_like(leaf, memory_format=torch.contiguous_format)
    if setup.neutral_lengths:
        _neutral_step(model, setup, pairs)
    with _passes(model, setup).loss(rows, pairs) as loss:
        (loss / setup.tokens).backward()  # type: ignore[no-untyped-call]
    trained = [(tensor, leaf.grad) for tensor, leaf in zip(made, leaves, strict=True) if tensor.requires_grad]
    torch.autograd.backward([tensor for tensor, _ in trained], [gradient for _, gradient in trained])


def _neutral_step(model: PrefixModel, setup: Setup, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The pass of a step's neutral text, which comes first and has two vocabularies of logits."""
    setup = replace(setup, lengths=setup.neutral_lengths, target_share=1.0, aims=True)
    rows = rows_of(setup.lengths, setup, width=model.geometry.hidden_size)
    with _passes(model, setup).loss(rows, pairs) as divergence:
        divergence.backward()  # type: ignore[no-untyped-call]


def evaluation_step(model: PrefixModel, setup: Setup) -> None:
    """A pass of `prefixtune.evaluate.target_loss`."""
    width = model.geometry.hidden_size
    rows = rows_of(setup.eval_lengths, setup, common=setup.eval_common, width=width)
    with _passes(model, setup).loss(rows, model.prefix()):
        pass


def _passes(model: PrefixModel, setup: Setup) -> Passes:
    return Passes(model.base_model, setup.tokens, setup.packing, split=True, pad_token_id=0)


def measure_step(base: nn.Module, setup: Setup) -> StepBytes:
    """Run a training step, and an evaluation step where there is one, without weights.

    Args:
        base: the model on the meta device, see `prefixtune.load.empty_model`; it is copied.

    Raises:
        UnsupportedModelError: the model cannot carry a prefix.
    """
    plain = replace(setup, quantize=None, sampled_rows=0)  # the first is counted below, the second elsewhere
    known = _MEASURED.setdefault(base, {})
    if plain not in known:
        known[plain] = _measure(base, plain)
    step = known[plain]
    if setup.quantize is None:
        return step
    saved, unpacked = saved_bytes(base, setup.quantize, setup.dtype)
    room = step.activations + 2 * unpacked  # a layer is unpacked in two steps
    return replace(step, weights=step.weights - saved, activations=room)


def _measure(base: nn.Module, setup: Setup) -> StepBytes:
    vocabulary = text_config(base).vocab_size
    tracker = LiveBytes({"logits": lambda tensor: tensor.dim() > 1 and tensor.shape[-1] == vocabulary})
    geometry = Geometry.probe(base)
    model = PrefixModel(copy.deepcopy(base), _empty_kv(geometry, setup.prefix.length))
    fake_copy_in_place(model.base_model, tracker, device=setup.device, dtype=setup.dtype)
    geometry.stands_for(model.base_model)
    weights = tracker.live
    with tracker:
        kv = _empty_kv(geometry, setup.prefix.length, device=setup.device)
        model.prefix = Prefix(setup.prefix, geometry, kv)
        del kv
        prefix = tracker.live - weights
        optimizer = _optimizer_with_state(model)
        state = tracker.live - weights - prefix
        tracker.restart()
        model.train()
        if setup.checkpointing:
            model.gradient_checkpointing_enable()
        training_step(model, setup)
        gradients = sum(p.grad.nbytes for p in model.prefix.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(model.prefix.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if setup.evaluation_may_take_more:
            model.eval()
            with torch.no_grad():
                evaluation_step(model, setup)
    beyond = tracker.peak - weights - prefix - state - gradients
    logits = min(beyond, tracker.peak_of["logits"])
    return StepBytes(
        weights=weights,
        prefix=prefix,
        optimizer=state,
        gradients=gradients,
        activations=beyond - logits,
        logits=logits,
    )


def without_weights(base: nn.Module) -> nn.Module:
    """A loaded model's twin on the meta device, always the same: its steps are measured once."""
    if base not in _TWINS:
        with torch.device("meta"):
            _TWINS[base] = type(base)(copy.deepcopy(base.config))
    return _TWINS[base]


def _empty_kv(geometry: Geometry, length: int, *, device: str = "meta") -> PrefixKV:
    """Zeros in the shape of the prefix's keys and values."""

    def zeros(heads: int, width: int) -> Tensor:
        return torch.zeros(heads, length, width, device=device)

    return PrefixKV(
        tuple(
            LayerKV(zeros(layer.kv_heads, layer.key_dim), zeros(layer.kv_heads, layer.value_dim))
            for layer in geometry.layers
        )
    )


def _optimizer_with_state(model: PrefixModel) -> torch.optim.Optimizer:
    """The one that training uses, with what it keeps from its first step on."""
    optimizer = model.prefix.optimizer(0.0)
    for parameter in model.prefix.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def rows_of(lengths: Sequence[int], setup: Setup, *, common: int = 0, width: int = 0) -> list[RowTokens]:
    """Rows of these lengths with a common beginning, the end of each its target.

    Args:
        width: the hidden size, for aims.
    """
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.ones(length, dtype=torch.long)
        ids[common:] = number % 2  # what differs from row to row is not held once
        labels = ids.clone()
        begin = common + round((length - common) * (1 - setup.target_share))
        labels[: max(begin, common + 1) if common else begin] = -100
        targets = int((labels[1:] != -100).sum())
        aims = torch.zeros(targets, width, dtype=setup.dtype) if setup.aims else None
        rows.append(RowTokens(ids, labels, aims))
    return rows
