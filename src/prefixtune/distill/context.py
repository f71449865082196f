"""What the teacher has before every question: the text as token ids, and its KV. Knows no questions.

Axes: n tokens of the context, P virtual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.data.row import check_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.geometry import Geometry
from prefixtune.load import LoadedBase
from prefixtune.prefix import PrefixKV
from prefixtune.progress import note

__all__ = ["Context", "check_positions_left", "length_of"]

SHARE, SHORTEST, LONGEST = 8, 16, 512  # auto: an eighth of the text, within these numbers of virtual tokens


@dataclass(frozen=True, kw_only=True)
class Context:
    """A text as the teacher reads it.

    Attributes:
        ids: n token ids; a row follows them as it is, so that a prefix made of their KV is the teacher.
        text: the instruction and the text.
    """

    ids: tuple[int, ...]
    text: str

    @classmethod
    def of(cls, text: str, tokenizer: Any, *, template: str, instruction: str | None = None) -> Context:
        """The text, after the instruction where there is one; with the chat template it is a system turn.

        Raises:
            DataError: there is no text, or it is not valid Unicode.
        """
        parts = [part.strip() for part in (instruction or "", text)]
        whole = check_text("\n\n".join(part for part in parts if part), "the text")
        if not whole:
            raise DataError(
                "the text is empty, so there is nothing to distil", hint="give --text or --instruction"
            )
        turn = _system_turn(whole, tokenizer) if template == "chat" else None
        if turn is not None:
            return cls(ids=tuple(_plain(tokenizer, turn, special=False)), text=whole)
        ids = _plain(tokenizer, f"{whole}\n\n", special=True)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        return cls(ids=tuple(ids), text=whole)

    def kv(self, base: Any) -> PrefixKV:
        """The KV of the context, [kv_heads, n, head_dim] a layer: attached, it makes the base the teacher."""
        return PrefixKV.from_tokens(base, torch.tensor([self.ids]))


def length_of(asked: str, context: Context) -> int:
    """The prefix's length P: as asked, or for auto an eighth of the context, from 16 to 512 virtual tokens.

    Raises:
        ConfigError: the text has fewer tokens than were asked for.
    """
    tokens = len(context.ids)
    if asked == "auto":
        return min(tokens, LONGEST, max(SHORTEST, tokens // SHARE))
    length = int(asked)
    if length > tokens:
        raise ConfigError(
            f"length: the text has {tokens} tokens, and a prefix of {length} was asked for",
            hint=f"a prefix of {tokens} is the text itself; less than that saves something",
        )
    return length


def check_positions_left(base: LoadedBase, context: Context, *, needed: int) -> None:
    """Refuse a text after which the model has no positions left for `needed` tokens more.

    Raises:
        DataError: the teacher cannot read the text.
    """
    config = base.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or Geometry.probe(base.model).max_positions
    tokens = len(context.ids)
    if isinstance(limit, int) and tokens + needed > limit:
        raise DataError(
            f"the text has {tokens:,} tokens, and the longest question with its answer {needed:,}; "
            f"{base.name} has {limit:,} positions, and the teacher must read both at once",
            hint=f"shorten the text to {limit - needed:,} tokens, or distil its parts"
            if limit > needed
            else "take a model with more positions",
        )


def _system_turn(text: str, tokenizer: Any) -> str | None:
    """The text as the chat template's system turn; None where it has none, or changes the text."""
    try:
        turn: str = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
    except Exception:  # a template is a program: it raises what it likes about roles and their order
        turn = ""
    if text in turn:
        return turn
    note("the chat template has no system turn of its own: the text stands before the conversation as it is")
    return None


def _plain(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
