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
from prefixtune.errors import ConfigError, DataError
from prefixtune.evaluate import evaluate, target_loss
from prefixtune.forgetting import forgetting, neutral_texts
from prefixtune.generate import generate_batch
from prefixtune.likelihood import choose_labels, row_losses
from prefixtune.loss import Passes
from prefixtune.metrics import score
from prefixtune.task import SPARE_TOKENS
from tokenizers_for_tests import CHANNELLED, CHATML, THINKING, byte_tokenizer

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


@pytest.mark.parametrize(
    ("on_gpu", "splits", "room"), [(False, True, 512), (True, True, 2048), (True, False, 512)]
)
def test_a_pass_on_a_gpu_has_more_room_unless_whole_logits_are_made(
    on_gpu: bool, splits: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefixtune.evaluate as evaluation

    model, asked = prefixed(), []
    own = Passes.of

    def seen(base: Any, *, capacity: int, **given: Any) -> Passes:
        asked.append(capacity)
        return own(base, capacity=capacity, **given)

    expected = target_loss(model, EXAMPLES, pad_token_id=0)
    monkeypatch.setattr(Passes, "of", seen)
    monkeypatch.setattr(evaluation, "splits", lambda base: splits)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: on_gpu))
    loss, tokens = target_loss(model, EXAMPLES, pad_token_id=0)
    assert asked == [room]
    assert tokens == expected[1]
    assert loss == pytest.approx(expected[0], rel=1e-5)


