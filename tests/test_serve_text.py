"""Laws of text that comes token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from prefixtune.serve.text import Writer
from tokenizers_for_tests import byte_tokenizer, metaspace_tokenizer

TEXTS = [
    "什么是三原色？三原色是红、蓝、黄。",
    "the colours are red 🙂🙂 and  blue\n\n end",
    " a",
    "\u00e9\u0301x",
    "",
]


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_tokenizers_own_text(make: Any, text: str) -> None:
    tokenizer = make()
    for ids in (tokenizer(text)["input_ids"], list(reversed(tokenizer(text)["input_ids"]))):
        writer = Writer(tokenizer)
        pieces = [writer.add(token) for token in ids]
        assert "".join([*pieces, writer.finish()]) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS[:2])
def test_text_ends_before_the_first_stop_string_wherever_tokens_end(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for start, length in itertools.product(range(len(whole)), (1, 2, 4)):
        stop = whole[start : start + length]
        writer, found = Writer(tokenizer, ["\0", stop, stop + "\0"]), ""
        for token in ids:
            found += writer.add(token)
            if writer.stopped:
                break
        else:
            found += writer.finish()
        assert writer.stopped
        assert found == whole[: whole.index(stop)]


def test_what_only_began_like_a_stop_string_is_given_in_the_end() -> None:
    tokenizer = byte_tokenizer()
    writer = Writer(tokenizer, ["blue and yellow"])
    given = [writer.add(token) for token in tokenizer("red, blue and")["input_ids"]]
    assert "".join(given) == "red, "
    assert writer.finish() == "blue and"
    assert not writer.stopped


def test_stop_string_is_seen_where_a_part_of_a_character_follows_it() -> None:
    tokenizer = byte_tokenizer()
    mixed = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "三\ufffd")
    for stop in ("三", "s三"):
        writer = Writer(tokenizer, ["never", stop])
        given = [writer.add(token) for token in (*tokenizer("colours")["input_ids"], mixed)]
        assert writer.stopped
        assert "".join(given) == "colours三"[: -len(stop)]
    writer = Writer(tokenizer, ["原"])
    assert writer.add(mixed) + writer.finish() == "三\ufffd"
    assert not writer.stopped
