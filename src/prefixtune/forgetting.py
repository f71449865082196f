"""What a tuned model has forgotten: how much less likely it finds neutral text that its base finds likely.

The base samples the text itself, once, so that it is likely whatever the base was trained on; every method is
measured on the same tokens. Knows no training and no kind of prefix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.attachment import position_limit
from prefixtune.data import Example
from prefixtune.errors import ConfigError, DataError, StorageError
from prefixtune.fingerprint import Fingerprint
from prefixtune.generate import ending, generate_ids, sampling, seeded
from prefixtune.geometry import Geometry, text_config
from prefixtune.likelihood import row_losses
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.rotary import virtual_tokens

__all__ = [
    "OPENINGS",
    "Forgetting",
    "NeutralTexts",
    "fitting_tokens",
    "forgetting",
    "neutral_losses",
    "neutral_texts",
    "read_texts",
]

OPENINGS = (  # the base goes on from these; they are about nothing, and belong to no task
    *("The", "In the", "It was", "There is", "When", "This is", "One of the", "For many years"),
    *("People", "A new", "After", "She", "He", "We", "As a", "At the end of"),
)
TOP_P = 0.95  # without the tail, which the base itself finds unlikely (Holtzman et al. 2020)
BATCH = 16  # a sample depends on its batch, so the size is no option
TOKENS = 128  # of a text, at most
FEWEST = 16  # tokens of a text
ROUNDS = 4  # of sampling, where many texts end at once
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class NeutralTexts:
    """Rows to measure forgetting on, and where they come from; the openings are no targets."""

    rows: tuple[Example, ...]
    source: str

    @property
    def tokens(self) -> int:
        """How many tokens a loss counts."""
        return sum(row.target_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The rise of the loss on neutral text.

    Attributes:
        rise: loss of the tuned model minus that of its base, in nats per token; below 0 where it fell.
        standard_error: of the rise, over texts; None for one text.
        loss, base_loss: nats per token.
        texts, tokens: that they were measured on.
        source: where the texts come from.
    """

    rise: float
    standard_error: float | None
    loss: float
    base_loss: float
    texts: int
    tokens: int
    source: str


