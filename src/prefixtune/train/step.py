"""The prefix of one optimizer step, the layers of it that no gradient reaches, and its label smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefixtune.errors import UnsupportedModelError

__all__ = ["SilentLayers", "Step", "smoothing_of"]

PATIENCE = 8  # steps; a model that leaves out layers by chance (LayerDrop) has run each of them by then


def smoothing_of(args: Any, state: Any) -> float:
    """The label smoothing of a step: none in the last third, in which probabilities become true again.

    A model that is trained to its end with a tenth of each target spread samples any token (bench/LOG.md).
    """
    factor: float = args.label_smoothing_factor
    return factor if 3 * state.global_step < 2 * state.max_steps else 0.0


class Step:
    """One optimizer step's prefix: made once, its gradient gathered over all passes, then sent back once.

    With a projection this is what keeps the MLP out of the passes: its cost does not grow with the rows.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.made = [tensor for pair in pairs for tensor in pair]
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.made]
        self.leaves = list(zip(leaves[::2], leaves[1::2], strict=True))

    def silent(self) -> set[int] | None:
        """Layers that train and have no gradient; None where there was no target at all."""
        missing = {
            index: [leaf.grad is None for leaf in pair]
            for index, pair in enumerate(self.leaves)
            if pair[0].requires_grad
        }
        if all(all(parts) for parts in missing.values()):
            return None
        return {index for index, parts in missing.items() if any(parts)}

    def finish(self, accelerator: Any) -> None:
        """The gradient of all processes into the parameters behind the prefix."""
        leaves = [leaf for pair in self.leaves for leaf in pair]
        trained = [
            (made, leaf.grad) for made, leaf in zip(self.made, leaves, strict=True) if made.requires_grad
        ]
        gradients = [made.new_zeros(made.shape) if grad is None else grad for made, grad in trained]
        if accelerator.num_processes > 1:
            # the wrapper that would do this never sees a backward pass: its forward is not called
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
            sizes = [g.numel() for g in gradients]
            gradients = [part.view_as(g) for part, g in zip(flat.split(sizes), gradients, strict=True)]
        torch.autograd.backward([made for made, _ in trained], gradients)


class SilentLayers:
    """Refuses a model that computes a part without gradients, as HRM does its early cycles.

    The prefix's layers in it would keep their start, and the gradient of the others would not be the loss's.
    """

    def __init__(self) -> None:
        self.layers: set[int] | None = None
        self.steps = 0

    def see(self, step: Step, *, last: int) -> None:
        """Note a step before it ends; `last` is the number of the run's last one.

        Raises:
            UnsupportedModelError: layers have had no gradient in eight steps, or in all of a shorter run.
        """
        found = step.silent()
        if found is None or self.layers == set():
            return
        self.layers = found if self.layers is None else self.layers & found
        self.steps += 1
        if self.layers and self.steps >= min(PATIENCE, last):
            raise UnsupportedModelError(
                f"layers {', '.join(map(str, sorted(self.layers)))} of the prefix get no gradient",
                hint="the model computes a part without gradients; look for an option in its configuration",
            )
