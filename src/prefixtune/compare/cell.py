"""One cell: load the base, train a method on it, measure it. Runs in a process of its own."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from prefixtune.attachment import multiply_once
from prefixtune.compare.machine import describe_machine
from prefixtune.compare.peers import peer_trainer
from prefixtune.compare.plan import Cell, Plan
from prefixtune.compare.rows import Question, Rows
from prefixtune.compare.scoring import score_answers, write_answers
from prefixtune.compare.settings import ALL_PEERS
from prefixtune.config import PrefixConfig, TrainConfig
from prefixtune.data import Example, added_tokens, special_beside, text_start
from prefixtune.errors import DataError, RunError
from prefixtune.fingerprint import Fingerprint
from prefixtune.forgetting import NeutralTexts, forgetting
from prefixtune.generate import ending, generate_batch
from prefixtune.geometry import Geometry, quiet_eval
from prefixtune.likelihood import row_losses
from prefixtune.load import LoadedBase, load_base
from prefixtune.loss import PASS_TOKENS
from prefixtune.memory import forget_peak, measured_peak, resident
from prefixtune.prefix import count_parameters
from prefixtune.train import (
    default_length,
    default_start,
    planned_steps,
    prefix_config_of,
    telling_rows,
    trainer_for,
)

__all__ = ["answer_limit", "context_ids", "run_cell"]

BATCH = 16  # answers at a time
SPARE_TOKENS = 8  # of an answer beyond the longest reference, as in prefixtune.evaluate
NEVER = 10**9


@dataclass
class Contender:
    """What a method came to: a model that is ready to be measured, and what it took.

    Attributes:
        context: token ids that stand before each row.
        train_seconds: with what comes before the first step, such as neutral text; without loading the base.
        rows_seen: a hash of the training rows in the order in which they came.
    """

    model: Any
    trainable_parameters: int = 0
    file_bytes: int = 0
    train_seconds: float | None = None
    trained_tokens: int = 0
    resolved: dict[str, Any] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    context: tuple[int, ...] = ()
    rows_seen: str | None = None


def run_cell(plan: Plan, cell: Cell, rows: Rows, folder: Path) -> dict[str, Any]:
    """Train and measure; `folder` gets what was trained, and the answers.

    Raises:
        RunError: the training diverged, or the base is not the one that the rows were made with.
        PrefixTuneError: the method does not work on this model or these rows.
    """
    begin = time.perf_counter()
    dtype = rows.about["dtype"]
    base = load_base(plan.config.model, dtype="float32" if cell.method.of == "full" else dtype)
    _check_base(plan, base, rows)
    place = str(base.model.device)
    forget_peak(place)  # what loading took is no method's
    initial = resident(place)
    loaded = time.perf_counter()
    contender = _contender(plan, cell, base, rows, folder, dtype)
    peak = measured_peak(place)
    trained = time.perf_counter()
    found = _measure(plan, contender, base.tokenizer, rows, folder)
    seconds = contender.train_seconds
    return {
        "trainable_parameters": contender.trainable_parameters,
        "file_bytes": contender.file_bytes,
        "initial_memory_bytes": initial,
        # a method that trains nothing has its peak where it is measured
        "peak_memory_bytes": peak if cell.method.trains else measured_peak(place),
        "train_seconds": seconds,
        "tokens_per_second": contender.trained_tokens / seconds if seconds else None,
        **found,
        "losses": contender.losses,
        "resolved": contender.resolved,
        "rows_seen": contender.rows_seen,
        "machine": describe_machine(),
        "seconds": {"load": loaded - begin, "prepare_and_train": trained - loaded}
        | {"measure": time.perf_counter() - trained},
    }


def _check_base(plan: Plan, base: LoadedBase, rows: Rows) -> None:
    recorded = Fingerprint.from_dict(rows.about["base"]["fingerprint"])
    if not Fingerprint.of(base.model).matches(recorded):
        raise RunError(
            f"{plan.config.model} has other weights than when data.json was made",
            hint="delete data.json in the folder of the comparison, and run it again",
        )


def _contender(plan: Plan, cell: Cell, base: LoadedBase, rows: Rows, folder: Path, dtype: str) -> Contender:
    examples = rows.first(cell.rows)
    set_seed(cell.seed)
    if cell.method.of == "base":
        return Contender(model=base.model)
    if cell.method.of == "prompt":
        return _in_context(plan.config.instruction, base, examples)
    schedule = {**plan.config.schedule, "seed": cell.seed}
    if cell.method.of == "prefix":
        return _ours(plan, cell, base, rows, schedule, folder)
    return _peer(plan, cell, base, rows, schedule, folder, dtype)


def _as_prefix(plan: Plan, cell: Cell, base: LoadedBase, rows: Rows) -> PrefixConfig:
    """The method `prefix` as these rows make it, without its start: the others have its length or size."""
    options = {"init": "random", **plan.prefix.prefix_options}
    examples = rows.first(cell.rows)
    try:
        return prefix_config_of(None, options, base, examples, rows.eval)
    except DataError:  # no room for it keeps no method from training that is not as long
        if cell.method.of not in ("full", "lora") and "length" not in cell.method.options:
            raise
        return PrefixConfig(**{**options, "length": default_length(examples)})


def context_ids(instruction: str | None, tokenizer: Any, examples: Sequence[Example]) -> tuple[int, ...]:
    """What the method `prompt` has before each row: the instruction, or the first training row for one."""
    if instruction is None:
        return examples[0].input_ids
    start, _ = added_tokens(tokenizer)
    text = tokenizer(instruction.rstrip("\n") + "\n", add_special_tokens=False)["input_ids"]
    return (*start, *text)  # without what ends a text: the row goes on


def _in_context(instruction: str | None, base: LoadedBase, examples: Sequence[Example]) -> Contender:
    """The bare model with `context_ids` before each row."""
    ids = context_ids(instruction, base.tokenizer, examples)
    if instruction is None:
        tokenizer: Any = base.tokenizer
        instruction = tokenizer.decode(ids)
    resolved = {"text": instruction, "tokens": len(ids)}
    return Contender(model=base.model, context=ids, file_bytes=len(instruction.encode()), resolved=resolved)


def _ours(
    plan: Plan, cell: Cell, base: LoadedBase, rows: Rows, schedule: Mapping[str, Any], folder: Path
) -> Contender:
    """Our own trainer with its defaults; checkpoints are left out, because the others write none."""
    examples, prefix = rows.first(cell.rows), cell.method.prefix_options
    if "length" not in prefix:
        prefix["length"] = _as_prefix(plan, cell, base, rows).length
    options = {"save_steps": NEVER, "logging_steps": 1, "report_to": "none"}
    config = TrainConfig(**{**options, **cell.method.train_options, **schedule})
    begin = time.perf_counter()
    trainer, resolved = trainer_for(
        base,
        examples,
        prefix_options=prefix,
        config=config,
        output=folder,
        pass_tokens=PASS_TOKENS,  # as the others have, on a GPU too
    )
    trainer.remove_callback(PrinterCallback)
    seen, tokens = _train(trainer)
    seconds = time.perf_counter() - begin
    model = trainer.model
    with quiet_eval(model):
        model.save_pretrained(folder)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    came_to = {name: value for name, value in resolved["prefix"].items() if value is not None}
    return Contender(
        model=model,
        trainable_parameters=_trainable(model),
        file_bytes=(folder / "prefix.safetensors").stat().st_size,
        train_seconds=seconds,
        trained_tokens=tokens,
        resolved={
            "steps": resolved["steps"],
            "batch": config.per_device_train_batch_size,
            **{name: getattr(config, name) for name in (*ALL_PEERS, "retain")},
            **{name: resolved[name] for name in ("learning_rate", "token_damping", "compile")},
            **came_to,
        },
        losses=_losses(trainer),
        rows_seen=seen,
    )


def _peer(
    plan: Plan,
    cell: Cell,
    base: LoadedBase,
    rows: Rows,
    schedule: Mapping[str, Any],
    folder: Path,
    dtype: str,
) -> Contender:
    import torch

    shared, precision = TrainConfig(**schedule), getattr(torch, dtype)
    examples = rows.first(cell.rows)
    prefix = _as_prefix(plan, cell, base, rows)
    begin = time.perf_counter()
    trainer = peer_trainer(
        cell.method.of,
        base,
        examples,
        cell.method.peer,
        shared=shared,
        steps=planned_steps(shared, [example.target_tokens for example in examples]),
        output=folder,
        length=prefix.length,
        like=count_parameters(Geometry.probe(base.model), prefix) if cell.method.of == "lora" else None,
        start=_start(base, examples, cell.method.peer.length or prefix.length),
        pad_token_id=ending(base.model, base.tokenizer)["pad_token_id"],
        precision=precision,
    )
    trainer.remove_callback(PrinterCallback)
    count = _trainable(trainer.model)
    seen, tokens = _train(trainer)
    seconds = time.perf_counter() - begin
    model = trainer.model
    size = _served(model, precision) if cell.method.of == "full" else _saved(model, folder)
    return Contender(
        model=model,
        trainable_parameters=count,
        file_bytes=size,
        train_seconds=seconds,
        trained_tokens=tokens,
        resolved={
            "steps": trainer.state.max_steps,
            "batch": shared.per_device_train_batch_size,
            **cell.method.shown(),
            **_rank(model),
        },
        losses=_losses(trainer),
        rows_seen=seen,
    )


def _start(base: LoadedBase, examples: Sequence[Example], length: int) -> tuple[int, ...]:
    """As for our own prefix."""
    return default_start(telling_rows(examples), length, front=text_start(base.tokenizer))


def _served(model: Any, precision: Any) -> int:
    """Bytes of all weights, which are brought to the precision that the base is served in."""
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False).to(precision)
    return sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.parameters()}.values())


def _saved(model: Any, folder: Path) -> int:
    """Bytes of PEFT's file."""
    model.save_pretrained(str(folder))
    return sum(path.stat().st_size for path in folder.glob("adapter_model.*"))


