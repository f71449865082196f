"""A real vLLM over HTTP: the answers of transformers token by token, and the guards before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import Reference, Server, fails_to_start, serving
from tiny import LENGTHS, retrain, write_base

pytestmark = pytest.mark.vllm


NEW = 16
TEXTS = ["hello world", "What is the capital of France?", "a", "x" * 70, "什么是三原色？"]
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
ID = 260


@pytest.fixture(scope="module")
def running(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    place = tmp_path_factory.mktemp("http")
    shutil.copytree(made / "served", place / "served")
    shutil.copytree(made / "made", place / "made")
    (place / "model").symlink_to(made / "model")
    with serving(place / "served", place / "log") as server:
        yield server, place


@pytest.fixture(scope="module")
def reference(running: tuple[Server, Path]) -> Reference:
    return Reference(running[1])


@pytest.fixture
def server(running: tuple[Server, Path]) -> Iterator[Server]:
    """The server, which must be well after each test, and must never have computed a placeholder."""
    yield running[0]
    assert running[0].client.get("/health").status_code == 200
    assert running[0].counter("computed_placeholders") == 0
    assert (
        running[0].counter("refused") == 0
    )  # the middleware lets nothing through that the engine must refuse


def model(name: str | None) -> str:
    return "tiny" if name is None else f"tiny:{name}"


def streamed(server: Server, name: str | None, text: str) -> list[int]:
    """The token ids of a streamed chat."""
    body = {
        "model": model(name),
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **GREEDY,
    }
    ids: list[int] = []
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.read().split(b"\n\n")  # not lines: an answer may hold what Unicode calls a line's end
    for line in events:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            assert event["model"] == model(name)
            ids += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
    return ids


def whole(server: Server, name: str | None, text: str) -> list[int]:
    answer = server.chat(model(name), text, **GREEDY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model(name)
    return answer.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("turn", [1, 2])
def test_170_concurrent_chats_with_16_prefixes_and_none_are_transformers_greedy_tokens(
    server: Server, reference: Reference, turn: int
) -> None:
    asked = [(name, text, send) for name in (*LENGTHS, None) for text in TEXTS for send in (whole, streamed)]
    assert (len(asked), len(LENGTHS), len(set(LENGTHS.values()))) == (170, 16, 8)

    def ask(one: tuple[str | None, str, Callable[[Server, str | None, str], list[int]]]) -> list[int]:
        name, text, send = one
        with server.apart() as own:
            return send(own, name, text)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, asked))
    wanted = {
        (name, text): reference.greedy(name, reference.chat_ids(text), count=NEW)
        for name in (*LENGTHS, None)
        for text in TEXTS
    }
    assert found == [wanted[name, text] for name, text, _ in asked]
    assert len(set(map(tuple, wanted.values()))) == len(wanted)  # each prefix answers otherwise


def test_completions_of_texts_and_ids_are_transformers_greedy_tokens(
    server: Server, reference: Reference
) -> None:
    for name in (*LENGTHS, None):
        ids = reference.tokenizer("hello")["input_ids"]
        wanted = reference.greedy(name, ids, count=NEW)
        for prompt in ("hello", ["hello", "a"], ids, [ids, [5]]):
            answer = server.complete(model(name), prompt, **GREEDY).json()
            assert answer["choices"][0]["token_ids"] == wanted
        assert answer["choices"][1]["token_ids"] == reference.greedy(name, [5], count=NEW)


def test_several_answers_of_one_prompt_all_have_the_prefix(server: Server, reference: Reference) -> None:
    greedy = {**GREEDY, "temperature": 1, "top_k": 1}  # vLLM gives one answer at temperature 0
    answer = server.complete("tiny:c", [5, 6], **greedy, n=3).json()
    wanted = reference.greedy("c", [5, 6], count=NEW)
    assert [choice["token_ids"] for choice in answer["choices"]] == [wanted] * 3


def test_models_lists_base_and_prefixes(server: Server) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["tiny", *(f"tiny:{name}" for name in LENGTHS)]


REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (400, "tiny:a", {"prompt": [5], "prompt_logprobs": 1}),
    (400, "tiny:a", {"prompt": [5], "echo": True, "logprobs": 1}),
    (400, "tiny:a", {"prompt": [5, 6], "truncate_prompt_tokens": 1}),
    (400, "tiny:a", {"prompt": [5], "use_beam_search": True, "n": 2}),
    (400, "tiny:a", {"prompt": []}),
    (400, "tiny:a", {"prompt": [ID] * 32}),
    (400, "tiny:a", {"prompt": [5, ID]}),
    (400, "tiny:a", {"prompt": "<|prefixtune|>"}),
    (400, "tiny:a", {"prompt": [5] * 760}),
    (400, "tiny:a", {"prompt": [999_999]}),
    (400, "tiny:a", {"prompt": [-1]}),
    (400, "tiny", {"prompt": [ID] * 33}),
    (400, "tiny", {"prompt": "<|prefixtune|>"}),
    (404, "tiny:nope", {"prompt": [5]}),
    (404, "other:a", {"prompt": [5]}),
    *(
        (400, model, {"prompt": [5], field: value})
        for model in ("tiny", "tiny:a")
        for field, value in (
            ("kv_transfer_params", {"prefixtune": {"name": "a", "digest": "x", "length": 1}}),
            ("cache_salt", "x"),
            ("vllm_xargs", {"kv_transfer_params": "x"}),
        )
    ),
]


@pytest.mark.parametrize(("status", "model", "body"), REFUSED)
def test_request_that_cannot_be_exact_is_refused_and_the_next_one_is_exact(
    server: Server, reference: Reference, status: int, model: str, body: dict[str, Any]
) -> None:
    answer = server.client.post("/v1/completions", json={"model": model, "max_tokens": 2, **body})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    after = server.complete("tiny:a", [5], **GREEDY).json()["choices"][0]["token_ids"]
    assert after == reference.greedy("a", [5], count=NEW)


def test_retrained_prefix_answers_anew_and_not_from_old_blocks(
    server: Server, running: tuple[Server, Path], reference: Reference
) -> None:
    asked = list(
        range(5, 105)
    )  # whole blocks of text after the prefix, which could be taken for the new one's
    old = server.complete("tiny:b", asked, **GREEDY).json()["choices"][0]["token_ids"]
    assert old == reference.greedy("b", asked, count=NEW)
    retrain(running[1], "b", seed=77, length=64)
    new = server.complete("tiny:b", asked, **GREEDY).json()["choices"][0]["token_ids"]
    assert new == reference.greedy("b", asked, count=NEW)
    assert new != old


def test_damaged_prefix_fails_alone(
    server: Server, running: tuple[Server, Path], reference: Reference
) -> None:
    retrain(running[1], "f", seed=78, length=3)
    file = running[1] / "served/prefixes/f/prefix.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert server.complete("tiny:f", [5], **GREEDY).status_code == 503
    after = server.complete("tiny:a", [5], **GREEDY).json()["choices"][0]["token_ids"]
    assert after == reference.greedy("a", [5], count=NEW)


def test_answer_whose_placeholders_were_computed_is_withheld_and_no_prefix_answers_any_more(
    made: Path, tmp_path: Path
) -> None:
    module = "--kv-transfer-config.kv_connector_module_path"
    with serving(made / "served", tmp_path / "log", module, "sabotage") as server:
        assert server.complete("tiny:c", [5], **GREEDY).status_code == 200
        # a single token: the answer has ended before the engine can fail its request
        answer = server.complete("tiny:c", [5, 6, 7], temperature=0, max_tokens=1)
        assert (answer.status_code, "withheld" in answer.text) == (500, True)
        assert server.counter("computed_placeholders") == LENGTHS["c"]
        for name in ("c", "a"):
            assert server.complete(model(name), [5], **GREEDY).status_code == 500
        assert server.complete("tiny", [5], **GREEDY).status_code == 200


def test_server_does_not_start_when_a_canary_does_not_come_back(place: Path) -> None:
    file = place / "served/prefixes/c/vllm.json"
    record = json.loads(file.read_text())
    record["canary"]["tokens"][-1] ^= 1
    file.write_text(json.dumps(record))
    said = fails_to_start(place / "served", place / "log")
    assert "the server does not start: the prefix c did not pass its canary" in said
    assert f"at export {record['canary']['tokens']}" in said


def test_server_does_not_start_on_another_base(place: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=1)
    said = fails_to_start(place / "served", place / "log", "--model", str(other))
    assert "has other weights" in said
