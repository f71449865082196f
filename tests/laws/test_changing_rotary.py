"""A rotary embedding that changes with the longest position of a pass: each row has its own factors, not a
neighbour's. The reference is each row alone, in a model that has run nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from oracle import assert_close, joined, logits, tokens
from torch.nn import functional as F

from families import COMMON, VOCAB, randomised
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.attachment import attach, attach_pairs, packed
from prefixtune.compare.peers import peer_model, peer_trainer
from prefixtune.compare.settings import PeerConfig
from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import Collator, Example, Row, build_examples, build_prompts
from prefixtune.distill.context import Context, check_positions_left
from prefixtune.errors import AttachError, DataError
from prefixtune.evaluate import evaluate, target_loss
from prefixtune.forgetting import NeutralTexts, forgetting
from prefixtune.generate import generate_ids, sampling
from prefixtune.likelihood import row_losses
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes, RowTokens
from prefixtune.rotary import RotaryChange, rotary_change
from tokenizers_for_tests import byte_tokenizer

LIMIT = 40  # positions up to which the factors are the first ones
LENGTHS = (LIMIT + 21, 7, LIMIT, LIMIT + 1, LIMIT + 9, 38, LIMIT + 9, LIMIT - 1, LIMIT + 8, 3)
TOKENIZER = byte_tokenizer()
GPT2: dict[str, Any] = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=LIMIT, initializer_range=0.25
)

each_kind = pytest.mark.parametrize("kind", ["longrope", "dynamic"])
each_way = pytest.mark.parametrize("packing", [True, False])


def fresh(kind: str, *, limit: int = LIMIT, **sizes: Any) -> Any:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope["original_max_position_embeddings"] = limit
        config = hf.Phi3Config(**COMMON | sizes, rope_parameters=rope, original_max_position_embeddings=limit)
    else:
        changed = {**COMMON, "max_position_embeddings": limit} | sizes
        config = hf.LlamaConfig(**changed, rope_parameters=rope | {"factor": 4.0})
    return randomised(config)


def rows_of(lengths: Sequence[int] = LENGTHS) -> list[RowTokens]:
    rows = [tokens(length, seed=length + place)[0] for place, length in enumerate(lengths)]
    return [RowTokens(ids, ids) for ids in rows]


def examples_of(rows: Sequence[RowTokens], *, origin: str = "rows.jsonl") -> list[Example]:
    found = []
    for place, row in enumerate(rows):
        ids = tuple(row.input_ids.tolist())
        found.append(Example(input_ids=ids, labels=ids, origin=f"{origin}:{place + 1}", truncated=0))
    return found


def alone(model: Any, rows: Sequence[RowTokens]) -> list[float]:
    """The summed loss of each row by a copy of the model that runs nothing else."""
    found = []
    for row in rows:
        scores = logits(copy.deepcopy(model), row.input_ids[None])[0]
        scores = scores[-len(row.input_ids) : -1]  # of virtual tokens nothing is asked
        found.append(float(F.cross_entropy(scores, row.labels[1:], reduction="sum")))
    return found


@each_kind
def test_the_change_moves_the_losses_of_short_rows_that_share_a_pass_with_long_ones(kind: str) -> None:
    rows, base = rows_of((LIMIT - 1, LIMIT + 1)), fresh(kind)
    with torch.no_grad(), packed(base, None, [len(row.input_ids) for row in rows]) as hidden_of:
        together = hidden_of(torch.cat([row.input_ids for row in rows])[None])[: LIMIT - 1]
        short = fresh(kind).model(rows[0].input_ids[None]).last_hidden_state[0]
    assert (together - short).norm() > 1e-3 * short.norm()


@each_kind
@each_way
def test_each_row_of_the_bare_model_has_its_own_loss_and_aims(kind: str, packing: bool) -> None:
    rows, base = rows_of(), fresh(kind)
    expected = alone(base, rows)
    passes = Passes.of(base, capacity=200, pad_token_id=0, packing=packing)
    assert passes.packing == packing
    plan = passes.plan(rows)
    assert sorted(row for group in plan for row in group) == list(range(len(rows)))
    assert any(len(group) > 1 for group in plan)
    for group in (*plan, *reversed(plan)):  # what a longer pass leaves behind is taken back
        with torch.no_grad(), passes.loss([rows[row] for row in group], None) as loss:
            assert float(loss) == pytest.approx(sum(expected[row] for row in group), rel=1e-5)
    for row, aim in zip(rows, passes.aims(rows), strict=True):
        whole = fresh(kind).model(row.input_ids[None]).last_hidden_state[0, :-1]
        assert_close(aim[None], whole[None])


@each_kind
def test_rows_of_both_sides_in_one_pass_are_refused(kind: str) -> None:
    passes = Passes.of(fresh(kind), capacity=200, pad_token_id=0)
    with pytest.raises(AssertionError), passes.loss(rows_of((LIMIT, LIMIT + 1)), None):
        pass


@each_kind
@each_way
def test_target_loss_and_row_losses_of_the_bare_model_are_those_of_each_row_alone(
    kind: str, packing: bool
) -> None:
    rows, base = rows_of(), fresh(kind)
    expected, examples = alone(base, rows), examples_of(rows)
    loss, count = target_loss(base, examples, pad_token_id=0, packing=packing)
    assert loss == pytest.approx(sum(expected) / count, rel=1e-5)
    assert row_losses(base, examples, pad_token_id=0, capacity=200) == pytest.approx(expected, rel=1e-5)


@each_kind
@pytest.mark.parametrize("of", ["lora", "prompt-tuning", "peft-prefix"])
def test_rows_of_other_methods_have_the_loss_of_each_row_alone(kind: str, of: str) -> None:
    rows = rows_of()
    model = peer_model(of, fresh(kind), PeerConfig(init="random"), length=4).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    found = row_losses(model, examples_of(rows), pad_token_id=0, capacity=200)
    assert found == pytest.approx(alone(model, rows), rel=1e-5)


@each_kind
def test_evaluate_measures_the_bare_model_and_its_forgetting_as_each_row_alone(kind: str) -> None:
    limit = 60
    base = fresh(kind, limit=limit, vocab_size=len(TOKENIZER))
    texts = [("Who?", "You."), ("zq" * 40, "k" * 9), ("zq" * 20, "kj"), ("Why?", "kj" * 50)]
    values = [{"instruction": one, "output": two} for one, two in texts]
    rows = [Row(values=one, origin=f"r:{place}") for place, one in enumerate(values)]
    examples, _ = build_examples(rows, TOKENIZER, DataConfig())
    sizes = [len(example.input_ids) for example in examples]
    assert min(sizes) < limit < sorted(sizes)[-2]
    neutral = NeutralTexts(rows=tuple(examples_of(rows_of((30, limit + 50, limit + 45)))), source="given")
    found = evaluate(base, TOKENIZER, rows, DataConfig(), exact_match=False, progress=False)
    assert found.loss == pytest.approx(mean_alone(base, examples), rel=1e-5)
    lost = forgetting(base, base, TOKENIZER, texts=neutral)
    assert lost.loss == lost.base_loss == pytest.approx(mean_alone(base, neutral.rows), rel=1e-5)


def mean_alone(model: Any, examples: Sequence[Example]) -> float:
    rows = [RowTokens(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in examples]
    return sum(alone(model, rows)) / sum(e.target_tokens for e in examples)


@each_kind
def test_packed_rows_behind_a_prefix_are_exact_up_to_the_change_and_refused_beyond(kind: str) -> None:
    base, kv = fresh(kind), PrefixKV.from_tokens(fresh(kind), tokens(11, seed=5))
    pairs = [(layer.key, layer.value) for layer in kv.layers]
    passes = Passes.of(base, capacity=200, pad_token_id=0)
    assert passes.packing
    with torch.no_grad():
        rows = rows_of((LIMIT - 11, 3))
        with passes.loss(rows, pairs) as loss:
            found = float(loss)
        expected = 0.0
        for row in rows:
            whole = logits(fresh(kind), joined(tokens(11, seed=5), row.input_ids[None]))[0, 11:-1]
            expected += float(F.cross_entropy(whole, row.input_ids[1:], reduction="sum"))
        assert found == pytest.approx(expected, rel=1e-5)
        for packing in (True, False):
            passes = Passes.of(base, capacity=200, pad_token_id=0, packing=packing)
            message = f"take {LIMIT + 1} positions"
            with pytest.raises(AttachError, match=message), passes.loss(rows_of((LIMIT - 10, 3)), pairs):
                pass


@pytest.mark.parametrize("family", ["longrope", "dynamic", "gpt2"])
def test_what_fills_a_pack_takes_no_position_beyond_the_rows(family: str) -> None:
    base = fresh(family) if family != "gpt2" else randomised(hf.GPT2Config(**GPT2))
    text = tokens(LIMIT - 3, seed=6)
    pairs = [(layer.key, layer.value) for layer in PrefixKV.from_tokens(base, text).layers]
    row, passes = rows_of((3,)), Passes.of(base, capacity=200, pad_token_id=0)
    assert passes.packing
    with torch.no_grad(), passes.loss(row, pairs) as loss:
        found = float(loss)
    whole = logits(base, joined(text, row[0].input_ids[None]))[0, LIMIT - 3 : -1]
    assert found == pytest.approx(
        float(F.cross_entropy(whole, row[0].input_ids[1:], reduction="sum")), rel=1e-5
    )


def test_dynamic_factors_change_beyond_the_models_positions_whatever_its_first_ones_were() -> None:
    config = fresh("dynamic").config
    config.rope_parameters["original_max_position_embeddings"] = LIMIT // 2
    base, text = randomised(config), tokens(LIMIT, seed=3)
    assert rotary_change(config) == RotaryChange(after=LIMIT, by_length=True)
    assert_close(logits(base, text[:, : LIMIT // 2]), logits(base, text)[:, : LIMIT // 2])


def test_pass_with_a_prefix_does_not_see_what_a_longer_one_left() -> None:
    base, front, text = fresh("dynamic"), tokens(11, seed=5), tokens(LIMIT - 11, seed=6)
    kv, expected = PrefixKV.from_tokens(base, front), logits(fresh("dynamic"), joined(front, text))[:, 11:]
    logits(base, tokens(LIMIT + 20, seed=7))
    with attach(base, kv):
        assert_close(logits(base, text), expected)
    logits(base, tokens(LIMIT + 20, seed=7))
    pairs = [(layer.key, layer.value) for layer in kv.layers]
    with attach_pairs(base, pairs, name="again"):
        assert_close(logits(base, text), expected)


@each_kind
@pytest.mark.parametrize("batch_size", [3, 16])
def test_answer_of_the_bare_model_in_a_batch_is_the_answer_alone(kind: str, batch_size: int) -> None:
    new, base = 9, fresh(kind)
    lengths = (3, 4, LIMIT - 10, LIMIT - 9, LIMIT - 5, LIMIT - 5, LIMIT - 4, LIMIT, LIMIT + 1, LIMIT + 6)
    prompts = [tokens(length, seed=length + place)[0].tolist() for place, length in enumerate(lengths)]
    settings = sampling(temperature=0.0, top_p=1.0)
    expected = []
    for prompt in prompts:
        whole = fresh(kind).generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        expected.append(whole[0, len(prompt) :].tolist())
    for _ in range(2):
        found = generate_ids(
            base, NoEnd(), prompts, max_new_tokens=new, batch_size=batch_size, settings=settings
        )
        assert found == expected


class NoEnd:
    """All that generation asks of a tokenizer that ends no text."""

    pad_token_id, eos_token_id = 0, None


@each_kind
def test_rows_and_answers_beyond_the_change_are_told_before_a_prefix_runs(kind: str) -> None:
    base = fresh(kind, limit=120, vocab_size=len(TOKENIZER))
    model = PrefixModel(base, PrefixConfig(length=20))
    values = [{"instruction": "zq" * size, "output": "a"} for size in (1, 60, 2)]
    rows = [Row(values=one, origin=f"r.jsonl:{place + 1}") for place, one in enumerate(values)]
    with pytest.raises(DataError, match=r"r.jsonl:2: \d+ tokens after a prefix of 20 do not fit .* 120"):
        evaluate(model, TOKENIZER, rows, DataConfig(), exact_match=False, progress=False)
    ran: list[Any] = []
    base.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(DataError, match=r"r.jsonl:1: a prompt with an answer of up to 99: .* 120"):
        evaluate(model, TOKENIZER, rows[:1], DataConfig(), max_new_tokens=99, progress=False)
    prompt = build_prompts(rows[:1], TOKENIZER, DataConfig())[0].input_ids
    settings = sampling(temperature=0.0, top_p=1.0)
    with pytest.raises(DataError, match="120 positions"):
        generate_ids(model, TOKENIZER, [prompt], max_new_tokens=99, batch_size=1, settings=settings)
    assert not ran


@each_kind
def test_text_that_leaves_a_teacher_no_positions_before_the_change_is_told(kind: str) -> None:
    base = LoadedBase(model=fresh(kind), tokenizer=None, name="base", dtype_reason="")
    context = Context(ids=tuple(range(3, LIMIT - 7)), text="", template="human", is_turn=False)
    check_positions_left(base, context, needed=10)
    with pytest.raises(DataError, match=f"has {LIMIT} positions"):
        check_positions_left(base, context, needed=11)


@each_kind
def test_training_step_of_another_method_has_the_loss_of_each_row_alone(kind: str, tmp_path: Path) -> None:
    rows = rows_of()
    trainer = peer_trainer(
        "lora",
        LoadedBase(model=fresh(kind), tokenizer=None, name="base", dtype_reason=""),
        examples_of(rows),
        PeerConfig(),
        shared=TrainConfig(max_steps=1),
        steps=1,
        output=tmp_path,
        length=4,
        start=None,
        pad_token_id=0,
        precision=torch.float32,
    )
    expected = sum(alone(fresh(kind), rows)) / sum(len(row.input_ids) - 1 for row in rows)
    for _ in range(2):
        loss = trainer.training_step(trainer.model, Collator(0)(examples_of(rows)))
        assert float(loss) == pytest.approx(expected, rel=1e-5)