def _rank(model: Any) -> dict[str, Any]:
    """What the sizes that were left open came to."""
    found: dict[str, Any] = {}
    for config in getattr(model, "peft_config", {}).values():
        names = {"rank": "r", "alpha": "lora_alpha", "length": "num_virtual_tokens"}
        found |= {name: getattr(config, field) for name, field in names.items() if hasattr(config, field)}
    return found


def _train(trainer: Any) -> tuple[str, int]:
    """Train to the end: a hash of the rows in the order in which they came, and the tokens trained on.

    These are real tokens, prompts among them; no padding and no virtual tokens. They are counted by steps,
    because one batch more is collated than is trained on.
    """
    seen, tokens = sha256(), 0
    collate, train_on = trainer.data_collator, trainer.training_step

    def recorded(examples: Sequence[Example]) -> Any:
        for example in examples:
            seen.update(json.dumps(example.input_ids).encode())
        return collate(examples)

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        nonlocal tokens
        tokens += int(inputs["attention_mask"].sum())
        return train_on(model, inputs, *rest)

    trainer.data_collator, trainer.training_step = recorded, counted
    trainer.train()
    return seen.hexdigest(), tokens


def _trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _losses(trainer: Any) -> list[tuple[int, float]]:
    history = trainer.state.log_history
    return [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]


