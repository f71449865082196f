"""Only the prefix learns, all of it learns, and its gradient is the derivative of what is served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import A, B, C, bare, every_family, generated, joined, kv_of, left_padded, logits, without_dropout
from torch.nn.functional import cross_entropy

from families import tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.attachment import attach
from prefixtune.errors import AttachError
from prefixtune.prefix import LayerKV

both_parameterisations = pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])

IDS, MASK = left_padded([B, C])
LABELS = IDS.masked_fill(MASK.cumsum(dim=1) <= 1, -100)  # a first token has no token before it
LABELS[:, -4] = -100
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def trainable(family: str, *, projection: bool = False, dtype: torch.dtype = torch.float32) -> PrefixModel:
    """A prefix that starts from A on its own fresh base, in training mode without dropout."""
    base = tiny_model(family, dtype=dtype)
    if dtype == torch.float64:
        base.config._experts_implementation = "eager"  # the grouped product has no float64
    config = PrefixConfig(
        length=A.shape[1], projection=projection, init="tokens", init_tokens=tuple(A[0].tolist())
    )
    torch.manual_seed(7)
    return without_dropout(PrefixModel(base, config))


def layer_gradients(model: PrefixModel) -> list[tuple[float, float]]:
    """Per layer the largest gradient of the key's numbers and of the value's."""
    parameters = model.prefix.parameterisation
    if not model.prefix.config.projection:
        pairs = zip(parameters.key, parameters.value, strict=True)
        return [(key.grad.abs().max().item(), value.grad.abs().max().item()) for key, value in pairs]
    rows = parameters.up.weight.grad.abs().amax(dim=1)  # [numbers]: one row per number of the KV
    sizes = [s.kv_heads * d for s in model.geometry.layers for d in (s.key_dim, s.value_dim)]
    largest = [part.max().item() for part in rows.split(sizes)]
    return list(zip(largest[::2], largest[1::2], strict=True))


def step(model: PrefixModel, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@every_family
@both_parameterisations
def test_every_key_and_value_has_gradient_at_step_two_and_after_an_evaluation(
    family: str, projection: bool
) -> None:
    model = trainable(family, projection=projection)
    before = {name: p.clone() for name, p in model.base_model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer), step(model, optimizer)]
    assert min(min(pair) for pair in layer_gradients(model)) > 1e-6
    model.eval()
    with torch.no_grad():
        model(**BATCH)
    generated(model, IDS, MASK)
    model.train()
    losses.append(step(model, optimizer))
    assert min(min(pair) for pair in layer_gradients(model)) > 1e-6
    losses.append(step(model, optimizer))
    assert losses[-1] < losses[0]
    assert len(set(losses)) == len(losses)
    for name, weights in model.base_model.state_dict().items():
        assert torch.equal(weights, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in model.base_model.parameters())
    assert all(p.grad is not None for p in model.prefix.parameters())


@every_family
def test_gradient_is_the_derivative_of_the_served_loss(family: str) -> None:
    model = trainable(family, dtype=torch.float64).double()
    kv = model.prefix.bake()

    def loss(module: Any) -> torch.Tensor:
        scores = module(input_ids=IDS, attention_mask=MASK).logits[:, :-1]  # [B, T-1, vocabulary]
        return cross_entropy(scores.flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)

    loss(model).backward()
    torch.manual_seed(11)
    direct = model.prefix.parameterisation
    moves = [(torch.randn_like(layer.key), torch.randn_like(layer.value)) for layer in kv.layers]
    slope = sum(
        (k * direct.key[i].grad).sum() + (v * direct.value[i].grad).sum() for i, (k, v) in enumerate(moves)
    )

    def served(size: float) -> float:
        moved = [
            LayerKV(layer.key + size * k, layer.value + size * v)
            for layer, (k, v) in zip(kv.layers, moves, strict=True)
        ]
        with attach(model.base_model, PrefixKV(tuple(moved))), torch.no_grad():
            return loss(model.base_model).item()

    size = 1e-4  # some layers round to float32 inside
    assert slope.item() == pytest.approx((served(size) - served(-size)) / (2 * size), rel=0.02, abs=1e-3)
    assert abs(slope.item()) > 1e-2


@every_family
@both_parameterisations
def test_checkpointing_changes_neither_loss_nor_gradient(family: str, projection: bool) -> None:
    def run(checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        model = trainable(family, projection=projection)
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = count_calls(model)
        loss = model(**BATCH).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.prefix.parameters()], calls[0]

    loss, gradients, calls = run(False)
    loss_again, gradients_again, calls_again = run(True)
    assert calls_again > calls  # the layers did run a second time
    assert torch.allclose(loss_again, loss, atol=1e-6, rtol=1e-6)
    for found, expected in zip(gradients_again, gradients, strict=True):
        assert expected.abs().max() > 0
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def count_calls(model: PrefixModel) -> list[int]:
    """How often linear layers of the base ran."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for module in model.base_model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    return calls


