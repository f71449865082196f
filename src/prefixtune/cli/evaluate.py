"""prefixtune evaluate: a prefix beside the bare model, on rows with known answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from prefixtune.cli.options import ONE_SOURCE, config_options, json_option, model_options
from prefixtune.cli.output import print_json, say, to_json
from prefixtune.config import DataConfig
from prefixtune.errors import ConfigError

__all__ = ["evaluate"]

SHARES = ("exact_match", "json", "json_equal", "accuracy")  # shown in percent
_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--model", help="base model; the one that the prefix was trained on by default")
@model_options
@click.option("--data", required=True, help="rows to measure on; rows with the same prompt are one input")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="exact_match, token_f1, bleu, chrf, rouge1, rouge2, rougeL, json, json_equal, accuracy, or your own "
    "package.module:function; several with commas, or repeated (docs/metrics.md)",
)
@click.option(
    "--labels",
    multiple=True,
    help="what accuracy chooses from, with commas, e.g. positive,negative; the references by default, where "
    "20 or fewer differ",
)
@click.option(
    "--language",
    type=click.Choice(["auto", "en", "zh"]),
    default="auto",
    show_default=True,
    help="take words (en) or Chinese characters (zh); auto looks at the references, and says what it took",
)
@click.option("--forgetting", is_flag=True, help="how much the loss on text that the base writes has risen")
@click.option("--forgetting-text", type=_FILE, help="the same on a text file of your own")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="of that text")
@click.option(
    "--rows", default=3, show_default=True, type=click.IntRange(min=0), help="how many answers to show"
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="longest answer; by the longest reference")
@click.option(
    "--exact-match/--no-exact-match",
    default=None,
    help="generate answers and compare  [default: on, unless accuracy is the only metric]",
)
@click.option("--base/--no-base", default=True, help="measure the bare model too  [default: on]")
@click.option(
    "--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="rows at a time"
)
@click.option(
    "--output",
    type=_FILE,
    help="write all answers with their references to this file, as JSON lines, and the metrics beside it",
)
@config_options(
    "data",
    only=ONE_SOURCE,
    defaults={"template": "what the prefix was trained with, else as train has it"},
)
@json_option
def evaluate(
    model: str | None,
    prefix_folder: Path | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    data: str,
    metrics: Sequence[str],
    labels: Sequence[str],
    language: str,
    forgetting: bool,
    forgetting_text: Path | None,
    seed: int,
    rows: int,
    max_new_tokens: int | None,
    exact_match: bool | None,
    base: bool,
    batch_size: int,
    output: Path | None,
    data_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure the loss on target tokens and task metrics, with the prefix and without."""
    DataConfig(**data_options)  # wrong values before any work
    metrics, labels = _with_commas(metrics, "--metric"), _with_commas(labels, "--labels")
    metrics = [*metrics, "accuracy"] if labels and "accuracy" not in metrics else metrics
    exact_match = exact_match if exact_match is not None else metrics != ["accuracy"]
    _check_output(output, has_answers=exact_match or bool(metrics))
    if output is not None:
        _check_replaced(output, [Path(data), forgetting_text, *_files_of(prefix_folder)])
    _check_metrics(metrics, labels, language)
    if (forgetting or forgetting_text is not None) and prefix_folder is None:
        raise ConfigError("--forgetting compares a prefix with its base, and no --prefix is given")

    from prefixtune import evaluate as room
    from prefixtune.cli.engine import load
    from prefixtune.data import load_rows, parse_fields

    loaded = load(model, prefix_folder, dtype=dtype, device=device, quantize=quantize)
    stored = {"template": loaded.template} if loaded.template else {}
    config = DataConfig(**{**stored, **data_options})
    read = load_rows(data, fields=parse_fields(config.fields), split=config.split, limit=config.limit)
    result = room.evaluate(
        loaded.model,
        loaded.tokenizer,
        read,
        config,
        base=base,
        exact_match=exact_match,
        metrics=metrics,
        labels=labels,
        language=language,
        neutral=_neutral(loaded, forgetting_text, seed=seed) if forgetting or forgetting_text else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    try:
        if output is not None:
            _write(result, output)
    finally:  # what was measured is told where it cannot be written, too
        if as_json:
            print_json({**result.to_dict(), "samples": result.samples[:rows]})
        else:
            _print(result, rows, loaded.name)
    failed = {**result.base_failed_metrics, **result.failed_metrics}
    if failed:
        told = "; ".join(f"metric {name} could not be measured: {error}" for name, error in failed.items())
        raise ConfigError(told)


def _neutral(loaded: Any, path: Path | None, *, seed: int) -> Any:
    from prefixtune.forgetting import fitting_tokens, neutral_texts, read_texts

    before = loaded.model.prefix.config.length if loaded.model is not loaded.base else 0
    if path is not None:
        return read_texts(path, loaded.tokenizer, tokens=fitting_tokens(loaded.base, before + 1))
    return neutral_texts(loaded.base, loaded.tokenizer, before=before, seed=seed, progress=True)


def _with_commas(values: Sequence[str], option: str) -> list[str]:
    parts = [part.strip() for value in values for part in value.split(",")]
    if "" in parts:
        raise ConfigError(f"{option}: expected names with commas between them; got {','.join(values)!r}")
    return parts


def _check_metrics(metrics: Sequence[str], labels: Sequence[str], language: str) -> None:
    if any(":" in name for name in metrics) and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: the user's own metric is there
    if metrics or labels:  # torch is imported for these, so not for every mistake
        from prefixtune.task import check_task

        check_task(metrics, labels, language)


def _check_output(output: Path | None, *, has_answers: bool) -> None:
    if output is not None and not has_answers:
        raise ConfigError("--output is for answers, and --no-exact-match makes none")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(
            f"{output}: not a file that can be written", hint="name a file in a folder that exists"
        )


def _check_replaced(output: Path, kept: Sequence[Path | None]) -> None:
    for path in (output, _beside(output)):
        for source in kept:
            if source and path.exists() and path.resolve().is_relative_to(source.resolve()):
                raise ConfigError(
                    f"--output {output}: {path} would be lost, which this command reads or a run wrote",
                    hint="name another file",
                )


def _files_of(prefix_folder: Path | None) -> list[Path]:
    """What a prefix's folder and its run consist of; answers may lie beside them."""
    if prefix_folder is None:
        return []
    from prefixtune import storage
    from prefixtune.train import folder

    names = [storage.TENSORS, storage.TRAINABLE, storage.INFO, storage.CARD, folder.RUN, folder.METRICS]
    names += [folder.RETENTION, folder.RATES, folder.QUESTIONS, folder.COMPARISON]
    return [prefix_folder / name for name in names]


def _beside(output: Path) -> Path:
    return output.with_suffix(".metrics.json")


def _write(result: Any, output: Path) -> None:
    """The answers, and beside a real file its metrics: answers.jsonl has answers.metrics.json."""
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in result.samples]
    output.write_text("".join(lines), encoding="utf-8")
    say(f"{len(lines)} answers written to {output}")
    if output.is_file():
        beside = _beside(output)
        values = {name: value for name, value in result.to_dict().items() if name != "samples"}
        beside.write_text(to_json(values) + "\n", encoding="utf-8")
        say(f"the metrics written to {beside}")


