"""Templates, truncation, targets and their counts: what becomes of a row, in numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prefixtune.config import DataConfig
from prefixtune.data import DataReport, Row, build_examples, build_prompts, default_template
from prefixtune.errors import ConfigError, DataError
from prefixtune.load import load_tokenizer
from prefixtune.serve.prompts import Prompts
from tokenizers_for_tests import CHATML, byte_tokenizer, metaspace_tokenizer, slow_tokenizer

ALPACA = [
    {
        "instruction": "Give three tips for staying healthy.",
        "input": "",
        "output": "1.Eat a balanced diet.\n2. Sleep.",
    },
    {"instruction": "Name the colours", "input": "red, blue and yellow", "output": " red "},
    {"instruction": "什么是三原色？", "input": "", "output": "三原色是红、蓝、黄。"},
    {
        "instruction": " 写一个故事。\n",
        "input": "湖底，有什么东西在动荡。\n",
        "output": "从前…" + "水开始翻腾起泡，" * 40,
    },
    {"instruction": "", "input": "only an input", "output": "fine 🙂"},
]
TOKENIZERS = {
    "without BOS": byte_tokenizer,
    "adding BOS": lambda: byte_tokenizer(bos=True),
    "with spaces in tokens": metaspace_tokenizer,
    "slow, adding EOS": slow_tokenizer,
}
# tokenizers that add tokens to each text, and what they put before it
ADDING = {
    "BOS and EOS, as Llama's with add_eos_token": (byte_tokenizer(around="<s> $A </s>"), ["<s>"]),
    "EOS first, as XGLM's": (byte_tokenizer(around="</s> $A"), ["</s>"]),
    "two tokens first": (byte_tokenizer(around="</s> <s> $A"), ["</s>", "<s>"]),
    "EOS last": (byte_tokenizer(around="$A </s>"), []),
    "EOS last, slow, as ByT5's": (slow_tokenizer(), []),
}
QA = "Question: {instruction}\nAnswer: {output}"


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(values=value, origin=f"train.jsonl:{number}") for number, value in enumerate(values, start=1)]


def smollm2() -> Any:
    return load_tokenizer("demo")


def process_func(example: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The tutorial's, word for word."""
    instruction = tokenizer(
        "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    )
    response = tokenizer(example["output"] + tokenizer.eos_token)
    input_ids = instruction["input_ids"] + response["input_ids"]
    attention_mask = instruction["attention_mask"] + response["attention_mask"]
    labels = [-100] * len(instruction["input_ids"]) + response["input_ids"]
    if len(input_ids) > max_length:
        input_ids = input_ids[:max_length]
        attention_mask = attention_mask[:max_length]
        labels = labels[:max_length]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_against_the_tutorial(tokenizer: Any, max_length: int) -> None:
    config = DataConfig(template="human", max_length=max_length)
    examples, report = build_examples(rows(*ALPACA), tokenizer, config)
    for values, example in zip(ALPACA, examples, strict=True):
        expected = process_func(values, tokenizer, max_length)
        assert list(example.input_ids) == expected["input_ids"]
        assert list(example.labels) == expected["labels"]
        assert set(expected["attention_mask"]) == {
            1
        }  # the Collator writes ones for every token of an example
    assert report.truncated_rows > 0


@pytest.mark.filterwarnings("ignore:This sequence already has")  # ByT5 says so itself, of the tutorial's EOS
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_human_rows_are_the_tutorials_rows(kind: str) -> None:
    check_against_the_tutorial(TOKENIZERS[kind](), max_length=128)


def test_human_template_lets_a_bos_adding_tokenizer_add_it_where_the_tutorials_does() -> None:
    tokenizer = byte_tokenizer(bos=True)
    (example,), report = build_examples(rows(ALPACA[0]), tokenizer, DataConfig(template="human"))
    assert [i for i, token in enumerate(example.input_ids) if token == tokenizer.bos_token_id] == [
        0,
        example.labels.index(tokenizer.bos_token_id),
    ]
    assert "A SECOND BOS before each target" in report.summary()


@pytest.mark.parametrize("template", [None, "human-one-bos"])
def test_rows_by_default_are_the_tutorials_without_a_bos_before_the_target(template: str | None) -> None:
    tokenizer = byte_tokenizer(bos=True)
    config = DataConfig(template=template, max_length=10_000)
    examples, report = build_examples(rows(*ALPACA), tokenizer, config)
    bos = [tokenizer.bos_token_id]
    for example, prompt, tutorial in zip(
        examples,
        build_prompts(rows(*ALPACA), tokenizer, config),
        build_examples(rows(*ALPACA), tokenizer, replace(config, template="human"))[0],
        strict=True,
    ):
        asked, target = (list(ids) for ids in (prompt.input_ids, tutorial.input_ids[len(prompt.input_ids) :]))
        assert asked[:1] == target[:1] == bos
        assert list(example.input_ids) == asked + target[1:]
        assert list(example.labels) == [-100] * len(asked) + target[1:]
    assert report.template == "human-one-bos"
    assert not report.inner_bos
    assert "template human-one-bos: the BOS of the tokenizer once a row" in report.summary()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [CHATML, None])
