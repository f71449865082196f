"""Laws of logprobs' tokens: joined they are the answer, and each is where it is said to be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from prefixtune.serve.answers import Answer, Shape
from prefixtune.serve.job import Step
from prefixtune.serve.metrics import Metrics
from prefixtune.serve.running import Asked, Running
from prefixtune.serve.sampling import Choice, Sampling
from prefixtune.serve.spelling import Speller
from tokenizers_for_tests import byte_tokenizer, metaspace_tokenizer, slow_tokenizer

TEXT = "the colours are red, blue and \u539f\n three  tips\\."


def fallback_tokenizer() -> Any:
    """`metaspace_tokenizer`, whose bytes are text and no special tokens, as in real files."""
    data = json.loads(metaspace_tokenizer().backend_tokenizer.to_str())
    data["added_tokens"] = [item for item in data["added_tokens"] if not item["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def stripping_tokenizer() -> Any:
    """As Llama's and Mistral's older files: the space that begins a text is stripped last of all."""
    tokenizer = fallback_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def told(
    tokenizer: Any, tokens: list[int], *, is_chat: bool = False, stream: bool = False, top: Any = ()
) -> Any:
    """The logprobs of an answer of these tokens, with its text as the server gives it."""

    class Engine:
        def submit(self, job: Any) -> None:
            for place, token in enumerate(tokens):
                job.listener(Step(answer=0, choice=Choice(token=token, logprob=-1.0 - place, top=tuple(top))))
            job.listener(Step(answer=0, ended="length"))

    async def run() -> Any:
        asked = Asked(
            prompts=[[1]],
            prefix=None,
            samplings=[Sampling()],
            max_tokens=99,
            ends=frozenset(),
            stops=(),
            timeout=9,
        )
        engine: Any = Engine()
        running = Running(engine, tokenizer, Metrics(), asked, speller=Speller(tokenizer))
        return [piece async for piece in running]

    pieces = asyncio.run(run())
    shape = Shape(is_chat=is_chat, model="x", fingerprint="y", prompt_tokens=1, tells_chances=True)
    if stream:
        chunks = [json.loads(shape.chunk(piece).removeprefix(b"data: "))["choices"][0] for piece in pieces]
        parts = [chunk["logprobs"] for chunk in chunks]
        return "".join(chunk["text"] for chunk in chunks), {
            key: [item for part in parts for item in part[key]] for key in parts[0]
        }
    answer = Answer()
    for piece in pieces:
        answer.take(piece)
    return answer.text, json.loads(shape.whole([answer]))["choices"][0]["logprobs"]


MAKERS = [byte_tokenizer, fallback_tokenizer, stripping_tokenizer]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_where_their_offsets_say_and_joined_are_the_text(make: Any, stream: bool) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids.insert(5, tokenizer.bos_token_id)  # of which an answer's text says nothing
    text, found = told(tokenizer, ids, stream=stream)
    assert text.strip() == TEXT
    parts = [token for token in found["tokens"] if token.startswith("bytes:")]
    assert "".join(part.removeprefix("bytes:") for part in parts) == r"\xe5\x8e\x9f"
    whole = [token for token in found["tokens"] if token not in (*parts, "<s>")]
    assert "".join(whole) == text.replace("\u539f", "")
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if token in parts:
            assert text[offset] == "\u539f"
        elif token != "<s>":
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("make", MAKERS)
def test_token_after_a_part_of_a_character_is_where_it_is(make: Any) -> None:
    tokenizer = make()
    blue = tokenizer("blue", add_special_tokens=False)["input_ids"]
    part = tokenizer("\U0001f642", add_special_tokens=False)["input_ids"][-3]
    text, found = told(tokenizer, [*blue, part, *blue])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert text[offset:].startswith("\ufffd" if token == r"bytes:\x9f" else token)


@pytest.mark.parametrize("make", MAKERS)
def test_bytes_of_a_chats_tokens_are_those_of_the_text(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    text, found = told(tokenizer, ids, is_chat=True)
    assert bytes(byte for token in found["content"] for byte in token["bytes"]) == text.encode()


def test_token_with_a_part_of_a_character_is_spelled_by_its_bytes() -> None:
    tokenizer = byte_tokenizer()
    mixed = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\u4e09\ufffd")
    found = Speller(tokenizer).spell(mixed, is_first=False)
    assert found == (r"bytes:\xe4\xb8\x89\xe5\x8e", b"\xe4\xb8\x89\xe5\x8e")


def test_of_alternatives_with_one_text_the_most_probable_is_told() -> None:
    tokenizer = metaspace_tokenizer()
    spaced, plain = tokenizer.convert_tokens_to_ids(["\u2581a", "a"])
    _, found = told(tokenizer, [plain, plain], top=[(spaced, -0.5), (plain, -2.0)])
    assert found["top_logprobs"] == [{"a": -0.5}, {" a": -0.5, "a": -2.0}]


def test_slow_tokenizers_tokens_are_spelled() -> None:
    tokenizer = slow_tokenizer()
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    text, found = told(tokenizer, ids)
    assert "".join(found["tokens"]) == text == "a b"
