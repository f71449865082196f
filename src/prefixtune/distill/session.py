"""From a text to a finished prefix that stands for it, and to what it is worth: the order of things."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from prefixtune.config import DISTILL_TRAINING, DistillConfig, PrefixConfig, TrainConfig
from prefixtune.data import Example, default_template, fix_date
from prefixtune.distill.comparison import (
    NO_TEXT,
    PREFIX,
    TIMED_TOKENS,
    Contestant,
    compare,
    greedy_answers,
    ways_without,
)
from prefixtune.distill.context import Context, check_positions_left, length_of
from prefixtune.distill.questions import Question, read_questions, split, write_questions
from prefixtune.distill.teacher import (
    PARTS,
    Answered,
    answer,
    as_text,
    read_answered,
    with_aims,
)
from prefixtune.errors import ConfigError, DataError
from prefixtune.fingerprint import Fingerprint
from prefixtune.generate import ending
from prefixtune.load import LoadedBase, load_base
from prefixtune.loss import PASS_TOKENS, Passes
from prefixtune.memory import keep_few_kernels, readable
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.train import TrainResult, one_process_only, train_examples
from prefixtune.train.folder import COMPARISON, QUESTIONS, check_resumed, finished, open_run
from prefixtune.train.forecast import check_weights

__all__ = ["Distillation", "distill"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a finished distillation reports; comparison.json holds it.

    Attributes:
        output: the prefix folder.
        text_tokens: of the text with its instruction, n.
        length: of the prefix, P.
        questions: how many there are to train on, to watch the training, and to compare.
        heldout_tokens: answer tokens that the comparison is made on.
        aims_bytes: the teacher's hidden states, held in memory during the training.
        contestants: text in the context (the teacher), prefix, its start, no text.
        training: the training's own record; its losses are divergences on the questions that watch it.
        samples: held-out questions with the answers of the teacher, of the prefix and without the text.
    """

    output: str
    text_tokens: int
    length: int
    template: str
    questions: dict[str, int]
    heldout_tokens: int
    aims_bytes: int
    contestants: tuple[Contestant, ...]
    training: dict[str, Any]
    samples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Distillation:
        return cls(**{**values, "contestants": tuple(Contestant(**one) for one in values["contestants"])})


