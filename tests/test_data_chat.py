"""Chat rows: the ids are the chat template's own, and the targets are what the assistant would generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefixtune.config import DataConfig
from prefixtune.data import Example, Row, build_examples, build_prompts, fix_date, load_rows, text_start
from prefixtune.errors import DataError
from prefixtune.generate import conversation_ids, without_target
from prefixtune.serve.prompts import Prompts
from test_data_examples import smollm2
from tokenizers_for_tests import (
    CHATML,
    CHATML_MARKED,
    HEADED,
    LLAMA2,
    OPEN_ENDED,
    THINKING,
    TOOLS,
    TOOLS_MARKED,
    byte_tokenizer,
    metaspace_tokenizer,
    slow_tokenizer,
)

CHAT = DataConfig(template="chat", max_length=10_000)
TURNS = [
    {"role": "user", "content": "What are the colours?"},
    {"role": "assistant", "content": "a"},  # stands in the role header too
    {"role": "user", "content": "什么是三原色？"},
    {"role": "assistant", "content": "三原色是红、蓝、黄 🙂"},
    {"role": "user", "content": "  and yellow "},
    {"role": "assistant", "content": "def f():\n        return 1"},
]
TOKENIZERS = {
    "byte-level": byte_tokenizer,
    "byte-level, trimmed offsets": lambda chat_template: byte_tokenizer(
        chat_template=chat_template, trim_offsets=True
    ),
    "adding BOS": lambda chat_template: byte_tokenizer(chat_template=chat_template, bos=True),
    "sentencepiece-like": metaspace_tokenizer,
    "slow": slow_tokenizer,
}
# each template, and what stands after the content of a turn that generation would emit
ENDINGS = {
    "chatml": (CHATML, "<|im_end|>"),
    "marked": (CHATML_MARKED, "<|im_end|>"),
    "headed": (HEADED, "</s>"),
}


def row(messages: Any) -> Row:
    return Row(values={"messages": messages}, origin="chat.jsonl:3")


def encode(messages: Any, tokenizer: Any) -> Example:
    return build_examples([row(messages)], tokenizer, CHAT)[0][0]


def targets(example: Example, tokenizer: Any) -> list[str]:
    """The text of each run of target tokens."""
    runs: list[list[int]] = []
    for index, label in enumerate(example.labels):
        if label != -100:
            assert label == example.input_ids[index]
            if index and example.labels[index - 1] != -100:
                runs[-1].append(label)
            else:
                runs.append([label])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ENDINGS)
def test_each_assistant_turn_and_its_end_token_are_targets_and_nothing_else(kind: str, name: str) -> None:
    template, ending = ENDINGS[name]
    tokenizer = TOKENIZERS[kind](chat_template=template)
    expected = [turn["content"] + ending for turn in TURNS if turn["role"] == "assistant"]
    assert targets(encode(TURNS, tokenizer), tokenizer) == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, HEADED, LLAMA2, OPEN_ENDED])
def test_chat_ids_are_those_of_the_chat_template(kind: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=template)
    expected = tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert list(encode(TURNS, tokenizer).input_ids) == list(expected)


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed offsets", "sentencepiece-like"])
@pytest.mark.parametrize("count", [2, 4, 5, 6])
def test_generation_marks_and_prefixes_find_the_same_targets(kind: str, count: int) -> None:
    plain = encode(TURNS[:count], TOKENIZERS[kind](chat_template=CHATML))
    assert encode(TURNS[:count], TOKENIZERS[kind](chat_template=CHATML_MARKED)) == plain


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
def test_marks_that_leave_out_the_end_token_still_make_it_a_target(kind: str) -> None:
    outside = CHATML_MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert outside != CHATML_MARKED
    # one answer ends in a character of several tokens, and transformers marks only the first
    plain = encode(TURNS, TOKENIZERS[kind](chat_template=CHATML))
    assert encode(TURNS, TOKENIZERS[kind](chat_template=outside)) == plain


def test_marks_that_take_in_the_line_break_after_the_end_token_do_not_make_it_a_target() -> None:
    inside = CHATML_MARKED.replace("+ '<|im_end|>' }}{% endgeneration", "+ '<|im_end|>\n' }}{% endgeneration")
    inside = inside.replace("{% endif %}{{ '\n' }}", "{{ '\n' }}{% endif %}")
    plain = encode(TURNS, byte_tokenizer(chat_template=CHATML))
    assert encode(TURNS, byte_tokenizer(chat_template=inside)) == plain


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama2_turn_is_a_target_from_its_space_to_its_end_token(kind: str) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=LLAMA2)
    found = targets(encode(TURNS[:4], tokenizer), tokenizer)
    # ByT5 drops the spaces beside a special token, and a sentencepiece decoding the one at its start
    assert [text.replace(" ", "") for text in found] == ["a</s>", "三原色是红、蓝、黄🙂</s>"]


@pytest.mark.parametrize(
    ("around", "bos", "template", "start"),
    [
        ("<s> $A", "<s>", CHATML, ["<s>"]),
        ("</s> $A", "<s>", None, ["</s>"]),
        ("$A", "<s>", None, []),
        ("$A", "<s>", f"{{{{ bos_token }}}}{CHATML}", ["<s>"]),  # what the template alone writes
        ("$A", "<s>", CHATML, []),
        ("$A", "<|im_start|>", CHATML, []),  # it begins each turn, and no text
        ("$A", "<s>", "{{ raise_exception('no') }}", []),
    ],
)
def test_what_begins_a_text(around: str, bos: str, template: str | None, start: list[str]) -> None:
    tokenizer = byte_tokenizer(around=around, chat_template=template)
    tokenizer.bos_token = bos
    assert tokenizer.convert_ids_to_tokens(text_start(tokenizer)) == start


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA2, THINKING])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_chat_prompt_is_what_serving_sends_and_what_stood_before_the_target(
    kind: str, template: str
) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=template)
    messages = TURNS[:2]
    prompt = build_prompts([row(messages)], tokenizer, CHAT)[0]
    served = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert list(prompt.input_ids) == list(served["input_ids"])
    example = encode(messages, tokenizer)
    first = next(index for index, label in enumerate(example.labels) if label != -100)
    assert example.input_ids[:first] == prompt.input_ids
    assert prompt.reference == "a"


@pytest.mark.parametrize("turns", [2, 3])
@pytest.mark.parametrize("path", ["serve", "generate --data", "chat"])
@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_a_prompt_of_several_turns_is_the_chat_templates_own(template: str, path: str, turns: int) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    said = TURNS[: 2 * turns - 1]  # the user asks last
    want = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
    texts = [message["content"] for message in said]
    if path == "serve":
        found = Prompts(tokenizer).of_messages(said, None)
    elif path == "chat":
        pairs = list(zip(texts[:-1:2], texts[1::2], strict=True))
        found = conversation_ids(pairs, texts[-1], tokenizer, "chat")
    else:
        asked = without_target([row(said), row(TURNS[: 2 * turns])], "chat")
        found, answered = (list(prompt.input_ids) for prompt in build_prompts(asked, tokenizer, CHAT))
        assert answered == want
    assert found == want


def test_a_reference_of_tool_calls_is_what_the_last_turn_says() -> None:
    uneven = TOOLS.replace(
        "{{ '\n' }}{% endfor %}",
        "{{ '\n' if loop.last or message.role != 'assistant' else '\n\n' }}{% endfor %}",
    )
    assert uneven != TOOLS  # earlier turns are rendered otherwise
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]}
    prompt = build_prompts([row([*TURNS[:3], call])], byte_tokenizer(chat_template=uneven), CHAT)[0]
    assert prompt.reference == '<call>look {"a": 1}</call>'
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_a_chat_prompt_goes_up_to_the_last_assistant_turn() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    prompt = build_prompts([row(TURNS[:5])], tokenizer, CHAT)[0]
    assert prompt.text.endswith("什么是三原色？<|im_end|>\n<|im_start|>assistant\n")
    assert (prompt.reference, prompt.origin) == (TURNS[3]["content"], "chat.jsonl:3")


def test_a_row_of_fields_is_a_chat_of_system_user_and_assistant() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    values = {"system": "Be brief.", "instruction": "Translate", "input": "红", "output": "red"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Translate\n红"},
        {"role": "assistant", "content": "red"},
    ]
    fields, _ = build_examples([Row(values=values, origin="chat.jsonl:3")], tokenizer, CHAT)
    assert fields == [encode(messages, tokenizer)]
    bare = {"instruction": "Translate", "input": "", "output": "red"}
    fields, _ = build_examples([Row(values=bare, origin="chat.jsonl:3")], tokenizer, CHAT)
    assert fields == [encode([{"role": "user", "content": "Translate"}, messages[2]], tokenizer)]


def test_a_system_column_beside_messages_is_the_first_of_them() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    system = {"role": "system", "content": "Be brief."}
    expected = encode([system, *TURNS], tokenizer)
    said = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TURNS]
    for values in ({"messages": TURNS}, {"messages": [system, *TURNS]}, {"conversations": said}):
        beside = Row(values={"system": "Be brief.", **values}, origin="chat.jsonl:3")
        assert build_examples([beside], tokenizer, CHAT)[0] == [expected]
    other = Row(values={"system": "Be long.", "messages": [system, *TURNS]}, origin="chat.jsonl:3")
    with pytest.raises(DataError, match=r"chat.jsonl:3: the field 'system' and the first message.* differ"):
        build_examples([other], tokenizer, CHAT)


def test_the_reference_of_an_answer_that_the_template_rewrites_is_what_is_learnt() -> None:
    spaced = CHATML.replace("message['content']", "message['content'].replace('<t>', '<t>\\n')")
    assert spaced != CHATML
    tokenizer = byte_tokenizer(chat_template=spaced)
    asked = row([TURNS[0], {"role": "assistant", "content": "<t>hm</t>red"}])
    (example,), _ = build_examples([asked], tokenizer, CHAT)
    (prompt,) = build_prompts([asked], tokenizer, CHAT)
    assert prompt.reference == "<t>\nhm</t>red"
    assert targets(example, tokenizer) == [prompt.reference + "<|im_end|>"]


def test_an_answer_of_indented_code_is_a_target_with_its_first_and_last_spaces() -> None:
    content = "   \n        return    \n   "
    for kind in ("byte-level", "byte-level, trimmed offsets"):
        tokenizer = TOKENIZERS[kind](chat_template=CHATML)
        example = encode([TURNS[0], {"role": "assistant", "content": content}], tokenizer)
        assert targets(example, tokenizer) == [content + "<|im_end|>"]


def test_what_follows_the_last_assistant_turn_is_no_target() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    example = encode(TURNS[:5], tokenizer)
    assert targets(example, tokenizer) == [turn["content"] + "<|im_end|>" for turn in (TURNS[1], TURNS[3])]
    assert "and yellow" in tokenizer.decode(example.input_ids)


def test_a_content_that_looks_like_the_end_of_its_end_token_is_found() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    messages = [TURNS[0], {"role": "assistant", "content": ">"}]
    examples, report = build_examples([row(messages)], tokenizer, CHAT)
    assert targets(examples[0], tokenizer) == ["><|im_end|>"]
    assert report.unclosed == 0


def test_a_template_without_end_of_turn_keeps_the_line_break_as_target_and_says_so() -> None:
    tokenizer = byte_tokenizer(chat_template=OPEN_ENDED)
    examples, report = build_examples([row(TURNS[:4])], tokenizer, CHAT)
    assert targets(examples[0], tokenizer) == [" a\n", " 三原色是红、蓝、黄 🙂\n"]
    assert report.unclosed == 2
    assert "2 turns WITHOUT an end-of-turn token" in report.summary()


def test_an_end_of_spaces_is_a_target_even_where_the_tokenizer_trims_offsets() -> None:
    spaces = OPEN_ENDED.replace("+ '\n' }}", "+ '    ' }}")
    assert spaces != OPEN_ENDED
    for kind in ("byte-level", "byte-level, trimmed offsets"):
        tokenizer = TOKENIZERS[kind](chat_template=spaces)
        assert targets(encode(TURNS[:2], tokenizer), tokenizer) == [" a    "]


def test_each_turn_is_an_example_where_the_template_writes_it_otherwise_once_others_follow() -> None:
    """And each reads what the model is given when it is asked for that turn."""
    tokenizer = byte_tokenizer(chat_template=THINKING)
    examples, report = build_examples([row(TURNS), row(TURNS[:2])], tokenizer, CHAT)
    said = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    thought = "<think>\n\n</think>\n\n"
    for answer, example in zip([*said, said[0]], examples, strict=True):
        assert targets(example, tokenizer) == [f"{thought}{answer}<|im_end|>"]
    for place, example in zip((1, 3, 5), examples, strict=False):
        asked = build_prompts([row(TURNS[: place + 1])], tokenizer, CHAT)[0]
        assert list(example.input_ids[: len(asked.input_ids)]) == list(asked.input_ids)
        assert set(example.labels[: len(asked.input_ids)]) == {-100}
    assert (report.rows, report.examples, report.split, report.cut_turns) == (2, 4, 1, 0)
    assert "2 rows: 4 examples" in report.summary()
    assert "an example for EACH TURN of 1 row" in report.summary()


def test_an_answer_that_is_written_otherwise_when_the_user_goes_on_is_learnt_as_it_was_asked_for() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING)
    found, report = build_examples([row(TURNS[:3])], tokenizer, CHAT)
    assert found == build_examples([row(TURNS[:2])], tokenizer, CHAT)[0]
    assert report.split == 0


def test_turns_beyond_the_longest_row_are_left_out_and_counted() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING)
    whole, _ = build_examples([row(TURNS)], tokenizer, CHAT)
    short = DataConfig(template="chat", max_length=len(whole[0].input_ids))
    kept, report = build_examples([row(TURNS)], tokenizer, short)
    assert kept == whole[:1]
    assert report.cut_turns == 2
    assert "LEFT OUT 2 turns beyond the longest row" in report.summary()
    with pytest.raises(DataError, match=r"chat.jsonl:3: no target token is left"):
        build_examples([row(TURNS)], tokenizer, DataConfig(template="chat", max_length=8))


def test_marks_count_where_the_template_is_not_prefix_consistent() -> None:
    marked = THINKING.replace(
        "{{ message['content'] + '<|im_end|>\n' }}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert marked != THINKING
    tokenizer = byte_tokenizer(chat_template=marked)
    found = targets(encode(TURNS, tokenizer), tokenizer)
    assert found == [turn["content"] + "<|im_end|>" for turn in TURNS if turn["role"] == "assistant"]


def test_marks_on_some_turns_only_leave_no_turn_out() -> None:
    last_only = CHATML_MARKED.replace("== 'assistant' %}", "== 'assistant' and loop.last %}", 1)
    assert last_only != CHATML_MARKED
    plain = encode(TURNS, byte_tokenizer(chat_template=CHATML))
    assert encode(TURNS, byte_tokenizer(chat_template=last_only)) == plain


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed offsets"])
def test_a_token_that_straddles_the_border_is_a_target_because_the_answer_begins_in_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=OPEN_ENDED.replace("'assistant:' }}", "'assistant: ' }}"))
    messages = [TURNS[0], {"role": "assistant", "content": "and"}]
    example = encode(messages, tokenizer)
    assert "Ġa" in tokenizer.convert_ids_to_tokens(example.input_ids)
    assert targets(example, tokenizer) == [" and\n"]


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_refused() -> None:
    template = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert template != CHATML
    with pytest.raises(DataError, match="not prefix-consistent"):
        encode(TURNS[:2], byte_tokenizer(chat_template=template))


def test_a_template_that_drops_the_answer_is_refused() -> None:
    template = "{% for message in messages %}{{ message['role'] + '</s>' }}{% endfor %}"
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        encode(TURNS[:2], byte_tokenizer(chat_template=template))


def test_a_role_that_the_template_refuses_is_an_error_with_its_reason() -> None:
    with pytest.raises(
        DataError, match=r"chat.jsonl:3: the chat template refuses the row: Only user and assistant"
    ):
        encode([{"role": "system", "content": "s"}, *TURNS[:2]], byte_tokenizer(chat_template=LLAMA2))


def test_a_slow_tokenizer_whose_tokens_straddle_a_border_is_refused() -> None:
    class Pairs(type(slow_tokenizer())):  # type: ignore[misc]
        """Joins the last two bytes, so that no prefix of a text has the first ids of the whole."""

        def _tokenize(self, text: str, **options: Any) -> list[str]:
            pieces = super()._tokenize(text, **options)
            return [*pieces[:-1], chr(255 - ord(pieces[-1]))] if pieces else pieces

    tokenizer = Pairs(extra_ids=0)
    tokenizer.chat_template = OPEN_ENDED
    with pytest.raises(DataError, match=r"chat.jsonl:3: a token straddles the border"):
        encode(TURNS[:2], tokenizer)


def test_a_tokenizer_without_chat_template_is_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"no chat template\n.*--template human"):
        encode(TURNS, byte_tokenizer())


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "expected a list of {role, content}; got a text"),
        (None, "expected a list of {role, content}; got null"),
        ([], "expected a list of {role, content}; got an empty list"),
        (["hello"], "expected {role, content} at [0]; got a text"),
        ([{"from": "human", "value": "hi"}], "no 'role' at [0]; it has from, value"),
        ([{"role": "user"}], "no 'content' at [0]; it has role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected text as 'content' at [0]; got a list"),
        ([{"role": 1, "content": "a"}], "expected text as 'role' at [0]; got a number"),
        ([{"role": "assistant", "tool_calls": "f()"}], "tool_calls at [0]: expected a list; got a text"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "expected calls that name a function"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}],
            "tool_calls at [0]: arguments: expected JSON; got '{x'",
        ),
        ([TURNS[0], {"role": "assistant", "content": "\ud83d"}], "at [1]: not valid Unicode"),
    ],
)
def test_messages_of_another_form_are_refused_with_their_place(messages: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(messages, byte_tokenizer(chat_template=CHATML))
    assert "chat.jsonl:3: field 'messages'" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (TURNS[:1], "the assistant's part is empty"),
        ([TURNS[0], {"role": "assistant", "content": None}], "messages\\[1\\].content is empty"),
        ([*TURNS[:3], {"role": "assistant", "content": " "}], "messages\\[3\\].content is empty"),
    ],
)
def test_a_chat_without_a_target_is_refused_or_dropped(messages: Any, reason: str) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    with pytest.raises(DataError, match=rf"chat.jsonl:3: {reason}"):
        encode(messages, tokenizer)
    config = DataConfig(template="chat", on_no_target="drop")
    assert build_examples([row(messages), row(TURNS)], tokenizer, config)[1].dropped == 1


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Prag"}}}
CALLING = [
    {"role": "user", "content": "Is it dry?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Yes."},
]
WRITTEN = '<call>weather {"city": "Prag"}</call>'
SCHEMAS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def tool_row(messages: Any, tools: Any = SCHEMAS) -> Row:
    return Row(values={"messages": messages, "tools": tools}, origin="chat.jsonl:3")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [TOOLS, TOOLS_MARKED])
def test_a_tool_call_is_a_target_as_the_template_writes_it_after_the_rows_tools(
    kind: str, template: str
) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=template)
    (example,), report = build_examples([tool_row(CALLING)], tokenizer, CHAT)
    assert targets(example, tokenizer) == [WRITTEN + "<|im_end|>", "Yes.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(CALLING, tools=SCHEMAS, return_dict=True)["input_ids"]
    assert list(example.input_ids) == list(rendered)
    assert (report.unclosed, report.without_tools) == (0, 0)


def test_a_prompt_for_a_tool_call_has_the_tools_and_the_call_as_written_for_reference() -> None:
    tokenizer = byte_tokenizer(chat_template=TOOLS)
    (prompt,) = build_prompts([tool_row(CALLING[:2])], tokenizer, CHAT)
    served = tokenizer.apply_chat_template(
        CALLING[:1], tools=SCHEMAS, add_generation_prompt=True, return_dict=True
    )
    assert list(prompt.input_ids) == list(served["input_ids"])
    assert prompt.reference == WRITTEN


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]},
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Prag"}'}}],
        },
    ],
    ids=["no content", "empty content", "call without function", "arguments as a text of JSON"],
)
def test_a_tool_call_in_another_spelling_is_the_same_row(message: dict[str, Any]) -> None:
    # Llama 3.1's asks whether a message has the key, and in Parquet each has it, as null or an empty list
    asks = "{% if 'tool_calls' in message and not message.tool_calls %}{{ '!' }}{% endif %}"
    start = "{% if message.content"
    tokenizer = byte_tokenizer(chat_template=TOOLS.replace(start, asks + start))
    nothing = [{**CALLING[0], "tool_calls": None}, message, {**CALLING[2], "tool_calls": []}, CALLING[3]]
    same, _ = build_examples([tool_row(nothing, json.dumps(SCHEMAS))], tokenizer, CHAT)
    assert same == build_examples([tool_row(CALLING)], tokenizer, CHAT)[0]


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def test_rows_of_arrow_are_those_of_json_though_each_object_has_the_keys_of_all(tmp_path: Path) -> None:
    said = {"role": "user", "content": "Go on."}
    lines = [
        {"messages": [said, calling("weather", city="Prag")], "tools": SCHEMAS},
        {
            "messages": [said, calling("mail", to="Eva", content={"subject": "x"})],
            "tools": [{"name": "mail"}],
        },
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "Yes."}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = datasets.Dataset.from_list(lines)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "folder")
    tokenizer = byte_tokenizer(chat_template=TOOLS)
    found = {}
    for name in ("rows.jsonl", "rows.parquet", "folder"):
        examples, _ = build_examples(load_rows(str(tmp_path / name)), tokenizer, CHAT)
        found[name] = [(example.input_ids, example.labels) for example in examples]
    assert found["rows.parquet"] == found["folder"] == found["rows.jsonl"]
    assert "null" not in tokenizer.decode([id for ids, _ in found["folder"] for id in ids])


def test_what_the_template_leaves_out_of_tool_calls_is_refused_and_of_tools_counted() -> None:
    ignoring = byte_tokenizer(chat_template=CHATML)
    with pytest.raises(
        DataError, match=r"chat.jsonl:3: the chat template leaves out the tool calls of messa"
    ):
        build_examples([tool_row(CALLING[:2])], ignoring, CHAT)
    without = tool_row(CALLING[2:])
    examples, report = build_examples([without, row(CALLING[2:])], ignoring, CHAT)
    assert examples[0].input_ids == examples[1].input_ids
    assert report.without_tools == 1
    assert "the TOOLS of 1 row LEFT OUT by the chat template" in report.summary()
    either = TOOLS.replace("{% if message.content %}", "{% if message.content and not message.tool_calls %}")
    said = [CALLING[0], {**CALLING[1], "content": "Let me look."}]
    with pytest.raises(DataError, match=r"leaves out what messages\[1\] says with its tool calls"):
        build_examples([tool_row(said)], byte_tokenizer(chat_template=either), CHAT)
    tokenizer = byte_tokenizer(chat_template=TOOLS)
    (example,), _ = build_examples([tool_row(said)], tokenizer, CHAT)
    assert targets(example, tokenizer) == ["Let me look." + WRITTEN + "<|im_end|>"]


@pytest.mark.parametrize(
    ("tools", "came"), [({"a": 1}, "got an object"), ("f()", "expected JSON; got 'f()'")]
)
def test_tools_of_another_form_are_refused(tools: Any, came: str) -> None:
    with pytest.raises(DataError, match=r"chat.jsonl:3: field 'tools': ") as caught:
        build_examples([tool_row(TURNS, tools)], byte_tokenizer(chat_template=TOOLS), CHAT)
    assert came in str(caught.value)


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Red?", "weight": None},
    {"from": "gpt", "value": "红"},
]


def test_sharegpts_conversations_are_messages(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    roles = ["system", "user", "assistant"]
    messages = [{"role": role, "content": turn["value"]} for role, turn in zip(roles, SHAREGPT, strict=True)]
    given = Row(values={"conversations": SHAREGPT, "id": 1}, origin="chat.jsonl:3")
    assert build_examples([given], tokenizer, CHAT)[0] == [encode(messages, tokenizer)]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(given.values))
    assert load_rows(str(file))[0].values == {"id": 1, "messages": messages}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("text", "expected a list of {from, value}; got a text"),
        (["hello"], "expected {from, value} at [0]; got a text"),
        ([{"role": "user", "content": "a"}], "expected {from, value} at [0]; got the fields role, content"),
        ([*SHAREGPT, {"from": "observation", "value": "a"}], "as 'from' at [3]; got 'observation'"),
    ],
)
def test_conversations_of_another_form_are_refused_where_they_are_read(
    said: Any, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": said, "instruction": "q", "output": "a"}))
    tokenizer = byte_tokenizer(chat_template=CHATML)
    with pytest.raises(DataError) as caught:
        build_examples(load_rows(str(file)), tokenizer, CHAT)
    assert "rows.jsonl:1: field 'conversations': expected " in str(caught.value)
    assert reason in str(caught.value)
    assert build_examples(load_rows(str(file)), tokenizer, DataConfig(template="human"))[1].examples == 1


def test_a_template_prints_the_date_that_is_fixed_in_each_of_its_forms() -> None:
    asks = """{{ strftime_now('%d %b %Y') }}|{% set x = strftime_now( "%H:%M\\n" ) %}{{ x }}"""
    told = "{{ strftime_now is defined }}|"
    tokenizer = byte_tokenizer(chat_template=told + asks)
    fix_date(tokenizer, "2001-02-03T04:05:06.789")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "True|03 Feb 2001|04:05\n"
    tokenizer.chat_template = {"default": asks, "tool_use": asks + "!"}
    fix_date(tokenizer, "2001-02-03")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template="tool_use") == (
        "03 Feb 2001|00:00\n!"
    )


@pytest.mark.slow
def test_chat_rows_of_the_real_tokenizer_end_with_its_end_token() -> None:
    tokenizer = smollm2()
    example = encode(TURNS, tokenizer)
    assert list(example.input_ids) == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    expected = [turn["content"] + "<|im_end|>" for turn in TURNS if turn["role"] == "assistant"]
    assert targets(example, tokenizer) == expected
