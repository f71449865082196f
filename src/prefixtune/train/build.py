"""From options, rows and a model to their trainer: no estimate, no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from prefixtune.attachment import (
    compile_layers,
    packs,
    position_limit,
    uncompile_layers,
    use_liger,
    use_no_liger,
)
from prefixtune.config import TrainConfig
from prefixtune.data import Collator, Example
from prefixtune.errors import ConfigError
from prefixtune.generate import ending
from prefixtune.geometry import text_config
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.train.callbacks import KeepBest
from prefixtune.train.defaults import check_lengths, prefix_config_of, resolve
from prefixtune.train.forecast import pass_tokens_for
from prefixtune.train.retention import SHORTEST, TOKENS, Retention, kept_texts
from prefixtune.train.trainer import PrefixTrainer, training_arguments

__all__ = ["add_retention", "make_trainer", "quicken", "trainer_for"]


def trainer_for(
    base: LoadedBase,
    examples: list[Example],
    *,
    prefix_options: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    pad_token_id: int | None = None,
    pass_tokens: int | None = None,
) -> tuple[PrefixTrainer, dict[str, Any]]:
    """The trainer that `train` would make, for who brings rows and model, and what its defaults came to.

    Args:
        prefix_options: fields of PrefixConfig, as `train` takes them.
        pad_token_id: the tokenizer's unless given.
        pass_tokens: of a pass, where the configuration does not say; by the device's room unless given.

    Raises:
        ConfigError: a learning rate is to be looked for.
        DataError: the longest row does not fit into the model's positions after the prefix.
    """
    if config.find_learning_rate:
        raise ConfigError("find_learning_rate: only train looks for a rate", hint="give learning_rate")
    set_seed(config.seed)
    prefix = prefix_config_of(None, prefix_options, base, examples)
    check_lengths(base, prefix, examples)
    model = PrefixModel(base.model, prefix, tokenizer=base.tokenizer)
    room = pass_tokens or pass_tokens_for(model, config, examples=examples)
    resolved = resolve(config, prefix, base, examples, pass_tokens=room)
    trainer = make_trainer(
        model,
        config,
        resolved,
        output,
        rows=(examples, None),
        tokenizer=base.tokenizer,
        pad_token_id=pad_token_id,
    )
    add_retention(trainer, config, output, base.tokenizer)
    return trainer, {**resolved, "prefix": prefix.to_dict()}


def make_trainer(
    model: PrefixModel,
    config: TrainConfig,
    resolved: Mapping[str, Any],
    output: Path,
    *,
    rows: tuple[list[Example], list[Example] | None],
    tokenizer: Any,
    pad_token_id: int | None = None,
    kind: Callable[..., PrefixTrainer] = PrefixTrainer,
) -> PrefixTrainer:
    """The trainer of a run on (training, evaluation) rows.

    Args:
        resolved: what the defaults came to.
        pad_token_id: the tokenizer's unless given.
    """
    examples, eval_examples = rows
    if pad_token_id is None:
        pad_token_id = ending(model.base_model, tokenizer)["pad_token_id"]
    passes = _passes(model.base_model, config, resolved["packing_length"], pad_token_id)
    # a run of an earlier version has recorded what was asked alone
    compiled = resolved.get("compile", config.compile)
    quicken(model.base_model, config, packing=passes.packing, compiled=compiled)
    return _trainer(
        kind,
        output,
        model=model,
        args=training_arguments(config, output, resolved, evaluates=bool(eval_examples)),
        train_dataset=examples,
        eval_dataset=eval_examples,
        data_collator=Collator(pad_token_id),
        callbacks=[KeepBest(output)],
        pad_token_id=pad_token_id,
        passes=passes,
        lengths=[len(example.input_ids) for example in examples],
        damping=resolved.get("token_damping", 0.0),  # a run of an earlier version has none
    )


def add_retention(trainer: PrefixTrainer, config: TrainConfig, output: Path, tokenizer: Any) -> None:
    """Give the trainer the neutral text of a run, if it is to have some; `output` keeps it.

    Raises:
        ConfigError: there is no tokenizer, or the positions behind the prefix or a pass hold no text.
    """
    if not config.retain:
        return
    if tokenizer is None:
        raise ConfigError("retain: neutral text cannot be sampled without a tokenizer", hint="use retain=0")
    model = trainer.accelerator.unwrap_model(trainer.model)
    room = min(TOKENS, trainer.passes.capacity)
    limit = position_limit(text_config(model.base_model), model.geometry)
    if limit is not None:
        room = min(room, limit - model.prefix.config.length)
    if room < SHORTEST:
        raise ConfigError(
            f"retain: there is room for {room} tokens of neutral text, too few to say anything",
            hint="use a shorter prefix or a larger packing_length, or --retain 0",
        )
    texts = kept_texts(output, model.base_model, tokenizer, seed=config.seed, tokens=room)
    trainer.retention = Retention.of(trainer.passes, texts, weight=config.retain)


def _trainer(kind: Callable[..., PrefixTrainer], output: Path, **arguments: Any) -> PrefixTrainer:
    before = output.exists()
    try:
        return kind(**arguments)
    except (RuntimeError, ValueError) as error:
        if not before and output.is_dir():
            output.rmdir()  # Trainer made it, and nothing is in it yet
        if any(words in str(error) for words in ("Callback requires", "is not supported, only")):
            raise ConfigError(
                f"report_to: {error}", hint="change --report-to, or install what it names"
            ) from None
        raise


def _passes(base: nn.Module, config: TrainConfig, capacity: int, pad_token_id: int) -> Passes:
    found = Passes.of(base, capacity=capacity, pad_token_id=pad_token_id, packing=config.packing)
    if found.packing:
        note(f"rows are packed, up to {capacity} tokens in a pass")
    elif config.packing:
        note(f"rows of similar length share a pass: {packs(base)}; up to {capacity} tokens")
    return found


def quicken(base: nn.Module, config: TrainConfig, *, packing: bool, compiled: bool | None) -> None:
    """Give packs compiled layers or Liger's kernels, or neither, whatever an earlier run of the process had.

    Raises:
        ConfigError: what was asked for does not go.
        MissingExtraError: liger-kernel is not installed.
    """
    if compiled:
        _compile_base(base, packing=packing, asked=bool(config.compile))
    else:
        uncompile_layers(base)
    if not config.liger:
        use_no_liger(base)
    elif not packing:
        raise ConfigError("liger: only packed rows run through Liger's kernels", hint="leave it out")
    else:
        use_liger(base)


def _compile_base(base: nn.Module, *, packing: bool, asked: bool = True) -> None:
    """Compile the layers of a base that is trained with packed rows.

    Args:
        asked: somebody wants it; else the base stays as it is, which is told, where it cannot be compiled.

    Raises:
        ConfigError: it was asked for, and the rows are not packed, or the layers cannot be compiled.
    """
    if not packing:
        raise ConfigError("compile: only packed rows run through compiled layers", hint="leave it out")
    note(
        "the layers are compiled, which takes half a minute"
        + ("" if asked else "; --no-compile leaves it out")
    )
    try:
        compile_layers(base)
    except ConfigError as error:
        if asked:
            raise
        note(f"they run uncompiled: {error}")
