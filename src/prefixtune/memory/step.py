"""One training step without weights: how many bytes are live at its peak, and what they are.

Axes: B rows of a batch, T tokens of a row, P prefix, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixtune.config import PrefixConfig
from prefixtune.geometry import Geometry, text_config
from prefixtune.memory.tracker import LiveBytes, fake_copy_in_place
from prefixtune.model import PrefixModel
from prefixtune.prefix import LayerKV, Prefix, PrefixKV

__all__ = ["Setup", "StepBytes", "batch_of", "measure_step", "training_step", "without_weights"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides how much memory a training step takes.

    Attributes:
        prefix: length and parameterisation; how it starts does not matter.
        rows, tokens: B and T of the largest batch that goes through the model at once.
        target_share: share of the tokens that are targets.
        accumulation: batches per optimizer step.
        checkpointing: activations are recomputed in the backward pass.
        dtype: of the frozen base; the prefix is float32.
        device: where it runs.
        eval_rows, eval_tokens: the largest batch of an evaluation; 0 without one.
    """

    prefix: PrefixConfig
    rows: int
    tokens: int
    target_share: float = 1.0
    accumulation: int = 1
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    eval_rows: int = 0
    eval_tokens: int = 0


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


def training_step(model: PrefixModel, batch: dict[str, Tensor]) -> None:
    """Forward and backward as the trainer does them: change it here when the trainer's step changes."""
    targets = int((batch["labels"] != -100).sum())
    model(**batch, num_items_in_batch=targets).loss.backward()


def evaluation_step(model: PrefixModel, batch: dict[str, Tensor]) -> None:
    """What `prefixtune.evaluate.target_loss` does with a batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # [B, T, V]
    labels = batch["labels"][:, 1:]
    chosen = labels != -100
    nn.functional.cross_entropy(logits[:, :-1][chosen].float(), labels[chosen], reduction="sum")


def measure_step(base: nn.Module, setup: Setup) -> StepBytes:
    """Run a training step, and an evaluation step where there is one, without weights.

    Args:
        base: the model on the meta device, see `prefixtune.load.empty_model`; it is copied.

    Raises:
        UnsupportedModelError: the model cannot carry a prefix.
    """
    vocabulary = text_config(base).vocab_size
    tracker = LiveBytes({"logits": lambda tensor: tensor.dim() > 1 and tensor.shape[-1] == vocabulary})
    geometry = Geometry.probe(base)
    model = PrefixModel(copy.deepcopy(base), _empty_kv(geometry, setup.prefix.length))
    fake_copy_in_place(model.base_model, tracker, device=setup.device, dtype=setup.dtype)
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
        batch = batch_of(setup.rows, setup.tokens, setup)
        for _ in range(min(setup.accumulation, 2)):  # from the second on there are gradients beside it
            training_step(model, batch)
        gradients = sum(p.grad.nbytes for p in model.prefix.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(model.prefix.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if setup.eval_rows:
            model.eval()
            with torch.no_grad():
                evaluation_step(model, batch_of(setup.eval_rows, setup.eval_tokens, setup))
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
    """A loaded model's twin on the meta device."""
    with torch.device("meta"):
        return type(base)(copy.deepcopy(base.config))


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
    """AdamW as Trainer makes it, with the moments that it has from the second step on."""
    parameters = list(model.prefix.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def batch_of(rows: int, tokens: int, setup: Setup) -> dict[str, Tensor]:
    """Rows of unequal length, as they come: one of `tokens`, and the others one token shorter."""
    ids = torch.ones(rows, tokens, dtype=torch.long, device=setup.device)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    labels = ids.clone()
    labels[:, : round(tokens * (1 - setup.target_share))] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