def forgetting(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    *,
    texts: NeutralTexts | None = None,
    base_losses: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Forgetting:
    """How much the loss on neutral text rises from `base` to `model`.

    Args:
        model: the tuned one: a PrefixModel, a PEFT model, or a plain one.
        base: what it was made of, bare. None where it is within `model`: a PrefixModel's base, or a PEFT
            model without its adapters; also where `texts` and `base_losses` are given.
        texts: `neutral_texts` or `read_texts`; sampled from the base with `seed` unless given.
        base_losses: `neutral_losses` of the base on these texts, measured before it was trained.
        progress: bars on stderr.

    Raises:
        ConfigError: there is no base to compare with.
        DataError: no text can be sampled.
    """
    name = "neutral text" if progress else None
    if texts is None or base_losses is None:
        with _bare(model, base) as bare:
            if texts is None:
                own = isinstance(model, PrefixModel)
                before = model.prefix.config.length if own else virtual_tokens(model)
                texts = neutral_texts(bare, tokenizer, before=before, seed=seed, progress=progress)
            base_losses = neutral_losses(bare, tokenizer, texts, progress=name and f"{name}, bare model")
    losses = neutral_losses(model, tokenizer, texts, progress=name)
    counts = [row.target_tokens for row in texts.rows]
    rises = [one - other for one, other in zip(losses, base_losses, strict=True)]
    return Forgetting(
        rise=sum(rises) / sum(counts),
        standard_error=_standard_error(rises, counts),
        loss=sum(losses) / sum(counts),
        base_loss=sum(base_losses) / sum(counts),
        texts=len(counts),
        tokens=sum(counts),
        source=texts.source,
    )


def neutral_losses(
    model: Any, tokenizer: Any, texts: NeutralTexts, *, progress: str | None = None
) -> list[float]:
    """The summed negative log likelihood of each text, in nats; their sum / texts.tokens is the loss."""
    pad = ending(model, tokenizer)["pad_token_id"]
    return row_losses(model, texts.rows, pad_token_id=pad, progress=progress)


def neutral_texts(
    base: Any,
    tokenizer: Any,
    *,
    texts: int = 32,
    tokens: int = TOKENS,
    before: int = 0,
    seed: int = 0,
    openings: Sequence[str] = OPENINGS,
    cache: Path | None = None,
    progress: bool = False,
) -> NeutralTexts:
    """Sample text from the base at temperature 1 and top_p 0.95, each from the next of the openings.

    A text ends where the base ends it; one of less than a quarter of `tokens` is left out and drawn again.

    Args:
        base: bare, before any training.
        tokens: the most that a text has beyond its opening; fewer, which is told, where the base has not
            the positions for them.
        before: positions that a tuned model takes before each text: its virtual tokens, or a context.
        openings: English unless given: for a base of another language give others, or text of your own.
        cache: a JSON file that keeps the texts; they are sampled anew when the base, the seed or another
            setting is not the one that it was written for.

    Raises:
        DataError: the base ends nearly every text at once, or has too few positions for a text.
        StorageError: the cache is a file of another kind.
    """
    if texts < 1 or tokens < 4 or not openings:
        raise ConfigError(
            f"neutral text: expected a text or more of 4 tokens or more; got {texts} of {tokens}, "
            f"from {len(openings)} openings"
        )
    starts = [_opening(tokenizer, opening) for opening in openings]
    tokens = fitting_tokens(base, before + max(map(len, starts)), tokens)
    asked = {"texts": texts, "tokens": tokens, "seed": seed, "top_p": TOP_P, "openings": starts}
    key = {"fingerprint": Fingerprint.of(base).digest, **asked}
    rows = _cached(cache, key) if cache is not None else None
    if rows is None:
        name = "sampling neutral text" if progress else None
        with seeded(seed):
            rows = _sample(base, tokenizer, starts, texts=texts, tokens=tokens, progress=name)
        if cache is not None:
            _keep(cache, key, rows, tokenizer)
    source = f"sampled by the base: seed {seed}, temperature 1, top_p {TOP_P}, {tokens} tokens at most"
    return NeutralTexts(rows=tuple(_example(ids, given) for ids, given in rows), source=source)


def read_texts(path: Path, tokenizer: Any, *, tokens: int = TOKENS) -> NeutralTexts:
    """A UTF-8 text file of one's own, cut into pieces of `tokens`; a last piece of one token is left out.

    Raises:
        DataError: the file cannot be read, or has no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file in UTF-8: {error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[first : first + tokens] for first in range(0, len(ids), tokens)]
    start = _opening(tokenizer, "a")[:1]
    start = start if start == [tokenizer.bos_token_id] else []
    rows = [([*start, *piece], max(len(start), 1)) for piece in pieces if len(piece) > 1]
    if not rows:
        raise DataError(f"{path}: expected a text; got {len(ids)} tokens")
    return NeutralTexts(rows=tuple(_example(ids, given) for ids, given in rows), source=str(path))


def fitting_tokens(base: Any, before: int, tokens: int = TOKENS) -> int:
    """`tokens`, or as many as the base has positions for after `before` others; then it is told.

    Raises:
        DataError: there is no room for a text.
    """
    geometry = Geometry.probe(base)
    limit = position_limit(text_config(base), geometry)
    if limit is None or before + tokens <= limit:
        return tokens
    room = limit - before
    if room < min(FEWEST, tokens):
        raise DataError(
            f"neutral text: expected {FEWEST} positions for a text or more; of the {limit} of "
            f"{geometry.model_type} {before} are taken before it",
            hint="a shorter prefix leaves more of them; to measure without neutral text: evaluate without "
            "--forgetting, compare with --no-forgetting",
        )
    note(f"neutral text: {room} tokens at most, for the {limit} positions of {geometry.model_type}")
    return room


def _sample(
    base: Any,
    tokenizer: Any,
    starts: Sequence[Sequence[int]],
    *,
    texts: int,
    tokens: int,
    progress: str | None,
) -> list[tuple[list[int], int]]:
    """Ids of each text, and how many of them are its opening."""
    settings = sampling(temperature=1.0, top_p=TOP_P)
    rows: list[tuple[list[int], int]] = []
    for _ in range(ROUNDS):
        asked = [starts[index % len(starts)] for index in range(len(rows), texts)]
        answers = generate_ids(
            base,
            tokenizer,
            asked,
            max_new_tokens=tokens,
            batch_size=BATCH,
            settings=settings,
            progress=progress,
        )
        pairs = zip(asked, answers, strict=True)
        rows += [([*start, *new], len(start)) for start, new in pairs if len(new) >= max(1, tokens // 4)]
        if len(rows) == texts:
            return rows
    if not rows:
        raise DataError(
            f"the base ended each of {texts} texts before {tokens // 4} tokens, {ROUNDS} times over",
            hint="give a neutral text of your own (evaluate --forgetting-text), or measure without it "
            "(compare --no-forgetting)",
        )
    note(f"neutral text: {len(rows)} of {texts} texts; the base ended the others at once")
    return rows


def _opening(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # some end every text


def _example(ids: Sequence[int], given: int) -> Example:
    labels = (*[IGNORED] * given, *ids[given:])
    return Example(input_ids=tuple(ids), labels=labels, origin="neutral text", truncated=0)


def _standard_error(rises: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of the ratio of sums, the texts taken for a random sample of all texts (Cochran 1977, 6.4)."""
    number, mean = len(rises), sum(rises) / sum(counts)
    if number < 2:
        return None
    squares = sum((rise - mean * count) ** 2 for rise, count in zip(rises, counts, strict=True))
    return math.sqrt(squares * number / (number - 1)) / sum(counts)


@contextmanager
def _bare(model: Any, base: Any | None) -> Iterator[Any]:
    """The model without what was trained; a PEFT model's layers are within its base, and are switched off."""
    if hasattr(model, "disable_adapter") and (base is None or base is model.get_base_model()):
        with model.disable_adapter():
            yield model.get_base_model()
        return
    if base is None and isinstance(model, PrefixModel):
        base = model.base_model
    if base is None:
        raise ConfigError(
            f"forgetting: there is no base to compare this {type(model).__name__} with",
            hint="give the base, or texts and base_losses that were measured before the training",
        )
    yield base


# --- the file that keeps the texts -------------------------------------------------------------------------


def _cached(path: Path, key: dict[str, Any]) -> list[tuple[list[int], int]] | None:
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows = [(list(map(int, row["input_ids"])), int(row["opening"])) for row in kept["rows"]]
        found = kept["of"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}: expected neutral texts that were kept there; got something else: {error!r}",
            hint="name another file, or remove this one",
        ) from None
    if found != key:
        note(f"{path}: the texts there are of another base or seed, and are sampled anew")
        return None
    return rows


def _keep(path: Path, key: dict[str, Any], rows: list[tuple[list[int], int]], tokenizer: Any) -> None:
    kept = [
        {"text": tokenizer.decode(ids, skip_special_tokens=True), "opening": given, "input_ids": ids}
        for ids, given in rows
    ]
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps({"of": key, "rows": kept}, ensure_ascii=False), encoding="utf-8")
    draft.replace(path)