def test_conversations_by_default_are_the_chat_templates_or_rows_by_default(
    bos: bool, template: str | None
) -> None:
    tokenizer = byte_tokenizer(bos=bos, chat_template=template)
    rows_form = "human-one-bos" if bos else "human"
    assert default_template(tokenizer) == rows_form
    expected = "chat" if template else rows_form
    assert default_template(tokenizer, chat=True) == Prompts(tokenizer).template(None) == expected


@pytest.mark.parametrize("kind", ["without BOS", "with spaces in tokens"])
def test_rows_by_default_are_the_tutorials_where_the_tokenizer_adds_no_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    examples, report = build_examples(rows(*ALPACA), tokenizer, DataConfig())
    assert examples == build_examples(rows(*ALPACA), tokenizer, DataConfig(template="human"))[0]
    assert report.template == "human"
    assert not report.inner_bos
    assert not report.inner_eos


@pytest.mark.parametrize("template", [None, "human-one-bos", QA])
@pytest.mark.parametrize("kind", ADDING)
def test_what_a_tokenizer_adds_to_each_text_stands_at_the_ends_of_a_row_only(
    kind: str, template: str | None
) -> None:
    tokenizer, start = ADDING[kind]
    config = DataConfig(template=template)
    (example,), report = build_examples(rows(ALPACA[2]), tokenizer, config)
    (prompt,) = build_prompts(rows(ALPACA[2]), tokenizer, config)
    asked = "Question: 什么是三原色？\nAnswer: " if template == QA else "Human: 什么是三原色？\n\nAssistant: "
    bare = tokenizer(asked, add_special_tokens=False)["input_ids"]
    said = tokenizer(ALPACA[2]["output"], add_special_tokens=False)["input_ids"]
    assert list(prompt.input_ids) == [*tokenizer.convert_tokens_to_ids(start), *bare]
    assert list(example.input_ids) == [*prompt.input_ids, *said, tokenizer.eos_token_id]
    assert list(example.labels) == [-100] * len(prompt.input_ids) + [*said, tokenizer.eos_token_id]
    assert report.template == (template or "human-one-bos")
    assert "before each target" not in report.summary()


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("BOS and EOS, as Llama's with add_eos_token", "AN END TOKEN and A SECOND BOS before each target"),
        ("EOS first, as XGLM's", "A SECOND BOS before each target"),
        ("EOS last", "AN END TOKEN before each target"),
        ("EOS last, slow, as ByT5's", "AN END TOKEN before each target"),
    ],
)
def test_human_rows_are_the_tutorials_whatever_the_tokenizer_adds_and_say_so(kind: str, told: str) -> None:
    tokenizer, _ = ADDING[kind]
    config = DataConfig(template="human", max_length=10_000)
    examples, report = build_examples(rows(*ALPACA), tokenizer, config)
    for values, example, prompt in zip(
        ALPACA, examples, build_prompts(rows(*ALPACA), tokenizer, config), strict=True
    ):
        expected = process_func(values, tokenizer, 10_000)
        assert list(example.input_ids) == expected["input_ids"]
        assert list(example.labels) == expected["labels"]
        assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert example.labels[len(prompt.input_ids)] != -100
    assert f"{told}, which the template human-one-bos leaves out" in report.summary()