# --- measuring ---------------------------------------------------------------------------------------------


def _measure(plan: Plan, contender: Contender, tokenizer: Any, rows: Rows, folder: Path) -> dict[str, Any]:
    model, before = contender.model, contender.context
    multiply_once(model)  # as ours does: answers come as fast from each method
    examples = [_after(before, example, tokenizer) for example in rows.eval]
    pad = ending(model, tokenizer)["pad_token_id"]
    nats = sum(row_losses(model, examples, pad_token_id=pad))
    loss = nats / sum(example.target_tokens for example in examples)
    if not math.isfinite(loss):
        if contender.losses:
            raise RunError(
                "the training diverged: the loss is no longer finite", hint="use a lower learning_rate"
            )
        raise RunError("the loss of the model as it is is not finite", hint="try --dtype float32")
    found: dict[str, Any] = {"dev_loss": loss, "forgetting": None, **score_answers((), [], [])}
    if plan.config.metrics:
        answers = _answers(plan, contender, tokenizer, rows.questions)
        found["answers"] = write_answers(folder, answers, rows.questions)
        found |= score_answers(plan.config.metrics, answers, rows.questions)
    if rows.neutral:
        if before:
            neutral = [_after(before, example, tokenizer) for example in rows.neutral]
        else:
            neutral = list(rows.neutral)
        texts = NeutralTexts(rows=tuple(neutral), source=rows.about["neutral"])
        found["forgetting"] = forgetting(
            model, None, tokenizer, texts=texts, base_losses=rows.neutral_losses
        ).rise
    return found


def _answers(plan: Plan, contender: Contender, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    asked = [_joined(contender.context, question.input_ids, tokenizer) for question in questions]
    return generate_batch(
        contender.model,
        tokenizer,
        asked,
        max_new_tokens=answer_limit(plan, questions, tokenizer),
        template=plan.data.template,
        leads=[question.lead for question in questions],
        dropped=special_beside((text for question in questions for text in question.references), tokenizer),
        batch_size=BATCH,
    )


def answer_limit(plan: Plan, questions: Sequence[Question], tokenizer: Any) -> int:
    """Tokens of an answer at most."""
    if plan.config.max_new_tokens is not None:
        return plan.config.max_new_tokens
    texts = [question.lead + reference for question in questions for reference in question.references]
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return min(longest + SPARE_TOKENS, plan.data.max_length)  # longer ones were cut in training too


def _after(before: Sequence[int], example: Example, tokenizer: Any) -> Example:
    """The row with other tokens before it, which are no targets."""
    if not before:
        return example
    ids = _joined(before, example.input_ids, tokenizer)
    dropped = len(before) + len(example.input_ids) - len(ids)
    return replace(example, input_ids=ids, labels=(*[-100] * len(before), *example.labels[dropped:]))


def _joined(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """One text after the other, of which the first alone has what begins each text."""
    start = text_start(tokenizer)
    begun = list(before[: len(start)]) == start == list(ids[: len(start)])
    return (*before, *ids[len(start) if begun else 0 :])
