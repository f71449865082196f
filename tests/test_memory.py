"""Laws of the memory estimate: live bytes are counted exactly, and the peak of a run is what was said."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner, Result
from packaging.version import Version

from families import COMMON, FAMILIES, randomised, tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.attachment import documents, packed, packs
from prefixtune.cli import main
from prefixtune.compare import child as compare_child
from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import Example
from prefixtune.distill import distill
from prefixtune.errors import OutOfMemoryError, UnsupportedModelError
from prefixtune.load import LoadedBase, empty_model, load_base, load_tokenizer, weight_files
from prefixtune.loss import Passes
from prefixtune.memory import (
    LiveBytes,
    Setup,
    StepBytes,
    check_fit,
    estimate,
    explain_full_memory,
    keep_few_kernels,
    measure_step,
    reading_bytes,
    take_workspaces,
)
from prefixtune.memory.estimate import sampling_bytes
from prefixtune.memory.host import KERNEL_CACHES, KERNELS, group_room
from prefixtune.memory.step import evaluation_step, training_step, without_weights
from prefixtune.quantize import QuantizedLinear
from prefixtune.train import train as run_train
from prefixtune.train import trainer_for
from prefixtune.train.defaults import packing_length_for
from prefixtune.train.forecast import check_weights, forecast_for, setup_of
from prefixtune.weights import made_anew, stored_tensors
from tokenizers_for_tests import byte_tokenizer

MIB, GIB = 2**20, 2**30
PLENTY = 2**60
TOLERANCE = 0.15  # of the measured peak
FEW = 5  # rows of a step: more than one pass of 512 tokens


# --- the tracker -------------------------------------------------------------------------------------------


def test_live_bytes_follow_storages_and_not_views() -> None:
    with LiveBytes() as counted:
        tensor = torch.zeros(1000, 1000) * 2  # the zeros go when the product is there
        assert (counted.live, counted.peak) == (4_000_000, 8_000_000)
        view = tensor[:10].t()
        del tensor
        assert counted.live == 4_000_000
        del view
        assert counted.live == 0


def test_peak_of_a_backward_pass_is_the_hand_count() -> None:
    width = 256
    with LiveBytes() as counted:
        x = torch.zeros(width, width, requires_grad=True)
        before, one = counted.live, 4 * width * width
        loss = x.exp().sin().cos().sum()  # kept: exp's output and sin's output
        assert counted.live - before == 2 * one + 4
        loss.backward()
        assert x.grad is not None
    assert counted.live - before == one + 4  # the gradient and the loss


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a process cannot tell its peak from its parent's"
)
def test_peak_of_a_process_is_its_own_and_not_that_of_the_larger_one_that_started_it() -> None:
    child = "import torch; from prefixtune.memory import measured_peak; print(measured_peak())"
    large = torch.ones(2**28)  # 1 GiB; the child has about half of it
    told = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert 0.05 * GIB < int(told.stdout) < large.nbytes


class _Square(torch.autograd.Function):
    """Keeps one tensor for the backward pass, as a chunked loss would."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_own_autograd_functions_and_masks_are_counted() -> None:
    with LiveBytes() as counted:
        mask = torch.arange(8) % 2 == 0
        weight = torch.zeros(8, 1000, requires_grad=True)
        hidden = weight * 1
        picked = hidden[mask]  # [4, 1000]: the mask's values are known
        assert picked.shape == (4, 1000)
        before = counted.live
        out = torch.bmm(_Square.apply(picked)[None], torch.zeros(1, 1000, 3))  # type: ignore[no-untyped-call]
        assert counted.live - before == 4 * (1000 * 3 + 4 * 3)  # the square is of no use in the backward pass
        out.sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == (8, 1000)


# --- a step ------------------------------------------------------------------------------------------------


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


