"""Laws of the routes: OpenAI's own client reads what they give, and it is what the model says alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from families import tiny_model
from prefixtune.config import DataConfig
from prefixtune.data import Row, build_prompts
from prefixtune.generate import PLACEHOLDER, prompt_row
from serving import (
    NAME,
    TOKENIZER,
    alone,
    client_of,
    events,
    eventually,
    live,
    random_ids,
    served_base,
    tokenizer_of,
    write_prefix,
)
from tokenizers_for_tests import slow_tokenizer

END = TOKENIZER.eos_token_id
LENGTHS = (1, 3, 5, 8, 13, 21, 34, 40)
VAST = {"cached_tokens": 10**7, "max_tokens": 100_000, "endless": True}
ASK = [{"role": "user", "content": "Give three tips."}]


@pytest.fixture(scope="module")
def base() -> Any:
    return served_base()


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("prefixes")
    for name, length, template in (("a", 4, None), ("human", 5, "human"), ("chat", 6, "chat")):
        write_prefix(base, place / name, length=length, seed=length, template=template)
    write_prefix(base, place / "form", length=3, seed=1, template="Q: {question}\\nA: {reply}")
    return place


@pytest.fixture(scope="module")
def client(base: Any, folder: Path) -> Any:
    with client_of(base, prefix_dir=folder) as made:
        yield made


@pytest.fixture(scope="module")
def vast() -> Any:
    """The same weights with room for answers that do not end within a test."""
    return served_base(max_position_embeddings=100_000)


@pytest.fixture(scope="module")
def server(vast: Any, folder: Path) -> Any:
    with live(vast, prefix_dir=folder, **VAST) as made:
        yield made


def complete(client: Any, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": NAME, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_64_requests_at_once_streamed_and_not_are_each_the_same_as_alone(base: Any, tmp_path: Path) -> None:
    prefixes: dict[str, Any] = {
        f"p{i}": write_prefix(base, tmp_path / f"p{i}", length=LENGTHS[i % 8], seed=i) for i in range(16)
    }
    names = [*prefixes, None]
    asked = [(names[i % 17], random_ids(1 + (7 * i) % 45, seed=i), 3 + i % 9) for i in range(64)]

    def ask(request: tuple[int, tuple[str | None, list[int], int]]) -> tuple[list[int], str]:
        number, (name, ids, tokens) = request
        model = f"{NAME}:{name}" if name else NAME
        body = {
            "model": model,
            "prompt": ids,
            "max_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        response = httpx.post(
            f"{server.url}/v1/completions", json=body | {"stream": number % 2 == 0}, timeout=60
        )
        assert response.status_code == 200, response.text
        if number % 2:
            choice = response.json()["choices"][0]
            return choice["token_ids"], choice["text"]
        parts = [event["choices"][0] for event in events(response)[:-1]]
        return [t for part in parts for t in part["token_ids"]], "".join(part["text"] for part in parts)

    with live(base, prefix_dir=tmp_path, rows=24) as server, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, enumerate(asked)))
    for (name, ids, tokens), (found, text) in zip(asked, answers, strict=True):
        expected = alone(base, prefixes[name] if name else None, ids, tokens, end=END)
        assert found == expected
        assert text == text_of(expected)


def test_models_are_the_base_and_each_prefix(client: Any) -> None:
    names = [NAME, *(f"{NAME}:{name}" for name in ("a", "chat", "form", "human"))]
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == names
    for name in names:
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert client.get("/v1/models/other").status_code == 404
    assert client.get(f"/v1/models/{NAME}:nobody").status_code == 404


def test_openais_own_client_works_unchanged(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert f"{NAME}:a" in [model.id for model in client.models.list()]
        settings: dict[str, Any] = {"model": f"{NAME}:a", "messages": ASK, "max_tokens": 6, "temperature": 0}
        whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2, n=2)
        stream = client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert [choice.message.content for choice in whole.choices] == [text, text]
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens / 2
        assert chunks[-1].usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens / 2
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        legacy = client.completions.create(model=NAME, prompt=["a", "b"], max_tokens=3, logprobs=1, n=2)
        assert [choice.index for choice in legacy.choices] == [0, 1, 2, 3]
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**settings | {"model": f"{NAME}:nobody"})
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                **settings, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        assert refused.value.param == "tools"


@pytest.mark.parametrize("name", [None, "a", "chat", "human", "form"])
def test_prefix_is_prompted_in_the_way_it_was_trained(
    base: Any, client: Any, folder: Path, name: str
) -> None:
    from prefixtune.storage import load_prefix

    stored = load_prefix(folder / name) if name else None
    template = (stored.info["template"] if stored else None) or "chat"
    row = (
        Row(values={"messages": [*ASK, {"role": "assistant", "content": PLACEHOLDER}]}, origin="r")
        if template == "chat"
        else prompt_row(ASK[0]["content"], template)
    )
    ids = list(build_prompts([row], TOKENIZER, DataConfig(template=template))[0].input_ids)
    body = {"model": f"{NAME}:{name}" if name else NAME, "messages": ASK, "max_tokens": 7, "temperature": 0}
    response = client.post("/v1/chat/completions", json=body | {"return_token_ids": True})
    expected = alone(base, stored.kv if stored else None, ids, 7, end=END)
    assert response.json()["choices"][0]["token_ids"] == expected
    assert response.json()["usage"]["prompt_tokens"] == len(ids)


def test_conversation_goes_on_in_the_template_of_the_prefix(client: Any) -> None:
    turns = [*ASK, {"role": "assistant", "content": "Sleep."}, {"role": "user", "content": "More?"}]
    for name in ("human", "form", "chat"):
        body = {"model": f"{NAME}:{name}", "messages": turns, "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    with_system = [{"role": "system", "content": "Be brief."}, *ASK]
    for name, status in (("chat", 200), ("human", 400), ("form", 400)):
        body = {"model": f"{NAME}:{name}", "messages": with_system, "max_tokens": 2}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == status
        assert status == 200 or "no place for a message of the system" in response.json()["error"]["message"]


def test_base_without_a_chat_template_is_asked_in_the_tutorials_form(base: Any) -> None:
    with client_of(base, tokenizer=tokenizer_of(None)) as client:
        body = {"model": NAME, "messages": ASK, "max_tokens": 2}
        used = client.post("/v1/chat/completions", json=body).json()["usage"]
        prompt = build_prompts([prompt_row(ASK[0]["content"], "human")], TOKENIZER, DataConfig())[0]
        assert used["prompt_tokens"] == len(prompt.input_ids)


def test_parts_of_text_are_one_text(client: Any) -> None:
    parts = [{"type": "text", "text": "Give three"}, {"type": "text", "text": " tips."}]
    answers = [
        client.post(
            "/v1/chat/completions",
            json={
                "model": NAME,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 5,
            },
        ).json()["choices"][0]["message"]["content"]
        for content in (ASK[0]["content"], parts)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_before_it(client: Any, stream: bool) -> None:
    ids = random_ids(9, 4)
    whole = complete(client, prompt=ids, max_tokens=30)["choices"][0]["text"]
    for length in (1, 2, 5):
        stop = whole[6 : 6 + length]
        body = {
            "model": NAME,
            "temperature": 0,
            "prompt": ids,
            "max_tokens": 30,
            "stop": ["never there", stop],
        }
        response = client.post("/v1/completions", json=body | {"stream": stream})
        if stream:
            parts = [event["choices"][0] for event in events(response)[:-1]]
            text, reason = "".join(part["text"] for part in parts), parts[-1]["finish_reason"]
        else:
            text, reason = (response.json()["choices"][0][key] for key in ("text", "finish_reason"))
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_streamed_text_is_the_whole_text_whatever_its_characters(client: Any) -> None:
    for seed in range(6):  # random bytes: characters that come in pieces, and such that never come whole
        body = {
            "model": NAME,
            "prompt": random_ids(5, seed),
            "max_tokens": 40,
            "seed": seed,
            "temperature": 1.5,
        }
        whole = client.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"][0]
        streamed = events(client.post("/v1/completions", json=body | {"stream": True}))
        assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == whole["text"]
        assert whole["text"] == text_of(whole["token_ids"])


def test_stop_string_that_comes_with_the_last_of_the_text_is_the_reason(client: Any) -> None:
    body = {"prompt": random_ids(5, 1), "temperature": 2.0, "seed": 1, "n": 16, "max_tokens": 1}
    parts = [c["index"] for c in complete(client, **body)["choices"] if c["text"] == "\ufffd"]
    assert parts
    for choice in complete(client, **body, stop="\ufffd")["choices"]:
        is_part = choice["index"] in parts
        assert choice["finish_reason"] == ("stop" if is_part else "length")
        assert not is_part or choice["text"] == ""


def test_logprobs_are_the_models_own(base: Any, client: Any) -> None:
    ids = random_ids(6, 1)
    found = complete(client, prompt=ids, max_tokens=4, logprobs=3, return_token_ids=True)["choices"][0]
    logits = base(input_ids=torch.tensor([[*ids, *found["token_ids"]]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for place, token in enumerate(found["token_ids"]):
        assert found["logprobs"]["token_logprobs"][place] == pytest.approx(
            float(expected[place, token]), abs=1e-4
        )
        best = sorted(found["logprobs"]["top_logprobs"][place].values(), reverse=True)
        assert best[0] == pytest.approx(float(expected[place].max()), abs=1e-4)
        assert len(best) <= 4


def test_seed_repeats_an_answer_and_its_n_answers_differ(client: Any) -> None:
    body = {"prompt": random_ids(5, 1), "temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12}
    first, second = (complete(client, **body) for _ in range(2))
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in second["choices"]]
    assert len({c["text"] for c in first["choices"]}) == 3
    assert complete(client, **body | {"seed": 8})["choices"] != first["choices"]


def test_penalties_change_a_greedy_answer_that_repeats(client: Any) -> None:
    texts = {
        name: complete(client, prompt=[9] * 12, max_tokens=40, return_token_ids=True, **{name: 2.0})[
            "choices"
        ][0]
        for name in ("presence_penalty", "frequency_penalty", "temperature")
    }
    free = complete(client, prompt=[9] * 12, max_tokens=40, return_token_ids=True)["choices"][0]["token_ids"]
    for name in ("presence_penalty", "frequency_penalty"):
        assert len(set(texts[name]["token_ids"])) > len(set(free))


def test_fingerprint_is_of_the_content(client: Any) -> None:
    marks = {
        name: complete(client, prompt="x", model=name, max_tokens=1)["system_fingerprint"]
        for name in (NAME, f"{NAME}:a", f"{NAME}:chat")
    }
    assert len(set(marks.values())) == 3
    assert client.service.store.get("a").digest[:16] in marks[f"{NAME}:a"]


def test_client_that_goes_away_frees_its_row(server: Any) -> None:
    engine = server.service.engine
    body = {"model": f"{NAME}:a", "prompt": "x", "max_tokens": 90_000, "temperature": 0}
    for stream in (True, False):
        with httpx.Client(timeout=60) as client:
            if stream:
                with client.stream(
                    "POST", f"{server.url}/v1/completions", json=body | {"stream": True}
                ) as response:
                    lines = response.iter_lines()  # held: when it goes, the connection goes
                    next(lines)
                    eventually(lambda: engine.active == 1)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/completions", json=body, timeout=2)
        eventually(lambda: engine.active == 0)
    eventually(
        lambda: [line["status"] for line in server.lines() if line["event"] == "request"][-2:] == [499, 499]
    )
    assert b"prefixtune_cancelled_total 2.0" in server.service.metrics.text()


def test_overload_is_429_with_a_time_to_come_again(vast: Any) -> None:
    with live(vast, rows=1, queue=1, **VAST) as server:
        body = {"model": NAME, "prompt": "x", "max_tokens": 90_000}
        stop = threading.Event()

        def occupy() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                stop.wait(30)
                response.close()

        threads = [threading.Thread(target=occupy, daemon=True) for _ in range(2)]
        threads[0].start()
        eventually(lambda: server.service.engine.active == 1)
        threads[1].start()
        eventually(lambda: server.service.engine.waiting == 1)
        refused = httpx.post(f"{server.url}/v1/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        server.service.engine.close(0)
        stop.set()


def test_late_request_is_told_so(vast: Any) -> None:
    with client_of(vast, timeout=0.4, **VAST) as client:
        body = {"model": NAME, "prompt": "x", "max_tokens": 90_000}
        response = client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        streamed = events(client.post("/v1/completions", json=body | {"stream": True}))
        assert streamed[-1]["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_the_tokenizer_cannot_read_is_a_500_and_not_silence(base: Any, stream: bool) -> None:
    class Failing(type(slow_tokenizer())):  # type: ignore[misc]
        def decode(self, ids: list[int], **options: Any) -> str:
            raise ValueError("no text")

    tokenizer = Failing(extra_ids=0)
    with live(base, tokenizer=tokenizer, endless=True) as server:
        body = {"model": NAME, "prompt": "x", "max_tokens": 9, "n": 2, "stream": stream}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=10)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "tokenizer_error")
        eventually(lambda: server.service.engine.active == 0)


def test_chat_ends_where_its_template_closes_a_turn_and_a_plain_text_does_not() -> None:
    says = served_base()
    head = torch.nn.Linear(says.config.hidden_size, says.config.vocab_size)
    closing = TOKENIZER.convert_tokens_to_ids("<|im_end|>")  # its EOS is another
    assert closing != END
    head.weight.data.zero_()
    head.bias.data.zero_()[closing] = 1
    says.lm_head = head.requires_grad_(False)
    asked = {"model": NAME, "max_tokens": 4, "temperature": 0}
    with client_of(says) as client:
        chat = client.post(
            "/v1/chat/completions", json=asked | {"messages": [{"role": "user", "content": "x"}]}
        )
        plain = client.post("/v1/completions", json=asked | {"prompt": "x"})
    found = [
        (one.json()["choices"][0]["finish_reason"], one.json()["usage"]["completion_tokens"])
        for one in (chat, plain)
    ]
    assert found == [("stop", 0), ("length", 4)]


def test_tokens_that_the_tokenizer_does_not_know_are_never_chosen() -> None:
    tokenizer = slow_tokenizer()
    count = len(tokenizer)
    padded = tiny_model("llama", vocab_size=2 * count)
    with client_of(padded, tokenizer=tokenizer, endless=True) as client:
        body = {"model": NAME, "prompt": "x", "max_tokens": 40, "temperature": 2, "seed": 1}
        response = client.post("/v1/completions", json=body | {"return_token_ids": True, "logprobs": 5})
        assert response.status_code == 200, response.text
        tokens = response.json()["choices"][0]["token_ids"]
        assert len(tokens) == 40
        assert max(tokens) < count


def test_shutdown_ends_answers_with_a_word(vast: Any) -> None:
    with live(vast, **VAST) as server:
        body = {"model": NAME, "prompt": "x", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.service.close(0.1)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutdown"
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 503


def test_replaced_prefix_answers_the_next_request_and_never_half_a_one(base: Any, tmp_path: Path) -> None:
    other = served_base()  # the same weights: nobody but the engine may run what it serves
    kvs = [write_prefix(other, tmp_path / "p", length=5, seed=1)]
    ids = random_ids(6, 3)
    with live(base, prefix_dir=tmp_path) as server:
        body = {
            "model": f"{NAME}:p",
            "prompt": ids,
            "max_tokens": 40,
            "temperature": 0,
            "return_token_ids": True,
        }

        def ask(_: int) -> tuple[str, list[int]]:
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            return answer["system_fingerprint"], answer["choices"][0]["token_ids"]

        with ThreadPoolExecutor(6) as pool:
            found = pool.map(ask, range(30))
            for seed in (2, 3):
                eventually(lambda: server.service.engine.active > 0)
                kvs.append(write_prefix(other, tmp_path / "p", length=5 + seed, seed=seed))
                server.service.store.refresh()
            answers = [*found, ask(0)]
    expected = {kv.digest[:16]: alone(base, kv, ids, 40, end=END) for kv in kvs}
    assert all(expected[mark.split("-")[1]] == tokens for mark, tokens in answers)
    assert answers[-1][1] == expected[kvs[-1].digest[:16]]


def test_watch_finds_what_is_new_on_disk(base: Any, tmp_path: Path) -> None:
    with client_of(base, prefix_dir=tmp_path, watch=0.05) as client:
        assert client.post("/v1/completions", json={"model": f"{NAME}:new", "prompt": "x"}).status_code == 404
        write_prefix(base, tmp_path / "new", length=4, seed=1)
        eventually(lambda: len(client.get("/v1/models").json()["data"]) == 2)
        assert client.post("/v1/completions", json={"model": f"{NAME}:new", "prompt": "x"}).status_code == 200


def test_metrics_count_what_happened(base: Any, folder: Path) -> None:
    with client_of(base, prefix_dir=folder) as client:
        for name in ("a", "a", "chat"):
            complete(client, model=f"{NAME}:{name}", prompt=[5, 6, 7], max_tokens=4)
        client.get("/v1/nowhere/at/all")
        text = client.get("/metrics").text
    for line in (
        'prefixtune_requests_total{route="/v1/completions",status="200"} 3.0',
        'prefixtune_requests_total{route="none",status="404"} 1.0',
        "prefixtune_prompt_tokens_total 9.0",
        "prefixtune_prefix_hits_total 1.0",
        "prefixtune_prefix_misses_total 2.0",
        "prefixtune_prefixes 4.0",
        "prefixtune_prefixes_in_memory 2.0",
        "prefixtune_queue_length 0.0",
        "prefixtune_first_token_seconds_count 3.0",
        "prefixtune_request_seconds_count 3.0",
    ):
        assert line in text
    assert "prefixtune_batch_rows_bucket" in text
    assert "prefixtune_next_token_seconds_bucket" in text


@pytest.mark.parametrize("log_prompts", [False, True])
def test_log_is_lines_of_json_without_prompts_unless_asked_for(base: Any, log_prompts: bool) -> None:
    with client_of(base, log_prompts=log_prompts) as client:
        answer = complete(client, prompt="a secret\nline", max_tokens=4, user="u-1")["choices"][0]["text"]
        (line,) = [line for line in client.lines() if line["event"] == "request"]
    assert (line["status"], line["route"], line["user"]) == (200, "/v1/completions", "u-1")
    assert (line["prompt_tokens"] > 0, line["completion_tokens"]) == (True, 4)
    assert ("secret" in json.dumps(line)) is log_prompts
    assert ((answer in line.get("answers", [])) or not log_prompts) is True


@pytest.mark.parametrize("log_prompts", [False, True])
def test_log_has_the_answers_of_a_stream_as_those_of_a_whole_one(base: Any, log_prompts: bool) -> None:
    body = {"model": NAME, "prompt": ["a", "bc"], "max_tokens": 4, "temperature": 0}
    with client_of(base, log_prompts=log_prompts) as client:
        for stream in (False, True):
            client.post("/v1/completions", json=body | {"stream": stream})
        whole, streamed = (line for line in client.lines() if line["event"] == "request")
    assert streamed.get("answers") == whole.get("answers")
    assert ("answers" in streamed) is log_prompts