def test_a_tokenizer_whose_added_tokens_cannot_be_told_is_refused() -> None:
    class Changing(type(slow_tokenizer())):  # type: ignore[misc]
        """Reads a text backwards where it adds tokens."""

        def build_inputs_with_special_tokens(self, ids: list[int], *pair: Any) -> list[int]:
            return [*reversed(ids), self.eos_token_id]

    with pytest.raises(DataError, match="what it adds to a text cannot be told"):
        build_examples(rows(ALPACA[0]), Changing(extra_ids=0), DataConfig())


@pytest.mark.slow
def test_human_rows_are_the_tutorials_rows_with_the_real_tokenizer() -> None:
    check_against_the_tutorial(smollm2(), max_length=64)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "Do", "input": "this"}, "Human: Do\nthis\n\nAssistant: "),
        ({"instruction": "Do", "input": None}, "Human: Do\n\nAssistant: "),
        ({"instruction": "Do"}, "Human: Do\n\nAssistant: "),
        ({"input": "name[X]"}, "Human: name[X]\n\nAssistant: "),
        ({"instruction": None, "input": "this"}, "Human: \nthis\n\nAssistant: "),
    ],
)
def test_human_prompt_has_a_line_for_each_column_that_the_rows_have(
    values: dict[str, Any], prompt: str
) -> None:
    assert build_prompts(rows({**values, "output": "o"}), byte_tokenizer(), DataConfig())[0].text == prompt


@pytest.mark.parametrize("template", ["human", "chat", QA])
def test_a_missing_field_is_named_with_the_fields_there_are(template: str) -> None:
    row = Row(values={"instruction": "q", "answer": "a"}, origin="train.jsonl:17")
    with pytest.raises(DataError) as caught:
        build_examples([row], byte_tokenizer(chat_template=CHATML), DataConfig(template=template))
    assert "train.jsonl:17" in str(caught.value)
    assert "no 'output' field; the row has instruction, answer" in str(caught.value).replace(
        "'messages' and ", ""
    )
    assert "--fields output=<column>" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("instruction;output", "its columns are separated by ';'"),
        (" output ", "the row has instruction, ' output '"),
    ],
)
def test_why_a_field_is_missing_can_be_seen(columns: str, said: str) -> None:
    values = dict.fromkeys([columns] if ";" in columns else ["instruction", columns], "a")
    with pytest.raises(DataError) as caught:
        build_examples([Row(values=values, origin="r:1")], byte_tokenizer(), DataConfig())
    assert said in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("template", ["human", "chat"])
def test_a_row_with_neither_instruction_nor_input_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="no 'instruction' field; the row has output"):
        build_examples(
            rows({"output": "a"}), byte_tokenizer(chat_template=CHATML), DataConfig(template=template)
        )


def test_numbers_and_booleans_become_text_and_are_counted() -> None:
    tokenizer = byte_tokenizer()
    numbers = rows({"instruction": 2, "input": True, "output": 4.5})
    texts = rows({"instruction": "2", "input": "True", "output": "4.5"})
    examples, report = build_examples(numbers, tokenizer, DataConfig())
    assert examples == build_examples(texts, tokenizer, DataConfig())[0]
    assert report.converted == 3
    assert "CONVERTED 3 numbers to text" in report.summary()


def test_a_number_in_a_column_that_is_not_read_is_not_counted() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tokenizer = byte_tokenizer(chat_template=CHATML)
    unread = rows({"messages": turns, "output": 3, "id": 4})
    assert build_examples(unread, tokenizer, DataConfig(template="chat"))[1].converted == 0
    unread = rows({"instruction": "q", "output": "a", "id": 4})
    assert build_examples(unread, tokenizer, DataConfig())[1].converted == 0


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (["a"], "got a list"),
        ({"a": 1}, "got an object"),
        (float("nan"), "got NaN"),
        (float("inf"), "got inf, a number too large"),
        (b"a", "got a bytes"),
        ("half an emoji \ud83d", "a lone surrogate U\\+D83D at character 14"),
    ],
)
@pytest.mark.parametrize("template", ["human", "chat", QA])
def test_a_field_that_is_no_text_is_refused_with_its_place(value: Any, came: str, template: str) -> None:
    row = rows({"instruction": "q", "input": "", "output": value})
    with pytest.raises(DataError, match=rf"train.jsonl:1: field 'output': .*{came}"):
        build_examples(row, byte_tokenizer(chat_template=CHATML), DataConfig(template=template))