def test_rows_with_a_long_beginning_share_a_pass() -> None:
    examples = [
        Example(input_ids=(3,) * 600 + (row, row), labels=(-100,) * 601 + (row,), origin="", truncated=0)
        for row in range(4, 9)
    ]
    model, passes = bare(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: passes.append(given[0].numel()))
    target_loss(model, examples, pad_token_id=0)
    assert [tokens for tokens in passes if tokens > 100] == [-(-(600 + 5 * 2) // 32) * 32]


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


def test_a_row_whose_prompt_leaves_no_room_for_its_target_is_not_asked_where_it_is_dropped() -> None:
    long = Row(values={"instruction": "x" * 300, "output": "y"}, origin="r:4")
    config = DataConfig(max_length=200, on_no_target="drop")
    found = evaluate(bare(), TOKENIZER, [long, *ROWS], config, max_new_tokens=NEW, progress=False)
    assert (found.rows, found.dropped_rows, len(found.samples)) == (3, 1, 3)
    assert [sample["origin"] for sample in found.samples] == ["r:1", "r:2", "r:3"]


def asked(*pairs: tuple[str, str]) -> list[Row]:
    return [
        Row(values={"instruction": instruction, "output": output}, origin=f"r:{number}")
        for number, (instruction, output) in enumerate(pairs, start=1)
    ]


def test_rows_with_one_prompt_are_one_input_with_all_their_references() -> None:
    rows = asked(("one", "first"), ("two", "red"), ("one", "second one"), ("two", "red"), ("one", "third"))
    found = evaluate(bare(), TOKENIZER, rows, DataConfig(), metrics=["bleu", "chrf"], progress=False)
    assert (found.rows, found.inputs) == (5, 2)
    assert [sample["references"] for sample in found.samples] == [["first", "second one", "third"], ["red"]]
    assert [(sample["origin"], sample["reference"]) for sample in found.samples] == [
        ("r:1", "first"),
        ("r:2", "red"),
    ]
    predictions = [sample["prediction"] for sample in found.samples]
    references = [sample["references"] for sample in found.samples]
    assert found.metrics == score(["exact_match", "bleu", "chrf"], predictions, references)
    assert found.metric_settings["bleu"].startswith("nrefs:var|")
    assert found.base_metrics is None


def test_any_reference_is_an_exact_match() -> None:
    model = bare()
    prompt = build_prompts(asked(("one", "x")), TOKENIZER, DataConfig())[0]
    answer = generate_batch(model, TOKENIZER, [prompt.input_ids], max_new_tokens=NEW)[0]
    rows = asked(("one", "x"), ("one", answer), ("two", "y"))
    found = evaluate(model, TOKENIZER, rows, DataConfig(), max_new_tokens=NEW, progress=False)
    assert found.exact_match == found.metrics["exact_match"] == 0.5


def test_metrics_of_the_bare_model_beside_the_prefix_are_its_own() -> None:
    options = {"metrics": ["chrf", "accuracy"], "max_new_tokens": 20, "progress": False}
    both = evaluate(prefixed(), TOKENIZER, ROWS, DataConfig(), **options)
    alone = evaluate(bare(), TOKENIZER, ROWS, DataConfig(), **options)
    assert both.base_metrics == alone.metrics
    assert both.metrics != alone.metrics
    assert [sample["base_label"] for sample in both.samples] == [sample["label"] for sample in alone.samples]


LABELS = [*"0123456789", "10", "红"]  # "1" begins "10"
ANY = asked(*((question, "x") for question in ("the colours", "什么是三原色？", "user", "3 + 4", "a b c")))


@pytest.mark.parametrize("make", [bare, prefixed])
@pytest.mark.parametrize("template", ["human", "chat", "Q: {instruction}\\nA:{output}"])
def test_label_is_the_one_whose_tokens_have_the_highest_summed_log_likelihood(
    make: Any, template: str
) -> None:
    """By hand: one row at a time, the softmax of each place, summed over the label and its end token."""
    model, tokenizer = make(), byte_tokenizer(chat_template=CHATML)
    config = DataConfig(template=template)
    expected = []
    for row in ANY:
        sums = []
        for label in LABELS:
            filled = Row(values={**row.values, "output": label}, origin="r")
            example = build_examples([filled], tokenizer, config)[0][0]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            likelihood = logits.log_softmax(-1)
            sums.append(sum(float(likelihood[t - 1, x]) for t, x in enumerate(example.labels) if x != -100))
        expected.append(LABELS[sums.index(max(sums))])
    assert choose_labels(model, tokenizer, ANY, config, LABELS, pad_token_id=0) == expected
    assert len(set(expected)) > 1


def test_accuracy_is_the_share_of_inputs_whose_likeliest_label_is_a_reference() -> None:
    model = bare()
    questions = [(f"number {number}", "yes") for number in range(6)]
    chosen = choose_labels(model, TOKENIZER, asked(*questions), DataConfig(), ["yes", "no"], pad_token_id=0)
    wanted = [*chosen[:4], *({"yes": "no", "no": "yes"}[label] for label in chosen[4:])]
    rows = asked(*((question, label) for (question, _), label in zip(questions, wanted, strict=True)))
    options = {"metrics": ["accuracy"], "exact_match": False, "progress": False}
    found = evaluate(model, TOKENIZER, rows, DataConfig(), labels=["yes", "no"], **options)
    assert found.metrics == {"accuracy": pytest.approx(4 / 6)}
    assert [sample["label"] for sample in found.samples] == chosen
    assert "prediction" not in found.samples[0]
    assert found.exact_match is None


def test_labels_are_the_distinct_references_written_as_the_rows_write_them() -> None:
    config = DataConfig(template="{instruction}:{output}")
    rows = asked(("a", " no"), ("b", " yes"), ("c", " no"))
    options = {"metrics": ["accuracy"], "exact_match": False, "progress": False}
    found = evaluate(bare(), TOKENIZER, rows, config, **options)
    given = evaluate(bare(), TOKENIZER, rows, config, labels=["no", "yes"], **options)
    assert found.labels == given.labels == ["no", "yes"]
    assert found.samples == given.samples
    chosen = choose_labels(bare(), TOKENIZER, rows, config, [" no", " yes"], pad_token_id=0)
    assert [sample["label"] for sample in found.samples] == [label.strip() for label in chosen]


@pytest.mark.parametrize(
    ("written", "given", "compared"),
    [
        ([" no", " no"], ["no", "yes"], [" no", " yes"]),  # as the others are, where no row has it
        ([" no", " no"], ["no", "yes "], [" no", "yes "]),  # unless it was given with its own
        (["no", " no", " no", "yes "], ["no", "yes", "so"], [" no", "yes ", " so"]),  # as most are
    ],
)
def test_labels_have_the_white_space_of_the_rows(
    written: list[str], given: list[str], compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "prefixtune.task.choose_labels",
        lambda model, tokenizer, rows, config, labels, **_: seen.append(labels) or [labels[0]] * len(rows),
    )
    rows = asked(*((f"{number}", label) for number, label in enumerate(written)))
    evaluate(
        bare(),
        TOKENIZER,
        rows,
        DataConfig(template="{instruction}:{output}"),
        metrics=["accuracy"],
        labels=given,
        exact_match=False,
        progress=False,
    )
    assert seen == [compared]


@pytest.mark.parametrize(("template", "lead"), [(CHATML, 0), (THINKING, 15), (CHANNELLED, 5)])
def test_what_a_template_writes_before_an_answer_is_no_part_of_it(
    template: str, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    config = DataConfig(template="chat")
    examples, _ = build_examples(ROWS, tokenizer, config)
    learnt = [[token for token in example.labels[:-1] if token != -100] for example in examples]
    longest = max(len(tokenizer(row.values["output"])["input_ids"]) for row in ROWS)
    allowed: list[int] = []

    def answers(*_: Any, max_new_tokens: int, **__: Any) -> list[list[int]]:
        allowed.append(max_new_tokens)
        return learnt

    monkeypatch.setattr("prefixtune.generate.generate_ids", answers)
    found = evaluate(bare(), tokenizer, ROWS, config, progress=False)
    assert found.metrics == {"exact_match": 1.0}
    assert [sample["prediction"] for sample in found.samples] == [row.values["output"] for row in ROWS]
    assert allowed == [longest + SPARE_TOKENS + lead]


@pytest.mark.parametrize("marked", ["<yes>", "[CALL]w {}"])
def test_a_reference_with_a_special_token_is_reached_by_the_answer_that_has_it(
    marked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>", "[CALL]"]})
    rows = [
        Row(values={"instruction": text, "output": text}, origin="r:1") for text in (marked, "<no>", "red")
    ]
    asked = [marked, "<yes>", "<s>red"]  # right, another label, and a special token that no reference has
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    monkeypatch.setattr("prefixtune.generate.generate_ids", lambda *_, **__: answers)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    found = evaluate(base, tokenizer, rows, DataConfig(), progress=False)
    assert [sample["exact_match"] for sample in found.samples] == [True, False, True]
    assert found.samples[0]["prediction"] == marked


def test_of_a_row_with_a_thought_the_answers_after_the_thoughts_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thinking = THINKING.replace(
        "<think>\n\n</think>", "<think>\n' + message['reasoning_content'] + '\n</think>"
    )
    assert thinking != THINKING
    tokenizer = byte_tokenizer(chat_template=thinking)
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "They greet me.\nSo do I."}
    rows = [Row(values={"messages": [{"role": "user", "content": "hi"}, turn]}, origin="r:1")]
    for said, right in (
        ("<think>\nThey greet me.\nSo do I.\n</think>\n\nyes", True),
        ("<think>\nAnother thought.\n</think>\n\nyes", True),
        ("<think>\nAnother thought.\n</think>\n\nno", False),
        ("<think>\nyes", False),
    ):
        ids = [tokenizer(said, add_special_tokens=False)["input_ids"]]
        monkeypatch.setattr("prefixtune.generate.generate_ids", lambda *_, ids=ids, **__: ids)
        found = evaluate(bare(), tokenizer, rows, DataConfig(template="chat"), progress=False)
        assert found.samples[0]["exact_match"] == right, said


def test_an_answer_that_begins_otherwise_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING)
    said = "  <think>\nWell.\n</think>\n\nred"
    monkeypatch.setattr(
        "prefixtune.generate.generate_ids", lambda *_, **__: [tokenizer(said)["input_ids"]] * len(ROWS)
    )
    found = evaluate(bare(), tokenizer, ROWS, DataConfig(template="chat"), progress=False)
    assert {sample["prediction"] for sample in found.samples} == {said}


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_last_turn_of_a_chat_is_what_the_label_replaces(template: str) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    turns = [("user", "Who?"), ("assistant", "You."), ("user", "Why?"), ("assistant", "red")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = Row(values={"messages": messages}, origin="r:1")
    config = DataConfig(template="chat")
    losses = []
    for label in LABELS:
        filled = Row(values={"messages": [*messages[:3], {**messages[3], "content": label}]}, origin="r:1")
        losses += row_losses(bare(), build_examples([filled], tokenizer, config)[0][-1:], pad_token_id=0)
    expected = LABELS[losses.index(min(losses))]
    assert choose_labels(bare(), tokenizer, [row], config, LABELS, pad_token_id=0) == [expected]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_losses_of_rows_sum_to_the_target_loss(family: str) -> None:
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    for one in (model, PrefixModel(model, PrefixConfig(length=4))):
        loss, tokens = target_loss(one, EXAMPLES, pad_token_id=0)
        alone = [row_losses(one, [example], pad_token_id=0)[0] for example in EXAMPLES]
        assert row_losses(one, EXAMPLES, pad_token_id=0) == pytest.approx(alone, rel=1e-5)
        assert sum(alone) / tokens == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"metrics": ["blue"]}, ConfigError, "got 'blue'"),
        ({"labels": ["a", "b"]}, ConfigError, "accuracy, which chooses from them, is not asked for"),
        ({"metrics": ["accuracy"], "labels": ["a"]}, ConfigError, "expected two or more; got a"),
        ({"metrics": ["accuracy"], "labels": ["a", "a"]}, ConfigError, "a comes twice"),
        ({"metrics": ["accuracy"], "labels": ["a", " "]}, ConfigError, "is empty"),
        ({"metrics": ["accuracy"], "labels": ["red", "b"]}, DataError, "r:1: accuracy: expected one of"),
        ({"metrics": ["accuracy", "accuracy"]}, ConfigError, "accuracy is named twice"),
        ({"language": "de"}, ConfigError, "got 'de'"),
    ],
)
def test_task_that_cannot_be_measured_is_told(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        evaluate(bare(), TOKENIZER, ROWS, DataConfig(), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": ["accuracy"], "labels": ["1", "2"]}, "r:3: accuracy: .*got '{'"),
        ({"metrics": ["json_equal"]}, "r:3: json_equal: .*'{'"),
    ],
)
def test_a_reference_that_cannot_be_used_is_told_with_its_own_row(options: Any, said: str) -> None:
    rows = asked(("one", "1"), ("two", "2"), ("one", "{"))  # the third is a reference of the first input
    with pytest.raises(DataError, match=said):
        evaluate(bare(), TOKENIZER, rows, DataConfig(), progress=False, **options)


