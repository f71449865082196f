"""What clients may send, by type and range. Every other field is refused by its name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["ChatRequest", "CompletionRequest", "LoadRequest", "is_unsupported"]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON knows one kind of number: 2.0 is 2
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[Whole, Field(ge=0, le=2**31 - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else None
        text = "".join(part.text for part in parts) if parts is not None else str(self.content)
        return {"role": self.role, "content": text}


class StreamOptions(_Strict):
    """Of a stream: whether its last chunk tells the tokens used."""

    include_usage: bool | None = None


class _Request(_Strict):
    model: Annotated[str, Field(max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = None
    # known to OpenAI's clients and not offered here: null, or the value that asks for nothing
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(_Request):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    audio: None = None
    function_call: None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: None = None
    modalities: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    response_format: None = None
    service_tier: None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(_Request):
    """A body of /v1/completions: texts to be continued as they are, or token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class LoadRequest(_Strict):
    """A body of POST /admin/prefixes: serve this folder, within --prefix-dir, under this name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    folder: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


_OFFERED = {
    *(set(_Request.model_fields) - {"logit_bias"}),
    *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "prompt"),
    *LoadRequest.model_fields,
}


def is_unsupported(field: str) -> bool:
    """Whether a field that did not pass is one that we do not offer, whatever its value."""
    return field not in _OFFERED
