"""A catalogue of what clients get wrong: each is told in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from bad_requests import BODIES, CHAT, REQUESTS, TEXT, text
from by_schema import MODES, ask_by_schema, operations_of
from serving import NAME, client_of, served_base, write_prefix


@pytest.fixture(scope="module")
def client(tmp_path_factory: Any) -> Any:
    base, folder = served_base(), tmp_path_factory.mktemp("prefixes")
    write_prefix(base, folder / "human", length=5, seed=1, template="human")
    with client_of(base, prefix_dir=folder, body_limit=20_000, keys={"admin_key": "a"}, rows=8) as made:
        made.base = base
        yield made


JSON = {"content-type": "application/json"}


def check(client: Any, response: Any, status: int, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert param is None or error["param"] == param, error
    assert "Traceback" not in response.text
    fine = client.post(TEXT, json={"model": NAME, "prompt": [5, 6], "max_tokens": 1})
    assert fine.status_code == 200


def test_catalogue_has_at_least_sixty_requests() -> None:
    assert len(REQUESTS) + len(BODIES) >= 60


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request_is_told_what_is_wrong_with_it(client: Any, name: str) -> None:
    (path, body), status, param = REQUESTS[name]
    content = json.dumps(body).encode()  # half characters as \\ud800, which a client's encoder would refuse
    response = client.post(path, content=content, headers=JSON)
    check(client, response, status, param)
    if name.startswith("unsupported"):
        assert response.json()["error"]["code"] == "unsupported_parameter"
        assert f"'{param}' is not supported" in response.json()["error"]["message"]


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_turn_in_a_chat_is_told_by_its_place_and_with_no_option_of_training(
    client: Any, content: str
) -> None:
    user = {"role": "user", "content": "hello"}
    messages = [user, {"role": "assistant", "content": content}, user]
    response = client.post(CHAT, json={"model": NAME, "messages": messages})
    check(client, response, 400, "messages")
    message = response.json()["error"]["message"]
    assert message.startswith("messages[1].content: ")
    assert "--" not in message


@pytest.mark.parametrize("path", [CHAT, TEXT, "/admin/prefixes"])
@pytest.mark.parametrize("name", BODIES)
def test_bad_body_is_told_what_is_wrong_with_it(client: Any, name: str, path: str) -> None:
    body, status = BODIES[name]
    key = {"authorization": "Bearer a"} if path.startswith("/admin") else {}
    check(client, client.post(path, content=body, headers=JSON | key), status)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_body_of_another_type_is_refused(client: Any, kind: str | None) -> None:
    body = json.dumps(text()[1]).encode()
    headers = {"content-type": kind} if kind else {}
    check(client, client.post(TEXT, content=body, headers=headers), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("POST", f"{TEXT}/", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/static/../api.py", 404),
        ("TRACE", "/", 405),
    ],
)
def test_route_that_is_none_is_told_so(client: Any, method: str, path: str, status: int) -> None:
    check(client, client.request(method, path), status)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "../x", "folder": "human"}, 400),
        ({"name": "x", "folder": "../.."}, 400),
        ({"name": "x", "folder": "/etc"}, 400),
        ({"name": "x", "folder": "nowhere"}, 400),
        ({"name": "x", "folder": "a\0"}, 400),
        ({"name": "x", "folder": "\ud800"}, 400),
        ({"name": "x" * 200}, 400),
        ({"name": 5}, 400),
        ({"name": "x", "path": "y"}, 400),
    ],
)
def test_admins_mistake_is_told_and_changes_nothing(client: Any, body: dict[str, Any], status: int) -> None:
    headers = JSON | {"authorization": "Bearer a"}
    check(client, client.post("/admin/prefixes", content=json.dumps(body).encode(), headers=headers), status)
    assert client.service.store.names() == ["human"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"folder": "a"}, "name", "missing_required_parameter"),
        ({"name": "../x"}, "name", "invalid_value"),
        ({"name": 3}, "name", "invalid_value"),
        ({"name": "a", "folder": ""}, "folder", "invalid_value"),
        ({"name": "a", "path": "a"}, "path", "unsupported_parameter"),
    ],
)
def test_admins_mistake_is_told_by_its_field(client: Any, body: Any, param: str, code: str) -> None:
    response = client.post("/admin/prefixes", json=body, headers={"authorization": "Bearer a"})
    check(client, response, 400, param)
    assert response.json()["error"]["code"] == code


def test_admin_loads_reloads_lists_and_unloads(client: Any, tmp_path: Path) -> None:
    headers = {"authorization": "Bearer a"}
    folder = client.service.store._folder
    write_prefix(client.base, folder / "late", length=3, seed=4)
    assert client.post("/admin/prefixes", json={"name": "late"}, headers=headers).json()["models"] == 2
    write_prefix(client.base, folder / "late", length=4, seed=5)
    assert client.post("/admin/prefixes/late/reload", headers=headers).status_code == 200
    (entry,) = [
        e for e in client.get("/admin/prefixes", headers=headers).json()["data"] if e["name"] == "late"
    ]
    assert entry["length"] == 4
    (folder / "late" / "prefix.safetensors").write_bytes(b"")
    complete = {"model": f"{NAME}:late", "prompt": "x", "max_tokens": 1}
    assert client.post("/admin/prefixes", json={"name": "late"}, headers=headers).status_code == 400
    assert client.post(TEXT, json=complete).status_code == 200  # from memory
    client.service.store._forget("late")
    assert client.post(TEXT, json=complete).status_code == 503
    assert client.delete("/admin/prefixes/late", headers=headers).json()["models"] == 1
    for path in ("/admin/prefixes/late", "/admin/prefixes/%2e%2e"):
        check(client, client.delete(path, headers=headers), 404)
    check(client, client.post("/admin/prefixes/late/reload", headers=headers), 404)
    check(client, client.post(TEXT, json=complete), 404)


def test_reload_of_a_folder_that_vanished_is_no_success(client: Any) -> None:
    headers = {"authorization": "Bearer a"}
    folder = client.service.store._folder / "gone"
    write_prefix(client.base, folder, length=3, seed=4)
    assert client.post("/admin/prefixes", json={"name": "gone"}, headers=headers).status_code == 200
    shutil.rmtree(folder)
    response = client.post("/admin/prefixes/gone/reload", headers=headers)
    assert (response.status_code, "its folder is gone" in response.text) == (400, True)
    check(client, client.post("/admin/prefixes/gone/reload", headers=headers), 404)


def test_chat_with_a_prefix_of_several_fields_is_the_clients_mistake(client: Any) -> None:
    headers = {"authorization": "Bearer a"}
    folder = client.service.store._folder / "fields"
    write_prefix(client.base, folder, length=3, seed=4, template="Q: {question}\nC: {context}\nA: {answer}")
    client.post("/admin/prefixes", json={"name": "fields"}, headers=headers)
    body = {"model": f"{NAME}:fields", "messages": [{"role": "user", "content": "x"}]}
    response = client.post(CHAT, json=body)
    check(client, response, 400)
    assert "question, context" in response.text
    client.delete("/admin/prefixes/fields", headers=headers)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_schemathesis_finds_no_request_that_is_answered_otherwise_than_the_schema_says(
    client: Any, mode: Any
) -> None:
    operations = operations_of(client)
    assert len(operations) >= 8
    for operation in operations:
        ask_by_schema(client, operation, mode, key="a", number=0, examples=30)


def test_spared_prefixes_are_named_in_no_admin_request() -> None:
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": ["kept", "other"]}}
    answers = {"200": {"description": "unloaded", "content": {"application/json": {}}}}
    routes = {"/admin/prefixes/{name}": {"delete": {"parameters": [name], "responses": answers}}}
    schema = {"openapi": "3.1.0", "info": {"title": "a server", "version": "1"}, "paths": routes}
    for spared, expected in (((), {"kept", "other"}), (("kept",), {"other"})):
        asked: list[str] = []

        def answer(request: httpx.Request, asked: list[str] = asked) -> httpx.Response:
            if request.url.path == "/openapi.json":
                return httpx.Response(200, json=schema)
            asked.append(request.url.path.rsplit("/", 1)[-1])
            stream = httpx.ByteStream(b"{}")  # read by the client, which then knows how long it took
            return httpx.Response(200, headers={"content-type": "application/json"}, stream=stream)

        with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
            (operation,) = operations_of(client)
            options = {"key": "a", "number": 0, "examples": 20, "spared": spared}
            count = ask_by_schema(client, operation, MODES[0], **options)
        assert set(asked) == expected
        assert count == len(asked)
