"""One chat template for all prefixes of a server: placeholders first, then the text as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixtune.config import DataConfig
from prefixtune.data import build_prompts
from prefixtune.errors import ConfigError, ModelError, PrefixTuneError
from prefixtune.generate import prompt_row
from prefixtune.interop.vllm.reserved import Placeholder

__all__ = ["chat_arguments", "server_template"]

PROBE = "prefixtune:probe"  # stands for the text whose place in a prompt is looked for
TEXTS = ("Where is my parcel?", "  a\nb ", "什么是三原色？", "1 < 2 & 3")
ONE_TEXT = "this prefix was trained on single texts: send one message, of the user"
ONLY_TEXT = "this prefix was trained on texts: send nothing else"
LENGTH = 3  # of the prefix with which rendering is checked


def server_template(original: str | Mapping[str, str] | None, placeholder: Placeholder) -> str:
    """The Jinja template for the server.

    Args:
        original: the tokenizer's own, by which chats without a prefix go on as before; of several by name
            "tool_use" for requests with tools and "default" for others, as transformers and vLLM choose.

    Its arguments come from the middleware: prefixtune_length, and prefixtune_form with what `chat_arguments`
    gives.

    Raises:
        ModelError: there are several templates, and none is the default.
    """
    if original is None:
        original = "{{ raise_exception('the tokenizer has no chat template') }}"
    # Jinja drops a last line break
    body = original.removesuffix("\n") if isinstance(original, str) else _chosen_by_tools(original)
    text = placeholder.text.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "{% if prefixtune_length is defined %}{{ '" + text + "' * prefixtune_length }}{% endif %}"
        "{% if prefixtune_form is defined and prefixtune_form == 'text' %}"
        "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
        "{{ raise_exception('" + ONE_TEXT + "') }}{% endif %}"
        # vLLM gives parts, also of a plain string, where the original template loops over them
        "{% set prefixtune_content = messages[0]['content'] %}{% if prefixtune_content is not string %}"
        "{% if prefixtune_content | rejectattr('type', 'equalto', 'text') | list %}"
        "{{ raise_exception('" + ONLY_TEXT + "') }}{% endif %}"
        "{% set prefixtune_content = prefixtune_content | map(attribute='text') | join('\\n') %}{% endif %}"
        "{% set prefixtune_asked = prefixtune_before ~ prefixtune_content %}"
        "{{ prefixtune_start ~ (prefixtune_asked | trim if prefixtune_trim else prefixtune_asked)"
        " ~ prefixtune_after }}"
        "{% else %}\n" + body + "{% endif %}"
    )


def _chosen_by_tools(templates: Mapping[str, str]) -> str:
    if "default" not in templates:
        raise ModelError(
            f"the tokenizer has several chat templates ({', '.join(templates)}) and no default",
            hint="set its chat_template to the one that is to be served",
        )
    default, tools = (templates.get(name, "").removesuffix("\n") for name in ("default", "tool_use"))
    return "{% if tools %}\n" + tools + "{% else %}\n" + default + "{% endif %}" if tools else default


def chat_arguments(
    template: str | None, tokenizer: Any, *, server: str, placeholder: Placeholder
) -> dict[str, Any] | None:
    """How a chat is written for a prefix that was trained with `template`; None where it cannot be exactly.

    What `server` renders is compared with the toolkit's own prompts, token by token.
    """
    if template in (None, "chat"):
        found: Mapping[str, Any] | None = {"form": "chat"} if tokenizer.chat_template else None
        form = "chat"
    else:
        found, form = _around(template, tokenizer), template
    if found is None or not _is_exact(found, form, tokenizer, server=server, placeholder=placeholder):
        return None
    return dict(found)


def _around(template: str, tokenizer: Any) -> dict[str, Any] | None:
    """What stands before and after the one text of a prompt."""
    try:
        prompt = build_prompts([prompt_row(PROBE, template)], tokenizer, DataConfig(template=template))[0]
    except ConfigError:  # several fields
        return None
    if prompt.text.count(PROBE) != 1:
        return None
    before, after = prompt.text.split(PROBE)
    bare = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    starts = list(prompt.input_ids) != bare
    return {
        "form": "text",
        "start": tokenizer.bos_token or "" if starts else "",
        "before": before,
        "after": after,
        "trim": "{" not in template,  # as human does before the answer's label
    }


def _is_exact(
    arguments: Mapping[str, Any], form: str, tokenizer: Any, *, server: str, placeholder: Placeholder
) -> bool:
    ours = {f"prefixtune_{name}": value for name, value in arguments.items()}
    for text in TEXTS:
        try:
            prompt = build_prompts([prompt_row(text, form)], tokenizer, DataConfig(template=form))[0]
        except PrefixTuneError:
            return False
        if placeholder.id in prompt.input_ids:  # the plugin would refuse it
            return False
        # of the original template vLLM finds out which of the two it takes; the text form gets either
        parts = [[{"type": "text", "text": text}]] if arguments["form"] == "text" else []
        for content in [text, *parts]:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=server,
                add_generation_prompt=True,
                tokenize=False,
                prefixtune_length=LENGTH,
                **ours,
            )
            found = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            if found != [placeholder.id] * LENGTH + list(prompt.input_ids):
                return False
    return True
