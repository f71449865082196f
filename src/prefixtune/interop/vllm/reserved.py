"""The token that stands for a prefix's positions in a prompt: nothing else may ever become it.

The engine never computes it, so which embedding it has does not matter; that it has one keeps every engine's
checks of token ids content.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import ConfigError, ModelError

__all__ = ["Placeholder", "reserve"]

OWN = "<|prefixtune|>"
# what models call tokens that they have for later; without brackets it is a word that texts have
SPARE = re.compile(r"<\S*(reserved|unused)\S*>|\[\S*(reserved|unused)\S*\]", re.IGNORECASE)
CHAT = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
TOOLS = [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}]


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """A reserved token: its id, and the text that becomes it."""

    id: int
    text: str


def reserve(tokenizer: Any, *, vocabulary: int, chosen: str | None) -> Placeholder:
    """Make a token of `tokenizer` the reserved one; the tokenizer is changed.

    Unless `chosen`, it is a new one where the model has an embedding to spare beyond the tokenizer's tokens,
    else one that the model calls reserved or unused.

    Args:
        vocabulary: rows of the model's embedding.

    Raises:
        ConfigError: `chosen` is no token that could be reserved.
        ModelError: there is none to spare.
    """
    known: dict[str, int] = tokenizer.get_vocab()
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    taken |= _of_chats(tokenizer)
    if chosen is not None:
        if chosen not in known or chosen in taken:
            examples = _special(tokenizer, taken)[-3:]
            raise ConfigError(
                f"reserved token {chosen!r}: expected a token of the tokenizer that no text needs",
                hint=f"for example {' or '.join(examples)}" if examples else "leave --reserved-token out",
            )
        text = chosen
    elif OWN in known or max(known.values()) + 1 < vocabulary:
        text = OWN
    else:
        named = {text for text in known if SPARE.fullmatch(text)}
        spare = sorted((known[text], text) for text in named - taken)
        if not spare:
            free = _special(tokenizer, taken) or ["…"]
            raise ModelError(
                f"all {vocabulary} tokens of the model are taken, and none is called reserved or unused",
                hint=f"choose one that no text needs: --reserved-token '{free[-1]}'",
            )
        text = spare[0][1]
    tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
    placeholder = Placeholder(id=tokenizer.convert_tokens_to_ids(text), text=text)
    ids = tokenizer(text * 3 + "a" + text, add_special_tokens=False)["input_ids"]
    if placeholder.id >= vocabulary or ids[:3] != [placeholder.id] * 3 or ids.count(placeholder.id) != 4:
        raise ConfigError(
            f"reserved token {text!r}: the tokenizer does not read it as one token of the model"
        )
    return placeholder


def _of_chats(tokenizer: Any) -> set[str]:
    """The tokens that the chat templates write: every chat would hold them."""
    given = getattr(tokenizer, "chat_template", None) or {}
    found: set[str] = set()
    for template in given.values() if isinstance(given, dict) else [given]:
        for messages, tools in itertools.product((CHAT, CHAT[1:], CHAT[1:2]), (None, TOOLS)):
            options = {"chat_template": template, "tools": tools, "add_generation_prompt": True}
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception:  # a template is a program: it raises what it likes about roles and tools
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found.update(tokenizer.convert_ids_to_tokens(ids))
    return found


def _special(tokenizer: Any, taken: set[str | None]) -> list[str]:
    """Special tokens by id; the last ones of a vocabulary tend to be the rarest in texts."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [token.content for _, token in added if token.special and token.content not in taken]
