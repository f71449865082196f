"""Errors in OpenAI's shape. Knows no request in particular."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from prefixtune.serve.schema import is_unsupported

__all__ = ["ApiError", "encoded", "invalid_body"]


class ApiError(Exception):
    """An answer that is an error.

    Args:
        code: a word for programs, as OpenAI's where it has one.
        param: which field of the request is at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, kind
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(
            encoded(self.body()), self.status, headers=self.headers, media_type="application/json"
        )


def encoded(value: Any) -> bytes:
    """JSON; what is no valid Unicode becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def invalid_body(errors: Sequence[Any]) -> ApiError:
    """What pydantic found in a body, told by its first and plainest complaint."""
    first = errors[0]
    if first["type"] == "missing" and len(first["loc"]) < 2:
        return ApiError(400, "there is no body: expected a JSON object", code="invalid_json")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {_reason(first)}", code="invalid_json")
    place = _place(first["loc"][1:])
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else ""
    if first["type"] == "extra_forbidden" or (field and is_unsupported(field)):
        return ApiError(
            400, f"{place!r} is not supported by this server", code="unsupported_parameter", param=place
        )
    if not field:
        return ApiError(
            400,
            "the body must be a JSON object, sent with the header content-type: application/json",
            code="invalid_type",
        )
    same = [error for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    reasons = list(dict.fromkeys(_reason(error) for error in same))
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{place}: {'; or '.join(reasons[:4])}", code=code, param=place)


def _reason(error: Any) -> str:
    text = str(error["msg"])
    told = (error.get("ctx") or {}).get("error")
    return f"{text}: {told}" if told and str(told) not in text else text


def _place(loc: Sequence[Any]) -> str:
    """("messages", 0, "content", "str") to messages[0].content: the names of types are left out."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not place:
            place = str(part)
        elif str(part).isidentifier() and str(part) not in ("str", "int", "list", "bool", "float"):
            place += f".{part}"
    return place
