"""Makes the rows of a comparison, and times the model on some of them. Trains nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prefixtune.attachment import position_limit
from prefixtune.compare.cell import answer_limit, context_ids
from prefixtune.compare.machine import describe_machine
from prefixtune.compare.plan import EVAL_ROWS, Plan, digest
from prefixtune.compare.rows import Question, Rows, first_rows
from prefixtune.config import DataConfig
from prefixtune.data import Example, Row, build_examples, build_prompts, check_splits, load_rows, parse_fields
from prefixtune.errors import DataError
from prefixtune.fingerprint import Fingerprint, weights_digest
from prefixtune.forgetting import NeutralTexts, neutral_losses, neutral_texts
from prefixtune.generate import check_ids, ending
from prefixtune.geometry import Geometry, text_config
from prefixtune.likelihood import row_losses
from prefixtune.load import LoadedBase, load_base
from prefixtune.progress import note
from prefixtune.task import check_prompts, inputs_of
from prefixtune.train.defaults import length_for, positions_of

__all__ = ["make_rows"]

NEUTRAL_SEED = 0
TIMED_ROWS = 16
OURS = "prefix"
VIRTUAL = (OURS, "prompt-tuning", "p-tuning", "peft-prefix")  # kinds whose virtual tokens take positions
LOSS_REFERENCES = 2  # of an input: more cost time and change the mean over tokens little


def make_rows(plan: Plan) -> Rows:
    """Read and tokenise the rows, sample the neutral text, and say what was found.

    Raises:
        DataError, ModelError, ConfigError: the input cannot be used.
    """
    config = plan.config
    read, eval_read = _read(plan)
    base = load_base(config.model, dtype=config.dtype)
    if base.tokenizer is None:
        raise DataError(f"{config.model} has no tokenizer, so rows of text cannot be read")
    train, report = build_examples(read, base.tokenizer, plan.data)
    note(f"training rows: {report.summary()}")
    kept = report.rows - report.dropped
    if config.train_rows and kept < max(config.train_rows):
        raise DataError(
            f"{config.train}: expected {max(config.train_rows):,} rows with a target; of the first "
            f"{len(read):,} there are {kept:,}",
            hint="take the others out of the file, or ask for fewer train_rows",
        )
    eval_rows = config.eval_rows or EVAL_ROWS
    questions, measured = _evaluation(
        eval_read, base.tokenizer, plan.data, eval_rows, answered=bool(config.metrics)
    )
    if config.eval_rows and len(questions) < config.eval_rows:
        raise DataError(
            f"{config.eval}: expected {config.eval_rows:,} inputs to measure on; got {len(questions):,}",
            hint="rows with one input count once; ask for fewer eval_rows",
        )
    examples, eval_report = build_examples(measured, base.tokenizer, plan.data)
    note(f"evaluation: {len(questions)} inputs; loss on {eval_report.summary()}")
    check_ids(base.model, (example.input_ids for example in [*train, *examples]))
    before = _check_positions(plan, base, train, examples, questions)
    about = {
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "dtype_reason": base.dtype_reason,
        "model": config.model,
        "base": _described(base.model),
        "limits": _limits(base.model),
        "training": report.summary(),
        "evaluation": f"{len(questions)} inputs; loss on {eval_report.summary()}",
        "machine": describe_machine(),
    }
    texts, losses, seconds = _neutral(base, before) if config.forgetting else (None, [], None)
    return Rows(
        train=tuple(train),
        eval=tuple(examples),
        questions=tuple(questions),
        neutral=texts.rows if texts else (),
        neutral_losses=tuple(losses),
        about={
            **about,
            "neutral": texts.source if texts else None,
            "tokens_per_second": _speed(base, train),
            "seconds_per_new_token": seconds,
        },
    )


def _read(plan: Plan) -> tuple[list[Row], list[Row]]:
    """The rows to train on, as many as are asked for, and all rows to measure on."""
    config, data = plan.config, plan.data
    assert config.train is not None
    assert config.eval is not None
    check_splits(config.train, config.eval, split=data.split, eval_split=data.evaluated_split)
    fields, limit = parse_fields(data.fields), max(config.train_rows) if config.train_rows else None
    read = load_rows(config.train, fields=fields, split=data.split, limit=limit)
    if config.train_rows and len(read) < max(config.train_rows):
        raise DataError(f"{config.train}: expected {max(config.train_rows):,} rows; got {len(read):,}")
    return read, load_rows(config.eval, fields=fields, split=data.evaluated_split)


def _check_positions(
    plan: Plan,
    base: LoadedBase,
    train: Sequence[Example],
    examples: Sequence[Example],
    questions: Sequence[Question],
) -> int:
    """Raise DataError where an evaluation row has no positions left, which cells would tell once trained.

    Returns:
        the most positions that a method takes before a row.
    """
    geometry = Geometry.probe(base.model)
    kinds: tuple[str, ...] = VIRTUAL
    limit = geometry.learned_positions
    if limit is None and any(cell.method.of == OURS for cell in plan.cells):
        # a rotary that changes with the length has a limit behind our prefix, and for nothing else
        limit, kinds = position_limit(text_config(base.model), geometry), (OURS,)
    if limit is None:
        return 0
    needed, what = max((len(example.input_ids), f"{example.origin}: ") for example in examples)
    if plan.config.metrics:
        new = answer_limit(plan, questions, base.tokenizer)
        answered = max(len(question.input_ids) for question in questions) + new
        if answered > needed:
            needed, what = answered, f"{plan.config.eval}: a prompt with an answer of up to {new}: "
    prefix = _longest_prefix(plan, base.model, train, examples, kinds=kinds)
    context = _context(plan, base, train) if geometry.learned_positions is not None else 0
    before = max(prefix, context)
    if before + needed > limit:
        after = f" after {'a prefix' if prefix >= context else 'the text in the context'} of {before}"
        raise DataError(
            f"{what}{needed} tokens{after if before else ''} do not fit into the {limit} positions of "
            f"{geometry.model_type}",
            hint="use a smaller --max-length, --max-new-tokens, length of the prefix or instruction",
        )
    return before


def _context(plan: Plan, base: LoadedBase, train: Sequence[Example]) -> int:
    """Tokens that the method `prompt` has before each row."""
    instruction, cells = plan.config.instruction, [cell for cell in plan.cells if cell.method.of == "prompt"]
    firsts = [first_rows(train, cell.rows) for cell in cells]
    return max((len(context_ids(instruction, base.tokenizer, rows)) for rows in firsts), default=0)


def _longest_prefix(
    plan: Plan, model: Any, train: Sequence[Example], examples: Sequence[Example], *, kinds: Sequence[str]
) -> int:
    """Virtual tokens of the method that has most of them."""
    lengths = [0]
    for cell in plan.cells:
        method, rows = cell.method, first_rows(train, cell.rows)
        if method.of in kinds and cell.seed == 1:
            length = method.options.get("length") or plan.prefix.prefix_options.get("length")
            longest = max((*rows, *examples), key=lambda example: len(example.input_ids))
            lengths.append(length or length_for(model, rows, longest))
    return max(lengths)


def _limits(model: Any) -> dict[str, int | None]:
    """What `Plan.check_limits` goes by, also where the rows are of an earlier run."""
    layers, vocabulary = len(Geometry.probe(model).layers), text_config(model).vocab_size
    return {"layers": layers, "positions": positions_of(model), "vocabulary": vocabulary}


def _described(model: Any) -> dict[str, Any]:
    """What makes the base another one, wherever it lies: its weights, and how it computes and generates."""
    config = {**model.config.to_dict(), "_name_or_path": None}
    settings = digest([config, model.generation_config.to_dict()])
    weights = {"fingerprint": Fingerprint.of(model).to_dict(), "digest": weights_digest(model)}
    return {"settings": settings, **weights}


def _evaluation(
    rows: Sequence[Row], tokenizer: Any, data: DataConfig, inputs: int, *, answered: bool
) -> tuple[list[Question], list[Row]]:
    """The first inputs with all their references, and the rows that the loss is measured on."""
    first = inputs_of(rows, tokenizer, data)[:inputs]
    if answered:
        check_prompts(one.prompt for one in first)
    wanted = {one.prompt.input_ids for one in first}
    questions = [
        Question(
            input_ids=one.prompt.input_ids,
            text=one.prompt.text,
            references=tuple(one.references),
            lead=one.prompt.lead,
        )
        for one in first
    ]
    counts: Counter[tuple[int, ...]] = Counter()
    kept = []
    for row in rows:
        for prompt in build_prompts([row], tokenizer, data):  # of rows that are dropped none is wanted
            counts[prompt.input_ids] += 1
            if prompt.input_ids in wanted and counts[prompt.input_ids] <= LOSS_REFERENCES:
                kept.append(row)
    return questions, kept


def _neutral(base: LoadedBase, before: int) -> tuple[NeutralTexts, list[float], float]:
    """The text, the base's loss on it, and the seconds that a new token of a batch took."""
    start = time.perf_counter()
    texts = neutral_texts(base.model, base.tokenizer, before=before, seed=NEUTRAL_SEED)
    written = max(row.target_tokens for row in texts.rows) * 2  # two batches
    seconds = (time.perf_counter() - start) / written
    return texts, neutral_losses(base.model, base.tokenizer, texts), seconds


def _speed(base: LoadedBase, examples: Sequence[Example]) -> float:
    """Tokens of training rows that go through the model in a second, without gradients."""
    pad = ending(base.model, base.tokenizer)["pad_token_id"]
    some = examples[:TIMED_ROWS]
    row_losses(base.model, some[:2], pad_token_id=pad)
    start = time.perf_counter()
    row_losses(base.model, some, pad_token_id=pad)
    return sum(len(row.input_ids) for row in some) / (time.perf_counter() - start)