@pytest.mark.parametrize("bos", [False, True])
def test_format_rows_are_prompt_ids_then_target_ids_without_special_tokens_but_eos(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    config = DataConfig(template=QA)
    example = build_examples(rows(ALPACA[2]), tokenizer, config)[0][0]
    prompt = tokenizer("Question: 什么是三原色？\nAnswer: ")["input_ids"]
    target = tokenizer("三原色是红、蓝、黄。", add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    assert list(example.input_ids) == prompt + target
    assert list(example.labels) == [-100] * len(prompt) + target


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{instruction}{output}", "q"),
        ("{output}", ""),
        ("{{x}} {instruction} {{{instruction}}} -> {output}", "{x} q {q} -> "),
        (r"{instruction}\n\t\\n{output}", "q\n\t\\n"),
        ("{name of a column}: {output}", "v: "),
        ("{null}|{output}", "|"),
    ],
)
def test_format_fills_named_fields_into_the_prompt(template: str, prompt: str) -> None:
    row = rows({"instruction": "q", "output": r"a\n{b}", "name of a column": "v", "null": None})
    found = build_prompts(row, byte_tokenizer(), DataConfig(template=template))[0]
    assert (found.text, found.reference) == (prompt, r"a\n{b}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{instruction} {output} end", "expected nothing after the last field"),
        ("{instruction} {output}\n", "expected nothing after the last field"),
        ("{} {output}", "expected a field's name"),
        ("{0} {output}", "expected a field's name"),
        ("{a.b} {output}", "expected a field's name"),
        ("{a[0]} {output}", "expected a field's name"),
        ("{a!r} {output}", "expected a field's name"),
        ("{a:>9} {output}", "expected a field's name"),
        ("{a {output}", "template: "),
        ("a} {output}", "template: "),
        ("{{a}}", "expected a format with"),
        ("{output} {output}", "the target {output} is in the prompt too"),
        ("", "expected human, human-one-bos, chat, or a format"),
        ("humane", "expected human, human-one-bos, chat, or a format"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_examples(rows(ALPACA[0]), byte_tokenizer(), DataConfig(template=template))
    assert reason in str(caught.value)


@pytest.mark.parametrize("template", ["human", "chat", QA])
def test_a_tokenizer_without_eos_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer(eos=None, chat_template=CHATML)
    with pytest.raises(DataError, match="no EOS token"):
        build_examples(rows(ALPACA[0]), tokenizer, DataConfig(template=template))


def test_what_is_cut_off_is_counted_in_the_example_and_in_the_report() -> None:
    tokenizer = byte_tokenizer()
    whole, _ = build_examples(rows(*ALPACA), tokenizer, DataConfig(max_length=10_000))
    cut, report = build_examples(rows(*ALPACA), tokenizer, DataConfig(max_length=100))
    lost = [max(0, len(example.input_ids) - 100) for example in whole]
    assert [example.truncated for example in cut] == lost
    assert [example.input_ids for example in cut] == [example.input_ids[:100] for example in whole]
    assert report == DataReport(
        rows=5,
        examples=5,
        dropped=0,
        truncated_rows=sum(count > 0 for count in lost),
        truncated_tokens=sum(lost),
        tokens=sum(len(example.input_ids) for example in whole) - sum(lost),
        target_tokens=sum(label != -100 for example in cut for label in example.labels),
        longest=100,
    )
    assert report.truncated_rows == 1
    assert f"TRUNCATED 1 row, {sum(lost):,} tokens cut off" in report.summary()


def test_one_token_cut_off_is_one_row_truncated() -> None:
    tokenizer = byte_tokenizer()
    length = build_examples(rows(ALPACA[0]), tokenizer, DataConfig())[1].longest
    for cut in (0, 1):
        report = build_examples(rows(ALPACA[0]), tokenizer, DataConfig(max_length=length - cut))[1]
        assert (report.truncated_rows, report.truncated_tokens) == (cut, cut)


def test_summary_does_not_mention_losses_that_were_none() -> None:
    summary = build_examples(rows(ALPACA[0]), byte_tokenizer(), DataConfig())[1].summary()
    assert summary.startswith("1 row: 1 example, ")
    assert not any(word.isupper() for word in summary.split())


@pytest.mark.parametrize(
    ("template", "output"), [("human", None), (QA, None), ("chat", None), ("chat", ""), ("chat", " \n")]
)
def test_a_missing_target_is_refused_or_dropped_and_counted(template: str, output: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    values = rows(ALPACA[0], {**ALPACA[0], "output": output})
    with pytest.raises(DataError, match=r"train.jsonl:2: 'output' is (null|empty), so the row has no target"):
        build_examples(values, tokenizer, DataConfig(template=template))
    with pytest.raises(DataError, match=r"train.jsonl:2: 'output' is (null|empty), so the row has no target"):
        build_prompts(values, tokenizer, DataConfig(template=template))
    config = DataConfig(template=template, on_no_target="drop")
    examples, report = build_examples(values, tokenizer, config)
    assert [example.origin for example in examples] == ["train.jsonl:1"]
    assert (report.rows, report.examples, report.dropped) == (2, 1, 1)
    assert "DROPPED 1 row without a target" in report.summary()
    assert [prompt.origin for prompt in build_prompts(values, tokenizer, config)] == ["train.jsonl:1"]


@pytest.mark.parametrize("template", ["human", QA])
def test_the_target_of_an_empty_answer_is_the_end_token_and_it_is_counted(template: str) -> None:
    tokenizer = byte_tokenizer()
    examples, report = build_examples(
        rows(ALPACA[0], {**ALPACA[0], "output": ""}), tokenizer, DataConfig(template=template)
    )
    assert [label for label in examples[1].labels if label != -100] == [tokenizer.eos_token_id]
    assert report.empty == 1
    assert "1 answer EMPTY" in report.summary()


def test_a_target_that_is_cut_away_is_refused_or_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer()
    prompt = len(build_prompts(rows(ALPACA[0]), tokenizer, DataConfig())[0].input_ids)
    values = rows(ALPACA[0], {"instruction": "a", "input": "", "output": "b"})
    kept, _ = build_examples(values, tokenizer, DataConfig(max_length=prompt + 1))
    assert kept[0].target_tokens == 1
    with pytest.raises(DataError, match=rf"train.jsonl:1: no target token is left: {prompt} of the row's"):
        build_examples(values, tokenizer, DataConfig(max_length=prompt))
    _, report = build_examples(values, tokenizer, DataConfig(max_length=prompt, on_no_target="drop"))
    assert (report.examples, report.dropped, report.truncated_rows) == (1, 1, 0)


def test_a_label_on_the_first_token_alone_is_no_target() -> None:
    tokenizer = byte_tokenizer()
    config = DataConfig(template="{output}", max_length=1)
    with pytest.raises(DataError, match="nothing predicts a row's first token"):
        build_examples(rows({"output": "xy"}), tokenizer, config)
    examples, report = build_examples(rows({"output": "xy"}), tokenizer, DataConfig(template="{output}"))
    assert report.target_tokens == examples[0].target_tokens == len(examples[0].input_ids) - 1


def test_rows_that_all_lack_a_target_are_an_error_even_when_dropped() -> None:
    with pytest.raises(DataError, match="no row has a target: 2 rows read, 2 dropped"):
        build_examples(
            rows({**ALPACA[0], "output": None}, {**ALPACA[1], "output": None}),
            byte_tokenizer(),
            DataConfig(on_no_target="drop"),
        )


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["human", QA])
def test_a_prompt_is_what_stands_before_the_target_and_is_never_cut(kind: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    examples, _ = build_examples(rows(*ALPACA), tokenizer, DataConfig(template=template, max_length=10_000))
    prompts = build_prompts(rows(*ALPACA), tokenizer, DataConfig(template=template, max_length=1))
    for values, example, prompt in zip(ALPACA, examples, prompts, strict=True):
        first = next(index for index, label in enumerate(example.labels) if label != -100)
        assert example.input_ids[:first] == prompt.input_ids
        assert (prompt.reference, prompt.origin) == (values["output"], example.origin)


def test_progress_is_written_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    build_examples(rows(ALPACA[0]), byte_tokenizer(), DataConfig(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tokenising" in shown.err
