"""Exact match and token F1, and what counts as a token. Knows no library."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["LANGUAGES", "chinese_words", "exact_match", "language_of", "token_f1"]

LANGUAGES = ("auto", "en", "zh")
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Unicode's blocks of ideographs
_HAN = re.compile(f"[{HAN}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def language_of(texts: Sequence[str]) -> str:
    """ "zh" where more than half of the letters are Chinese characters, else "en"."""
    letters = sum(letter.isalpha() for text in texts for letter in text)
    return "zh" if sum(len(_HAN.findall(text)) for text in texts) > letters / 2 else "en"


def chinese_words(text: str, others: str = r"\S") -> list[str]:
    """Each Chinese character by itself, and runs of `others` between them, a character class without Han."""
    return re.findall(f"[{HAN}]|(?:(?![{HAN}]){others})+", text)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the predictions that are one of their references, but for white space around."""
    hits = [
        prediction.strip() in {text.strip() for text in texts}
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str) -> float:
    """Mean over the predictions of the best reference's F1 of tokens, 0..1.

    In English as SQuAD's own script (Rajpurkar et al. 2016): lower case, without punctuation and articles,
    words by white space. In Chinese as CMRC's (Cui et al. 2019): each character is a token, and so is each
    run of other letters.
    """
    best = [
        max(_f1(_tokens(prediction, language), _tokens(text, language)) for text in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best)


def _tokens(text: str, language: str) -> list[str]:
    text = text.lower()
    if language == "zh":
        return chinese_words("".join(c for c in text if not unicodedata.category(c).startswith(("P", "S"))))
    text = "".join(letter for letter in text if letter not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)  # SQuAD 2.0: no answer is right where none is wanted
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))