@every_family
def test_re_entrant_checkpointing_is_refused_not_trained_without_gradient(family: str) -> None:
    model = trainable(family)
    with pytest.raises(AttachError, match="re-entrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base_model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(AttachError, match="re-entrant"):
        model(**BATCH)


@every_family
def test_checkpointing_of_a_mixed_batch_keeps_each_rows_loss(family: str) -> None:
    base = without_dropout(tiny_model(family))
    rows = [kv_of(family, A), None]
    with attach(base, rows):
        plain = base(**BATCH, use_cache=False).loss
        base.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = base(**BATCH, use_cache=False).loss
    assert torch.allclose(checkpointed, plain, atol=1e-6)
    assert torch.allclose(plain, hand_made_loss(family, [A, A[:, :0]]), atol=1e-5)


def hand_made_loss(family: str, fronts: list[torch.Tensor]) -> torch.Tensor:
    """Mean over all targets, from the bare model's logits of each whole row."""
    scores, targets = [], []
    for row, (front, text) in enumerate(zip(fronts, (B, C), strict=True)):
        whole = logits(bare(family), joined(front, text))[0, front.shape[1] :]
        scores.append(whole[:-1])
        targets.append(LABELS[row, -text.shape[1] :][1:])
    return cross_entropy(torch.cat(scores), torch.cat(targets), ignore_index=-100)


@every_family
def test_loss_is_the_cross_entropy_of_the_bare_model_on_both_texts(family: str) -> None:
    model = PrefixModel(bare(family), kv_of(family, A)).eval()
    with torch.no_grad():
        found = model(**BATCH).loss
    assert torch.allclose(found, hand_made_loss(family, [A, A]), atol=1e-5)


@every_family
def test_loss_is_weighted_by_the_number_of_targets_that_the_trainer_counts(family: str) -> None:
    model = PrefixModel(bare(family), kv_of(family, A)).eval()
    targets = int((LABELS[:, 1:] != -100).sum())
    with torch.no_grad():
        mean = model(**BATCH).loss
        share = model(**BATCH, num_items_in_batch=torch.tensor(5 * targets)).loss
    assert share.item() == pytest.approx(mean.item() / 5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_tensors_are_read_anew_after_a_pass_without_gradient(dtype: torch.dtype) -> None:
    base = tiny_model("llama").to(dtype)
    text = torch.tensor([[5, 6, 7, 8, 9]]).expand(2, -1)
    made = PrefixKV.from_tokens(base, text[:1])
    live = [LayerKV(*(t.float().requires_grad_() for t in (layer.key, layer.value))) for layer in made.layers]
    with attach(base, [PrefixKV(tuple(live)), None]):
        with torch.no_grad():
            before = base(input_ids=text, use_cache=False).logits
        base(input_ids=text, labels=text, use_cache=False).loss.backward()
        assert all(layer.key.grad.any() and layer.value.grad.any() for layer in live)
        with torch.no_grad():
            for layer in live:
                layer.value.add_(1)
            after = base(input_ids=text, use_cache=False).logits
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
