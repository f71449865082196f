"""The contestants of both benchmarks by name, and the Trainer of each. Knows no clock and no process.

All train on the same `Example`s, with Adam on what they train (ours in its own form), 8 rows per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bases import Base
from prefixtune.config import TrainConfig
from prefixtune.data import Collator, Example

PREFIX_LENGTH = 10  # the tutorial's
ROWS_PER_STEP = 8  # the tutorial's accumulation, and our default batch
RECIPE = "tutorial-recipe"
# Speed does not depend on them, loss curves do. The recipe keeps Trainer's default, as the tutorial does; a
# prefix of PEFT gets the rate of the best prefix in PEFT's own public comparison of methods.
LEARNING_RATES = {"recipe": 5e-5, "peft-prefix": 5e-3, "lora": 2e-3, "full": 2e-5, "p-tuning": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train.

    Attributes:
        method: prefixtune, peft-prefix, p-tuning, lora or full.
        dtype: of the base: float32, bfloat16, or auto, which is what our own default finds.
        batch: rows per forward pass; 8 rows make an optimizer step. None: the best batch of PEFT's prefix.
        options: of our own TrainConfig, beside its defaults.
        quantize: int8 or nf4 weights of the base, as `--quantize` has them.
    """

    name: str
    method: str
    dtype: str = "bfloat16"
    batch: int | None = None
    projection: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES["recipe" if self.name == RECIPE else self.method]


def _ours(name: str, *, projection: bool = False, **options: Any) -> Contestant:
    return Contestant(name=name, method="prefixtune", dtype="auto", projection=projection, options=options)


def _peer(name: str, method: str, *, batch: int | None = None, projection: bool = False) -> Contestant:
    """In the precision that this machine is fast in, found as our own default finds it."""
    return Contestant(name=name, method=method, dtype="auto", batch=batch, projection=projection)


# In the order of their start: the batch of the later ones is that of the fastest PEFT prefix.
TRAINING = (
    Contestant(name=RECIPE, method="peft-prefix", dtype="float32", batch=1),
    Contestant(name="peft-bf16-b1", method="peft-prefix", batch=1),
    *(_peer(f"peft-b{batch}", "peft-prefix", batch=batch) for batch in (4, 8)),
    _ours("prefixtune"),
    _ours("prefixtune-checkpointing", gradient_checkpointing=True),
    _ours("prefixtune-compile", compile=True),
    _ours("prefixtune-unpacked", packing=False),
    _peer("peft-lora", "lora"),
    _peer("full", "full"),
    _ours("prefixtune-projection", projection=True),
    _peer("peft-projection", "peft-prefix", projection=True),
)
BASELINES = (RECIPE, "peft-bf16-b1", "peft-b4", "peft-b8")  # of which peft-best is one


def missing_options(contestant: Contestant) -> list[str]:
    """Options that this version of prefixtune does not have, so that the contestant cannot run."""
    known = {knob.name for knob in fields(TrainConfig)}
    return sorted(set(contestant.options) - known)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is the same for all contestants of a race; `saves` keeps each trainer's default checkpoints."""

    rows: Sequence[Example]
    epochs: int
    seed: int
    output: Path
    device: str
    saves: bool = False


def make_trainer(contestant: Contestant, base: Base, job: Job) -> Any:
    """The Trainer of a contestant; its model trains what the method trains and nothing else."""
    if contestant.method == "prefixtune":
        return _our_trainer(contestant, base, job)
    return _peer_trainer(contestant, base, job)


def _our_trainer(contestant: Contestant, base: Base, job: Job) -> Any:
    from prefixtune.train import trainer_for

    options: dict[str, Any] = {"num_train_epochs": float(job.epochs), "logging_steps": 1, "seed": job.seed}
    options["retain"] = 0.0  # speed is compared on the same tokens, and these are nobody else's
    if not job.saves:
        options["save_steps"] = 10**9
    trainer, _ = trainer_for(
        base.loaded(),
        list(job.rows),
        prefix_options={"length": PREFIX_LENGTH, "projection": contestant.projection},
        config=TrainConfig(**options, **contestant.options, report_to="none"),
        output=job.output,
        pad_token_id=base.pad_token_id,
    )
    _on_device(trainer.args, job.device)
    return trainer


def _on_device(arguments: Any, device: str) -> Any:
    assert arguments.device.type == device, f"{arguments.device} was chosen, {device} was asked for"
    return arguments


def _peer_trainer(contestant: Contestant, base: Base, job: Job) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    assert contestant.batch is not None
    set_seed(job.seed)
    batch = min(contestant.batch, ROWS_PER_STEP)
    # a batch of one has nothing to group; the recipe's order is Trainer's own
    grouped = {"train_sampling_strategy": "group_by_length"} if batch > 1 else {}
    arguments = TrainingArguments(
        output_dir=str(job.output),
        num_train_epochs=job.epochs,
        learning_rate=contestant.learning_rate,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS_PER_STEP // batch,
        logging_steps=1,
        save_strategy="steps" if job.saves else "no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device != "cpu",
        seed=job.seed,
        **grouped,
    )
    rows = [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in job.rows]
    return Trainer(
        model=_peer_model(contestant, base),
        args=_on_device(arguments, job.device),
        train_dataset=rows,
        data_collator=Collator(base.pad_token_id),
    )


def _peer_model(contestant: Contestant, base: Base) -> Any:
    from prefixtune.compare import PeerConfig
    from prefixtune.compare.peers import peer_model

    if contestant.method == "full":  # in the base's own precision, as the tutorial has it
        base.model.requires_grad_(True)
        return base.model
    settings = PeerConfig(init="random", targets="nearest", projection=contestant.projection)
    return peer_model(contestant.method, base.model, settings, length=PREFIX_LENGTH)
