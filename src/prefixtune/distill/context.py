"""What the teacher has before every question: the text as token ids, and its KV. Knows no questions.

Axes: n tokens of the context, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attachment import position_limit
from prefixtune.config import DataConfig
from prefixtune.data import Row, build_prompts, text_start
from prefixtune.data.row import check_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.generate import PLACEHOLDER, prompt_row
from prefixtune.geometry import Geometry, compute_dtype, text_config
from prefixtune.load import LoadedBase
from prefixtune.prefix import PrefixKV
from prefixtune.progress import note
from prefixtune.rotary import rotary_change

__all__ = ["Context", "check_positions_left", "length_of", "prompts_of"]

SHARE, SHORTEST, LONGEST = 8, 16, 512  # auto: an eighth of the text, within these numbers of virtual tokens


@dataclass(frozen=True, kw_only=True)
class Context:
    """A text as the teacher reads it, and how questions come after it.

    Attributes:
        ids: n token ids; the ids of `prompts` follow them.
        text: the instruction and the text.
        template: of the questions.
        is_turn: the text is the chat template's system turn; else it stands before the rows as it is.
    """

    ids: tuple[int, ...]
    text: str
    template: str
    is_turn: bool

    @classmethod
    def of(cls, text: str, tokenizer: Any, *, template: str, instruction: str | None = None) -> Context:
        """The text, after the instruction where there is one.

        Raises:
            DataError: there is no text, or it is not valid Unicode.
        """
        parts = [part.strip() for part in (instruction or "", text)]
        whole = check_text("\n\n".join(part for part in parts if part), "the text")
        if not whole:
            raise DataError(
                "the text is empty, so there is nothing to distil", hint="give --text or --instruction"
            )
        if template == "chat":
            ids = _system_turn(whole, tokenizer)
            if ids:
                return cls(ids=ids, text=whole, template=template, is_turn=True)
            note("the chat template has no system turn by itself: the text stands before it as it is")
        ids = _ids(tokenizer, f"{whole}\n\n", special=True)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        return cls(ids=ids, text=whole, template=template, is_turn=False)

    def prompts(self, questions: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
        """What the teacher reads after `ids`: each question, up to its answer.

        The student reads `prompts_of` the same questions: the same, but for what a template writes only where
        no text is before it, its default system turn or the token that begins a text.
        """
        if not self.is_turn:
            alone = prompts_of(questions, tokenizer, self.template)
            start = tuple(text_start(tokenizer))
            begun = self.ids[: len(start)] == start
            return [ids[len(start) :] if begun and ids[: len(start)] == start else ids for ids in alone]
        found = []
        for ids in _prompts(
            [_after_system(self.text, question) for question in questions], tokenizer, "chat"
        ):
            if ids[: len(self.ids)] != self.ids:
                raise DataError(
                    "the chat template renders the text differently for different questions",
                    hint="use --template human",
                )
            found.append(ids[len(self.ids) :])
        return found

    def kv(self, base: Any) -> PrefixKV:
        """The KV of the context, [kv_heads, n, head_dim] a layer: attached, it makes the base the teacher."""
        return PrefixKV.from_tokens(base, torch.tensor([self.ids]))

    def cache_bytes(self, base: Any) -> int:
        """Of the context's keys and values in an engine's cache, which drops what no later token sees."""
        numbers = 0
        for layer in Geometry.probe(base).layers:
            seen = len(self.ids) if layer.window is None else min(len(self.ids), layer.window - 1)
            numbers += seen * layer.numbers_per_token
        return numbers * compute_dtype(base).itemsize


def prompts_of(questions: Sequence[str], tokenizer: Any, template: str) -> list[tuple[int, ...]]:
    """Each question in the template, as it is served: token ids up to its answer."""
    return _prompts(
        [prompt_row(text, template, origin="question") for text in questions], tokenizer, template
    )


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
    config, geometry = text_config(base.model), Geometry.probe(base.model)
    limit = getattr(config, "max_position_embeddings", None) or geometry.max_positions
    if rotary_change(config) is not None:
        limit = position_limit(config, geometry)
    tokens = len(context.ids)
    if isinstance(limit, int) and tokens + needed > limit:
        raise DataError(
            f"the text has {tokens:,} tokens, and the longest question with its answer {needed:,}; "
            f"{base.name} has {limit:,} positions, and the teacher must read both at once",
            hint=f"shorten the text to {limit - needed:,} tokens, or distil its parts"
            if limit > needed
            else "take a model with more positions",
        )


def _system_turn(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids of the text as the chat template's system turn; none where a question after it changes them."""
    try:
        turn = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
        (whole,) = _prompts([_after_system(text, "?")], tokenizer, "chat")
    except Exception:  # a template is a program: it raises what it likes about roles and their order
        return ()
    ids = _ids(tokenizer, turn, special=False)
    return ids if text in turn and whole[: len(ids)] == ids else ()


def _after_system(text: str, question: str) -> Row:
    roles = {"system": text, "user": question, "assistant": PLACEHOLDER}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    return Row(values={"messages": messages}, origin="question")


def _prompts(rows: Sequence[Row], tokenizer: Any, template: str) -> list[tuple[int, ...]]:
    return [prompt.input_ids for prompt in build_prompts(rows, tokenizer, DataConfig(template=template))]


def _ids(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
