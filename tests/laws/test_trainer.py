"""A plain transformers.Trainer trains a prefix; what it saves is the prefix, and it resumes exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from oracle import A, without_dropout
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from families import VOCAB, tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.data import Collator, Example
from prefixtune.errors import ConfigError, DataError, UnsupportedModelError
from prefixtune.loss import Passes, RowTokens
from prefixtune.optimizer import HeadwiseSoap
from prefixtune.prefix import LayerKV
from prefixtune.train import PrefixTrainer
from prefixtune.train.retention import Retention
from tokenizers_for_tests import byte_tokenizer

few_families = pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma3"])
both_trainers = pytest.mark.parametrize("kind", ["plain", "ours"])


def rows() -> list[Example]:
    """Eight texts of unequal length, from 1 to 8 targets each, all towards one token."""
    generator = torch.Generator().manual_seed(17)
    made = []
    for targets in (1, 8, 2, 7, 3, 6, 4, 5):
        ids = torch.randint(3, VOCAB, (3 + targets,), generator=generator).tolist()
        ids[3:] = [11] * targets
        labels = (-100, -100, -100, *ids[3:])
        made.append(Example(input_ids=tuple(ids), labels=labels, origin=f"rows:{targets}", truncated=0))
    return made


def fresh(family: str, *, projection: bool = False) -> PrefixModel:
    torch.manual_seed(2)
    config = PrefixConfig(length=5, projection=projection, init="tokens", init_tokens=tuple(A[0].tolist()))
    return without_dropout(PrefixModel(tiny_model(family), config))


def trainer(kind: str, model: PrefixModel, output: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "log_level": "error",
        "seed": 5,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(output), **settings)
    shared = {
        "model": model,
        "args": arguments,
        "train_dataset": rows(),
        "eval_dataset": rows()[:3],
        "data_collator": Collator(0),
    }
    return Trainer(**shared) if kind == "plain" else PrefixTrainer(**shared, pad_token_id=0)


def tensors(model: PrefixModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.prefix.parameters()]


@torch.no_grad()
def target_loss(model: PrefixModel, examples: Sequence[Example] = ()) -> float:
    """Mean over all targets of all rows, one row at a time."""
    model.eval()
    scores, targets = [], []
    for row in examples or rows():
        scores.append(model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1])
        targets.append(torch.tensor(row.labels[1:]))
    model.train()
    return cross_entropy(torch.cat(scores), torch.cat(targets)).item()


@few_families
@both_trainers
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_trainer_moves_the_prefix_and_nothing_else(
    family: str, kind: str, projection: bool, tmp_path: Path
) -> None:
    model = fresh(family, projection=projection)
    base = {name: weights.clone() for name, weights in model.base_model.state_dict().items()}
    start, before = tensors(model), target_loss(model)
    rate = 0.005 if projection else 0.1 if kind == "ours" else 0.05  # 5 tokens: few directions, short steps
    trainer(kind, model, tmp_path, learning_rate=rate).train()
    assert target_loss(model) < 0.9 * before
    assert all(not torch.equal(now, then) for now, then in zip(tensors(model), start, strict=True))
    assert all(torch.equal(weights, base[name]) for name, weights in model.base_model.state_dict().items())


@few_families
def test_first_step_moves_the_keys_and_the_values_of_each_layer_by_the_same_share_of_their_size(
    family: str, tmp_path: Path
) -> None:
    model = fresh(family)
    start = tensors(model)
    made = trainer("ours", model, tmp_path, max_steps=1, learning_rate=0.02, logging_steps=1)
    made.train()
    assert made.state.log_history[0]["learning_rate"] == pytest.approx(0.02)
    for now, then in zip(model.prefix.parameters(), start, strict=True):
        size = float(then[:, 1:].square().mean().sqrt())  # the first token is where attention is parked
        moved = (now - then) @ made.optimizer.state[now]["basis"]  # along the gradient's directions
        assert float(moved.abs().max()) == pytest.approx(0.02 * size, rel=1e-2)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [({}, HeadwiseSoap), ({"optim": "adamw_torch"}, torch.optim.AdamW), ({"optim": "sgd"}, torch.optim.SGD)],
)
def test_optimizer_that_is_asked_for_is_the_one_that_trains(
    asked: dict[str, str], kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    made = trainer("ours", fresh("llama"), tmp_path, **asked)
    assert type(made.create_optimizer()) is kind


def test_damping_without_the_optimizer_that_has_it_is_refused(tmp_path: Path) -> None:
    made = trainer("ours", fresh("llama"), tmp_path, optim="sgd")
    made.damping = 0.5
    with pytest.raises(ConfigError, match="damping: optim=sgd"):
        made.create_optimizer()


def test_sizes_of_zero_train_too(tmp_path: Path) -> None:
    base = tiny_model("llama")
    layers = PrefixKV.from_tokens(base, A).layers
    zero = PrefixKV(tuple(LayerKV(torch.zeros_like(kv.key), torch.zeros_like(kv.value)) for kv in layers))
    model = PrefixModel(base, zero)
    trainer("ours", model, tmp_path, max_steps=2).train()
    assert all(bool(tensor.any()) for tensor in tensors(model))


@few_families
@both_trainers
def test_checkpoint_holds_the_prefix_only_and_resumes_as_if_never_interrupted(
    family: str, kind: str, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = fresh(family)
    trainer(kind, whole, tmp_path, **saving).train()
    (checkpoint,) = tmp_path.glob("checkpoint-3")
    (file,) = checkpoint.glob("model*")
    with safe_open(file, "pt") as saved:
        assert sorted(saved.keys()) == sorted(whole.state_dict())
    resumed = fresh(family)
    trainer(kind, resumed, tmp_path, **saving).train(resume_from_checkpoint=str(checkpoint))
    for found, expected in zip(tensors(resumed), tensors(whole), strict=True):
        assert torch.equal(found, expected)


@few_families
@both_trainers
def test_accumulated_batches_equal_one_large_batch_weighted_by_targets(
    family: str, kind: str, tmp_path: Path
) -> None:
    """SGD's step is the gradient itself; Adam's would hide its scale."""
    plain = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "max_grad_norm": 0.0}
    large, small = fresh(family), fresh(family)
    trainer(kind, large, tmp_path, per_device_train_batch_size=4, **plain).train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer(kind, small, tmp_path, **split, **plain).train()
    for found, expected, start in zip(tensors(small), tensors(large), tensors(fresh(family)), strict=True):
        assert (expected - start).abs().max() > 1e-3
        assert torch.allclose(found, expected, atol=1e-5)


@few_families
def test_logged_loss_is_the_mean_over_targets(family: str, tmp_path: Path) -> None:
    model = fresh(family)
    expected = target_loss(model)
    run = trainer("plain", model, tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=8)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-4)


@few_families
@both_trainers
def test_checkpointed_training_ends_in_the_same_prefix(family: str, kind: str, tmp_path: Path) -> None:
    plain, checkpointed = fresh(family), fresh(family)
    trainer(kind, plain, tmp_path, max_steps=2).train()
    trainer(kind, checkpointed, tmp_path, max_steps=2, gradient_checkpointing=True).train()
    assert checkpointed.is_gradient_checkpointing
    for found, expected in zip(tensors(checkpointed), tensors(plain), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


@few_families
@both_trainers
def test_evaluation_between_steps_changes_no_step(family: str, kind: str, tmp_path: Path) -> None:
    plain, evaluated = fresh(family), fresh(family)
    trainer(kind, plain, tmp_path, max_steps=4).train()
    run = trainer(kind, evaluated, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for found, expected in zip(tensors(evaluated), tensors(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "gpt2"])
def test_projection_made_once_a_step_has_the_gradient_of_one_made_for_each_row(
    family: str, tmp_path: Path
) -> None:
    """Four batches of two rows make an optimizer step; the reference runs the MLP and one row at a time."""
    model = fresh(family, projection=True)
    ours = trainer("ours", model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    batches = [Collator(0)(rows()[first : first + 2]) for first in range(0, 8, 2)]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    calls: list[int] = []
    handle = model.prefix.register_forward_hook(lambda *_: calls.append(1))
    for index, batch in enumerate(batches):
        ours.accelerator.gradient_state._set_sync_gradients(index == 3)
        ours.training_step(model, batch, torch.tensor(targets))
    handle.remove()
    assert len(calls) == 1
    found = [parameter.grad.clone() for parameter in model.prefix.parameters()]
    model.zero_grad()
    for row in rows():
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        (cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum") / targets).backward()
    for mine, parameter in zip(found, model.prefix.parameters(), strict=True):
        assert torch.allclose(mine, parameter.grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("finding", [False, True], ids=["called-again", "auto-find-batch-size"])
def test_an_attempt_that_failed_leaves_no_gradient_to_the_next(
    finding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, failed = fresh("llama"), fresh("llama")
    options: dict[str, Any] = {"max_steps": 2, "gradient_accumulation_steps": 2}
    trainer("ours", clean, tmp_path, per_device_train_batch_size=1, **options).train()
    made = trainer(
        "ours",
        failed,
        tmp_path,
        per_device_train_batch_size=2 if finding else 1,
        auto_find_batch_size=finding,
        **options,
    )
    whole, passes = Passes.loss, iter([True, False])  # the second batch of the first step does not fit

    def loss(*args: Any, **options: Any) -> Any:
        if next(passes, True):
            return whole(*args, **options)
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(Passes, "loss", loss)
    if not finding:
        with pytest.raises(RuntimeError, match="out of memory"):
            made.train()
    made.train()
    for found, expected in zip(tensors(failed), tensors(clean), strict=True):
        assert torch.equal(found, expected)


def test_logged_divergence_is_the_mean_over_tokens_in_however_many_passes(tmp_path: Path) -> None:
    texts, logged = [list(row.input_ids) for row in rows()[:2]], []
    for capacity in (12, 64):
        model = fresh("llama")
        made = trainer("ours", model, tmp_path, max_steps=1, logging_steps=1)
        made.passes = Passes.of(model.base_model, capacity=capacity, pad_token_id=0)
        made.retention = Retention.of(made.passes, texts, weight=0.1)
        made.train()
        logged.append(made.state.log_history[0]["divergence"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def whole_rows() -> list[Example]:
    """The rows as one collates them for language modelling: their first token has a label too."""
    return [replace(row, labels=row.input_ids) for row in rows()]


@few_families
@both_trainers
def test_label_of_a_first_token_is_no_target(family: str, kind: str, tmp_path: Path) -> None:
    model = fresh(family)
    made = trainer(kind, model, tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=8)
    made.train_dataset = whole_rows()
    expected = target_loss(model, whole_rows())
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, abs=5e-4)


@few_families
def test_label_smoothing_is_of_the_gradient_and_not_of_the_loss_that_is_told(
    family: str, tmp_path: Path
) -> None:
    options = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    options |= {"optim": "sgd", "label_smoothing_factor": 0.3}  # a step along the gradient
    start, moved, logged = tensors(fresh(family)), [], []
    for kind in ("plain", "ours"):
        model = fresh(family)
        made = trainer(kind, model, tmp_path, **options)
        made.train()
        logged.append(made.state.log_history[0])
        moved.append([now - then for now, then in zip(tensors(model), start, strict=True)])
    assert logged[1]["loss"] == pytest.approx(target_loss(fresh(family)), abs=5e-4)
    assert logged[1]["grad_norm"] == pytest.approx(logged[0]["grad_norm"], rel=1e-4)
    for theirs, ours in zip(*moved, strict=True):  # ours goes as far as is right for keys, and for values
        assert cosine_similarity(theirs.flatten(), ours.flatten(), dim=0) > 0.999


def test_label_smoothing_ends_with_two_thirds_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("ours", fresh("llama"), tmp_path, label_smoothing_factor=0.3, max_steps=5, logging_steps=1)
    whole, seen = Passes.loss, []

    def loss(*args: Any, smoothing: float, **options: Any) -> Any:
        seen.append((made.state.global_step, smoothing))
        return whole(*args, smoothing=smoothing, **options)

    monkeypatch.setattr(Passes, "loss", loss)
    made.train()
    assert set(seen) == {(0, 0.3), (1, 0.3), (2, 0.3), (3, 0.3), (4, 0.0)}
    assert [entry["loss"] > 0 for entry in made.state.log_history if "loss" in entry] == [True] * 5


def test_label_smoothing_is_not_of_our_evaluation(tmp_path: Path) -> None:
    model = fresh("llama")
    made = trainer("ours", model, tmp_path, label_smoothing_factor=0.3)
    assert made.evaluate(rows())["eval_loss"] == pytest.approx(target_loss(model), abs=1e-5)


@few_families
def test_label_smoothing_of_a_plain_trainer_shifts_the_labels(family: str, tmp_path: Path) -> None:
    losses = []
    for smoothing in (0.0, 1e-6):
        run = trainer("plain", fresh(family), tmp_path, label_smoothing_factor=smoothing)
        losses.append(run.evaluate(whole_rows()[:1])["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ({"compute_metrics": lambda _: {}}, "compute_metrics"),
        ({"preprocess_logits_for_metrics": lambda logits, _: logits}, "preprocess_logits_for_metrics"),
        ({"torch_compile": True}, "torch_compile"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
        ({"fp16_full_eval": True}, "fp16_full_eval"),
    ],
)
def test_what_would_have_no_effect_on_our_trainer_is_refused(
    given: dict[str, Any], name: str, tmp_path: Path
) -> None:
    asked = {key: value for key, value in given.items() if hasattr(TrainingArguments, key)}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **asked)
    own = {key: value for key, value in given.items() if key not in asked}
    with pytest.raises(ConfigError, match=f"{name}: PrefixTrainer"):
        PrefixTrainer(model=fresh("llama"), args=arguments, pad_token_id=0, **own)


def padding_tokenizer(side: str) -> Any:
    tokenizer = copy.deepcopy(byte_tokenizer())  # there is one for all tests
    tokenizer.padding_side, tokenizer.pad_token = side, "</s>"
    return tokenizer


def test_padding_on_the_left_is_padding_on_the_right(tmp_path: Path) -> None:
    """Each token is a target, but a row's first one, which nothing predicts, wherever it stands."""

    def trained(side: str) -> tuple[float, float, float]:
        ours = trainer("ours", fresh("llama"), tmp_path, max_steps=1, logging_steps=1)
        ours.data_collator = DataCollatorForLanguageModeling(padding_tokenizer(side), mlm=False)
        ours.train_dataset = [{"input_ids": list(row.input_ids)} for row in rows()]
        before = ours.evaluate(ours.train_dataset)["eval_loss"]
        ours.train()
        (first,) = (entry for entry in ours.state.log_history if "loss" in entry)
        return before, first["loss"], first["grad_norm"]

    assert trained("left") == pytest.approx(trained("right"), rel=1e-5)


