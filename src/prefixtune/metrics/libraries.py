"""BLEU and chrF by sacrebleu, ROUGE by rouge-score: their numbers, with what they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from prefixtune.errors import DataError, MissingExtraError
from prefixtune.metrics.text import chinese_words

__all__ = ["bleu", "check_words", "chrf", "require", "rouge"]

TOKENIZERS = {"en": "13a", "zh": "zh"}  # of sacrebleu, by language


def require(library: str, metric: str) -> Any:
    """The imported library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f"metric {metric} needs the package {library.replace('_', '-')} ({error})",
            hint="pip install 'prefixtune[compare]'",
        ) from None


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str
) -> tuple[float, str]:
    """Corpus BLEU (Papineni et al. 2002; Post 2018), 0..100, and sacrebleu's signature."""
    metric = require("sacrebleu", "bleu").metrics.BLEU(tokenize=TOKENIZERS[language])
    return _corpus(metric, predictions, references)


def chrf(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str
) -> tuple[float, str]:
    """Corpus chrF2 (Popović 2015), 0..100, and sacrebleu's signature; of characters, in every language."""
    return _corpus(require("sacrebleu", "chrf").metrics.CHRF(), predictions, references)


def rouge(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str,
) -> dict[str, tuple[float, str]]:
    """For each ROUGE (Lin 2004) the mean F, 0..1, of the best reference, and how words were taken.

    rouge-score itself drops every letter but a-z; in Chinese it is given characters.

    Raises:
        DataError: the language is "en", and most references have no word of such letters.
    """
    if not names:
        return {}
    require("rouge_score", names[0])
    check_words(references, language=language)
    tokenizer = _tokenizer(language)
    scorer = import_module("rouge_score.rouge_scorer").RougeScorer(list(names), tokenizer=tokenizer)
    found = [
        scorer.score_multi(list(texts), prediction)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    how = f"refs:best|stem:no|tok:{'char' if language == 'zh' else 'a-z'}|version:{version('rouge-score')}"
    return {name: (sum(float(row[name].fmeasure) for row in found) / len(found), how) for name in names}


def _corpus(
    metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, str]:
    most = max(map(len, references))
    # sacrebleu takes the first reference of every prediction, then the second, …; None where there is none
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    value = float(metric.corpus_score(list(predictions), streams).score)
    return value, str(metric.get_signature())


class _Characters:
    """rouge-score's tokenizer for Chinese: characters one by one, and words of other letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return chinese_words(text.lower(), others=r"[^\W_]")


def _tokenizer(language: str) -> Any:
    if language == "zh":
        return _Characters()
    return import_module("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=False)


def check_words(references: Sequence[Sequence[str]], *, language: str) -> None:
    """Raise DataError where ROUGE sees no word in most references: all would score 0 without a reason."""
    tokenizer = _tokenizer(language)
    written = [text for texts in references for text in texts if any(map(str.isalpha, text))]
    lost = [text for text in written if not tokenizer.tokenize(text)]
    if len(lost) > len(written) / 2:
        raise DataError(
            f"rouge: rouge-score reads the letters a-z only, and {len(lost)} of {len(written)} references "
            f"have none, such as {lost[0][:40]!r}",
            hint="use chrf, which reads all scripts; evaluate --language zh takes Chinese by characters",
        )