def small(**changes: Any) -> Any:
    sizes = dict(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return meta_model(hf.LlamaConfig(**sizes | changes))


def setup(**changes: Any) -> Setup:
    values: dict[str, Any] = dict(prefix=PrefixConfig(length=10), lengths=(64, 64), longest=64)
    return Setup(**values | changes)


def test_weights_prefix_optimizer_and_gradients_are_the_tensors_bytes() -> None:
    base = small(tie_word_embeddings=True)
    trained = 10 * base.config.num_hidden_layers * 2 * 2 * 16  # P, layers, key and value, heads, head dim
    step = measure_step(base, setup())
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    assert step.weights == sum(p.nbytes for p in base.parameters()) + buffers
    assert step.prefix == step.gradients == 4 * trained
    square = 2 * 16 * 16  # of each head's covariance and basis, for keys and values
    assert step.optimizer == 4 * (2 * trained + base.config.num_hidden_layers * 2 * 2 * square)
    half = measure_step(base, setup(dtype=torch.bfloat16))
    assert half.weights - buffers == (step.weights - buffers) / 2
    assert (half.prefix, half.optimizer) == (step.prefix, step.optimizer)


def test_logits_grow_with_the_vocabulary_and_activations_do_not() -> None:
    one, two = (measure_step(small(vocab_size=size), setup(lengths=(128, 128))) for size in (4000, 8000))
    assert two.logits == pytest.approx(2 * one.logits, rel=0.01)
    assert two.activations == pytest.approx(one.activations, rel=0.05)
    large, larger = (measure_step(small(vocab_size=2**18), setup(lengths=(n,))) for n in (250, 500))
    assert larger.logits == pytest.approx(large.logits, rel=0.01)  # a chunk of them


def test_checkpointing_keeps_one_layer_and_the_layers_inputs() -> None:
    shapes = dict(vocab_size=100)
    few, many = (
        measure_step(small(num_hidden_layers=layers, **shapes), setup(checkpointing=True))
        for layers in (4, 8)
    )
    inputs = 4 * 2 * 64 * 64  # bytes of one layer's input: float32, rows, tokens, hidden size
    assert many.activations - few.activations == pytest.approx(4 * inputs, rel=0.25)
    assert measure_step(small(num_hidden_layers=8, **shapes), setup()).activations > 3 * many.activations


def test_evaluation_counts_where_its_pass_is_the_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measure_step(small(), setup()).total
    short = setup(eval_lengths=setup().lengths)
    assert measure_step(small(), short).total == plain
    assert measure_step(small(), setup(eval_lengths=(200,) * 60)).total > plain
    monkeypatch.setattr(Setup, "evaluation_may_take_more", True)  # what is left out takes no more indeed
    assert measure_step(small(), short).total == plain


def test_neutral_text_counts_where_the_rows_are_short_or_the_vocabulary_is_large() -> None:
    short, long = (setup(lengths=(n,), neutral_lengths=(64, 64)) for n in (30, 256))
    assert measure_step(small(), short).total > measure_step(small(), setup(lengths=(30,))).total
    plain = measure_step(small(), setup(lengths=(256,)))
    assert plain.total <= measure_step(small(), long).total <= plain.total + plain.gradients
    wide = small(vocab_size=2**17, num_hidden_layers=2)
    with_neutral, without = (measure_step(wide, one) for one in (long, setup(lengths=(256,))))
    assert with_neutral.logits > without.logits  # a teacher's beside the model's


def test_rows_that_a_run_would_refuse_are_counted() -> None:
    base = meta_model(tiny_model("gpt2").config)  # 128 positions
    one, two = (measure_step(base, setup(lengths=lengths)) for lengths in ((126,), (126, 40)))
    assert two.activations > one.activations > 0


def test_accumulation_keeps_gradients_beside_the_activations() -> None:
    projected = PrefixConfig(length=10, projection=True, hidden_size=512)
    one, two = (measure_step(small(), setup(prefix=projected, passes=n)) for n in (1, 2))
    assert 0 <= two.total - one.total <= one.gradients
    assert (two.weights, two.prefix, two.gradients) == (one.weights, one.prefix, one.gradients)


def test_a_copy_without_weights_is_not_asked_for_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("prefixtune.geometry._counts_the_mask", lambda base: bool(asked.append(base)))
    measure_step(small(), setup())
    assert not asked


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_without_weights(family: str) -> None:
    if family == "opt" and Version(hf.__version__) < Version("5.18"):
        pytest.skip("transformers 5.17 reads the values of OPT's mask")
    base = meta_model(tiny_model(family).config)
    packing = not packs(base)
    assert packing == (not packs(tiny_model(family)))  # the same answer without weights
    plain, checkpointed = (
        measure_step(base, setup(lengths=(32, 16), packing=packing, checkpointing=on)) for on in (False, True)
    )
    assert plain.activations > 0
    assert checkpointed.total <= plain.total


@pytest.mark.parametrize(
    "lengths", [{"lengths": (40, 40, 39)}, {"lengths": (9,), "neutral_lengths": (64, 64)}]
)
def test_measured_step_is_what_the_same_step_on_real_tensors_allocates(lengths: dict[str, Any]) -> None:
    """Of the same code, with weights: storages counted alike, kernels' own buffers left out."""
    from prefixtune import PrefixModel
    from prefixtune.memory.step import training_step

    base = tiny_model("llama", num_hidden_layers=3)
    plan = setup(**lengths, longest=40)
    predicted = measure_step(meta_model(base.config), plan)
    model = PrefixModel(base, plan.prefix).train()
    seen = _RealBytes()
    with seen:
        training_step(model, plan)
    assert predicted.activations + predicted.logits + predicted.gradients == pytest.approx(
        seen.peak, rel=0.02
    )


class _RealBytes(LiveBytes):
    """The same count over tensors that have their data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.count(tensor)
        return result


# --- what fits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("common", [0, 13])  # tokens that all rows begin with
@pytest.mark.parametrize("steps", [2, 9])  # within an epoch, and beyond one
def test_estimated_pass_is_the_largest_that_the_trainer_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packing: bool, common: int, steps: int
) -> None:
    seen: list[int] = []
    loss = Passes.loss

    def size(lengths: Sequence[int]) -> int:
        held_once = common * (len(lengths) - 1)
        return sum(lengths) - held_once if packing else len(lengths) * max(lengths)

    def watched(self: Passes, rows: Any, pairs: Any, **options: Any) -> Any:
        seen.append(size([len(row.input_ids) for row in rows]))
        return loss(self, rows, pairs, **options)

    monkeypatch.setattr(Passes, "loss", watched)
    examples = [
        Example(
            input_ids=(3,) * common + tuple(range(n, 0, -1)),  # no two of a length, so that no more is common
            labels=(-100,) * (common + n - 2) + (2, 1),
            origin="",
            truncated=0,
        )
        for n in random.Random(1).sample(range(4, 50), 30)
    ]
    config = TrainConfig(
        max_steps=steps, packing=packing, packing_length=64, report_to="none", retain=0, dtype="float32"
    )
    base = LoadedBase(model=tiny_model("llama"), tokenizer=None, name="tiny", dtype_reason="")
    options = {"length": 3, "init": "random"}
    trainer, _ = trainer_for(
        base, examples, prefix_options=options, config=config, output=tmp_path / "run", pad_token_id=0
    )
    trainer.train()
    setup = setup_of(
        config, PrefixConfig(**options), examples, packing=packing, dtype=torch.float32, device="cpu"
    )
    assert setup.tokens == max(seen)
    assert setup.tokens == size(setup.lengths)
    assert setup.common == (common if packing else 0)
    own = sum(setup.lengths) - setup.common * len(setup.lengths)
    assert setup.target_share == pytest.approx(2 * len(setup.lengths) / own)
    assert setup.passes == 2  # of an optimizer step
    assert setup.neutral_lengths == ()
    retaining = dataclasses.replace(config, retain=0.1)
    place: dict[str, Any] = {"packing": packing, "dtype": torch.float32, "device": "cpu"}
    assert setup_of(retaining, PrefixConfig(**options), examples, **place).neutral_lengths == (64, 64)


def test_advice_holds_what_it_says() -> None:
    wide = dict(lengths=(256,) * 8, longest=256, prefix=PrefixConfig(length=10, projection=True))
    base, plan = small(), setup(**wide)
    found = estimate(base, plan, available=1)
    assert not found.fits
    alone = {item.change: item.peak_bytes for item in found.advice}
    assert (
        alone["--gradient-checkpointing"]
        == estimate(base, setup(**wide, checkpointing=True), available=PLENTY).peak
    )
    assert all(peak < found.peak for peak in alone.values())
    options = [word for word in list(alone)[-1].split() if word.startswith("--")]
    assert len(options) >= 5  # all of them at once,
    assert len(set(options)) == len(options)  # which can be typed as they stand
    assert min(alone.values()) == alone[list(alone)[-1]]


def test_advice_leaves_out_what_a_model_cannot_have() -> None:
    """Experts are not quantised: a run that does not fit is refused all the same, with what helps."""
    base = meta_model(tiny_model("mixtral").config)
    found = estimate(base, setup(), available=1)
    changes = [item.change for item in found.advice]
    assert "--gradient-checkpointing" in changes
    assert not [change for change in changes if "--quantize" in change]
    with pytest.raises(OutOfMemoryError, match="would need"):
        check_fit(found, force=False)


def test_changes_together_leave_out_packing_where_reading_packed_weights_is_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = small(num_hidden_layers=2, hidden_size=1024, vocab_size=30_000)
    wide = setup(lengths=(256,) * 8, longest=256)
    peak = estimate(base, wide, available=PLENTY).peak
    monkeypatch.setattr(
        sys.modules["prefixtune.memory.estimate"],
        "reading_bytes",
        lambda *_, quantize, **__: peak - 1 if quantize else 0,
    )
    found = estimate(base, wide, available=1)
    packed_ = next(item for item in found.advice if item.change == "--quantize int8")
    assert packed_.while_loading
    assert "--quantize int8 needs" in found.hint
    assert found.hint.count("still too much while the weights are read") == 2  # of both schemes
    last = found.advice[-1]
    assert last.peak_bytes == min(item.peak_bytes for item in found.advice) < 0.9 * peak
    assert "--dtype bfloat16" in last.change
    assert "--quantize" not in last.change
    assert not last.while_loading


def test_changes_together_are_told_where_they_beat_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {torch.float32: (4 * GIB, 3 * GIB), torch.bfloat16: (2 * GIB, 2 * GIB)}
    monkeypatch.setattr(
        sys.modules["prefixtune.memory.estimate"],
        "reading_bytes",
        lambda base, dtype, *, quantize, **_: sizes[dtype][quantize is not None],
    )
    found = estimate(small(num_hidden_layers=2), setup(), available=1)
    assert [item.change for item in found.advice] == [
        "--dtype bfloat16", "--quantize int8", "--quantize nf4"
    ]  # fmt: skip


def test_changes_that_do_nothing_alone_are_told_where_together_they_are_enough() -> None:
    """Steps and the sampling of neutral text take as much: less of the one is no less at the peak."""
    base = small(num_hidden_layers=6)
    plan = setup(lengths=(600,), longest=600, neutral_lengths=(64, 64), dtype=torch.bfloat16)
    step = estimate(base, plan, available=PLENTY)
    one = estimate(base, dataclasses.replace(plan, sampled_rows=1), available=PLENTY)
    rows = (step.peak - one.sampling) // (one.sampling - step.step.weights - step.step.prefix) + 3
    alike = dataclasses.replace(plan, sampled_rows=rows)
    both = dataclasses.replace(alike, checkpointing=True, neutral_lengths=(), sampled_rows=0)
    peak = estimate(base, both, available=PLENTY).peak
    found = estimate(base, alike, available=peak)
    assert found.peak == found.sampling < 1.02 * step.peak
    assert peak < 0.95 * found.peak
    *alone, last = found.advice
    assert not any(item.fits for item in alone)
    assert last.change == "--gradient-checkpointing --retain 0"  # and nothing that is not needed
    assert last.fits
    assert last.peak_bytes == peak


def test_a_peak_of_the_past_is_not_taken_for_reading_the_weights() -> None:
    wide = setup(lengths=(256,) * 8, longest=256)
    peak = estimate(small(), wide, available=PLENTY).peak
    found = estimate(small(), wide, available=1, so_far=peak - 1)
    assert found.peak == peak
    assert found.advice[0].peak_bytes == peak - 1
    assert not [item for item in found.advice if item.while_loading]


def test_a_model_that_cannot_recompute_is_not_advised_to() -> None:
    found = estimate(meta_model(tiny_model("ctrl").config), setup(), available=1)
    assert found.advice
    assert not [item for item in found.advice if "checkpointing" in item.change]
    model = PrefixModel(tiny_model("ctrl"), PrefixConfig(length=2, init="random"))
    with pytest.raises(UnsupportedModelError, match="ctrl models cannot recompute"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize(("family", "room"), [("llama", 512 + 699), ("bloom", 710)])
def test_a_run_has_room_beside_a_long_beginning_where_it_packs(family: str, room: int) -> None:
    """As it is estimated, too."""
    examples = [
        Example(
            input_ids=(3,) * 699 + (row,) * 11, labels=(-100,) * 700 + (row,) * 10, origin="", truncated=0
        )
        for row in range(4, 12)
    ]
    model, config = tiny_model(family), TrainConfig()
    assert packing_length_for(config, examples, model) == room
    prefix = PrefixConfig(length=2, init="random")
    plan = setup_of(config, prefix, examples, packing=family == "llama", dtype=torch.float32, device="cpu")
    assert plan.tokens == (699 + 8 * 11 if family == "llama" else 710)


@pytest.mark.parametrize("common", [0, 13])
@pytest.mark.parametrize("packing", [True, False])
def test_a_measured_step_runs_the_tokens_that_the_setup_says(common: int, packing: bool) -> None:
    common = common if packing else 0
    plan = setup(
        lengths=(40, 33, 20), longest=40, common=common, packing=packing, target_share=0.3,
        eval_lengths=(70, 30), eval_common=common,
    )  # fmt: skip
    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=2, init="random"))
    seen: list[int] = []
    model.base_model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0].numel())
    )
    training_step(model, plan)
    with torch.no_grad():
        evaluation_step(model, plan)
    expected = [plan.tokens, plan.eval_tokens]
    assert seen == [-(-tokens // 32) * 32 if packing else tokens for tokens in expected]
    held_once = 13 if common else 0
    assert plan.tokens == (93 - 2 * held_once if packing else 120)


@pytest.mark.parametrize(
    ("family", "more", "from_bytes"),
    [
        ("llama", ["--gradient-checkpointing"], [2**20]),
        ("llama", ["--no-packing", "--packing-length", 2048], [2**20]),  # 8 rows of 100 tokens
        ("llama", ["--no-packing"], []),
        ("llama", ["--packing-length", 2048], []),
        ("gemma2", [], [8 * 2**20]),  # copies of logits, by its soft cap
        ("gemma2", ["--gradient-checkpointing"], [2**20]),
    ],
)
def test_freed_blocks_are_given_back_where_a_run_says_so(
    family: str, more: list[Any], from_bytes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_model(family, vocab_size=len(byte_tokenizer())).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": "qz" * 30 + str(row), "input": "", "output": "xv" * 10} for row in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked: list[int] = []
    monkeypatch.setattr("prefixtune.train.session.return_freed_memory", asked.append)
    line = ["train", "--model", tmp_path / "model", "--data", tmp_path / "rows.json", "--max-steps", 1]
    line += ["--output", tmp_path / "run", "--length", 4, "--retain", 0, "--report-to", "none", *more]
    done = call(*line)
    assert done.exit_code == 0, done.stderr
    assert asked == from_bytes


def test_memory_that_is_full_before_the_first_step_is_told_with_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = write_model(tmp_path, n_layer=1, n_embd=64, n_inner=64)

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr("prefixtune.train.session.target_loss", full)
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", tmp_path / "run"]
    line += ["--eval-data", place / "rows.json", "--max-steps", 1, "--retain", 0, "--report-to", "none"]
    done = call(*line)
    assert done.exit_code == 1
    assert "run: the memory is full" in done.stderr
    assert "--gradient-checkpointing" in done.stderr
    monkeypatch.setattr("prefixtune.train.session.set_seed", full)  # before there is an estimate
    done = call(*line, "--overwrite")
    assert "the memory is full" in done.stderr
    assert "internal error" not in done.stderr


def test_whole_matrices_of_scores_leave_holes_in_the_heap() -> None:
    """docs/memory.md, "The allocator"."""
    plan = setup(lengths=(200, 180), longest=200, row_tokens=150.0, packing=False)
    made = {family: tiny_model(family).to("meta") for family in ("bloom", "falcon-alibi")}

    def slack(family: str, **changes: Any) -> int:
        return estimate(made[family], dataclasses.replace(plan, **changes), available=PLENTY).slack

    first = slack("bloom", lengths=(1,), row_tokens=1.0, longest=1)  # next to nothing but the first step
    heads, layers = 4, 2
    matrix = 2 * heads * 200 * (plan.prefix.length + 200) * 4
    assert made["bloom"].config.num_attention_heads == heads
    assert slack("bloom") - first == pytest.approx(2 * layers * matrix, rel=0.02)
    for other in (slack("bloom", checkpointing=True), slack("bloom", row_tokens=1e4), slack("falcon-alibi")):
        assert other - first < layers * matrix


def test_a_quantised_layer_is_unpacked_while_neutral_text_is_sampled() -> None:
    sizes = dict(hidden_size=256, intermediate_size=2048, num_hidden_layers=2)
    plan = setup(lengths=(8,), neutral_lengths=(64,), sampled_rows=1)
    whole, packed_ = (
        sampling_bytes(small(**sizes), dataclasses.replace(plan, quantize=q)) for q in (None, "int8")
    )
    assert packed_ - whole == pytest.approx(1.15 * 2 * 256 * 2048 * 4, rel=1e-3)


def test_sampling_of_neutral_text_is_a_peak_of_its_own_where_steps_are_small() -> None:
    plain, sampling = (
        estimate(small(), setup(lengths=(8,), **extra), available=PLENTY, baseline=1000)
        for extra in ({}, {"neutral_lengths": (64, 64), "sampled_rows": 32})
    )
    cache = 32 * 64 * 3 * 2 * 2 * 16 * 4  # rows, tokens, layers, key and value, heads, head dim, bytes
    logits = 32 * 1000 * 4 * 4  # and three more in float32
    assert plain.sampling == 0
    held = 1000 + sampling.step.weights + sampling.step.prefix
    assert sampling.sampling == held + round(1.15 * (cache + logits))
    short = small(num_hidden_layers=2)
    found = estimate(short, setup(lengths=(8,), neutral_lengths=(8,), sampled_rows=2**16), available=1)
    assert found.peak == found.sampling
    assert "sampling neutral text" in found.summary()
    assert "--retain 0" in [item.change for item in found.advice]


def test_a_run_that_cannot_fit_is_refused_unless_forced() -> None:
    found = estimate(small(), setup(), available=1000)
    with pytest.raises(OutOfMemoryError, match="would need") as refused:
        check_fit(found, force=False)
    assert "--force" in str(refused.value.hint)
    assert "--gradient-checkpointing needs" in str(refused.value.hint)
    check_fit(found, force=True)
    check_fit(estimate(small(), setup(), available=PLENTY), force=False)


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 10), (inner.parent, str(8 * GIB), 3 * GIB)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert group_room("0::/a/b\n", tmp_path) == 6 * GIB  # the page cache can be given back
    assert group_room("0::/\n", tmp_path) is None


def test_control_groups_of_the_first_version_count(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    members = "3:cpu:/x\n2:memory:/docker/of-the-host\n"  # a path that this container does not see
    assert group_room(members, tmp_path) == 3 * GIB
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert group_room(members, tmp_path) is None


def test_full_memory_is_told_with_the_hint_and_other_errors_are_not() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="run: the memory is full"),
        explain_full_memory("run", hint=lambda: "smaller"),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="other"), explain_full_memory("run", hint=lambda: "smaller"):
        raise RuntimeError("other")


# The last is what torch's dispatch ends in.
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, SystemError])
def test_advice_that_fails_for_want_of_memory_is_the_plain_one(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefixtune.train.forecast as room

    def starve(*args: Any, **options: Any) -> None:
        raise error("returned NULL without setting an exception")

    monkeypatch.setattr(room, "_estimate", starve)
    unused: Any = None
    told = room.advice_for(unused, unused)
    assert told.startswith("--gradient-checkpointing, a smaller batch or shorter rows")
    assert error.__name__ in told
    assert "--resume" in told


# --- the command and the run -------------------------------------------------------------------------------


def call(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_estimate_command_says_the_parts_and_their_sum(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ["estimate", "--model", tmp_path / "config.json", "--dtype", "float32", "--device", "cpu"]
    result = call(*line, "--max-length", 100, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    parts = ("weights", "prefix", "optimizer", "gradient", "activation", "logits", "baseline", "slack")
    assert facts["peak_bytes"] == sum(facts[f"{part}_bytes"] for part in parts)
    assert facts["fits"] is True
    assert facts["advice"] == []
    assert facts["assumptions"]["packing"] is True
    assert facts["assumptions"]["tokens_of_a_pass"] == 512
    assert "peak" in call(*line).stdout


@pytest.mark.parametrize("limit", ["packing_length", "positions"])
def test_estimate_refuses_rows_that_train_refuses(tmp_path: Path, limit: str) -> None:
    folder = write_model(tmp_path)
    rows = json.loads((folder / "rows.json").read_text())
    rows[3]["instruction"] = "word " * (40 if limit == "packing_length" else 110)
    (folder / "rows.json").write_text(json.dumps(rows))
    line = ["--model", folder / "model", "--data", folder / "rows.json", "--dtype", "float32"]
    line += ["--max-length", 2000, "--length", 20]
    line += ["--packing-length", 200] if limit == "packing_length" else []
    told = call("estimate", *line)
    refused = call("train", *line, "--output", tmp_path / "run", "--report-to", "none")
    assert told.exit_code == refused.exit_code == 1
    assert "rows.json:" in told.stderr
    assert "error:" in told.stderr
    found, expected = (text[text.index("error:") :] for text in (told.stderr, refused.stderr))
    assert found == expected


@pytest.mark.parametrize(
    ("family", "stored", "read"),
    [
        ("mixtral", "float32", "float32"),
        ("llama", "float32", "float32"),
        ("glm4_moe", "float32", "float32"),
        ("glm4_moe", "bfloat16", "float32"),
        ("glm4_moe", "bfloat16", "bfloat16"),
    ],
)
def test_a_file_of_which_little_is_used_does_not_stay_in_memory(
    tmp_path: Path, family: str, stored: str, read: str
) -> None:
    """transformers merges the matrices of experts; what it takes as it is would keep the file mapped."""
    path = tmp_path / "model"
    model = routed(getattr(torch, stored)) if family == "glm4_moe" else tiny_model(family)
    model.save_pretrained(path)
    merged = family != "llama"
    base = load_base(str(path), dtype=read, device="cpu").model
    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
    assert (str(path / "model.safetensors") in maps) == (not merged and bool(maps))
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor.to(base.state_dict()[name].dtype)), name
    size = (path / "model.safetensors").stat().st_size
    weights = sum(p.nbytes for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    empty, files = empty_model(str(path)), weight_files(str(path))
    found = reading_bytes(empty, getattr(torch, read), device="cpu", files=files)
    assert found == weights + (size if merged else 0)
    if stored == "float32":
        assert reading_bytes(empty, torch.bfloat16, device="cpu", files=files) > size


@pytest.mark.parametrize("read", ["float32", "bfloat16"])
def test_weights_that_torch_saved_are_counted_as_safetensors_are(tmp_path: Path, read: str) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    empty, safe = empty_model(str(tmp_path)), weight_files(str(tmp_path))
    expected = reading_bytes(empty, getattr(torch, read), device="cpu", files=safe)
    (path,) = safe
    path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert weight_files(str(tmp_path)) == [tmp_path / "pytorch_model.bin"]
    found = reading_bytes(empty, getattr(torch, read), device="cpu", files=weight_files(str(tmp_path)))
    assert found == pytest.approx(expected, rel=0.2)  # of a small model: torch's own table is in its file
    assert (expected > reading_bytes(empty, getattr(torch, read), device="cpu", files=[])) == (
        read == "bfloat16"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_damaged_are_told_with_their_file(tmp_path: Path, name: str) -> None:
    base = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:3000])
    told = call("estimate", "--model", tmp_path)
    assert told.exit_code == 1
    assert f"{name}: its weights cannot be read" in told.stderr
    assert "internal error" not in told.stderr


def test_full_memory_is_not_told_as_damaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unable to mmap 9 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr("prefixtune.weights.safe_open", full)
    with pytest.raises(OutOfMemoryError, match="its weights cannot be read: the memory is full"):
        stored_tensors([tmp_path / "a.safetensors"])


def routed(dtype: torch.dtype) -> Any:
    """A mixture of experts as GLM-4.5 is stored: its router has a buffer, which is float32 in any case."""
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}
    sizes = {"head_dim": 8, "moe_intermediate_size": 48, "first_k_dense_replace": 0, "topk_group": 1}
    model = randomised(hf.Glm4MoeConfig(**COMMON, **experts, **sizes), dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape)
    return model


def test_masks_that_are_never_saved_are_no_reason_to_copy_a_file(tmp_path: Path) -> None:
    config = hf.GPTNeoConfig(
        vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    model = randomised(config)
    assert sum(b.numel() for b in model.buffers()) > sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    base, files = load_base(str(tmp_path), dtype="float32", device="cpu").model, weight_files(str(tmp_path))
    assert made_anew(base, stored_tensors(files)) == 0
    assert made_anew(empty_model(str(tmp_path)), stored_tensors(files), torch.float32) == 0


def test_a_large_tokenizer_is_no_part_of_the_peak_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_model(tmp_path) / "model")
    held = [2**30]  # bytes: what earlier tests left in this process may go at any time
    monkeypatch.setattr("prefixtune.train.forecast.resident", lambda place: sum(held))
    plain = forecast_for(model)

    def with_much(name: str) -> Any:
        held.append(2**28)
        return load_tokenizer(name)

    monkeypatch.setattr("prefixtune.train.forecast.load_tokenizer", with_much)
    found = forecast_for(model)
    assert found.baseline - plain.baseline == 2**28
    assert found.loading == plain.loading


@pytest.mark.parametrize(
    ("options", "longest", "length", "said"),
    [
        ({}, 512, 128, ""),
        ({"packing_length": 64}, 64, 128, "rows of 64 tokens are counted, as many as packing_length has"),
        ({"positions": 600}, 512, 88, "a prefix of 88 virtual tokens"),
        ({"positions": 300}, 292, 8, "rows of 292 tokens are counted, as many as the prefix leaves"),
        ({"positions": 300, "length": 100}, 200, 100, "rows of 200 tokens are counted"),
    ],
)
def test_without_rows_no_more_is_counted_than_a_run_takes(
    options: dict[str, int],
    longest: int,
    length: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=options.get("positions", 1024)).save_pretrained(
        tmp_path
    )
    found = forecast_for(
        str(tmp_path / "config.json"),
        prefix_options={"length": options["length"]} if "length" in options else None,
        config=TrainConfig(packing_length=options.get("packing_length"), dtype="float32"),
    )
    assert (found.setup.longest, found.setup.prefix.length) == (longest, length)
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_prefix_that_leaves_no_positions_to_a_row_is_told(tmp_path: Path) -> None:
    hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64).save_pretrained(tmp_path)
    refused = call("estimate", "--model", tmp_path / "config.json", "--length", 63)
    assert refused.exit_code == 2
    assert "leaves no row in the model's 64 positions" in " ".join(refused.stderr.split())


def test_probe_times_real_steps(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    result = call("estimate", "--model", tmp_path, "--max-length", 16, "--probe", "--json")
    assert result.exit_code == 0, result.stderr
    assert 0 < json.loads(result.stdout)["seconds_per_1000_rows"] < 1000


def test_probe_times_the_base_that_a_run_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("prefixtune.train.probe.training_step", lambda model, plan: seen.append(model))
    line = ("estimate", "--model", tmp_path, "--max-length", 16, "--probe", "--quantize", "int8", "--compile")
    result = call(*line)
    assert result.exit_code == 0, result.stderr
    layers = seen[0].base_model.model.layers
    assert isinstance(layers[0].mlp.up_proj, QuantizedLinear)
    with packed(seen[0].base_model, None, [4]):
        assert all(layer._compiled_call_impl is not None for layer in layers)
    refused = call(*line, "--no-packing")
    assert refused.exit_code == 2
    assert "only packed rows" in refused.stderr


def test_probe_counts_the_neutral_text_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run, tokens = Passes._states, [0]

    def counted(passes: Any, rows: Any, pairs: Any) -> Any:  # each token takes a millisecond
        tokens[0] += sum(len(row.input_ids) for row in rows)
        return run(passes, rows, pairs)

    monkeypatch.setattr(Passes, "_states", counted)
    clock = SimpleNamespace(perf_counter=lambda: tokens[0] / 1000)
    monkeypatch.setattr("prefixtune.train.probe.time", clock)
    line = ("estimate", "--model", tmp_path, "--max-length", 16, "--probe", "--json")
    of_rows, with_neutral = (
        json.loads(call(*line, "--retain", weight).stdout)["seconds_per_1000_rows"] for weight in (0, 0.5)
    )
    assert (of_rows, with_neutral) == pytest.approx((16, 16 + 2 * 64 / 8))


def write_model(folder: Path, *, stored: torch.dtype = torch.float32, **shape: int) -> Path:
    """A model whose weights, logits and activations matter beside the process: 43 million parameters."""
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": 20_000, "n_embd": 640, "n_layer": 6, "n_head": 8, "n_positions": 512}
    config = hf.GPT2Config(**(sizes | shape))
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(config).to(stored).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": "word " * (8 + i % 20), "input": "", "output": "yes " * 8} for i in range(16)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


RUN = """
import resource
from pathlib import Path
from types import SimpleNamespace
from transformers import Trainer
from prefixtune.cli import main

def limit(self, *args, save=Trainer._save_checkpoint, **more):  # between two steps: the next one needs more
    save(self, *args, **more)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    spare = 64 * 2**20  # what is small finds room, one of a step's activations does not
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))

