"""prefixtune compare: methods side by side on one's own model and rows. And prefixtune report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import config_options, json_option
from prefixtune.cli.output import Failure, print_json, say
from prefixtune.errors import ConfigError, MissingExtraError

__all__ = ["compare", "report"]

FOLDER = click.Path(path_type=Path)
DATA_OPTIONS = ("template", "fields", "max_length", "split", "eval_split", "on_no_target")


class Names(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """Names with commas between them; numbers where `whole` is set."""

    name = "names"

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not self.whole:
            return tuple(parts)
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            self.fail(f"expected whole numbers with commas between them; got {value!r}", param, ctx)


@click.command()
@click.argument("file", required=False, type=FOLDER)
@click.option("--model", help="base model: hub name, folder, .gguf file, or demo  [default: demo]")
@click.option("--train", help="rows to train on")
@click.option("--eval", "eval_", help="rows to measure on; rows with one input are references of one another")
@click.option("--methods", type=Names(), help="names with commas between them; see --list")
@click.option("--metric", "metrics", type=Names(), multiple=True, help="bleu, rougeL, …; repeatable")
@click.option("--train-rows", type=Names(whole=True), help="the first so many rows; or several numbers")
@click.option(
    "--eval-rows", type=click.IntRange(min=1), help="the first so many inputs  [default: up to 100]"
)
@click.option("--seeds", type=click.IntRange(min=1), help="how many seeds  [default: 3]")
@click.option("--num-train-epochs", type=float, help="passes over the training rows, for all methods")
@click.option("--max-steps", type=click.IntRange(min=1), help="optimizer steps, for all methods")
@click.option("--per-device-train-batch-size", type=click.IntRange(min=1), help="rows per step, for all")
@click.option("--instruction", help="the text that the method prompt puts before each row")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="longest answer; by the longest reference")
@click.option("--forgetting/--no-forgetting", default=None, help="measure it  [default: on]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="precision of the base")
@config_options("data", only=DATA_OPTIONS, files=False)
@click.option(
    "--output", type=FOLDER, help="folder of the comparison; what is finished there is not run again"
)
@click.option("--list", "list_", is_flag=True, help="print the methods with their settings, and end")
@json_option
def compare(
    file: Path | None,
    eval_: str | None,
    metrics: Sequence[Sequence[str]],
    data_options: dict[str, Any],
    output: Path | None,
    list_: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train and measure methods on the same rows, with several seeds.

    FILE is a TOML file with these options (model = "demo", train_rows = 2000, …), [data], and
    [settings.METHOD] for the settings of a method; options beat the file. Ctrl-C keeps what is finished.
    """
    import prefixtune.compare as room

    if list_:
        shown = {name: method.shown() for name, method in room.METHODS.items()}
        print_json(shown) if as_json else _list(room.METHODS)
        return
    table = room.read_file(file) if file is not None else {}
    data, settings = {**table.pop("data", {}), **data_options}, table.pop("settings", {})
    folder = output or Path(table.pop("output", ""))
    table.pop("output", None)
    options |= {"eval": eval_, "metrics": tuple(name for names in metrics for name in names) or None}
    given = {name: value for name, value in options.items() if value is not None}
    plan = room.plan_of({**table, **given}, data=data, settings=settings)
    if folder == Path():
        raise ConfigError("there is no folder for the comparison", hint="name it with --output")
    for method in plan.methods:
        say(f"{method.name}: {_settings(method.shown()) or _without(method)}")
    if any(":" in name for name in plan.config.metrics) and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # as the children have it: the user's own metric is there
    command = room.shown_command("prefixtune", sys.argv[1:])
    found = room.compare(plan, folder, command=command)
    print_json(found) if as_json else _print(found)  # before the report, which may fail
    _report(folder)
    if found["failed"]:
        failed = ", ".join(f"{failure['method']} (seed {failure['seed']})" for failure in found["failed"])
        raise Failure(
            f"{len(found['failed'])} cells failed: {failed}", hint=f"their logs are in {folder}/cells"
        )
    if found["failed_metrics"]:
        names = ", ".join(dict.fromkeys(failure["metric"] for failure in found["failed_metrics"]))
        raise Failure(
            f"answers could not be scored by {names}",
            hint="mend it, and the same command scores the answers again, without training",
        )


@click.command()
@click.argument("folder", type=FOLDER)
@json_option
def report(folder: Path, as_json: bool) -> None:
    """Make report.md and its plots again, from the folder of a comparison."""
    from prefixtune.report import missing_cells, read_results, require_matplotlib, write_report

    found = read_results(folder)
    require_matplotlib()
    page = write_report(folder)
    if as_json:
        print_json({"report": str(page), "rows": found["rows"]})
    else:
        _print(found)
    for line in missing_cells(found):
        say(line)
    say(f"report: {page}")


def _list(methods: Mapping[str, Any]) -> None:
    for name, method in methods.items():
        click.echo(f"{name}: {_settings(method.shown()) or _without(method)}")


def _without(method: Any) -> str:
    return "default options" if method.trains else "trains nothing"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _report(folder: Path) -> None:
    """The report belongs to the comparison; without matplotlib it has no plots."""
    from prefixtune.report import write_report

    try:
        say(f"report: {write_report(folder)}")
    except MissingExtraError as error:
        say(f"report: {write_report(folder, plots=False)}, without plots: {error.hint}")


def _print(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from prefixtune.report import columns_of

    rows = found["rows"]
    columns = columns_of(rows)
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(escape(column.title), justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*(escape(column.text(row)) for column in columns))
    console = Console(highlight=False)
    # in a file or a pipe a table keeps its width: cut numbers are no numbers
    console = console if console.is_terminal else Console(highlight=False, width=200)
    console.print(table)