def test_rows_to_evaluate_may_be_mappings_as_those_to_train_on(tmp_path: Path) -> None:
    made = trainer("ours", fresh("llama"), tmp_path)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    plain = [
        {
            "input_ids": [*row.input_ids, pad["input_ids"]],
            "attention_mask": [1] * len(row.input_ids) + [0],
            "labels": [*row.labels, pad["labels"]],
        }
        for row in rows()[:3]
    ]
    expected = made.evaluate()["eval_loss"]
    assert made.evaluate(plain)["eval_loss"] == expected
    named = made.evaluate({"a": plain, "b": rows()[3:5]})
    assert named["eval_a_loss"] == expected
    assert named["eval_b_loss"] == made.evaluate(rows()[3:5])["eval_loss"] != expected


def test_half_precision_of_the_trainer_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.fp16 = True
    with pytest.raises(ConfigError, match="fp16: the prefix is trained in float32"):
        PrefixTrainer(model=fresh("llama"), args=arguments, pad_token_id=0)


def test_a_base_in_float32_has_no_bfloat16_of_the_trainers(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=True)
    with pytest.raises(ConfigError, match="bf16: the base computes in its own precision, float32"):
        PrefixTrainer(model=fresh("llama"), args=arguments, pad_token_id=0)
    half = PrefixModel(tiny_model("llama").bfloat16(), PrefixConfig(length=3, init="random"))
    PrefixTrainer(model=half, args=arguments, pad_token_id=0)


