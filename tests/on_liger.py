"""Packs and training through Liger's kernels, beside the same without.

Not collected by itself: `test_liger.py` runs it in a process of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import stir_norms, tiny_model
from prefixtune.attachment import liger, packed, trial, use_liger, use_no_liger
from prefixtune.attachment.head import decoder_of
from prefixtune.cli import main
from prefixtune.config import TrainConfig
from prefixtune.errors import ConfigError
from prefixtune.prefix import PrefixKV
from prefixtune.train import defaults
from prefixtune.train.build import quicken
from small_runs import logged_losses, write_place
from triton_on_cpu import DEVICE, IS_REAL

ALIKE = ("llama", "qwen2", "qwen3", "mistral-sliding", "mixtral", "llama-yarn", "gemma", "gemma2", "gemma3")
# some of whose parts its kernels know, and none, of what is packed
PARTLY = ("phi3", "olmo2", "cohere2")
NONE = ("gpt2", "gpt-neox", "opt", "gpt-bigcode", "gpt-oss")
RUN = (
    "--length 4 --max-steps 2 --logging-steps 1 --packing-length 64 --retain 0 "
    "--gradient-accumulation-steps 2 --dtype float32"
)
# the interpreter computes bfloat16 as the integers that hold it
DTYPES = [torch.float32, torch.bfloat16] if IS_REAL else [torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_REAL:
        for module in (trial, defaults):
            monkeypatch.setattr(module, "check_liger", lambda device: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel was called since."""
    made: dict[str, int] = {}

    def counted(name: str, kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            made[name] = made.get(name, 0) + 1
            return kernel(*args)

        return call

    own = liger._kernels()
    found = {name: counted(name, kernel) for name, kernel in vars(own).items() if "forward" in name}
    found["LigerRMSNormFunction"] = SimpleNamespace(apply=counted("norm", own.LigerRMSNormFunction.apply))
    monkeypatch.setattr(liger, "_kernels", lambda: SimpleNamespace(**{**vars(own), **found}))
    return made


def frozen(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = tiny_model(family, **options).requires_grad_(False).to(dtype).to(DEVICE).eval()
    stir_norms(base)
    return base


def states_and_gradients(base: Any) -> list[torch.Tensor]:
    ids = (torch.arange(23, device=DEVICE)[None] * 7 + 3) % 40
    pairs = [
        (layer.key.requires_grad_(), layer.value.requires_grad_())
        for layer in PrefixKV.from_tokens(base, ids[:, :3]).layers
    ]
    with packed(base, pairs, (9, 14)) as run:
        states = run(ids).float()
        weights = torch.linspace(0, 50, states.numel(), device=DEVICE).cos().view_as(states)
        gradients = torch.autograd.grad((states * weights).sum(), [t for pair in pairs for t in pair])
    return [states.detach(), *(gradient.float() for gradient in gradients)]


@each_dtype
@pytest.mark.parametrize("family", ALIKE)
def test_states_and_gradients_are_those_without_it(
    family: str, dtype: torch.dtype, calls: dict[str, int]
) -> None:
    base = frozen(family, dtype)
    expected = states_and_gradients(base)
    assert not calls
    use_liger(base)
    calls.clear()
    found = states_and_gradients(base)
    layers = base.config.num_hidden_layers
    norms = sum("RMSNorm" in type(module).__name__ for module in decoder_of(base).modules())
    assert calls["norm"] == norms
    assert calls["rope_forward"] == layers
    gate = "geglu_forward" if family.startswith("gemma") else "swiglu_forward"
    assert family == "mixtral" or calls[gate] == layers
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    use_no_liger(base)
    calls.clear()
    assert all(torch.equal(*pair) for pair in zip(states_and_gradients(base), expected, strict=True))
    assert not calls


def test_recomputed_layers_have_the_same_gradients(calls: dict[str, int]) -> None:
    base = frozen("llama")
    expected = states_and_gradients(base)
    use_liger(base)
    base.train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    found = states_and_gradients(base)
    assert calls["swiglu_forward"] > base.config.num_hidden_layers
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", PARTLY)
def test_a_model_with_some_of_the_parts_is_what_it_was(family: str, calls: dict[str, int]) -> None:
    base = frozen(family)
    expected = states_and_gradients(base)
    use_liger(base)
    calls.clear()
    found = states_and_gradients(base)
    assert calls
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", NONE)
def test_a_model_with_none_of_the_parts_is_refused(family: str) -> None:
    base = frozen(family)
    with pytest.raises(ConfigError, match=f"none of the parts of {base.config.model_type}"):
        use_liger(base)


@pytest.mark.parametrize("gated", [liger.STEPS.silu_gate, liger.STEPS.gelu_gate])
def test_the_mlp_is_gone_backwards_through_once(gated: Any) -> None:
    gate, up = (torch.randn(1, 5, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    total = gated(gate * 1, up * 1).sum()
    torch.autograd.grad(total, (gate, up), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, (gate, up))


def test_queries_keys_and_their_gradients_stay_as_they_were() -> None:
    made = [torch.randn(1, 5, heads, 8, device=DEVICE, requires_grad=True) for heads in (4, 2)]
    query, key = (tensor.transpose(1, 2) for tensor in made)  # laid out as a projection leaves them
    cos, sin = torch.randn(2, 1, 5, 8, device=DEVICE)
    before = query.detach().clone()
    turned = liger.STEPS.turn(query, key, cos, sin)
    given = [torch.randn_like(part) for part in turned]
    kept = [gradient.clone() for gradient in given]
    torch.autograd.grad(turned, (query, key), given)
    assert torch.equal(query, before)
    assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True))


def test_the_next_run_of_a_process_is_asked_anew(calls: dict[str, int]) -> None:
    base = frozen("llama")
    quicken(base, TrainConfig(liger=True), packing=True, compiled=False)
    assert calls
    quicken(base, TrainConfig(), packing=True, compiled=False)
    calls.clear()
    states_and_gradients(base)
    assert not calls


def test_rows_that_are_not_packed_are_refused() -> None:
    with pytest.raises(ConfigError, match="only packed rows"):
        quicken(frozen("bloom"), TrainConfig(liger=True), packing=False, compiled=False)


def test_heads_may_be_another_axis() -> None:
    query, key = (torch.randn(1, 5, heads, 8, device=DEVICE) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8, device=DEVICE)
    expected = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(liger.STEPS.turn(query, key, cos, sin, 2), expected)


def test_a_norm_in_another_precision_is_llamas() -> None:
    hidden = torch.randn(3, 16, device=DEVICE, dtype=torch.bfloat16)
    assert liger.STEPS.norm(hidden, torch.ones(16, device=DEVICE), 1e-6).dtype == torch.float32


def _wrong(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return gate, up, gate * up


def _wrong_backwards(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> Any:
    return gradient, gradient


def _broken(*args: Any) -> Any:
    raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nand much more")


@pytest.mark.parametrize(
    ("kernel", "instead", "said"),
    [
        ("swiglu_forward", _wrong, r"other hidden states \(off by"),
        ("swiglu_backward", _wrong_backwards, r"other gradients \(off by"),
        ("rope_forward", _broken, "device kernel image is invalid"),
    ],
)
def test_kernels_that_do_something_else_are_not_used(
    kernel: str, instead: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = frozen("llama")
    expected = states_and_gradients(base)
    kernels = SimpleNamespace(**{**vars(liger._kernels()), kernel: instead})
    monkeypatch.setattr(liger, "_kernels", lambda: kernels)
    with pytest.raises(ConfigError, match=said) as told:
        use_liger(base)
    assert "much more" not in str(told.value)
    assert all(torch.equal(*pair) for pair in zip(states_and_gradients(base), expected, strict=True))


def test_a_base_that_trains_is_left_alone() -> None:
    with pytest.raises(ConfigError, match="none of the parts"):
        use_liger(frozen("llama").requires_grad_(True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": f"Say {i}.", "output": "yes" * (1 + i % 3)} for i in range(8)]
    return write_place(tmp_path_factory.mktemp("liger"), rows)


def train(place: Path, output: Path, *more: str) -> Result:
    line = f"train --model {place}/model --data {place}/rows.json --output {output} {RUN}"
    return CliRunner().invoke(main, [*line.split(), *more])


def test_a_run_with_it_learns_what_one_without_does_and_goes_on_without(
    place: Path, tmp_path: Path, calls: dict[str, int]
) -> None:
    plain = train(place, tmp_path / "plain")
    assert plain.exit_code == 0, plain.stderr
    assert not calls
    done = train(place, tmp_path / "liger", "--liger")
    assert done.exit_code == 0, done.stderr
    assert calls["rope_forward"] > 2 * 4
    assert logged_losses(tmp_path / "liger") == pytest.approx(logged_losses(tmp_path / "plain"), rel=1e-4)
    stopped(tmp_path / "liger")
    calls.clear()
    resumed = train(place, tmp_path / "liger", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "liger: not as the run was begun" in resumed.stderr
    assert not calls
    assert logged_losses(tmp_path / "liger") == pytest.approx(logged_losses(tmp_path / "plain"), rel=1e-4)


def test_a_run_that_was_compiled_by_itself_goes_on_with_it(
    place: Path, tmp_path: Path, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(self: nn.Module, **options: Any) -> None:
        self._compiled_call_impl = self.forward

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", compiled)
        patch.setattr(defaults, "compiled_for", lambda *args, **options: True)
        begun = train(place, tmp_path / "run")
    assert "the layers are compiled" in begun.stderr
    stopped(tmp_path / "run")
    resumed = train(place, tmp_path / "run", "--resume", "--liger")
    assert resumed.exit_code == 0, resumed.stderr
    assert "the layers are compiled" not in resumed.stderr
    assert calls["rope_forward"] > 4


def stopped(output: Path) -> None:
    """What a run leaves that was stopped after its first step."""
    for path in (output / "checkpoint-2", output / "best"):
        shutil.rmtree(path, ignore_errors=True)
    (output / "prefix.json").unlink()
