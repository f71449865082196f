"""One conversation: turns, and which prefix answers. Knows no options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from prefixtune.cli.engine import Loaded, with_prefix
from prefixtune.cli.output import say
from prefixtune.data import default_template
from prefixtune.errors import ConfigError, PrefixTuneError
from prefixtune.generate import check_positions, conversation_ids, ending
from prefixtune.storage import INFO

__all__ = ["Session", "lines"]

BOM = "\ufeff"  # which editors of Windows begin a file with
HELP = """/base           answer without a prefix
/prefix [NAME]  answer with the prefix of this folder, or with the last one
/reset          forget the conversation
/help           this list
/quit           leave"""


class Session:
    """A conversation that goes on when the prefix is switched, so that the same question can be asked again.

    Args:
        loaded: who answers first.
        template: how turns are written; unless given, as the prefix was trained, else the chat template where
            the tokenizer has one, else the default one.
        settings: options of `generate`.
        seed: makes the whole session repeatable.
    """

    def __init__(
        self, loaded: Loaded, *, template: str | None, settings: dict[str, Any], seed: int | None
    ) -> None:
        self._turns: list[tuple[str, str]] = []
        self._with_prefix = None if loaded.model is loaded.base else loaded
        self._active = loaded
        self._template = template
        check_positions(
            loaded.model, settings["max_new_tokens"]
        )  # an unsupported model is told before a turn
        conversation_ids([], "?", loaded.tokenizer, template)  # and so is a wrong template
        self._settings = settings
        if seed is not None:
            torch.manual_seed(seed)

    def describe(self) -> str:
        """Who answers, in one line."""
        bare = self._active.model is self._active.base
        who = "the bare model" if bare else f"the prefix {self._active.name}"
        return f"{who} answers, template {self._form()}"

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash; a mistake in it is told, and the session goes on."""
        name, _, rest = line.partition(" ")
        try:
            if name == "/base":
                self._active = self._bare()
            elif name == "/prefix":
                self._active = self._with_prefix = self._prefix(rest.strip())
            elif name == "/reset":
                self._turns.clear()
            elif name == "/help":
                return say(HELP)
            else:
                raise ConfigError(f"there is no command {name}", hint="/help lists the commands")
            say("the conversation begins anew" if name == "/reset" else self.describe())
        except PrefixTuneError as error:
            say(f"error: {error}")

    def answer(self, text: str) -> None:
        """Stream the answer to stdout; Ctrl-C stops it and what was not finished is not remembered."""
        from transformers import TextStreamer

        tokenizer, model = self._active.tokenizer, self._active.model
        try:
            asked = conversation_ids(self._turns, text, tokenizer, self._form())
            check_positions(model, len(asked) + self._settings["max_new_tokens"])
            ids = torch.tensor([asked], device=model.device)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            options = self._settings | ending(model, tokenizer, self._form())
            with torch.no_grad():
                written = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options
                )
        except PrefixTuneError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            click.echo()
            say("stopped")
        else:
            said = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
            if said:
                self._turns.append((text, said))
            else:
                say("the answer is empty; the turn is not remembered")

    def _form(self) -> str:
        trained = self._template or self._active.template
        return trained or default_template(self._active.tokenizer, chat=True)

    def _bare(self) -> Loaded:
        loaded = self._active
        return Loaded(model=loaded.base, base=loaded.base, tokenizer=loaded.tokenizer, name=loaded.name)

    def _prefix(self, name: str) -> Loaded:
        folder = Path(name).expanduser()
        is_last = self._with_prefix is not None and name == self._with_prefix.name
        if name and ((folder / INFO).is_file() or not is_last):
            return with_prefix(self._active, folder)
        if self._with_prefix is None:
            raise ConfigError("no prefix was used yet", hint="name its folder: /prefix FOLDER")
        return self._with_prefix


def lines() -> Iterator[str]:
    """What the user types, or the lines of stdin; blank ones are passed over."""
    if not sys.stdin.isatty():
        typed = (line.removeprefix(BOM).strip() for line in sys.stdin)
        yield from (line for line in typed if line)
        return
    import readline  # noqa: F401  (importing it gives input() its history and line editing)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return click.echo()
        if line:
            yield line