def distill(
    *,
    model: str,
    text: str = "",
    output: Path,
    instruction: str | None = None,
    questions: str | None = None,
    template: str | None = None,
    fields: str | None = None,
    prefix_options: Mapping[str, Any] | None = None,
    distill_config: DistillConfig | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> Distillation:
    """Train a prefix that makes `model` answer as if the text stood in its context, and compare the two.

    The loss is KL(model with the text || model with the prefix) at the tokens of the teacher's answers, over
    the whole vocabulary. The prefix starts from the KV of the text's first P tokens (Eyuboglu et al. 2025).

    Args:
        model: hub name, folder, .gguf file or demo.
        text: what the prefix is to stand for; `instruction` comes before it, or alone.
        output: folder of the run, which is a prefix folder when it is done.
        questions: a file, as `questions.read_questions` takes it; the model writes some unless given.
        template: how questions are written; chat where the tokenizer has a chat template, else human.
        fields: "question=COLUMN" for the file.
        prefix_options: projection, hidden_size and layers of PrefixConfig.
        resume: go on from the last checkpoint in `output`, exactly as if never interrupted.
        overwrite: replace the run in `output`.
        force: begin although the memory will not do, by the estimate.

    Raises:
        DataError: the text is empty or too long for the model, or a question cannot be used.
        ConfigError, ModelError, RunError, OutOfMemoryError: as `prefixtune.train.train`.
        KeyboardInterrupt: stopped by Ctrl-C; after a checkpoint was written, once the training has begun.
    """
    settings, config = distill_config or DistillConfig(), config or TrainConfig(**DISTILL_TRAINING)
    options = dict(prefix_options or {})
    PrefixConfig(**options)  # wrong values before any work, and wrong files
    if config.label_smoothing_factor:
        raise ConfigError(
            "label_smoothing_factor: a teacher's distribution is not smoothed", hint="leave it out"
        )
    one_process_only("distill", hint="only train takes several")
    if fields is not None and (questions is None or Path(questions).suffix.lower() == ".txt"):
        what = "there are no --questions" if questions is None else f"{questions} has lines, and no fields"
        raise ConfigError(f"fields: {what}, so it would have no effect", hint="leave --fields out")
    given = read_questions(questions, fields=fields) if questions is not None else None
    asked: dict[str, Any] = {
        "distilled": True,
        "model": model,
        "text_sha256": _hash(text),
        "instruction": instruction,
        "questions": questions,
        "questions_sha256": None if given is None else _hash(json.dumps([one.text for one in given])),
        "template": template,
        "fields": fields,
        "prefix": options,
        "distill_config": settings.to_dict(),
        "train_config": config.to_dict(),
    }
    if not text.strip() and not (instruction or "").strip():
        raise DataError(
            "the text is empty, so there is nothing to distil", hint="give --text or --instruction"
        )
    began = open_run(output, asked, resume=resume, overwrite=overwrite)
    record = finished(output, began["resolved"]) if began else None
    keep_few_kernels()
    check_weights(model, config, force=force)
    base = _load(model, config, began)
    if began and record:  # what trains looks itself
        same = {"base": (base.name, Fingerprint.of(base.model).digest)}
        check_resumed(output, began["resolved"], same, processes=1)
        if known := _known(output):
            note(f"{output}: the run has come to its end already; nothing to do")
            return dataclasses.replace(known, output=str(output))
    asked["date"] = (began["asked"].get("date") if began else None) or datetime.now().isoformat()
    fix_date(base.tokenizer, asked["date"])
    form = template or default_template(base.tokenizer, chat=True)
    context = Context.of(text, base.tokenizer, template=form, instruction=instruction)
    length = length_of(settings.length, context)
    note(
        f"the text has {len(context.ids):,} tokens; a prefix of {length} is to stand for it (template {form})"
    )
    material = _gather(base, context, settings, config, given=given, kept=output if began else None)
    if record:  # it was killed while it compared
        trained = TrainResult(output=str(output), **record)
    else:
        start = {"length": length, "init": "tokens", "init_tokens": context.ids[:length]}
        trained = train_examples(
            base,
            (material.rows["train"], material.rows["watch"]),
            source=str(output / QUESTIONS),
            asked=asked,
            began=began,
            output=output,
            prefix_options=options | start,
            template=form,
            config=config,
            overwrite=overwrite,
            force=force,
            files=None if began else {QUESTIONS: as_text(material.answered)},
        )
    return _compared(base, material, trained, settings)


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What the training and the comparison are made of; `rows` by part, with the teacher's aims.

    The text's KV is not kept; `text_bytes` is what it takes in a cache.
    """

    context: Context
    text_bytes: int
    answered: list[Answered]
    passes: Passes
    rows: dict[str, list[Example]]

    @property
    def aims_bytes(self) -> int:
        return sum(example.aims.nbytes for examples in self.rows.values() for example in examples)


def _gather(
    base: LoadedBase,
    context: Context,
    settings: DistillConfig,
    config: TrainConfig,
    *,
    given: list[Question] | None,
    kept: Path | None,
) -> _Material:
    """Questions, the teacher's answers and its hidden states; `kept` is the folder that has the former."""
    check_positions_left(base, context, needed=1 + _answer_tokens(settings))
    kv = context.kv(base.model)
    if kept is not None:
        answered = read_answered(kept)
    else:
        parts = _questions(base, context, given, settings, seed=config.seed)
        answered = answer(base.model, base.tokenizer, context, kv, parts, config=settings, seed=config.seed)
    passes = _passes(base, answered, config)
    rows = {part: with_aims(passes, [one for one in answered if one.part == part], kv) for part in PARTS}
    size = context.cache_bytes(base.model)
    found = _Material(context=context, text_bytes=size, answered=answered, passes=passes, rows=rows)
    note(f"the teacher's hidden states take {readable(found.aims_bytes)} of memory")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _load(model: str, config: TrainConfig, began: Mapping[str, Any] | None) -> LoadedBase:
    base = load_base(model, dtype=began["dtype"] if began else config.dtype, quantize=config.quantize)
    if base.tokenizer is None:
        raise DataError(f"{model} has no tokenizer, so a text cannot be read", hint="save one in its folder")
    note(f"{base.name}: {base.dtype_reason}")
    return base


def _questions(
    base: LoadedBase,
    context: Context,
    given: list[Question] | None,
    settings: DistillConfig,
    *,
    seed: int,
) -> dict[str, list[Question]]:
    """The questions of each part; all of them fit after the text, with their answers."""
    asked = given or write_questions(
        base.model,
        base.tokenizer,
        context.text,
        count=settings.write_questions,
        chat=context.template == "chat",
        batch_size=settings.batch_size,
        seed=seed,
    )
    parts = split(asked, heldout=settings.heldout, seed=seed)
    note(", ".join(f"{len(parts[part])} questions to {_PURPOSE[part]}" for part in PARTS))
    texts = [question.text for part in PARTS for question in parts[part]]
    longest = max(map(len, context.prompts(texts, base.tokenizer)))
    check_positions_left(base, context, needed=longest + _answer_tokens(settings))
    return parts


def _answer_tokens(settings: DistillConfig) -> int:
    """Of the longest answer: the speed's is as long as it is, whatever the others are."""
    return max(settings.max_new_tokens, TIMED_TOKENS)


_PURPOSE = {"train": "train on", "watch": "watch the training", "heldout": "compare"}


def _passes(base: LoadedBase, answered: list[Answered], config: TrainConfig) -> Passes:
    """How the teacher and the contestants run the rows: as the training does on a CPU."""
    longest = max(len(one.answer_ids) + max(len(one.teacher_ids), len(one.student_ids)) for one in answered)
    return Passes.of(
        base.model,
        capacity=max(longest, config.packing_length or PASS_TOKENS),
        pad_token_id=ending(base.model, base.tokenizer)["pad_token_id"],
        packing=config.packing,
    )


def _known(output: Path) -> Distillation | None:
    """The comparison of a run that was made; None where it is missing or damaged, so that it is made anew."""
    try:
        return Distillation.from_dict(json.loads((output / COMPARISON).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compared(
    base: LoadedBase, material: _Material, trained: TrainResult, settings: DistillConfig
) -> Distillation:
    """The saved prefix, as it is served, in comparison; written to comparison.json."""
    output = Path(trained.output)
    prefix = PrefixModel.from_pretrained(base.model, output).prefix.bake().to(base.model.dtype)
    asked = [one for one in material.answered if one.part == "heldout"]
    heldout, context = material.rows["heldout"], material.context
    ways, prompts = ways_without(base, context, prefix), [one.student_ids for one in asked]
    answers = {
        name: greedy_answers(
            base,
            prompts,
            kv,
            max_new_tokens=settings.max_new_tokens,
            template=context.template,
            batch_size=settings.batch_size,
            progress=f"answers: {name}",
        )
        for name, kv in ways.items()
    }
    contestants = compare(
        base,
        material.passes,
        heldout,
        asked,
        context=context,
        text_bytes=material.text_bytes,
        ways=ways,
        answers=answers,
        greedy=settings.temperature == 0,
    )
    found = Distillation(
        output=str(output),
        text_tokens=len(context.ids),
        length=prefix.length,
        template=context.template,
        questions={part: len(material.rows[part]) for part in PARTS},
        heldout_tokens=sum(example.target_tokens for example in heldout),
        aims_bytes=material.aims_bytes,
        contestants=tuple(contestants),
        training={k: v for k, v in trained.to_dict().items() if k != "output"},
        samples=[
            {"question": one.question, "teacher": one.answer, PREFIX: with_, NO_TEXT: without}
            for one, with_, without in zip(asked, answers[PREFIX], answers[NO_TEXT], strict=True)
        ],
    )
    draft = output / f".{COMPARISON}.draft"
    draft.write_text(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(output / COMPARISON)
    return found