def _print(result: Any, rows: int, name: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for sample in result.samples[:rows]:
        told = [("prompt", sample["prompt"]), *(("reference", text) for text in sample["references"])]
        for start, who in (("", name), ("base_", "bare model")):
            said = [sample[start + key] for key in ("prediction", "label") if start + key in sample]
            told += [(who, text) for text in said]
        click.echo(sample["origin"])
        for label, text in told:
            console.print(Text.assemble((f"  {label}: ", "dim"), text.strip()), soft_wrap=True)
    console.print(_table(result, name))
    if set(result.metrics) - set(SHARES):  # these alone need no setting
        for metric, setting in result.metric_settings.items():
            click.echo(f"{metric}: {setting}")
    if result.forgetting_detail is not None:
        lost = result.forgetting_detail
        click.echo(f"forgetting on {lost.texts} texts, {lost.tokens:,} tokens, {lost.source}")
    inputs = f", {result.inputs} inputs" if result.inputs not in (None, result.rows) else ""
    cut = f", TRUNCATED {result.truncated_rows}" if result.truncated_rows else ""
    dropped = f", DROPPED {result.dropped_rows}" if result.dropped_rows else ""
    click.echo(f"{result.rows} rows{inputs}, {result.target_tokens:,} target tokens{cut}{dropped}")


def _table(result: Any, name: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    has_base = result.base_loss is not None
    table = Table("", escape(name), *(["bare model"] if has_base else []))
    for label, key in (("target loss", "loss"), ("perplexity", "perplexity")):
        values = [result.to_dict()[start + key] for start in (["", "base_"] if has_base else [""])]
        table.add_row(label, *(f"{value:.4f}" for value in values))
    found = [result.metrics, *([result.base_metrics] if has_base else [])]
    for metric in {name: None for metrics in found for name in metrics}:  # one's own may give other keys
        shown = (_shown(metric, metrics.get(metric)) for metrics in found)
        table.add_row(escape(metric.replace("_", " ")), *shown)
    if result.forgetting is not None:
        error = result.forgetting_detail.standard_error
        spread = f" ± {error:.4f}" if error is not None else ""
        table.add_row("forgetting (nats per token)", f"{result.forgetting:.4f}{spread}")
    return table


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if metric in SHARES else f"{value:.4f}"