if {limited}:
    Trainer._save_checkpoint = limit
try:
    main()
finally:  # what libraries do at exit is not what is tested
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
"""


def train(
    place: Path, *more: Any, output: str = "run", limited: bool = False
) -> subprocess.CompletedProcess[str]:
    """prefixtune train in its own process; if limited, it gets no more memory after its first checkpoint."""
    args = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", place / output]
    args += ["--per-device-train-batch-size", FEW, "--report-to", "none", "--json", *more]
    # Large tensors each get a mapping of their own, so that a limit holds them whatever malloc has kept.
    kept = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    environment = {**kept, "HF_HUB_OFFLINE": "1"}
    if limited:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    line = [sys.executable, "-c", RUN.format(limited=limited), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=170)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory"))


# A machine without bfloat16 of its own is a hundred times slower at it: two rows, one step there.
PEAKS = {
    "float32": "--dtype float32 --max-steps 2",  # with neutral text, which the others do without: a minute
    "bfloat16-checkpointing": "--dtype bfloat16 --gradient-checkpointing --retain 0 --limit 2 --max-steps 1",
    "checkpointing": "--dtype float32 --gradient-checkpointing --retain 0 --max-steps 2",
    "projection": "--dtype float32 --projection --per-device-train-batch-size 2 --retain 0 --max-steps 2",
    "long-packs": "--dtype float32 --packing-length 1024 --retain 0 --max-steps 2"
    " --per-device-train-batch-size 8",  # one pass of the full size
    "unpacked": "--dtype float32 --no-packing --retain 0 --max-steps 2",
}


# One process for all, which has imported what a process of its own would have.
ESTIMATES = """
import json, sys
from click.testing import CliRunner
from prefixtune.cli import main
for line in json.loads(sys.argv[1]):
    print(json.loads(CliRunner().invoke(main, line, catch_exceptions=False).stdout)["peak_bytes"])