def test_a_row_without_a_prompt_has_a_loss_and_nothing_to_ask() -> None:
    config = DataConfig(template="{instruction}{output}")
    rows = asked(("one", "yes"), ("", "no"))
    with pytest.raises(DataError, match="r:2: the prompt is empty"):
        evaluate(bare(), TOKENIZER, rows, config, progress=False)
    assert evaluate(bare(), TOKENIZER, rows, config, exact_match=False, progress=False).rows == 2


def test_an_empty_reference_is_no_label_and_is_told_with_its_row() -> None:
    rows = asked(("one", "yes"), ("two", "no"), ("three", " "))
    with pytest.raises(DataError, match="r:3: accuracy: the reference is empty") as told:
        evaluate(bare(), TOKENIZER, rows, DataConfig(), metrics=["accuracy"], progress=False)
    assert "take the row out" in str(told.value.hint)


def test_one_or_many_references_are_no_labels() -> None:
    for number in (1, 21):
        rows = asked(*((f"q{i}", f"a{i}") for i in range(number)))
        with pytest.raises(ConfigError, match=f"2 to 20 distinct references.*got {number}"):
            evaluate(bare(), TOKENIZER, rows, DataConfig(), metrics=["accuracy"], progress=False)


def test_forgetting_is_measured_beside_the_task() -> None:
    model = prefixed()
    neutral = neutral_texts(model.base_model, TOKENIZER, texts=3, tokens=8)
    found = evaluate(
        model, TOKENIZER, ROWS, DataConfig(), neutral=neutral, exact_match=False, progress=False
    ).to_dict()
    expected = forgetting(model, model.base_model, TOKENIZER, texts=neutral)
    assert found["forgetting"] == expected.rise != 0.0
    assert found["forgetting_detail"]["texts"] == 3


TASK = "CAUSAL_LM"  # in PEFT's words


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_peft_model_is_evaluated_through_its_own_forward(method: str) -> None:
    import peft

    configs = {
        "lora": peft.LoraConfig(task_type=TASK, r=2, target_modules=["q_proj"], init_lora_weights=False),
        "prompt": peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
    }
    model = peft.get_peft_model(bare(), configs[method])
    found = evaluate(model, TOKENIZER, ROWS, DataConfig(), max_new_tokens=NEW, progress=False)
    assert found.loss == pytest.approx(row_by_row(model), rel=1e-5)
    ids = torch.tensor([build_prompts(ROWS, TOKENIZER, DataConfig())[0].input_ids])
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
    assert TOKENIZER.decode(whole[0, -NEW:], skip_special_tokens=True) == found.samples[0]["prediction"]
