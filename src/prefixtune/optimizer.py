"""The optimizer of a prefix: Adam in the directions in which each head's gradients come, with smaller
steps, if asked for, of the virtual tokens that get most of the attention. Knows torch only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["HeadwiseSoap"]

EVERY = 10  # steps between two looks for the directions; more often at first
EARLY = (1, 2, 4, 8)
# A direction with less than this share of a token's gradient (root mean square) steps as if it had it: where
# gradients have few directions the rest is rounding error, of which AdamW's division makes steps.
FLAT = 1e-2
REACH = 4.0  # with damping, no token steps this many times as far, or as little, as the median one
MEMORY = 0.95  # of the covariance from step to step: the last 20 count
KEPT = {"step", "exp_avg", "exp_avg_sq", "covariance", "basis"}


class HeadwiseSoap(torch.optim.Optimizer):
    """AdamW in the eigenbasis of each head's gradient covariance: SOAP (Vyas et al. 2024) along head_dim.

    A layer's keys have their gradients from its queries, its values theirs through the output projection:
    both are far larger in some directions of head_dim than in others, and these directions are not the axes,
    along which AdamW scales its steps. Here the second moment is kept along the covariance's eigenvectors, so
    that a rotation of head_dim does not change what is learnt.
    As in SOAP the first moment is kept unrotated; unlike it the virtual tokens' side is not turned.

    The virtual tokens that get most of the attention, the first above all, have gradients many times those of
    the others, and AdamW's steps are as large for all. With damping a token's step is multiplied by (the
    median token's gradient / its own) to the power of it, within a factor of 4 (docs/adr/0011).

    Args:
        params: tensors [H, P, D], or groups of them with an `lr` each (`Prefix.parameter_groups`).
        lr: learning rate, the size of a step along each direction.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        damping: the power of that ratio, 0 to 1; 0 is none.

    State, for each tensor: both moments [H, P, D], covariance and basis [H, D, D].

    Raises:
        ValueError: a parameter is not [H, P, D].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("damping", 0.0)  # saved before there was any

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for tensor in self.param_groups[-1]["params"]:
            if tensor.dim() != 3:
                raise ValueError(f"expected parameters [H, P, D]; got {list(tensor.shape)}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; a ValueError where the state is another optimizer's."""
        if any(not state.keys() >= KEPT for state in state_dict["state"].values()):
            raise ValueError(f"the state is another optimizer's: expected {', '.join(sorted(KEPT))}")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        with _one_thread():
            for _, parameter in moving:
                self._observe(parameter)
            self._turn([parameter for _, parameter in moving])
            for group, parameter in moving:
                self._move(parameter, group)
        return loss

    def _observe(self, parameter: Tensor) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            heads, _, width = parameter.shape
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["covariance"] = parameter.new_zeros(heads, width, width)
            state["basis"] = parameter.new_zeros(heads, width, width)
        state["step"] += 1
        state["covariance"].lerp_(gradient.mT @ gradient, 1 - MEMORY)

    def _turn(self, parameters: list[Tensor]) -> None:
        """New bases where it is time, those of one shape in one call."""
        due: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if state["step"] % EVERY == 0 or state["step"] in EARLY:
                kind = (parameter.shape[2], parameter.dtype, parameter.device)
                due[kind].append(state)
        for states in due.values():
            covariances = torch.cat([state["covariance"] for state in states])
            covariances = covariances.nan_to_num(0.0, 0.0, 0.0)  # eigh refuses these; the moments keep them
            on = "cpu" if covariances.device.type == "mps" else covariances.device
            bases = torch.linalg.eigh(covariances.to(on)).eigenvectors.to(covariances.device)
            for state, basis in zip(states, bases.split([len(s["basis"]) for s in states]), strict=True):
                overlap = (state["basis"].mT @ basis).square()  # [H, D, D], how much of each old direction
                state["exp_avg_sq"].copy_(state["exp_avg_sq"] @ overlap)
                state["basis"].copy_(basis)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        first, second = group["betas"]
        count, basis = state["step"], state["basis"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        turned = gradient @ basis
        state["exp_avg_sq"].mul_(second).addcmul_(turned, turned, value=1 - second)
        squares = state["exp_avg_sq"] / (1 - second**count)
        sizes = squares.mean(dim=2, keepdim=True)  # [H, P, 1], squares of each token's gradient
        spread = squares.maximum(sizes * FLAT**2).sqrt_().add_(group["eps"])
        move = (state["exp_avg"] @ basis).div_(1 - first**count).div_(spread)
        if group["damping"]:
            ratio = sizes.median(dim=1, keepdim=True).values / sizes
            factor = ratio.pow(group["damping"] / 2).clamp(1 / REACH, REACH)
            move.mul_(factor.nan_to_num(1.0))  # 0 / 0: tokens without a gradient do not move anyway
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(move @ basis.mT, alpha=group["lr"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU: a prefix's tensors are so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