"""


@pytest.fixture(scope="module")
def estimated(place: Path) -> dict[str, int]:
    """What `prefixtune estimate` says of each of PEAKS."""
    line = ["estimate", "--model", place / "model", "--data", place / "rows.json", "--json"]
    line += ["--per-device-train-batch-size", FEW]
    lines = [[*map(str, line), *options.split()] for options in PEAKS.values()]
    told = subprocess.run(
        [sys.executable, "-c", ESTIMATES, json.dumps(lines)], capture_output=True, text=True, timeout=170
    )
    assert told.returncode == 0, told.stderr
    return dict(zip(PEAKS, map(int, told.stdout.split()), strict=True))


@pytest.mark.parametrize("name", PEAKS)
def test_estimate_is_within_15_percent_of_the_process_peak(
    place: Path, estimated: dict[str, int], name: str
) -> None:
    done = train(place, "--overwrite", *PEAKS[name].split())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak_bytes"] > 0.6 * GIB  # an empty process has 0.5
    assert estimated[name] == pytest.approx(result["peak_bytes"], rel=TOLERANCE)
    assert result["estimated_peak_bytes"] == pytest.approx(result["peak_bytes"], rel=TOLERANCE)


def test_experts_in_bfloat16_take_what_is_estimated(tmp_path: Path) -> None:
    """The router gives each expert of each pass another number of rows, and oneDNN keeps kernels for each."""
    config = hf.Qwen3MoeConfig(
        vocab_size=2_000,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    hf.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": "word " * (10 + 2 * i), "input": "", "output": "yes " * 20} for i in range(32)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = train(tmp_path, "--dtype", "bfloat16", "--retain", 0, "--max-steps", 6)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["estimated_peak_bytes"] == pytest.approx(result["peak_bytes"], rel=TOLERANCE)


def test_many_lengths_of_padded_rows_take_what_is_estimated(tmp_path: Path) -> None:
    """oneDNN makes kernels for each length, and PyTorch and it would keep a thousand of them."""
    config = hf.BloomConfig(vocab_size=2_000, hidden_size=256, n_layer=6, n_head=8)
    torch.manual_seed(0)
    hf.BloomForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": "word " * (5 + i % 70), "input": "", "output": "yes " * 20} for i in range(320)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = train(tmp_path, "--dtype", "auto", "--retain", 0, "--max-steps", 40)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["estimated_peak_bytes"] == pytest.approx(result["peak_bytes"], rel=TOLERANCE)


@pytest.mark.parametrize("has", ["LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
def test_what_the_environment_says_of_kernels_holds(has: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.setenv(name, "1")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv(has, "500")
    keep_few_kernels()
    assert {name: os.environ[name] for name in KERNEL_CACHES} == {
        name: "500" if name == has else str(KERNELS) for name in KERNEL_CACHES
    }


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("way", ["train", "distill", "compare"])
def test_few_kernels_are_kept_from_the_first_matmul_on(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.setenv(name, "1")  # so that it is as before afterwards
        monkeypatch.delenv(name)

    def stop(*_: Any, **__: Any) -> None:
        assert all(os.environ.get(name) == str(KERNELS) for name in KERNEL_CACHES)
        raise StoppedError

    monkeypatch.setattr("prefixtune.train.session.check_weights", stop)
    monkeypatch.setattr("prefixtune.distill.session.check_weights", stop)
    monkeypatch.setattr(compare_child, "_end_with_parent", lambda: None)
    monkeypatch.setattr(compare_child, "_run", stop)
    task = {"plan": {"values": {"train": "t", "eval": "e"}}, "cell": "x", "result": "r"}
    (tmp_path / "task.json").write_text(json.dumps({**task, "failure": str(tmp_path / "failure.json")}))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "task.json")])
    ways = {
        "train": lambda: run_train(model="m", data="d", output=tmp_path / "run"),
        "distill": lambda: distill(model="m", text="a", output=tmp_path / "run"),
        "compare": compare_child.main,
    }
    with pytest.raises(SystemExit if way == "compare" else StoppedError):
        ways[way]()
    if way == "compare":
        assert json.loads((tmp_path / "failure.json").read_text())["kind"] == "StoppedError"


QUANTISED = """
import json, sys
from prefixtune.load import empty_model, load_base, weight_files
from prefixtune.memory import forget_peak, measured_peak, reading_bytes, resident
model, small = sys.argv[1:]
for scheme in ("int8", "nf4"):
    load_base(small, dtype="float32", quantize=scheme)  # code and libraries are no part of it
    forget_peak()
    before = resident()
    base = load_base(model, dtype="float32", quantize=scheme).model
    taken = measured_peak() - before
    options = {"device": "cpu", "quantize": scheme, "files": weight_files(model)}
    print(json.dumps([reading_bytes(empty_model(model), base.dtype, **options), taken]))
    del base
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process so far")
def test_packing_a_base_takes_what_is_said_beside_its_mapped_file(place: Path, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    line = [sys.executable, "-c", QUANTISED, str(place / "model"), str(tmp_path)]
    told = subprocess.run(line, capture_output=True, text=True, timeout=170)
    assert told.returncode == 0, told.stderr
    for said, taken in map(json.loads, told.stdout.split("\n")[:2]):
        assert said == pytest.approx(taken, rel=TOLERANCE)


def test_a_gpu_has_room_for_the_packed_weights_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefixtune.train.forecast as room

    model, available = str(place / "model"), 100 * MIB  # of 163 MiB in float32, 79 in int8
    monkeypatch.setattr(room, "placement", lambda dtype: (torch.float32, "cuda"))
    monkeypatch.setattr(room, "budget", lambda device: available)
    monkeypatch.setattr(room, "resident", lambda device: 0)
    check_weights(model, TrainConfig(quantize="int8"), force=False)
    with pytest.raises(OutOfMemoryError, match="the weights take 163 MiB"):
        check_weights(model, TrainConfig(), force=False)
    available = 60 * MIB
    with pytest.raises(OutOfMemoryError, match="the weights take 79 MiB in int8"):
        check_weights(model, TrainConfig(quantize="int8"), force=False)
    # the estimate counts the same; a step on a GPU is given, because torch may not know CUDA
    step = StepBytes(weights=70 * MIB, prefix=0, optimizer=0, gradients=0, activations=MIB, logits=0)
    monkeypatch.setattr(sys.modules[estimate.__module__], "measure_step", lambda base, setup: step)
    plan = setup(device="cuda", quantize="int8")
    assert estimate(empty_model(model), plan, available=available).peak < 80 * MIB


def gpu_estimate(
    place: Path, patch: pytest.MonkeyPatch, *, room: int, packing_length: int | None = None
) -> Any:
    """Of rows of 100 tokens on a GPU with `room` MiB, where a token takes 1 MiB and the weights 200."""
    import prefixtune.train.forecast as forecast

    def step(base: Any, setup: Setup) -> StepBytes:
        held = {"prefix": 0, "optimizer": 0, "gradients": 0, "logits": 0}
        return StepBytes(weights=200 * MIB, activations=setup.tokens * MIB, **held)

    patch.setattr(forecast, "placement", lambda dtype, device: (torch.float32, "cuda"))
    patch.setattr(forecast, "budget", lambda device: room * MIB)
    patch.setattr(forecast, "resident", lambda device: 64 * MIB)
    patch.setattr(forecast, "take_workspaces", lambda device, dtype: None)
    patch.setattr(sys.modules[estimate.__module__], "measure_step", step)
    config = TrainConfig(packing_length=packing_length, per_device_train_batch_size=30, retain=0.0)
    data = DataConfig(max_length=100)
    return forecast.forecast_for(str(place / "model"), data_config=data, config=config)


@pytest.mark.parametrize(
    ("room", "packing_length", "tokens"),
    [
        (3000, None, 2048),
        (2500, None, 1024),  # 2,048 + 200 + 64 are 2,312, and a margin is kept
        (1600, None, 1024),
        (1000, None, 512),
        (500, None, 512),  # which does not fit either, and is told so
        (3000, 700, 700),
    ],
)
def test_a_pass_on_a_gpu_has_as_much_room_as_fits(
    place: Path, monkeypatch: pytest.MonkeyPatch, room: int, packing_length: int | None, tokens: int
) -> None:
    found = gpu_estimate(place, monkeypatch, room=room, packing_length=packing_length)
    assert found.setup.tokens == tokens
    assert found.baseline == 64 * MIB  # what its libraries keep there is counted
    assert found.peak == (64 + 200 + tokens) * MIB
    assert found.fits == (room > 500)
    assert bool(found.advice) == (room == 500)


def test_a_run_takes_the_room_of_its_gpu_and_on_a_cpu_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import prefixtune.train.forecast as forecast

    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=4))
    rows = [
        Example(input_ids=(5 + i, 6, 7) * 30, labels=(-100,) * 60 + (5, 6, 7) * 10, origin="", truncated=0)
        for i in range(40)
    ]
    asked: list[int] = []

    def estimated(model: Any, setup: Setup, *, advise: Any, so_far: int) -> Any:
        asked.append(setup.tokens)
        return SimpleNamespace(peak=setup.tokens, available=1500)

    def room(**changes: Any) -> int:
        config = TrainConfig(per_device_train_batch_size=32, **changes)
        return forecast.pass_tokens_for(model, config, examples=rows)

    monkeypatch.setattr(forecast, "_estimate", estimated)
    assert room() == 512
    assert not asked
    monkeypatch.setattr(type(model.base_model), "device", torch.device("cuda"))
    assert room() == 1024
    assert len(asked) == 2
    assert asked[0] > 1500 > asked[1]
    assert room(packing_length=100) == 512
    capsys.readouterr()
    monkeypatch.setattr(forecast, "_estimate", lambda *_, **__: 1 / 0)  # a model that runs with weights alone
    assert room() == 512
    assert "larger ones is not estimated: ZeroDivisionError" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(forecast, "splits", lambda base: False)  # its whole logits are made
    assert room() == 512
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
    ],
)
def test_a_gpu_too_full_for_workspaces_is_left_to_the_estimate_and_other_errors_are_not(
    error: RuntimeError, is_raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "ones", full)
    take_workspaces("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="assert triggered") if is_raised else nullcontext():
        take_workspaces("cuda", torch.float32)


def test_steps_of_a_loaded_model_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefixtune.memory.step as step
    import prefixtune.train.forecast as forecast

    model, counted = PrefixModel(tiny_model("llama"), PrefixConfig(length=4)), []
    own = step._measure
    monkeypatch.setattr(step, "_measure", lambda base, setup: (counted.append(setup), own(base, setup))[1])
    found = [forecast.forecast(model, setup(sampled_rows=rows), force=True) for rows in (0, 32, 32)]
    assert len(counted) == 1
    assert len({one.step for one in found if one}) == 1
    assert forecast.forecast(model, setup(lengths=(64,) * 3), force=True)
    assert len(counted) == 2


def test_advice_for_a_full_memory_counts_what_the_run_has_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the optimizer's state resident, as without."""
    import prefixtune.train.forecast as forecast

    model, resident = PrefixModel(tiny_model("llama"), PrefixConfig(length=4)), 1000 * MIB
    monkeypatch.setattr(forecast, "resident", lambda device: resident)
    before = forecast.forecast(model, setup(), force=True)
    advice = forecast.advice_for(model, setup(), before)
    resident += 500 * MIB
    assert forecast.advice_for(model, setup(), before) == advice
    assert forecast.advice_for(model, setup()) != advice


def test_a_trainer_has_the_room_of_its_device_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules[trainer_for.__module__], "pass_tokens_for", lambda *_, **__: 2048)
    base = LoadedBase(model=tiny_model("llama"), tokenizer=byte_tokenizer(), name="tiny", dtype_reason="")
    row = Example(input_ids=(5, 6, 7), labels=(-100, 6, 7), origin="row", truncated=0)

    def capacity(packing_length: int | None = None, **given: Any) -> int:
        config = TrainConfig(packing_length=packing_length, retain=0.0, report_to="none")
        options: Any = {"length": 4, "init": "random"}
        trainer, _ = trainer_for(base, [row], prefix_options=options, config=config, output=tmp_path, **given)
        return trainer.passes.capacity

    found = [capacity(), capacity(pass_tokens=512), capacity(100), capacity(100, pass_tokens=512)]
    assert found == [2048, 512, 100, 100]


