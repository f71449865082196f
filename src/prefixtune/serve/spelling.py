"""What each token adds to a text, for logprobs. Knows no model and no HTTP."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, NamedTuple

__all__ = ["Spelled", "Speller"]

PART = "�"  # what a tokenizer gives for a part of a character
MARK = "bytes:"  # OpenAI's sign for a token that is no text
PRINTED = {chr(x) for x in range(32, 127)} - {"\\"}
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelled(NamedTuple):
    """A token's text; `raw` is None where its bytes are not known."""

    text: str
    raw: bytes | None


class Speller:
    """The texts of tokens, one by one, remembered.

    A token alone is not what it is in a text: SentencePiece's decoders drop the space that begins a text. So
    it is what it adds to a text that something precedes; the first of an answer is what it is alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, bool], Spelled] = {}

    def spell(self, token: int, *, is_first: bool) -> Spelled:
        """Its text, or "bytes:\\xe4" where it holds a part of a character and its bytes are known."""
        found = self._known.get((token, is_first))
        if found is None:
            found = self._known[token, is_first] = self._spell(token, is_first)
        return found

    def adds_text(self, token: int) -> bool:
        """Whether it is more than a mark, such as an end of turn, that answers leave out."""
        return not self._decode([token]) or bool(self._decode([token], skip_special_tokens=True))

    def _spell(self, token: int, is_first: bool) -> Spelled:
        text = self._decode([token])
        if not is_first and self._anchor is not None and self.adds_text(token):
            before, joined = self._decode([self._anchor]), self._decode([self._anchor, token])
            text = joined[len(before) :] if joined.startswith(before) else text
        if PART not in text:
            return Spelled(text, text.encode("utf-8", "replace"))
        raw = _raw(str(self._tokenizer.convert_ids_to_tokens(token)))
        if raw is None or raw.decode("utf-8", "replace") != text:
            return Spelled(text, None)
        if raw != text.encode():
            text = MARK + "".join(chr(x) if chr(x) in PRINTED else f"\\x{x:02x}" for x in raw)
        return Spelled(text, raw)

    @cached_property
    def _anchor(self) -> int | None:
        """A token that others may follow without a change to its own text, or to theirs."""
        for text in ("a", "the", "A", "1", "."):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids:
                alone = self._decode(ids[-1:], skip_special_tokens=True)
                is_byte = BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(ids[-1])))
                if alone.strip() and PART not in alone and not is_byte:
                    return int(ids[-1])
        return None

    def _decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def _raw(piece: str) -> bytes | None:
    """The bytes of a vocabulary's entry: byte fallback's, or in GPT-2's letters for bytes."""
    found = BYTE.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    try:
        return bytes(_BYTES[letter] for letter in piece)
    except KeyError:
        return None


def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte (`bytes_to_unicode` of its encoder.py), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(x): x for x in plain} | {chr(256 + place): x for place, x in enumerate(others)}


_BYTES = _letters()
