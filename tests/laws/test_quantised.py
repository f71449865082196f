"""Laws of quantised bases: what is computed is what a model with the unpacked weights computes, gradient too.

The reference is the same model with plain linear layers that hold the unpacked weights.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from families import FAMILIES, tiny_model
from laws.oracle import TOLERANCE, A, B, C
from prefixtune import PrefixConfig, PrefixKV, PrefixModel, attach
from prefixtune.config import SCHEMES
from prefixtune.data import Example
from prefixtune.errors import ConfigError, StorageError, UnsupportedModelError
from prefixtune.fingerprint import Fingerprint, weights_digest
from prefixtune.geometry import Geometry, compute_dtype
from prefixtune.quantize import QuantizedLinear, count_numbers, quantization, quantize_base, saved_bytes
from prefixtune.train import PrefixTrainer

SAME = 1e-6  # relative; the two sides run the same matmuls on the same numbers
MIXTURES = {"mixtral": "MixtralExperts", "gpt-oss": "GptOssExperts", "llama4": "Llama4TextExperts"}
DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)
START = PrefixConfig(length=3, init="tokens", init_tokens=(5, 6, 7))

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_family = pytest.mark.parametrize("family", DENSE)


@cache
def quantised(family: str, scheme: str) -> Any:
    return quantize_base(tiny_model(family), scheme)


def unpacked(model: Any) -> Any:
    """A copy with plain linear layers that hold what the quantised ones compute with."""
    plain = deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight = nn.Parameter(layer.unpacked(torch.float32), requires_grad=False)
            if layer.bias is not None:
                linear.bias = layer.bias
            plain.set_submodule(name, linear.eval())
    return plain


def loss_and_gradient(base: Any, *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of every key and value number of the prefix."""
    model = PrefixModel(base, START).train(train)
    found = model(input_ids=B, labels=B)
    found.loss.backward()
    return found.logits.detach(), gradient_of(model)


def gradient_of(model: PrefixModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.prefix.parameters() if p.grad is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@each_scheme
@each_family
def test_logits_and_gradient_are_those_of_the_unpacked_weights(family: str, scheme: str) -> None:
    base = quantised(family, scheme)
    (logits, gradient), (exact_logits, exact_gradient) = map(loss_and_gradient, (base, unpacked(base)))
    assert relative(logits, exact_logits) < SAME
    assert relative(gradient, exact_gradient) < SAME
    assert exact_gradient.norm() > 0


@each_scheme
@each_family
def test_oracle_holds_on_a_quantised_base(family: str, scheme: str) -> None:
    base = quantised(family, scheme)
    with torch.no_grad():
        whole = base(input_ids=torch.cat([A, B], dim=1)).logits[:, A.shape[1] :]
        with attach(base, PrefixKV.from_tokens(base, A)):
            found = base(input_ids=B).logits
    assert (found - whole).abs().max() < TOLERANCE


@each_scheme
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_refused_by_the_kind_of_layer_and_stay_as_they_were(family: str, scheme: str) -> None:
    base = tiny_model(family)
    before = base(input_ids=B).logits
    with pytest.raises(UnsupportedModelError, match=MIXTURES[family]):
        quantize_base(base, scheme)
    assert torch.equal(base(input_ids=B).logits, before)


@pytest.mark.parametrize("family", ["falcon", "gpt2"])  # Falcon's linear layers are a class of its own
def test_saved_bytes_are_known_without_weights(family: str) -> None:
    base = tiny_model(family)
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(base.config)
    assert saved_bytes(empty, "int8", torch.float32) == saved_bytes(base, "int8", torch.float32)


@each_scheme
def test_weights_are_off_by_half_a_step_at_most(scheme: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64) * torch.logspace(-6, 2, 48)[:, None]
    weight[3] = 0
    layer = QuantizedLinear(weight, None, scheme)
    error, largest = (layer.unpacked(torch.float32) - weight).abs(), weight.abs().amax(dim=1, keepdim=True)
    # nf4's widest gap, between -1 and -0.696, is 0.304 of the block's largest; a block here is a row
    step = largest / 127 * (1 + 2**-8) if scheme == "int8" else 0.305 * largest
    assert bool((error <= step / 2).all())
    assert bool((error[4:].amax(dim=1) > 0).all())


@each_scheme
def test_a_weight_packed_in_pieces_is_the_one_packed_at_once(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(30, 50)  # the last block is not full
    whole = QuantizedLinear(weight, None, scheme)
    monkeypatch.setattr("prefixtune.quantize.PIECE", 128)
    pieces = QuantizedLinear(weight, None, scheme)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.scale, whole.scale)


@each_scheme
def test_no_unpacked_weight_waits_for_the_backward_pass(scheme: str) -> None:
    layer = QuantizedLinear(torch.randn(40, 64), torch.randn(40), scheme)
    kept: list[int] = []
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda _: None):
        layer(x).sum()
    assert sum(kept) == 0