def test_full_memory_says_what_to_do_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    # An activation of 100 MB and more is refused while much is left: where nothing is, torch may abort (C++).
    place = write_model(tmp_path, n_embd=64, n_layer=2, n_inner=65_536)
    options = ["--dtype", "float32", "--max-steps", 3, "--save-steps", 1, "--retain", 0]
    stopped = train(place, *options, output="full", limited=True)
    assert stopped.returncode == 1, stopped.stderr
    assert "the memory is full" in stopped.stderr
    assert "--gradient-checkpointing" in stopped.stderr
    needs = re.findall(r"needs ([\d.]+ [GM]iB)", stopped.stderr)
    assert len(set(needs)) > 1, needs  # each change has its own, and none the peak of this run
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    resumed = train(place, *options, "--resume", output="full")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 3


def test_training_is_refused_before_it_begins_where_it_cannot_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import prefixtune.train.forecast as room

    place = write_model(tmp_path, n_layer=1)
    monkeypatch.setattr(room, "budget", lambda device: room.resident(device) + 120 * MIB)
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", tmp_path / "run"]
    refused = call(*line, "--dtype", "float32", "--report-to", "none", "--max-steps", 1)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setattr(room, "budget", lambda device: room.resident(device) + 10 * MIB)
    early = call(*line, "--dtype", "float32")
    assert "the weights take" in early.stderr


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_two_largest_parts_of_attention_stand_for_all_parts(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (700, 300, 20, 4)
    given = setup(lengths=lengths, longest=700, row_tokens=256, checkpointing=checkpointing)
    take, taken = documents._take, []

    def counted(*arguments: Any) -> torch.Tensor:
        taken.append(arguments)
        return take(*arguments)

    monkeypatch.setattr(documents, "_take", counted)
    one = measure_step(without_weights(tiny_model(family)), given)
    few = len(taken)
    monkeypatch.setattr(documents, "FakeTensor", type(None))
    all_ = measure_step(without_weights(tiny_model(family)), given)
    assert one == all_
    assert len(taken) > 3 * few
