"""What clients get wrong: requests and bodies with the answer that each must get. Knows no test.

For a server of the model NAME with a prefix `human` of 5 tokens and that template, 128 positions, 8 rows, and
bodies of at most 20,000 bytes.
"""

from __future__ import annotations

from typing import Any

from serving import NAME

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "x"}]
DEEP = b'{"model":' * 50_000


def chat(**body: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": NAME, "messages": MESSAGES, "max_tokens": 2, **body}


def text(**body: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": NAME, "prompt": "x", "max_tokens": 2, **body}


def without(request: tuple[str, dict[str, Any]], name: str) -> tuple[str, dict[str, Any]]:
    return request[0], {key: value for key, value in request[1].items() if key != name}


def said(content: Any, role: str = "user") -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": role, "content": content}])


# what is asked, the status, and the parameter that is named
REQUESTS: dict[str, tuple[tuple[str, Any], int, str | None]] = {
    "no model": (without(chat(), "model"), 400, "model"),
    "no messages": (without(chat(), "messages"), 400, "messages"),
    "no prompt": (without(text(), "prompt"), 400, "prompt"),
    "model is null": (chat(model=None), 400, "model"),
    "model is a number": (chat(model=5), 400, "model"),
    "model is unknown": (chat(model="gpt-4"), 404, "model"),
    "model is empty": (chat(model=""), 404, "model"),
    "prefix is unknown": (chat(model=f"{NAME}:nobody"), 404, "model"),
    "prefix is empty": (chat(model=f"{NAME}:"), 404, "model"),
    "prefix is a path": (chat(model=f"{NAME}:../human"), 404, "model"),
    "prefix is an encoded path": (chat(model=f"{NAME}:%2e%2e%2fhuman"), 404, "model"),
    "prefix with a zero byte": (chat(model=f"{NAME}:human\0"), 404, "model"),
    "prefix of half a character": (chat(model=f"{NAME}:\ud800"), 400, "model"),
    "prefix twice": (chat(model=f"{NAME}:{NAME}:human"), 404, "model"),
    "model is long": (chat(model="m" * 5000), 400, "model"),
    "messages are empty": (chat(messages=[]), 400, "messages"),
    "messages are a text": (chat(messages="hello"), 400, "messages"),
    "message is a text": (chat(messages=["hello"]), 400, "messages[0]"),
    "message without a role": (chat(messages=[{"content": "x"}]), 400, "messages[0].role"),
    "message without content": (chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    "content is null": (said(None), 400, "messages[0].content"),
    "content is a number": (said(3), 400, "messages[0].content"),
    "content is no part": (said([]), 400, "messages[0].content"),
    "content is an image": (said([{"type": "image_url", "image_url": {"url": "x"}}]), 400, None),
    "content is half a character": (said("a\ud800b"), 400, "messages"),
    "role is tool": (said("x", "tool"), 400, "messages[0].role"),
    "role is anything": (said("x", "root"), 400, "messages[0].role"),
    "message has a name": (chat(messages=[{**MESSAGES[0], "name": "bob"}]), 400, "messages[0].name"),
    "assistant says nothing": (
        chat(messages=[*MESSAGES, {"role": "assistant", "content": ""}, *MESSAGES]),
        400,
        "messages",
    ),
    "human template, system": (
        chat(model=f"{NAME}:human", messages=[{"role": "system", "content": "x"}, *MESSAGES]),
        400,
        "messages",
    ),
    "human template, assistant last": (
        chat(model=f"{NAME}:human", messages=[*MESSAGES, {"role": "assistant", "content": "y"}]),
        400,
        "messages",
    ),
    "human template, user twice": (chat(model=f"{NAME}:human", messages=MESSAGES * 2), 400, "messages"),
    "prompt is empty": (text(prompt=""), 400, "prompt"),
    "prompt is null": (text(prompt=None), 400, "prompt"),
    "prompts are none": (text(prompt=[]), 400, "prompt"),
    "token ids are none": (text(prompt=[[]]), 400, "prompt"),
    "prompt among empty ones": (text(prompt=["x", ""]), 400, "prompt"),
    "prompts are mixed": (text(prompt=["x", 3]), 400, "prompt"),
    "prompts are mixed lists": (text(prompt=[[3], "x"]), 400, "prompt"),
    "token id is negative": (text(prompt=[5, -1]), 400, "prompt"),
    "token id is unknown": (text(prompt=[5, 340]), 400, "prompt"),
    "token id is huge": (text(prompt=[10**30]), 400, "prompt"),
    "token id is a fraction": (text(prompt=[1.5]), 400, "prompt"),
    "token id is a boolean": (text(prompt=[True]), 400, "prompt"),
    "prompt is half a character": (text(prompt="\udfff"), 400, "prompt"),
    "prompt is too long": (text(prompt=[5] * 127), 400, "prompt"),
    "prompt and answer are too long": (text(prompt=[5] * 100, max_tokens=29), 400, "prompt"),
    "prefix makes it too long": (text(model=f"{NAME}:human", prompt=[5] * 100, max_tokens=24), 400, "prompt"),
    "chat is too long": (said("word " * 200), 400, "messages"),
    "more answers than rows": (text(n=9), 400, "n"),
    "prompts times n are more than rows": (text(prompt=["x"] * 5, n=2), 400, "n"),
    "n is 0": (text(n=0), 400, "n"),
    "n is a text": (text(n="2"), 400, "n"),
    "n is a fraction": (text(n=1.5), 400, "n"),
    "n is a boolean": (text(n=True), 400, "n"),
    "n is huge": (text(n=10**20), 400, "n"),
    "max_tokens is 0": (text(max_tokens=0), 400, "max_tokens"),
    "max_tokens is negative": (text(max_tokens=-1), 400, "max_tokens"),
    "max_tokens is a text": (text(max_tokens="16"), 400, "max_tokens"),
    "max_tokens is a fraction": (text(max_tokens=1.5), 400, "max_tokens"),
    "max_tokens twice": (chat(max_completion_tokens=2), 400, "max_tokens"),
    "max_completion_tokens of a text": (text(max_completion_tokens=2), 400, "max_completion_tokens"),
    "temperature is negative": (text(temperature=-0.1), 400, "temperature"),
    "temperature is high": (text(temperature=2.1), 400, "temperature"),
    "temperature is a text": (text(temperature="hot"), 400, "temperature"),
    "top_p is 0": (text(top_p=0), 400, "top_p"),
    "top_p is more than all": (text(top_p=1.1), 400, "top_p"),
    "seed is a fraction": (text(seed=0.5), 400, "seed"),
    "seed is huge": (text(seed=2**64), 400, "seed"),
    "presence_penalty is high": (text(presence_penalty=3), 400, "presence_penalty"),
    "frequency_penalty is low": (text(frequency_penalty=-3), 400, "frequency_penalty"),
    "stop is empty": (text(stop=""), 400, "stop"),
    "stop holds an empty one": (text(stop=["a", ""]), 400, "stop"),
    "stops are many": (text(stop=["a"] * 17), 400, "stop"),
    "stop is a number": (text(stop=3), 400, "stop"),
    "logprobs of a text are a boolean": (text(logprobs=True), 400, "logprobs"),
    "logprobs are many": (text(logprobs=21), 400, "logprobs"),
    "logprobs of a chat are a number": (chat(logprobs=2), 400, "logprobs"),
    "top_logprobs without logprobs": (chat(top_logprobs=2), 400, "top_logprobs"),
    "stream is a text": (text(stream="yes"), 400, "stream"),
    "stream_options without a stream": (text(stream_options={"include_usage": True}), 400, "stream_options"),
    "stream_options of another kind": (text(stream=True, stream_options={"x": 1}), 400, "stream_options.x"),
    "user is a list": (text(user=[]), 400, "user"),
    **{
        f"unsupported: {name}": ((path, body), 400, name)
        for name, (path, body) in {
            "echo": text(echo=True),
            "suffix": text(suffix="end"),
            "best_of": text(best_of=3),
            "logit_bias": text(logit_bias={"5": 1}),
            "top_k": text(top_k=5),
            "min_p": text(min_p=0.1),
            "prompt_logprobs": text(prompt_logprobs=1),
            "cache_salt": text(cache_salt="x"),
            "kv_transfer_params": text(kv_transfer_params={}),
            "tools": chat(tools=[{"type": "function"}]),
            "tool_choice": chat(tool_choice="auto"),
            "functions": chat(functions=[{}]),
            "response_format": chat(response_format={"type": "json_object"}),
            "audio": chat(audio={}),
            "store": chat(store=True),
            "metadata": chat(metadata={"a": "b"}),
            "reasoning_effort": chat(reasoning_effort="low"),
            "add_generation_prompt": chat(add_generation_prompt=False),
            "prefix": chat(prefix="human"),
        }.items()
    },
}

# raw bodies, and raw requests
BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"model=tiny", 400),
    "half a JSON": (b'{"model": "tiny", "prompt": "x"', 400),
    "a list": (b"[]", 400),
    "a text": (b'"tiny"', 400),
    "null": (b"null", 400),
    "a number": (b"5", 400),
    "no UTF-8": (b'{"model": "tiny", "prompt": "\xff"}', 400),
    "not a number": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
    "infinity": (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', 400),
    "a number of 6,000 digits": (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 6000 + b"}", 400),
    "a number beyond floats": (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400),
    "deep lists": (b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400),
    "deep objects": (b'{"a":' * 3000 + b"1" + b"}" * 3000, 400),
    "too much": (b'{"model": "tiny", "prompt": "' + b"x" * 20_000 + b'"}', 413),
    "far too much": (DEEP, 413),
}

# what depends on the tiny model's vocabulary
OF_THE_TINY_MODEL = {"token id is unknown"}
