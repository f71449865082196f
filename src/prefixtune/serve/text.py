"""Token by token to text, up to a stop string. Knows no model and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Writer"]

UNFINISHED = "�"  # what a tokenizer gives for the first bytes of a character


class Writer:
    """The text of an answer as it grows.

    Text is held back while it may be the beginning of a stop string or of a character; joined, what `add` and
    `finish` return is the tokenizer's own text of all tokens, up to the first stop string. But with byte
    fallback an invalid byte makes U+FFFD of its whole run of bytes; characters of the run that are out
    already stay what they were (to wait for each run's end would delay "\\n", and the stop strings in it).
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._shown = self._read = 0  # tokens whose text is context for the next, and that have been read
        self._held = ""
        self._done = 0  # characters of the tokens that have been read
        self.length = 0  # characters of all tokens so far, held back or not, without an unfinished one
        self.stopped = False

    def add(self, token: int) -> str:
        """The new text that is certain; `stopped` says whether a stop string has come."""
        self._ids.append(token)
        before = self._decode(self._ids[self._shown : self._read])
        text = self._decode(self._ids[self._shown :])
        if text.endswith(UNFINISHED):  # what is before the unfinished character is certain
            certain = text.rstrip(UNFINISHED)[len(before) :]
            self.length = self._done + len(certain)
            ends = any(stop in self._held + certain for stop in self._stops)
            return self._release(certain) if ends else ""
        if len(text) <= len(before):
            return ""
        self._shown, self._read = self._read, len(self._ids)
        self._done = self.length = self._done + len(text) - len(before)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What is still held back; a character that has not come to its end is U+FFFD."""
        before = self._decode(self._ids[self._shown : self._read])
        text = self._decode(self._ids[self._shown :])
        self._shown = self._read = len(self._ids)
        last = self._release(text[len(before) :])
        if self.stopped:
            return last
        last, self._held = last + self._held, ""
        return last

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
