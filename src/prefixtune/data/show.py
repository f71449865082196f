"""Shows an example as coloured text: what the model reads, and what it must learn to write."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from prefixtune.data.examples import Example
from prefixtune.data.templates import NO_TARGET

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["example_text"]

TARGET_STYLE, PROMPT_STYLE = "bold green", "dim"


def example_text(example: Example, tokenizer: Any) -> Text:
    """The decoded row, special tokens included: targets bold green, the rest dim.

    The text of a run of tokens is what it adds to the decoding of all ids before it, because a token alone
    need not be text: a Chinese character may be three of them, and some tokenizers drop a leading space.
    """
    from rich.text import Text

    # nothing predicts the first token, so it is no target whatever its label
    flags = [index > 0 and label != NO_TARGET for index, label in enumerate(example.labels)]
    ids = list(example.input_ids)
    whole = _decode(tokenizer, ids)
    shown = Text()
    done = count = 0
    for is_target, run in groupby(flags):
        count += len(list(run))
        # a character cut in two by the border decodes to U+FFFD before it: it goes to the run that ends it
        end = len(whole) if count == len(ids) else _common_length(whole, _decode(tokenizer, ids[:count]))
        shown.append(whole[done : max(done, end)], style=TARGET_STYLE if is_target else PROMPT_STYLE)
        done = max(done, end)
    return shown


def _common_length(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
