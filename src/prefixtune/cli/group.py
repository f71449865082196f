"""The command group: turns every error into a message and an exit code, in one place."""

from __future__ import annotations

import difflib
import errno
from typing import Any

import click

from prefixtune.cli.output import Failure, describe_os_error, say
from prefixtune.errors import PrefixTuneError, memory_is_full

__all__ = ["Group", "debug_option"]


class Group(click.Group):
    """Exit codes: 0 done, 1 failed or interrupted, 2 wrong usage. Tracebacks only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except PrefixTuneError as error:
            if ctx.meta.get("prefixtune.debug"):
                raise
            raise Failure.of(error) from error
        except (KeyboardInterrupt, click.Abort) as stop:
            say(f"interrupted{f': {stop}' if str(stop) else ''}")
            ctx.exit(1)
        except Exception as error:
            broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            if broken_pipe or ctx.meta.get("prefixtune.debug"):  # click ends a broken pipe in silence
                raise
            raise _explain(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else "see prefixtune --help"
            raise Failure(f"there is no command {args[0]!r}", hint=hint, exit_code=2)
        return super().resolve_command(ctx, args)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """As click's, and the command knows --debug too: people append it to the line that failed."""
        cmd.params.append(debug_option())
        super().add_command(cmd, name)


def debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_take_debug,
        help="show tracebacks",
    )


def _take_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["prefixtune.debug"] = True


def _explain(error: Exception) -> Failure:
    if memory_is_full(error):
        return Failure("the memory is full", hint="smaller batches or shorter rows need less")
    if isinstance(error, OSError) and error.errno is not None:
        return describe_os_error(error)
    if "No space left on device" in str(error):  # safetensors and torch wrap it in exceptions of their own
        return describe_os_error(OSError(errno.ENOSPC, "No space left on device"))
    if "inline_container" in str(error) or "unexpected pos" in str(error):  # torch.save, short of space
        return Failure(
            "a checkpoint could not be written", hint="is the disk full? free some space, then --resume"
        )
    return Failure(
        f"internal error: {type(error).__name__}: {error}",
        hint="this is a mistake of ours: please report it with what prefixtune --debug … shows",
    )
