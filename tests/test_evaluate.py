"""Laws of evaluate: each target token counts the same; the bare model beside the prefix is the bare model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.config import DataConfig
from prefixtune.data import Example, Row, build_examples, build_prompts
from prefixtune.errors import DataError
from prefixtune.evaluate import evaluate, target_loss
from prefixtune.generate import generate_batch
from tokenizers_for_tests import byte_tokenizer

TOKENIZER = byte_tokenizer()
ROWS = [
    Row(
        values={"instruction": "Give three tips.", "output": "Sleep enough and eat a balanced diet."},
        origin="r:1",
    ),
    Row(values={"instruction": "the colours", "output": "red"}, origin="r:2"),
    Row(values={"instruction": "什么是三原色？", "output": "红、蓝、黄。"}, origin="r:3"),
]
EXAMPLES, _ = build_examples(ROWS, TOKENIZER, DataConfig())
NEW = 6  # tokens in the answers that the tests compare


def bare(**options: Any) -> Any:
    return tiny_model("llama", vocab_size=len(TOKENIZER), **options)


def prefixed() -> Any:
    torch.manual_seed(0)
    return PrefixModel(bare(), PrefixConfig(length=4))


def row_by_row(model: Any) -> float:
    """The same mean from transformers' own loss of each row, weighted by its targets."""
    nats = 0.0
    for example in EXAMPLES:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        nats += loss.item() * example.target_tokens
    return nats / sum(example.target_tokens for example in EXAMPLES)


@pytest.mark.parametrize("make", [bare, prefixed])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_target_loss_is_the_mean_over_tokens_not_over_rows_or_batches(make: Any, batch_size: int) -> None:
    model = make()
    loss, tokens = target_loss(model, EXAMPLES, pad_token_id=0, capacity=5 * batch_size)
    assert loss == pytest.approx(row_by_row(model), rel=1e-5)
    assert tokens == sum(example.target_tokens for example in EXAMPLES)


def test_target_loss_does_not_depend_on_the_padding_token() -> None:
    losses = {target_loss(bare(), EXAMPLES, pad_token_id=pad)[0] for pad in (0, 7, 200)}
    assert max(losses) - min(losses) < 1e-6


def test_loss_of_a_bfloat16_model_is_computed_in_float32() -> None:
    """In bfloat16 a loss near 6 has steps of 0.03; the float32 loss of the same logits does not."""
    model = bare(dtype=torch.bfloat16)
    example = EXAMPLES[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
    labels = torch.tensor(example.labels[1:])
    exact = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert target_loss(model, [example], pad_token_id=0)[0] == pytest.approx(exact, rel=1e-3)


def test_examples_without_targets_are_an_error_not_a_nan() -> None:
    empty = Example(input_ids=(5, 6), labels=(-100, -100), origin="r:1", truncated=0)
    with pytest.raises(DataError, match="no target token"):
        target_loss(bare(), [empty], pad_token_id=0)


def test_every_module_is_in_the_mode_it_was_in_before() -> None:
    model = bare()
    model.model.layers[0].train()
    before = [module.training for module in model.modules()]
    target_loss(model, EXAMPLES, pad_token_id=0)
    assert [module.training for module in model.modules()] == before


def test_bare_model_beside_the_prefix_is_the_bare_model_alone() -> None:
    both = evaluate(prefixed(), TOKENIZER, ROWS, DataConfig(), max_new_tokens=NEW, progress=False)
    alone = evaluate(bare(), TOKENIZER, ROWS, DataConfig(), max_new_tokens=NEW, progress=False)
    assert both.base_loss == alone.loss
    assert both.base_exact_match == alone.exact_match
    assert [s["base_prediction"] for s in both.samples] == [s["prediction"] for s in alone.samples]
    assert both.loss != alone.loss
    assert alone.base_loss is None
    assert both.perplexity == math.exp(both.loss)


def test_exact_match_is_the_share_of_answers_that_are_the_reference_but_for_space_around() -> None:
    model = bare()
    prompts = build_prompts(ROWS, TOKENIZER, DataConfig())
    answers = generate_batch(model, TOKENIZER, [p.input_ids for p in prompts], max_new_tokens=NEW)
    outputs = [f" {answers[0].strip()}\n", answers[1], answers[2] + "!"]
    rows = [
        Row(values={**row.values, "output": output}, origin=row.origin)
        for row, output in zip(ROWS, outputs, strict=True)
    ]
    found = evaluate(model, TOKENIZER, rows, DataConfig(), max_new_tokens=NEW, progress=False)
    assert found.exact_match == pytest.approx(2 / 3)
    assert [sample["exact_match"] for sample in found.samples] == [True, True, False]
    assert [sample["prediction"] for sample in found.samples] == answers


def test_longest_answer_is_the_longest_reference_and_a_few_tokens() -> None:
    found = evaluate(bare(), TOKENIZER, ROWS, DataConfig(), progress=False)
    longest = max(len(TOKENIZER(row.values["output"])["input_ids"]) for row in ROWS)
    prompts = build_prompts(ROWS, TOKENIZER, DataConfig())
    ids = [prompt.input_ids for prompt in prompts]
    expected = generate_batch(bare(), TOKENIZER, ids, max_new_tokens=longest + 8)
    assert [sample["prediction"] for sample in found.samples] == expected


def test_what_is_cut_or_dropped_is_counted() -> None:
    rows = [*ROWS, Row(values={"instruction": "x", "output": None}, origin="r:4")]
    config = DataConfig(max_length=len(EXAMPLES[0].input_ids) - 1, on_no_target="drop")
    found = evaluate(bare(), TOKENIZER, rows, config, exact_match=False, progress=False)
    assert (found.rows, found.truncated_rows, found.dropped_rows) == (3, 1, 1)
    assert found.samples == []
    assert found.exact_match is None
