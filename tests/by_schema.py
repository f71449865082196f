"""Requests that schemathesis makes up from the server's own OpenAPI, and what every answer must be like."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from urllib.parse import unquote

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

MODES = tuple(schemathesis.GenerationMode)  # what fits the schema, and what does not


def operations_of(client: Any) -> list[Any]:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    return [operation.ok() for operation in schema.get_all_operations()]


def ask_by_schema(
    client: Any,
    operation: Any,
    mode: schemathesis.GenerationMode,
    *,
    key: str | None,
    number: int,
    examples: int,
    spared: Collection[str] = (),
) -> int:
    """Send requests to one route; how many.

    Args:
        key: for the admin routes, where the server has one.
        number: other requests for another number.
        spared: prefixes that no admin request may name: one that is unloaded by hand stays away.

    Raises:
        AssertionError, BaseExceptionGroup: an answer is the server's failure, has another shape than errors
            have, or is not as the schema says.
    """
    headers = {"authorization": f"Bearer {key}"} if key and operation.path.startswith("/admin") else {}
    asked = 0

    def ask(case: Any) -> None:
        nonlocal asked
        if operation.path.startswith("/admin") and _named(case) in spared:
            return
        asked += 1
        sent = case.as_transport_kwargs(base_url=str(client.base_url).rstrip("/"), headers=headers)
        response = client.request(**{name: value for name, value in sent.items() if name != "verify"})
        assert response.status_code < 500, (sent, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        # what fits the schema may still not fit together: messages and template, prompt and room
        not_asked = [positive_data_acceptance]
        if response.status_code == 413:  # refused unread; the check does not know that status for a refusal
            not_asked.append(negative_data_rejection)
        case.validate_response(response, excluded_checks=not_asked)

    quick = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        quick(seed(number)(given(case=operation.as_strategy(generation_mode=mode))(ask)))()
    except Unsatisfiable:  # a route without parameters has nothing wrong to be sent
        assert mode is schemathesis.GenerationMode.NEGATIVE
    return asked


def _named(case: Any) -> str | None:
    """The prefix that an admin request is about."""
    body = case.body if isinstance(case.body, dict) else {}
    name = (case.path_parameters or {}).get("name", body.get("name"))
    return unquote(name) if isinstance(name, str) else None
