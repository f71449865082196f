"""In a prefix that trains in some layers these learn as they would in a whole one; the others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import A, B, C, assert_close, every_family, joined, left_padded, logits, without_dropout
from torch import Tensor

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel

both_parameterisations = pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
each_layer = pytest.mark.parametrize("layers", ["0", "top:1"])  # of the families' two

IDS, MASK = left_padded([B, C])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def started(base: Any, layers: str | None, *, projection: bool = False) -> PrefixModel:
    """A prefix that starts from A and trains in `layers`, in training mode without dropout."""
    torch.manual_seed(7)
    start = {"init": "tokens", "init_tokens": tuple(A[0].tolist())}
    config = PrefixConfig(length=A.shape[1], projection=projection, layers=layers, **start)
    return without_dropout(PrefixModel(base, config))


def loss_of(model: PrefixModel) -> Tensor:
    """The loss on BATCH, after its backward pass."""
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return loss.detach()


def gradients(model: PrefixModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.prefix.parameters()]


def gradients_in_a_whole_prefix(model: PrefixModel) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient where the same KV trains in every layer, of the numbers that `model` trains.

    The KV's gradient in the chosen layers is pulled back through the parameterisation.
    """
    whole = PrefixModel(model.base_model, model.prefix.bake()).train(model.training)
    loss = loss_of(whole)
    kv = whole.prefix.parameterisation
    pairs = model.prefix()
    outputs = [pairs[i][side] for i in model.prefix.trained for side in (0, 1)]
    pulls = [side[i].grad for i in model.prefix.trained for side in (kv.key, kv.value)]
    return loss, list(torch.autograd.grad(outputs, list(model.prefix.parameters()), pulls))


def assert_same_gradients(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-6
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@every_family
@each_layer
@both_parameterisations
def test_chosen_layers_have_the_loss_and_gradient_of_a_prefix_that_trains_everywhere(
    family: str, layers: str, projection: bool
) -> None:
    model = started(tiny_model(family), layers, projection=projection)
    expected_loss, expected = gradients_in_a_whole_prefix(model)
    loss = loss_of(model)
    found = gradients(model)
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(found, expected, 0.0)
    model.gradient_checkpointing_enable()
    assert torch.allclose(loss_of(model), expected_loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients(model), expected, 1e-4)


def test_layers_in_the_middle_have_it_too() -> None:
    base = tiny_model("llama", num_hidden_layers=6)
    for layers in ("1,3-4", "5,0", "0-5", "top:6"):
        model = started(base, layers)
        expected_loss, expected = gradients_in_a_whole_prefix(model)
        assert torch.equal(loss_of(model), expected_loss)
        assert_same_gradients(gradients(model), expected, 0.0)
        assert len(expected) == 2 * len(model.prefix.trained)


def layers_with_a_graph(model: PrefixModel) -> dict[int, bool]:
    """For each decoder layer, whether the output of any module in it belongs to an autograd graph."""
    found: dict[int, bool] = {}

    def watch(number: int) -> Any:
        def look(module: Any, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            graph = any(isinstance(part, Tensor) and part.requires_grad for part in parts)
            found[number] = found.get(number, False) or graph

        return look

    for name, module in model.base_model.named_modules():
        numbers = [part for part in name.split(".") if part.isdigit()]
        if numbers:  # the first number in a module's name is its layer's
            module.register_forward_hook(watch(int(numbers[0])))
    loss_of(model)
    return found


@every_family
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_graph_reaches_below_the_lowest_chosen_layer(family: str, checkpointing: bool) -> None:
    for layers, expected in (("top:1", [False, True]), ("0", [True, True]), (None, [True, True])):
        model = started(tiny_model(family), layers)
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert layers_with_a_graph(model) == dict(enumerate(expected))


@every_family
@each_layer
@both_parameterisations
def test_training_moves_the_chosen_layers_and_leaves_the_others_as_they_started(
    family: str, layers: str, projection: bool
) -> None:
    base = tiny_model(family)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = started(base, layers, projection=projection)
    start, text = model.prefix.bake(), started(base, None).prefix.bake()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    first = loss_of(model)
    optimizer.step()
    loss_of(model)
    optimizer.step()
    assert loss_of(model) < first
    for number, (now, then) in enumerate(zip(model.prefix.bake().layers, start.layers, strict=True)):
        moved = number in model.prefix.trained
        assert torch.equal(now.key, then.key) != moved
        assert torch.equal(now.value, then.value) != moved
        if not moved:
            assert torch.equal(now.key, text.layers[number].key)
            assert torch.equal(now.value, text.layers[number].value)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    # two moments per trained number, and nothing for the frozen ones
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim() > 0)
    assert held == 2 * model.get_nb_trainable_parameters()[0]


@every_family
@both_parameterisations
def test_model_with_frozen_layers_starts_as_on_the_text(family: str, projection: bool) -> None:
    base = tiny_model(family)
    model = started(base, "top:1", projection=projection).eval()
    assert_close(logits(model, B), logits(base, joined(A, B))[:, A.shape[1] :], 1e-3)
