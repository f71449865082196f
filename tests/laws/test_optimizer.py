"""The optimizer of keys and values: rotations of head_dim, where it is AdamW, and its state."""

from __future__ import annotations

import copy

import pytest
import torch

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.errors import ConfigError
from prefixtune.optimizer import EVERY, HeadwiseSoap

HEADS, TOKENS, WIDTH = 2, 6, 4


def rotation(generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q


class Problem:
    """Least squares in head_dim, far steeper along some directions than along others."""

    def __init__(self, turn: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        axes = rotation(generator)
        steepness = torch.tensor([30.0, 3.0, 0.3, 0.03], dtype=torch.float64)
        self.map = axes * steepness  # [H, D, D]
        self.wanted, start = torch.randn(2, HEADS, TOKENS, WIDTH, dtype=torch.float64, generator=generator)
        self.turn = torch.eye(WIDTH, dtype=torch.float64) if turn is None else turn
        self.parameter = torch.nn.Parameter(start @ self.turn)

    def loss(self) -> torch.Tensor:
        return ((self.parameter @ self.turn.mT - self.wanted) @ self.map).square().mean()

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return self.loss().item()


def test_rotation_of_head_dim_changes_nothing() -> None:
    plain, turned = Problem(), Problem(rotation(torch.Generator().manual_seed(1)))
    for problem in (plain, turned):
        problem.train(HeadwiseSoap([problem.parameter], lr=0.02), 3 * EVERY)
    torch.testing.assert_close(turned.parameter @ turned.turn.mT, plain.parameter, rtol=1e-4, atol=1e-4)


def test_steep_and_flat_directions_are_learnt_in_fewer_steps_than_with_adamw() -> None:
    ours, adamw = Problem(), Problem()
    with_ours = ours.train(HeadwiseSoap([ours.parameter], lr=0.05), 100)
    with_adamw = adamw.train(torch.optim.AdamW([adamw.parameter], lr=0.05, weight_decay=0.0), 100)
    assert with_ours < 0.1 * with_adamw


def test_heads_of_one_number_are_trained_as_by_adamw() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 5, 1), torch.randn(25, 3, 5, 1)  # one direction: no basis but the axis
    found = []
    for kind in (HeadwiseSoap, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.03, betas=(0.8, 0.95), weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("gradients", "steps"),
    [
        ((4.0, 1.0, 16.0), (1.0, 2.0, 0.5)),  # the root of the median's share
        ((1e-3, 1.0, 1.0, 1e3), (4.0, 1.0, 1.0, 0.25)),  # and no further than that
        ((0.0, 0.0, 5.0, 5.0, 5.0), (0.0, 0.0, 1.0, 1.0, 1.0)),  # what is not attended to has no say
        ((7.0,), (1.0,)),
    ],
)
def test_damped_token_steps_less_the_larger_its_gradient_is(
    gradients: tuple[float, ...], steps: tuple[float, ...]
) -> None:
    line = torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(0)), dim=0)
    for damping, expected in ((0.5, steps), (0.0, tuple(float(size > 0) for size in gradients))):
        parameter = torch.nn.Parameter(torch.zeros(2, len(gradients), 8))
        parameter.grad = (torch.tensor(gradients)[:, None] * line).repeat(2, 1, 1)
        HeadwiseSoap([parameter], lr=0.1, damping=damping).step()
        torch.testing.assert_close(parameter.detach().norm(dim=2), 0.1 * torch.tensor(expected).expand(2, -1))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_saved_state_goes_on_to_the_bit(damping: float) -> None:
    whole, parts = Problem(), Problem()
    whole.train(HeadwiseSoap([whole.parameter], lr=0.02, damping=damping), EVERY + 7)
    first = HeadwiseSoap([parts.parameter], lr=0.02, damping=damping)
    parts.train(first, EVERY - 3)
    second = HeadwiseSoap([parts.parameter], lr=1.0)
    state = copy.deepcopy(first.state_dict())
    if not damping:
        del state["param_groups"][0]["damping"]  # as of an earlier version
    second.load_state_dict(state)
    parts.train(second, 10)
    assert torch.equal(parts.parameter, whole.parameter)


def test_groups_have_rates_of_their_own_and_what_has_no_gradient_stays() -> None:
    fast, slow, still = (torch.nn.Parameter(torch.ones(1, 2, 3)) for _ in range(3))
    optimizer = HeadwiseSoap([{"params": [fast], "lr": 0.2}, {"params": [slow, still], "lr": 0.1}])
    fast.grad, slow.grad = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    optimizer.step()
    torch.testing.assert_close(1 - fast.detach(), 2 * (1 - slow.detach()))
    assert torch.equal(still, torch.ones(1, 2, 3))


def test_weights_of_a_projection_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[H, P, D\]; got \[4, 4\]"):
        HeadwiseSoap([torch.nn.Parameter(torch.ones(4, 4))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_seen_in_the_parameter(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3, 4))
    parameter.grad = torch.full((2, 3, 4), bad)
    HeadwiseSoap([parameter]).step()  # as with AdamW: no error here, and nothing that looks right
    assert parameter.isnan().all()


def test_rounding_errors_are_no_directions() -> None:
    torch.manual_seed(0)
    line = torch.randn(1, 1, 8)
    parameter = torch.nn.Parameter(torch.zeros(1, 3, 8))
    optimizer = HeadwiseSoap([parameter], lr=0.1)
    for _ in range(3 * EVERY):
        parameter.grad = torch.randn(1, 3, 1) * line + 1e-6 * torch.randn(1, 3, 8)
        optimizer.step()
    moved = parameter.detach()
    along = moved @ line.mT @ line / line.square().sum()
    assert along.abs().max() > 0.1
    assert (moved - along).abs().max() < 1e-3


@pytest.mark.parametrize("late", [1, 2, 3])
def test_direction_that_is_new_late_is_no_leap(late: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 4))
    optimizer = HeadwiseSoap([parameter], lr=0.1)
    for step in range(150):
        parameter.grad = torch.zeros(1, 2, 4)
        parameter.grad[..., 0 if step < 100 else late] = 1.0
        before = parameter.detach().clone()
        optimizer.step()
        assert (parameter - before).abs().max() < 0.3


def test_one_thread_steps_and_the_others_are_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen, eigh = torch.get_num_threads(), [], torch.linalg.eigh

    def observed(matrices: torch.Tensor) -> object:
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", observed)
    parameter = torch.nn.Parameter(torch.ones(1, 2, 3))
    parameter.grad = torch.ones(1, 2, 3)
    optimizer = HeadwiseSoap([parameter])
    torch.set_num_threads(3)
    try:
        optimizer.step()
        assert (seen, torch.get_num_threads()) == ([1], 3)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_prefix_in_bfloat16_is_refused_and_trains_in_float32_on_the_same_base(projection: bool) -> None:
    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=3, projection=projection)).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"model\.prefix\.float\(\)"):
        model.prefix.optimizer(1e-2)
    model.prefix.float()
    before = [parameter.detach().clone() for parameter in model.prefix.parameters()]
    optimizer = model.prefix.optimizer(1e-2)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.prefix.parameters(), strict=True))
