"""From the ids of an answer to the text that is compared with references. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["answer_text", "special_beside"]


def answer_text(
    ids: Sequence[int], tokenizer: Any, *, lead: str = "", dropped: frozenset[int] | None = None
) -> str:
    """The text of an answer, without special tokens and without what stands before the answer.

    Args:
        ids: up to the end token.
        lead: `Prompt.lead`. Where a thought of the row stands in it, another in its place is left out too.
        dropped: the special tokens that are left out, see `special_beside`; all unless given.
    """
    text = _decoded(ids, tokenizer, dropped)
    shown = _decoded(tokenizer(lead, add_special_tokens=False)["input_ids"], tokenizer, dropped).strip()
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    begun = text.lstrip()
    if not lines:
        return text
    if begun.startswith(shown):
        return begun.removeprefix(shown).lstrip()
    opening, *thought, closing = lines if len(lines) > 1 else (*lines, "")
    if thought and begun.startswith(opening) and closing in begun:
        return begun.partition(closing)[2].lstrip()
    return text


def special_beside(texts: Iterable[str], tokenizer: Any) -> frozenset[int] | None:
    """Special tokens that the texts of references do not have; None where they have none at all.

    A tokenizer leaves all out of what it decodes: no answer would be a text with the mark of a tool call.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
    written = {id for text in texts for id in tokenizer(text, add_special_tokens=False)["input_ids"]}
    return frozenset(special - written) if special & written else None


def _decoded(ids: Sequence[int], tokenizer: Any, dropped: frozenset[int] | None) -> str:
    if dropped is not None:
        ids = [id for id in ids if id not in dropped]
    text: str = tokenizer.decode(ids, skip_special_tokens=dropped is None)
    return text