def test_a_collator_that_makes_no_labels_is_told(tmp_path: Path) -> None:
    ours = trainer("ours", fresh("llama"), tmp_path)
    ours.data_collator = DataCollatorWithPadding(padding_tokenizer("right"))
    ours.train_dataset = [{"input_ids": list(row.input_ids)} for row in rows()]
    with pytest.raises(DataError, match="a training batch has no labels; it has attention_mask, input_ids"):
        ours.train()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6, 7]}, "a row has no labels; it has input_ids"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6]}, "3 input_ids, 3 of attention_mask and 2 labels"),
        ({"input_ids": [5, 6, 700], "labels": [5, 6, 7]}, "token id 700 is beyond the model's vocabulary"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 700]}, "token id 700 is beyond the model's vocabulary"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_told(row: Any, message: str, tmp_path: Path) -> None:
    ours = trainer("ours", fresh("llama"), tmp_path)
    ours.data_collator, ours.train_dataset = Collator(0), [row] * 4
    with pytest.raises(DataError, match=message):
        ours.train()


class _Skipping:
    """A layer that runs without a gradient in all steps, or in some."""

    def __init__(self, layer: Any, *, always: bool) -> None:
        self.run, self.always, self.count = layer.forward, always, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        with torch.set_grad_enabled(not self.always and self.count % 3 == 0):
            return self.run(*args, **options)


