"""Laws of a mixture's experts in training: filled up to few sizes they compute what transformers' own do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations import moe

from families import VOCAB, tiny_model
from prefixtune.attachment import aligned_experts, compile_layers, experts
from prefixtune.attachment.experts import keeps_kernels
from prefixtune.loss import Passes, RowTokens

MIXTURES = ("mixtral", "gpt-oss")


def module_of(family: str) -> Any:
    base = tiny_model(family)
    return next(m for name, m in base.named_modules() if name.endswith(".experts"))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_filled_up_experts_give_the_same_value_and_gradient(family: str, tokens: int) -> None:
    module = module_of(family)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 32, generator=generator)
    shares, chosen = torch.randn(tokens, module.num_experts, generator=generator).softmax(1).topk(2)
    weight = torch.randn(tokens, 32, generator=generator)

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        leaves = [hidden.clone().requires_grad_(), shares.clone().requires_grad_()]
        out = function(module, leaves[0], chosen, leaves[1])
        return (out, *torch.autograd.grad((out * weight).sum(), leaves))

    for found, expected in zip(run(experts._aligned), run(moe.grouped_mm_experts_forward), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_pass_in_bfloat16_has_experts_of_few_sizes(
    family: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(family).bfloat16()
    ends: list[int] = []
    own = moe._grouped_mm

    def watched(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ends.extend(offs.tolist())
        return own(rows, weight, offs=offs)

    monkeypatch.setattr(moe, "_grouped_mm", watched)
    ids = [torch.arange(3, 3 + length) % VOCAB for length in (21, 9)]
    passes = Passes.of(base, capacity=64, pad_token_id=0, packing=packing)
    ends.clear()  # models are tried first
    with passes.loss([RowTokens(one, one) for one in ids], None) as loss:
        assert bool(loss.isfinite())
    assert ends
    assert {end % 16 for end in ends} == {0}
    assert base.config._experts_implementation == "grouped_mm"


def test_the_trial_of_compiled_layers_runs_the_experts_that_a_run_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_model("mixtral").bfloat16()
    seen: list[str] = []

    def watched(layer: Any, **_: Any) -> None:
        def call(*args: Any, **more: Any) -> Any:
            seen.append(base.config._experts_implementation)
            return layer.forward(*args, **more)

        layer._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    compile_layers(base)
    assert set(seen) == {experts.NAME}


def test_experts_are_left_alone_where_no_kernels_are_kept() -> None:
    base = tiny_model("mixtral")
    with aligned_experts(base):
        assert base.config._experts_implementation == "grouped_mm"
    assert not keeps_kernels(base, torch.float32, "cpu")
    assert not keeps_kernels(base, torch.bfloat16, "cuda")
    assert not keeps_kernels(tiny_model("llama"), torch.bfloat16, "cpu")
    assert keeps_kernels(base, torch.bfloat16, "cpu")
