"""Batches and the coloured view of an example."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefixtune.config import DataConfig
from prefixtune.data import Collator, Example, build_examples, example_text
from test_data_examples import rows, smollm2
from tokenizers_for_tests import byte_tokenizer, metaspace_tokenizer

ONE = Example(input_ids=(5, 6, 7), labels=(-100, 6, 7), origin="a:1", truncated=0)
TWO = Example(input_ids=(8, 9), labels=(-100, 9), origin="a:2", truncated=0)


def styled(example: Example, tokenizer: Any) -> list[tuple[str, str]]:
    text = example_text(example, tokenizer)
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_a_batch_is_padded_on_the_right_and_padding_is_masked_and_no_target() -> None:
    batch = Collator(3)([ONE, TWO])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_pad_id_that_is_a_real_token_stays_a_target_inside_the_text() -> None:
    assert Collator(7)([ONE, TWO])["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_dicts_of_lists_or_tensors_collate_as_examples_do() -> None:
    plain = [{"input_ids": list(example.input_ids), "labels": list(example.labels)} for example in (ONE, TWO)]
    tensors = [{name: torch.tensor(ids) for name, ids in example.items()} for example in plain]
    expected = Collator(0)([ONE, TWO])
    for examples in (plain, tensors, [plain[0], TWO]):
        batch = Collator(0)(examples)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_mask_that_a_dict_brings_is_kept() -> None:
    brought = {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [0, 1]}
    assert Collator(0)([brought, ONE])["attention_mask"].tolist() == [[0, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_shown_text_is_the_row_with_its_target_in_green(make: Any) -> None:
    tokenizer = make()
    row = rows({"instruction": "什么是三原色？", "output": "三原色是红、蓝 🙂"})
    example = build_examples(row, tokenizer, DataConfig(template="问：{instruction} 答： {output}"))[0][0]
    assert styled(example, tokenizer)[0] == ("问：什么是三原色？ 答： ", "dim")
    target, style = styled(example, tokenizer)[1]
    assert (target.strip(), style) == ("三原色是红、蓝 🙂</s>", "bold green")


def test_a_character_that_the_border_cuts_in_two_is_shown_once_and_whole() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("x湖y")["input_ids"]
    assert len(ids) == 5  # the character is three tokens
    example = Example(input_ids=tuple(ids), labels=(-100, -100, *ids[2:]), origin="a:1", truncated=0)
    assert styled(example, tokenizer) == [("x", "dim"), ("湖y", "bold green")]


def test_a_character_that_truncation_cut_in_two_is_shown_as_cut() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("x湖")["input_ids"][:-1]
    example = Example(input_ids=tuple(ids), labels=(-100, *ids[1:]), origin="a:1", truncated=1)
    assert example_text(example, tokenizer).plain == "x\ufffd"


def test_several_targets_are_shown_each_in_its_place() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcd")["input_ids"]
    assert len(ids) == 4
    example = Example(input_ids=tuple(ids), labels=(ids[0], ids[1], -100, ids[3]), origin="a:1", truncated=0)
    green = "bold green"  # the first token's label is no target: nothing predicts it
    assert styled(example, tokenizer) == [("a", "dim"), ("b", green), ("c", "dim"), ("d", green)]


@pytest.mark.slow
def test_shown_text_of_the_real_tokenizer_is_the_row_in_chinese() -> None:
    tokenizer = smollm2()
    row = rows({"instruction": "什么是三原色？", "input": "", "output": "三原色是红、蓝、黄。"})
    example = build_examples(row, tokenizer, DataConfig())[0][0]
    assert styled(example, tokenizer) == [
        ("Human: 什么是三原色？\n\nAssistant: ", "dim"),
        ("三原色是红、蓝、黄。<|im_end|>", "bold green"),
    ]