@each_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_of_activations_changes_neither_packed_weights_nor_scales(
    scheme: str, dtype: torch.dtype
) -> None:
    layer = QuantizedLinear(torch.randn(40, 64), torch.randn(40), scheme)
    packed, scale = layer.packed.clone(), layer.scale.clone()
    layer.to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    layer.to(torch.float32)
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.scale, scale)
    # one rounding, as if float32's product were rounded
    assert torch.equal(layer.unpacked(dtype), layer.unpacked(torch.float32).to(dtype))


def test_under_autocast_gradients_have_the_precision_of_what_came_in() -> None:
    layer = QuantizedLinear(torch.randn(40, 64), None, "int8")
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert relative(x.grad, layer.weight.sum(dim=0).expand(7, -1)) < 0.02


def bitsandbytes_base(folder: Path, family: str = "llama", **options: Any) -> Any:
    """A base as a user of transformers quantises it, without our loader."""
    tiny_model(family, hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    config = hf.BitsAndBytesConfig(**options)
    return hf.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
INT8 = dict(load_in_8bit=True, llm_int8_threshold=0.0)
FOREIGN = {"nf4": NF4, "fp4": NF4 | dict(bnb_4bit_quant_type="fp4"), "llm.int8": INT8}


@pytest.mark.parametrize("kind", [*SCHEMES, "bitsandbytes-nf4"])
def test_evaluation_in_between_leaves_the_gradient_as_it_was(tmp_path: Path, kind: str) -> None:
    """bitsandbytes' own 4-bit layer loses it on CPUs with AVX512-BF16, unless it is kept from repacking."""
    base = quantised("llama", kind) if kind in SCHEMES else bitsandbytes_base(tmp_path, **NF4)
    model = PrefixModel(base, START)

    def gradient() -> Tensor:
        model.train().zero_grad()
        model(input_ids=B, labels=B).loss.backward()
        return gradient_of(model)

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=B)
        model.generate(input_ids=B, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert relative(gradient(), before) < SAME
    assert before.norm() > 0


def test_base_that_was_repacked_without_a_backward_pass_is_refused_for_training(tmp_path: Path) -> None:
    base = bitsandbytes_base(tmp_path, **NF4)
    PrefixModel(base, START).save_pretrained(tmp_path / "prefix")
    base.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    for make in (
        lambda: PrefixModel(base, START),
        lambda: PrefixModel.from_pretrained(base, tmp_path / "prefix", is_trainable=True),
    ):
        with pytest.raises(UnsupportedModelError, match="up_proj"):
            make()


def test_rounding_that_depends_on_later_tokens_is_refused(tmp_path: Path) -> None:
    base = bitsandbytes_base(tmp_path, load_in_8bit=True)  # with its default threshold
    with pytest.raises(UnsupportedModelError, match="llm_int8_threshold"):
        PrefixModel(base, START)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("trainer", [hf.Trainer, PrefixTrainer])
def test_trainers_train_on_a_base_that_transformers_quantised(
    tmp_path: Path, kind: str, trainer: Any
) -> None:
    base = bitsandbytes_base(tmp_path, **FOREIGN[kind])
    model = PrefixModel(base, START)
    before = model.prefix.bake()
    run(trainer, model, tmp_path)
    after = model.prefix.bake()
    for old, new in zip(before.layers, after.layers, strict=True):
        assert float((new.key - old.key).abs().min()) > 0
        assert float((new.value - old.value).abs().min()) > 0
    model.save_pretrained(tmp_path / "prefix")
    loaded = PrefixModel.from_pretrained(base, tmp_path / "prefix")
    assert torch.equal(loaded(input_ids=B).logits, model.eval()(input_ids=B).logits)
    assert loaded.record["quantization"]["scheme"] == kind
    assert loaded.record["quantization"]["library"] == "bitsandbytes"


@each_scheme
@pytest.mark.parametrize("trainer", [hf.Trainer, PrefixTrainer])
def test_trainers_train_on_our_quantised_base_and_leave_it_as_it_was(
    tmp_path: Path, scheme: str, trainer: Any
) -> None:
    base = quantize_base(tiny_model("gpt2"), scheme)
    before = deepcopy(base.state_dict())
    model = PrefixModel(base, START)
    start = model.prefix.bake()
    run(trainer, model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for old, new in zip(start.layers, model.prefix.bake().layers, strict=True):
        assert float((new.key - old.key).abs().min()) > 0


def run(trainer: Any, model: PrefixModel, folder: Path) -> None:
    arguments = hf.TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    ids = B[0].tolist()
    rows = [{"input_ids": ids, "labels": ids}] * 4
    extra: dict[str, Any] = {}
    if trainer is PrefixTrainer:
        extra["pad_token_id"] = 0
        extra["eval_dataset"] = [Example(input_ids=ids, labels=ids, origin="row 1", truncated=0)]
    made = trainer(model=model, args=arguments, train_dataset=rows, **extra)
    made.train()
    if extra:
        assert made.evaluate()["eval_loss"] > 0


@each_scheme
def test_checkpointing_changes_no_gradient_on_a_quantised_base(scheme: str) -> None:
    base = quantize_base(tiny_model("llama"), scheme)
    _, plain = loss_and_gradient(base, train=True)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    _, recomputed = loss_and_gradient(base, train=True)
    assert torch.equal(plain, recomputed)


@each_scheme
def test_prefix_finds_its_base_quantised_or_not_and_refuses_another(tmp_path: Path, scheme: str) -> None:
    base = quantise_copy("llama", scheme)
    model = PrefixModel(base, START)
    model.save_pretrained(tmp_path)
    for again in (tiny_model("llama"), quantise_copy("llama", "int8"), quantise_copy("llama", "nf4")):
        loaded = PrefixModel.from_pretrained(again, tmp_path)
        assert loaded.record["quantization"] == quantization(base)
    again = PrefixModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert again.record["quantization"] is None  # what it goes on training on
    # a fine-tuned copy that kept the embeddings: what a quantised base shows of itself is the same
    other = tiny_model("llama", seed=1)
    other.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
    for wrong in (quantize_base(deepcopy(other), scheme), other):
        with pytest.raises(StorageError, match="other weights"):
            PrefixModel.from_pretrained(wrong, tmp_path)


def quantise_copy(family: str, scheme: str) -> Any:
    return quantize_base(tiny_model(family), scheme)


@each_scheme
def test_what_is_recorded_names_scheme_library_and_version(scheme: str) -> None:
    assert quantization(tiny_model("llama")) is None
    told = quantization(quantised("llama", scheme))
    assert told is not None
    assert told["scheme"] == scheme
    assert told["library"] == {"int8": "torch", "nf4": "bitsandbytes"}[scheme]
    assert told["version"].split(".")[0].isdigit()


@each_scheme
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_numbers_are_counted_as_if_the_base_were_not_quantised(family: str, scheme: str) -> None:
    expected = PrefixModel(tiny_model(family), START).get_nb_trainable_parameters()
    assert PrefixModel(quantised(family, scheme), START).get_nb_trainable_parameters() == expected


def test_numbers_of_a_base_that_transformers_quantised_are_counted_too(tmp_path: Path) -> None:
    four = bitsandbytes_base(tmp_path, **NF4)
    plain = tiny_model("llama", hidden_size=64, intermediate_size=128)
    assert count_numbers(four) == sum(p.numel() for p in plain.parameters())


def test_precision_is_told_by_the_activations_not_by_the_first_parameter() -> None:
    """A packed first parameter is not noticed by the probe, the self-test, a 4D mask and the fingerprint."""
    plain, odd = (tiny_model("llama", dtype=torch.bfloat16) for _ in range(2))
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        packed = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
        odd.register_parameter("packed", packed)
        assert next(odd.parameters()).dtype == dtype
        assert compute_dtype(odd) == PrefixModel(odd, START).dtype == torch.bfloat16
    assert Geometry.probe(odd) == Geometry.probe(plain)
    mask = torch.ones(1, 1, C.shape[1], C.shape[1]).tril() > 0
    found, expected = (
        PrefixModel(base, START).eval()(input_ids=C, attention_mask=mask) for base in (odd, plain)
    )
    assert torch.equal(found.logits, expected.logits)
    del odd.packed
    odd.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    assert Fingerprint.of(odd).matches(Fingerprint.of(plain))


def test_a_quantised_base_is_not_quantised_again(tmp_path: Path) -> None:
    for base in (quantised("llama", "int8"), bitsandbytes_base(tmp_path, **NF4)):
        with pytest.raises(ConfigError, match="already"):
            quantize_base(base, "nf4")


def test_one_number_of_a_wrapped_tensor_is_another_digest() -> None:
    def made(number: float) -> str:
        layer = nn.Linear(2, 2, bias=False)
        inner = torch.zeros(2, 2), torch.full((2, 2), number)
        layer.weight = nn.Parameter(TwoTensor(*inner), requires_grad=False)
        return weights_digest(layer)

    assert made(1.0) == made(1.0)
    assert made(1.0) != made(2.0)
