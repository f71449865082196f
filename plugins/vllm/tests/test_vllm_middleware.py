"""What reaches the engine, and what is refused before it: each guard, with what it is there for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_server import Client, FakeServer
from prefixtune_vllm import Export
from tiny import LENGTHS, retrain

TOKEN, ID = "<|prefixtune|>", 260


@pytest.fixture
def client(place: Path) -> Client:
    client = Client(FakeServer(place / "served"))
    assert client.start() == "complete"
    return client


def refused(client: Client, answer: tuple[int, Any], status: int = 400) -> str:
    """The message of a refusal that nothing of reached the engine."""
    assert answer[0] == status, answer
    assert client.server.reached == []
    assert answer[1]["error"]["code"] == status
    return answer[1]["error"]["message"]


# --- what a prefix becomes


@pytest.mark.parametrize("name", LENGTHS)
def test_prefix_is_placeholders_a_load_and_a_salt_of_its_content(client: Client, name: str) -> None:
    status, answer = client.complete(f"tiny:{name}", [5, 6, 7], max_tokens=3)
    prefix = Export.read(client.server.folder).find(name)
    ((path, body),) = client.server.reached
    assert (status, path, answer["model"]) == (200, "/v1/completions", f"tiny:{name}")
    assert body["prompt"] == [[ID] * LENGTHS[name] + [5, 6, 7]]
    assert body["model"] == "tiny"
    assert body["cache_salt"] == prefix.stored.digest
    assert body["kv_transfer_params"]["prefixtune"] == {
        "name": name,
        "digest": prefix.stored.digest,
        "length": LENGTHS[name],
    }


def test_text_becomes_tokens_before_the_prefix_is_put_before_it(client: Client) -> None:
    client.complete("tiny:d", ["ab", "c"])
    client.complete("tiny:d", "ab", add_special_tokens=False)
    ids = client.server.tokenizer("ab")["input_ids"]
    assert client.server.reached[0][1]["prompt"][0] == [ID] * 5 + ids
    assert len(client.server.reached[0][1]["prompt"]) == 2
    assert client.server.reached[1][1]["prompt"] == [[ID] * 5 + ids[1:]]


def test_chat_has_its_placeholders_from_the_template(client: Client) -> None:
    status, answer = client.chat("tiny:d", chat_template_kwargs={"enable_thinking": True})
    ((_, body),) = client.server.reached
    assert (status, answer["model"]) == (200, "tiny:d")
    arguments = {"enable_thinking": True, "prefixtune_form": "chat", "prefixtune_length": 5}
    assert body["chat_template_kwargs"] == arguments


def test_base_is_asked_as_it_is(client: Client) -> None:
    for sent in ({"prompt": "x", "echo": True}, {"prompt": [3], "prompt_logprobs": 1}):
        assert client.complete("tiny", **sent)[0] == 200
    assert [body for _, body in client.server.reached] == [
        {"model": "tiny", "prompt": "x", "echo": True},
        {"model": "tiny", "prompt": [3], "prompt_logprobs": 1},
    ]


def test_models_are_the_base_and_each_prefix(client: Client) -> None:
    _, listed = client.send("/v1/models", method="GET")
    assert [model["id"] for model in listed["data"]] == ["tiny", *(f"tiny:{name}" for name in LENGTHS)]


# --- guard 2: what would compute the placeholders


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_logprobs", 0),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("truncate_prompt_tokens", 8),
        ("use_beam_search", True),
        ("prompt_embeds", "AAAA"),
        ("suffix", "x"),
        ("vllm_xargs", {"a": 1}),
        ("logprob_token_ids", [3]),
        ("a_field_of_next_year", 1),
    ],
)
@pytest.mark.parametrize("ask", [Client.chat, Client.complete])
def test_field_that_is_not_known_to_be_harmless_is_refused_by_name(
    client: Client, ask: Any, field: str, value: Any
) -> None:
    assert refused(client, ask(client, "tiny:a", **{field: value})).startswith(f"{field} is not supported")


def test_field_that_says_nothing_is_not_refused(client: Client) -> None:
    assert client.chat("tiny:a", echo=False, prompt_logprobs=None)[0] == 200
    assert "echo" not in client.server.reached[0][1]


@pytest.mark.parametrize(
    "more", [{"chat_template": "x"}, {"add_special_tokens": True}, {"chat_template_kwargs": [1]}]
)
def test_chat_that_could_leave_the_prefix_out_is_refused(client: Client, more: dict[str, Any]) -> None:
    assert next(iter(more)) in refused(client, client.chat("tiny:a", **more))


# --- guard 3: what would end the engine


@pytest.mark.parametrize("prompt", [[], [[]], [[5], []]])
def test_prompt_without_text_is_refused(client: Client, prompt: Any) -> None:
    assert "prompt" in refused(client, client.complete("tiny:a", prompt))


def test_text_without_tokens_is_refused(client: Client) -> None:
    refused(client, client.complete("tiny:a", "", add_special_tokens=False))


def test_chat_that_becomes_no_text_is_refused(client: Client) -> None:
    client.server.template = "{{ '<|prefixtune|>' * prefixtune_length }}"
    assert "empty" in refused(client, client.chat("tiny:a"))


@pytest.mark.parametrize("prompt", [None, 5, {}, [None], [5.5], [True], [[5], "x"], [["x"]]])
def test_prompt_of_another_kind_is_refused(client: Client, prompt: Any) -> None:
    refused(client, client.complete("tiny:a", prompt))


@pytest.mark.parametrize(
    "name", ["nope", "", "A", "../served/prefixes/a", "a/", ".", "..", "a\x00", "a:b", "é"]
)
def test_unknown_prefix_is_refused(client: Client, name: str) -> None:
    refused(client, client.chat(f"tiny:{name}"), 404)


def test_prompt_that_is_too_long_is_refused(client: Client) -> None:
    assert "room for 768" in refused(client, client.chat("tiny:e", "x" * 600))


def test_prefix_answers_at_two_routes_only(client: Client) -> None:
    refused(client, client.send("/v1/responses", {"model": "tiny:a", "input": "x"}), 404)


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000, b"model=tiny:a"])
def test_what_is_not_json_is_refused(client: Client, raw: bytes) -> None:
    refused(client, client.send("/v1/completions", raw=raw))


# --- guard 4: what only the middleware may say


@pytest.mark.parametrize("model", ["tiny", "tiny:a", "other", None])
@pytest.mark.parametrize("field", ["kv_transfer_params", "cache_salt", "ec_transfer_params"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/inference/v1/generate", "/any"])
def test_reserved_field_is_refused_on_every_route(
    client: Client, path: str, field: str, model: str | None
) -> None:
    body = {"model": model, "prompt": "x"}
    assert field in refused(client, client.send(path, {**body, field: {"prefixtune": {}}}))
    assert field in refused(
        client, client.send(path, {**body, "sampling_params": {"extra_args": {field: 1}}})
    )
    assert field in refused(client, client.send(path, {**body, field: None}))


@pytest.mark.parametrize("model", ["tiny", "tiny:a"])
def test_reserved_token_is_refused_in_text_and_ids(client: Client, model: str) -> None:
    parts = [{"type": "text", "text": f"x{TOKEN}"}]
    for messages in (
        f"a {TOKEN} b",
        [{"role": "user", "content": parts}],
        [{"role": TOKEN, "content": "x"}],
        [{"role": "user", "content": "x", TOKEN: 1}],
    ):
        refused(client, client.chat(model, messages))
    for prompt in (TOKEN, [TOKEN], ["x", TOKEN], [ID], [5, ID], [[5], [5, ID]], [260.0]):
        refused(client, client.complete(model, prompt))
    escaped = json.dumps({"model": model, "prompt": TOKEN}).replace("<", "\\u003c").encode()
    refused(client, client.send("/v1/completions", raw=escaped))
    refused(client, client.send("/inference/v1/generate", {"model": model, "token_ids": [ID]}))
    refused(client, client.chat(model, chat_template_kwargs={"prefixtune_length": 1}))


def test_reserved_token_put_together_from_two_texts_is_refused(client: Client) -> None:
    template = client.server.template.split("{% else %}")[0]
    joined = "{% else %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endif %}"
    client.server.template = template + joined
    halves = [{"role": "user", "content": TOKEN[:5]}, {"role": "user", "content": TOKEN[5:]}]
    assert "reserved token" in refused(client, client.chat("tiny:a", halves))


def test_template_that_forgets_the_prefix_is_noticed(client: Client) -> None:
    client.server.template = "{{ messages[0]['content'] }}"
    refused(client, client.chat("tiny:a"), 500)


# --- guard 5, the canary, and what changes on disk


def test_retrained_prefix_has_another_salt_and_its_own_canary(client: Client, place: Path) -> None:
    client.complete("tiny:a", [5])
    retrain(place, "a", seed=99, length=9)
    client.complete("tiny:a", [5])
    (_, first), (_, canary), (_, second) = client.server.reached
    assert first["cache_salt"] != second["cache_salt"] == canary["cache_salt"]
    assert canary["ignore_eos"] is True
    assert second["prompt"] == [[ID] * 9 + [5]]
    assert second["kv_transfer_params"]["prefixtune"]["length"] == 9


def test_prefix_whose_canary_does_not_come_back_is_not_served(client: Client, place: Path) -> None:
    retrain(place, "a", seed=99, length=9)
    client.server._canary = lambda body: [3]  # type: ignore[method-assign]
    for _ in range(2):
        status, answer = client.complete("tiny:a", [5])
        assert (status, "canary" in answer["error"]["message"]) == (503, True)
    assert len(client.server.reached) == 1  # the canary, once
    assert client.complete("tiny:b", [5])[0] == 200


@pytest.mark.parametrize("name", ["prefix.safetensors", "prefix.json", "vllm.json"])
def test_damaged_prefix_is_refused_and_the_others_are_served(client: Client, place: Path, name: str) -> None:
    file = place / "served/prefixes/a" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    retouched = place / "served/prefixes/a/vllm.json"  # notices a change of either record
    retouched.write_bytes(retouched.read_bytes() + b"\n")
    fresh = Client(client.server)
    assert "cannot" in fresh.start() or "checksum" in fresh.start() or "JSON" in fresh.start()
    status, answer = client.complete("tiny:a", [5])
    if name == "prefix.safetensors":  # what the engine has in memory is still the old content, by its digest
        assert status == 200
    else:
        assert status == 503, answer
    assert client.complete("tiny:b", [5])[0] == 200


def test_removed_prefix_is_unknown_and_added_one_is_known(client: Client, place: Path) -> None:
    shutil.move(place / "served/prefixes/a", place / "away")
    assert client.complete("tiny:a", [5])[0] == 404
    shutil.move(place / "away", place / "served/prefixes/a")
    assert client.complete("tiny:a", [5])[0] == 200


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: (200, {**answer, "choices": [{**answer["choices"][0], "token_ids": [3]}]}),
        lambda answer: (500, {"error": {"message": "engine"}}),
        lambda answer: (200, {**answer, "kv_transfer_params": {"prefixtune_refusal": "computed"}}),
    ],
)
def test_server_does_not_start_without_its_canaries(place: Path, spoil: Any) -> None:
    client = Client(FakeServer(place / "served", spoiled=spoil))
    assert "canary" in client.start()
    assert client.complete("tiny:a", [5])[0] == 503


@pytest.mark.parametrize("change", [None, {"kv_connector": "Another"}, {"kv_connector_extra_config": None}])
def test_server_does_not_start_without_the_connector(place: Path, change: dict[str, Any] | None) -> None:
    client = Client(FakeServer(place / "served"))
    args = client.server.state.args
    args.kv_transfer_config = None if change is None else {**args.kv_transfer_config, **change}
    assert "PrefixConnector" in client.start()


def test_nothing_is_asked_before_the_canaries_have_come_back(place: Path) -> None:
    client = Client(FakeServer(place / "served"))
    for model in ("tiny", "tiny:a"):
        assert "not been checked" in refused(client, client.complete(model, [5]), 503)


def test_canary_of_other_tensors_is_refused(place: Path) -> None:
    file = place / "served/prefixes/a/vllm.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sha256": "0" * 64}))
    assert "export the prefix again" in Client(FakeServer(place / "served")).start()


def test_answer_that_was_computed_without_its_prefix_is_withheld(client: Client) -> None:
    client.complete("tiny:a", [5])
    client.server.spoiled = lambda answer: (
        200,
        {**answer, "kv_transfer_params": {"prefixtune_refusal": "computed"}},
    )
    assert client.complete("tiny:a", [5])[0] == 500


def test_without_the_key_nothing_is_told_and_the_canaries_have_it(place: Path) -> None:
    client = Client(FakeServer(place / "served", key="secret"))
    assert client.start() == "complete"
    for model in ("tiny", "tiny:a", "tiny:nope"):
        assert client.complete(model, [5])[0] == 401
        assert client.send("/v1/models", method="GET")[0] == 401
    body = {"model": "tiny:nope", "prompt": [5]}
    assert client.send("/v1/completions", body, key="secret")[0] == 404