def test_a_model_that_runs_layers_without_a_gradient_is_refused(tmp_path: Path) -> None:
    model = fresh("llama")
    layer = model.base_model.model.layers[0]
    layer.forward = _Skipping(layer, always=True)
    with pytest.raises(UnsupportedModelError, match="layers 0 of the prefix get no gradient"):
        trainer("ours", model, tmp_path).train()
    layer.forward.always = False
    trainer("ours", model, tmp_path).train()


def test_printed_model_is_a_prefix_model() -> None:
    assert repr(fresh("llama")).startswith("PrefixModel(\n")


def test_rows_are_on_the_host_wherever_the_batch_is() -> None:
    """Trainer moves the whole batch to the GPU; tensors that refuse the company of others stand for it."""
    batch = {name: tensor.as_subclass(Elsewhere) for name, tensor in Collator(0)(rows()).items()}
    for row, example in zip(RowTokens.of_batch(batch), rows(), strict=True):
        assert type(row.input_ids) is Tensor
        assert type(row.labels) is Tensor
        assert row.labels.tolist() == list(example.labels)


class Elsewhere(Tensor):
    """On another device than plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [value for value in args if isinstance(value, Tensor) and type(value) is Tensor]
        assert not plain, f"{func.__name__} of tensors on two devices"
        found = super().__torch_function__(func, types, args, kwargs)
        return found.as_subclass(Tensor) if func is Tensor.cpu else found


def test_rows_are_evaluated_as_the_collator_makes_them(tmp_path: Path) -> None:
    """One that decides what is a target does so in training and in evaluation."""
    bare = [{"input_ids": list(row.input_ids), "targets": row.target_tokens} for row in rows()]

    def collated(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        made = [{"input_ids": row["input_ids"], "labels": [-100] * 3 + row["input_ids"][3:]} for row in batch]
        return Collator(0)(made)

    ours = trainer("ours", fresh("llama"), tmp_path)
    expected = ours.evaluate(rows())["eval_loss"]
    ours.data_collator = collated
    assert ours.evaluate(bare)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert ours.evaluate(Dataset.from_list(bare))["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_tokens_of_each_process_by_themselves_are_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", average_tokens_across_devices=False
    )
    with pytest.raises(ConfigError, match="average_tokens_across_devices"):
        PrefixTrainer(model=fresh("llama"), args=arguments, pad_token_id=0)


def test_documents_in_one_row_are_refused_and_positions_of_one_are_not() -> None:
    for documents in ([[5, 6, 7], [8, 9]], [[5], [6], [7], [8], [9]]):
        batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
        with pytest.raises(DataError, match="position_ids: they jump or restart"):
            RowTokens.of_batch(batch)
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    counted = {**padded, "labels": padded["input_ids"], "position_ids": torch.tensor([[1, 1, 0, 1]])}
    assert RowTokens.of_batch(counted)[0].input_ids.tolist() == [5, 6]
    (row,) = RowTokens.of_batch({**batch, "position_ids": torch.arange(5)[None]})
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9]
