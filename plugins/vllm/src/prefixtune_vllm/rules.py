"""What a client's JSON may hold, and what it becomes for a prefix. Knows no HTTP and no engine.

A field that could take the prefix away, or make the engine compute its placeholders, is refused by name;
so is every field that is not known to be harmless, since vLLM gets new ones with each release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prefixtune_vllm.errors import RefusalError
from prefixtune_vllm.export import Export, Prefix

__all__ = ["check_client", "check_prompt", "split_model", "split_prompts", "to_tokenize", "with_prefix"]

RESERVED = ("kv_transfer_params", "ec_transfer_params", "cache_salt")  # anywhere in the JSON
TOKEN_FIELDS = ("prompt", "token_ids", "prompt_token_ids")
PREFIX_ARGUMENTS = "prefixtune_"  # of the chat template, ours

# fields of both routes that leave the prompt and its cache alone
HARMLESS = frozenset(
    """
    model frequency_penalty presence_penalty repetition_penalty logit_bias logprobs max_tokens n
    seed stop stop_token_ids stream stream_options temperature top_p top_k min_p user
    response_format structured_outputs include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens allowed_token_ids bad_words priority
    request_id return_tokens_as_token_ids return_token_ids add_special_tokens stream_interval
    """.split()  # noqa: SIM905  (a word per field, that one can read)
)
HARMLESS_IN_CHAT = HARMLESS | frozenset(
    """
    messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls
    reasoning_effort include_reasoning add_generation_prompt continue_final_message documents
    chat_template_kwargs
    """.split()  # noqa: SIM905  (a word per field, that one can read)
)
HARMLESS_IN_COMPLETIONS = HARMLESS | {"prompt"}
REASONS = {
    "prompt_logprobs": "they would be computed over the prefix, whose tokens are placeholders",
    "echo": "the prompt begins with the prefix, whose tokens are placeholders",
    "truncate_prompt_tokens": "it could cut the prefix off",
    "use_beam_search": "vLLM's beams lose the prefix",
    "chat_template": "it could leave the prefix out",
}


def check_client(body: Any, export: Export) -> None:
    """Refuse what no client may send, with a prefix or without, on any route.

    Raises:
        RefusalError: a reserved field, the reserved token in a text, or its id in a prompt.
    """
    for key, value in _walk(body):
        if key in RESERVED:
            raise RefusalError(400, f"{key} is reserved by this server", param=str(key))
        if isinstance(value, str) and export.text in value:
            raise RefusalError(400, f"the text holds the reserved token {export.text}", param=_name(key))
        if key in TOKEN_FIELDS and _holds(value, export.placeholder):
            raise RefusalError(400, f"{key} holds the id of the reserved token {export.text}", param=str(key))
        if isinstance(key, str) and key.startswith(PREFIX_ARGUMENTS):
            raise RefusalError(400, f"{key} is reserved by this server", param=key)


def split_model(model: Any, base: str) -> str | None:
    """The prefix's name in `base:name`; None for any other model."""
    if isinstance(model, str) and model.startswith(f"{base}:"):
        return model[len(base) + 1 :]
    return None


def check_fields(body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """The body without the fields that say nothing; what is not harmless with a prefix is refused by name."""
    harmless = HARMLESS_IN_CHAT if is_chat else HARMLESS_IN_COMPLETIONS
    kept = {}
    for name, value in body.items():
        if name in harmless:
            kept[name] = value
        elif value is not None and value is not False:
            reason = REASONS.get(name, "it is not known to leave the prefix alone")
            raise RefusalError(400, f"{name} is not supported with a prefix: {reason}", param=name)
    return kept


def with_prefix(body: dict[str, Any], prefix: Prefix, export: Export, *, is_chat: bool) -> dict[str, Any]:
    """The request for the base model that is this request with `prefix`; the prompt of a completion is not
    changed yet, because a text must become tokens first."""
    kept = check_fields(body, is_chat=is_chat)
    kept |= {"model": export.base, "kv_transfer_params": prefix.params, "cache_salt": prefix.salt}
    if not is_chat:
        return kept
    if prefix.chat is None:
        raise RefusalError(
            400,
            f"{prefix.name} was trained on texts that no chat can be written as: use /v1/completions",
            param="model",
        )
    if kept.get("add_special_tokens"):
        raise RefusalError(
            400, "add_special_tokens would put a token before the prefix", param="add_special_tokens"
        )
    arguments = kept.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise RefusalError(400, "chat_template_kwargs: expected an object", param="chat_template_kwargs")
    ours = {f"{PREFIX_ARGUMENTS}{name}": value for name, value in prefix.chat.items()}
    length = {f"{PREFIX_ARGUMENTS}length": prefix.stored.length}
    return {**kept, "chat_template_kwargs": {**arguments, **ours, **length}}


def to_tokenize(chat: Mapping[str, Any]) -> dict[str, Any]:
    """A chat for vLLM's /tokenize, which knows fewer fields: the others reach the template as arguments."""
    same = ("model", "messages", "add_generation_prompt", "continue_final_message")
    kept = {name: chat[name] for name in same if name in chat}
    arguments = {name: chat[name] for name in ("documents", "reasoning_effort") if chat.get(name)}
    kept["chat_template_kwargs"] = {**arguments, **chat["chat_template_kwargs"]}
    if chat.get("tools"):
        kept["tools"] = chat["tools"]
    return kept


def split_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """The prompts of a completion: one text or list of ids, or several.

    Raises:
        RefusalError: it is something else.
    """
    several = (
        prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    )
    texts = all(isinstance(one, str) for one in several)
    if not texts and not all(isinstance(one, list) and all(map(_is_id, one)) for one in several):
        raise RefusalError(
            400, "prompt: expected a text, a list of token ids, or a list of these", param="prompt"
        )
    return several


def check_prompt(ids: Any, prefix: Prefix, export: Export, *, room: int) -> None:
    """Refuse a rendered chat that is not P placeholders and then a text of other tokens.

    Args:
        room: the most tokens that the engine takes, the answer included.
    """
    length = prefix.stored.length
    if not isinstance(ids, list) or ids[:length] != [export.placeholder] * length:
        raise RefusalError(500, "the chat template did not put the prefix first; nothing was computed")
    if len(ids) == length:
        raise RefusalError(400, "the prompt is empty: a prefix needs a text after it", param="messages")
    if export.placeholder in ids[length:]:
        raise RefusalError(400, f"the text becomes the reserved token {export.text}", param="messages")
    if len(ids) >= room:
        raise RefusalError(
            400, f"the prompt has {len(ids)} tokens, prefix included; there is room for {room}"
        )


def _walk(value: Any, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """Every value in a JSON document, with the key that it is under; without recursion, so of any depth."""
    rest = [(key, value)]
    while rest:
        key, value = rest.pop()
        yield key, value
        if isinstance(value, dict):
            rest += value.items()
            rest += [(None, name) for name in value]  # keys are text too
        elif isinstance(value, list):
            rest += [(key, item) for item in value if isinstance(item, str | dict | list)]


def _holds(value: Any, token: int) -> bool:
    return isinstance(value, list) and any(isinstance(item, int | float) and item == token for item in value)


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _name(key: Any) -> str | None:
    return key if isinstance(key, str) else None
