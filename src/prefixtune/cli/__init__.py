"""The command line: `prefixtune COMMAND --help`. Imports no torch until a command runs."""

from __future__ import annotations

import logging

import click

from prefixtune import __version__
from prefixtune.cli.chat import chat
from prefixtune.cli.compare import compare, report
from prefixtune.cli.data import data
from prefixtune.cli.distill import distill
from prefixtune.cli.estimate import estimate
from prefixtune.cli.evaluate import evaluate
from prefixtune.cli.export import export
from prefixtune.cli.generate import generate
from prefixtune.cli.group import Group, debug_option
from prefixtune.cli.inspect import inspect
from prefixtune.cli.output import write_anything
from prefixtune.cli.quickstart import quickstart
from prefixtune.cli.serve import serve
from prefixtune.cli.train import train

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prefixtune")
def main() -> None:
    """Prefix-tuning as a trained KV cache: train a prefix for a frozen language model, and use it.

    MODEL is a hub name, a folder, a .gguf file, or demo. DATA is a .json, .jsonl, .csv, .tsv or .parquet
    file, a data set folder, a hub name, or demo.
    """
    write_anything()
    # peft imports it where it is there, and transformers' Trainer peft: on CPUs with bfloat16 arithmetic
    # it warns each time that a kernel could not be downloaded, which nothing of ours uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


main.params.append(debug_option())

for _command in (
    quickstart,
    estimate,
    train,
    distill,
    evaluate,
    generate,
    chat,
    serve,
    compare,
    report,
    inspect,
    export,
    data,
):
    main.add_command(_command)
