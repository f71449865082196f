"""From the ids of an answer to the text that is compared with references. Knows no model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

__all__ = ["answer_text", "special_in"]


def answer_text(
    ids: Sequence[int], tokenizer: Any, *, lead: str = "", keep: Collection[int] = frozenset()
) -> str:
    """The text of an answer, without special tokens and without what stands before the answer.

    Args:
        ids: up to the end token.
        lead: `Prompt.lead`. Where a thought of the row stands in it, another in its place is left out too.
        keep: special tokens that stay, see `special_in`.
    """
    text = _decoded(ids, tokenizer, keep)
    shown = _decoded(tokenizer(lead, add_special_tokens=False)["input_ids"], tokenizer, keep).strip()
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


def special_in(texts: Iterable[str], tokenizer: Any) -> frozenset[int]:
    """Special tokens that are written in texts, such as the mark of a tool call in references.

    A tokenizer leaves them out of what it decodes: no answer would be such a text.
    """
    written = {id for text in texts for id in tokenizer(text, add_special_tokens=False)["input_ids"]}
    return frozenset(written & _special(tokenizer))


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}


def _decoded(ids: Sequence[int], tokenizer: Any, keep: Collection[int]) -> str:
    if keep:
        special = _special(tokenizer)
        ids = [id for id in ids if id in keep or id not in special]
    text: str = tokenizer.decode(ids, skip_special_tokens=not keep)
    return text
