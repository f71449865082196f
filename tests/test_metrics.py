"""Laws of the metrics: a number is its library's own; what cannot be scored is refused, not scored as 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from prefixtune.errors import ConfigError, DataError, MissingExtraError
from prefixtune.metrics import METRICS, measure, measure_each, score

ENGLISH = ["Blue Spice is a cheap pub near the river.", "", "It serves food", "the the the the"]
ENGLISH_REFERENCES = [
    ["Blue Spice is a low-priced pub by the river.", "The pub Blue Spice is cheap.", "Cheap: Blue Spice"],
    ["There is a pub."],
    ["It serves French food.", "French food is served there."],
    ["the cat is on the mat", "there is a cat on the mat"],
]
CHINESE = ["三原色是红、蓝、黄。", "", "北京是中国的首都"]
CHINESE_REFERENCES = [
    ["三原色：红色、蓝色和黄色。", "红、蓝、黄。"],
    ["没有答案"],
    ["中国的首都是北京 (Beijing)。"],
]
ROUGES = ["rouge1", "rouge2", "rougeL"]


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """As sacrebleu takes them: the first reference of each, the second, …"""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def test_bleu_and_chrf_are_sacrebleus_with_another_number_of_references_for_each() -> None:
    found = score(["bleu", "chrf"], ENGLISH, ENGLISH_REFERENCES)
    assert found["bleu"] == sacrebleu.corpus_bleu(ENGLISH, streams(ENGLISH_REFERENCES)).score
    assert found["chrf"] == sacrebleu.corpus_chrf(ENGLISH, streams(ENGLISH_REFERENCES)).score
    assert 0 < found["bleu"] < 100


def test_bleu_of_chinese_is_sacrebleus_with_its_chinese_tokens_and_says_so() -> None:
    found = measure(["bleu", "chrf"], CHINESE, CHINESE_REFERENCES)
    expected = sacrebleu.corpus_bleu(CHINESE, streams(CHINESE_REFERENCES), tokenize="zh").score
    by_words = sacrebleu.corpus_bleu(CHINESE, streams(CHINESE_REFERENCES)).score
    assert found.values["bleu"] == expected != by_words
    assert found.values["chrf"] == sacrebleu.corpus_chrf(CHINESE, streams(CHINESE_REFERENCES)).score
    assert found.settings["language"] == "zh"
    assert "tok:zh" in found.settings["bleu"]
    words = measure(["bleu"], CHINESE, CHINESE_REFERENCES, language="en")
    assert words.values["bleu"] == by_words
    assert "tok:13a" in words.settings["bleu"]


def test_rouge_is_the_mean_of_rouge_scores_best_reference() -> None:
    found = score(ROUGES, ENGLISH, ENGLISH_REFERENCES)
    scorer = rouge_scorer.RougeScorer(ROUGES)
    for name in ROUGES:
        best = [
            max(scorer.score(text, prediction)[name].fmeasure for text in texts)
            for prediction, texts in zip(ENGLISH, ENGLISH_REFERENCES, strict=True)
        ]
        assert found[name] == pytest.approx(sum(best) / len(best))
        assert found[name] > 0


class SpacedApart:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def test_rouge_of_chinese_is_rouge_scores_of_its_characters() -> None:
    """By hand: punctuation is dropped, a word of other letters is one token."""
    tokens = [
        ("三 原 色 是 红 蓝 黄", ["三 原 色 红 色 蓝 色 和 黄 色", "红 蓝 黄"]),
        ("", ["没 有 答 案"]),
        ("北 京 是 中 国 的 首 都", ["中 国 的 首 都 是 北 京 beijing"]),
    ]
    scorer = rouge_scorer.RougeScorer(ROUGES, tokenizer=SpacedApart())
    found = score(ROUGES, CHINESE, CHINESE_REFERENCES)
    for name in ROUGES:
        best = [max(scorer.score(text, said)[name].fmeasure for text in texts) for said, texts in tokens]
        assert found[name] == pytest.approx(sum(best) / 3)


def test_rouge_refuses_a_script_that_rouge_score_cannot_read() -> None:
    with pytest.raises(DataError, match=r"1 of 1 references.*красная"):
        score(["rougeL"], ["красная машина"], [["красная машина"]])


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The red car!", ["a red  car"], 1.0),  # articles, case, punctuation and spaces do not count
        ("red car", ["blue car", "red"], 2 / 3),  # the best of 1/2 and 2/3
        ("red red", ["red"], 2 / 3),  # a word is found as often as it is there
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),  # nothing is left of either
        ("红、蓝", ["红蓝黄"], 0.8),  # 2 of 2 characters and 2 of 3
        ("用 Python 3 写", ["用Python写"], 6 / 7),  # 3 of 4 tokens and 3 of 3
    ],
)
def test_token_f1_is_squads(prediction: str, references: list[str], expected: float) -> None:
    language = "zh" if any("一" <= letter <= "龥" for letter in prediction) else "en"
    assert score(["token_f1"], [prediction], [references], language=language) == {
        "token_f1": pytest.approx(expected)
    }


def test_exact_match_is_the_share_that_is_any_reference_but_for_space_around() -> None:
    assert score(["exact_match"], [" b\n", "c", ""], [["a", "b"], ["C"], ["  "]]) == {
        "exact_match": pytest.approx(2 / 3)
    }


def test_json_is_what_rfc_8259_says_not_what_python_takes() -> None:
    texts = ['{"a": [1, null]}', " 5 ", "{'a': 1}", "NaN", "", '{"a": 1} and more', "[" * 100_000]
    assert score(["json"], texts, [["x"]] * len(texts)) == {"json": pytest.approx(2 / 7)}


@pytest.mark.parametrize(
    ("prediction", "equal"),
    [
        ('{"b": [1, true], "a": "é"}', True),
        ('{"a":"\\u00e9","b":[1.0,true]}', True),
        ('{"a": "é", "b": [1, 1]}', False),  # 1 == True in Python
        ('{"a": "é", "b": [true, 1]}', False),
        ('{"a": "é"}', False),
        ("a", False),
    ],
)
def test_json_equal_does_not_see_spaces_order_of_keys_or_how_a_number_is_written(
    prediction: str, equal: bool
) -> None:
    references = [["{}", '{"a": "é", "b": [1, true]}']]
    assert score(["json_equal"], [prediction], references) == {"json_equal": float(equal)}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1e999", "5e500", False),  # as floats both are infinite
        ("0.1", "0.10000000000000000001", False),
        ("12345678901234567890.5", "12345678901234567891.5", False),
        ("1e2", "100", True),
        ("0.10", "1e-1", True),
        ("-0", "0.0", True),
    ],
)
def test_numbers_of_json_are_equal_in_all_their_digits(one: str, other: str, equal: bool) -> None:
    assert score(["json_equal"], [one], [[other]]) == {"json_equal": float(equal)}


def test_json_is_read_however_deep_it_is_and_however_long_a_number() -> None:
    deep, digits = "[" * 900 + "]" * 900, "1" * 5000  # Python recurses less deep, and reads 4,300 digits
    assert score(["json", "json_equal"], [deep, digits], [[deep], [digits]]) == {
        "json": 1.0,
        "json_equal": 1.0,
    }
    assert score(["json_equal"], [deep, digits], [[f"[{deep}]"], [f"{digits}1"]]) == {"json_equal": 0.0}
    assert score(["json_equal"], [digits], [[f'"{digits}"']]) == {"json_equal": 0.0}
    beyond = "1e" + "9" * 30  # what Python's decimal numbers hold
    assert score(["json", "json_equal"], [beyond], [[beyond]]) == {"json": 1.0, "json_equal": 1.0}
    turned = [f"{deep[:900]}{{{keys}}}{deep[900:]}" for keys in ('"a": 1, "b": true', '"b": true, "a": 1.0')]
    assert score(["json_equal"], turned[:1], [turned[1:]]) == {"json_equal": 1.0}


def test_json_equal_refuses_a_reference_that_is_no_json() -> None:
    with pytest.raises(DataError, match=r"references\[1\]: json_equal: the reference is not JSON: 'yes'"):
        score(["json_equal"], ["1", "2"], [["1"], ["2", "yes"]])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own."""
    (tmp_path / "own_metrics.py").write_text(
        "from collections import namedtuple\n"
        "import math\n"
        "def length(predictions, references):\n"
        "    assert isinstance(predictions, list) and isinstance(references[0], list)\n"
        "    return sum(map(len, predictions))\n"
        "def several(predictions, references): return {'rows': len(predictions), 'most': 2.5}\n"
        "def fails(predictions, references): return 1 / 0\n"
        "def leaves(predictions, references): raise SystemExit(3)\n"
        "def text(predictions, references): return 'good'\n"
        "def nothing(predictions, references): return {}\n"
        "def nan(predictions, references): return {'a': math.nan}\n"
        "number = 3\n"
    )
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    (tmp_path / "own_leaves.py").write_text("raise SystemExit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_metrics", "own_broken", "own_leaves"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_metrics"


def test_a_metric_that_fails_stops_no_other(own: str) -> None:
    names = ["rougeL", f"{own}:fails", "exact_match", "rouge1"]
    found = measure_each(names, ["ab", "c"], [["ab"], ["x"]])
    assert found.values == score(["rougeL", "exact_match", "rouge1"], ["ab", "c"], [["ab"], ["x"]])
    assert list(found.failed) == [f"{own}:fails"]
    assert "ZeroDivisionError" in found.failed[f"{own}:fails"]
    assert set(found.settings) == {"language", "rougeL", "rouge1"}


def test_what_an_own_module_prints_is_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_loud.py").write_text(
        "print('imported')\ndef one(predictions, references):\n    print('called')\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_loud", raising=False)
    assert score(["own_loud:one"], ["a"], [["a"]]) == {"own_loud:one": 1.0}
    assert capfd.readouterr() == ("", "imported\ncalled\n")


def test_own_function_scores_beside_the_others(own: str) -> None:
    found = score([f"{own}:length", "exact_match", f"{own}:several"], ["ab", "c"], [["ab"], ["x", "y"]])
    assert found == {
        f"{own}:length": 3.0,
        "exact_match": 0.5,
        f"{own}:several.rows": 2.0,
        f"{own}:several.most": 2.5,
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_metrics:absent", "absent is not there in own_metrics"),
        ("own_metrics:number", "number is not a function in own_metrics"),
        ("own_metrics:", "expected package.module:function"),
        (":length", "expected package.module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("own_broken:f", "No module named 'no_such_package'"),
        ("own_metrics:fails", "it failed: ZeroDivisionError"),
        ("own_metrics:leaves", "it failed: SystemExit: 3"),
        ("own_leaves:f", "cannot be imported: SystemExit: 4"),
        ("own_metrics:text", "expected a number or a dict of numbers; got str"),
        ("own_metrics:nothing", "got an empty dict"),
        ("own_metrics:nan", "own_metrics:nan.a: expected a finite number"),
    ],
)
def test_own_function_that_cannot_be_used_is_told_with_its_name(own: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        score([name], ["a"], [["a"]])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"names": ["blue"]}, ConfigError, "(?s)got 'blue'.*did you mean bleu"),
        ({"names": ["bleu", "bleu"]}, ConfigError, "bleu is named twice"),
        ({"language": "de"}, ConfigError, "expected one of auto, en, zh; got 'de'"),
        ({"predictions": []}, DataError, "0 predictions came with references for 2"),
        ({"predictions": [], "references": []}, DataError, "nothing to score"),
        ({"references": [["a"], []]}, DataError, r"references\[1\]: there is no reference"),
        ({"references": [["a"], "b"]}, DataError, r"references\[1\]: expected a list"),
    ],
)
def test_what_cannot_be_scored_is_told(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"names": ["bleu"], "predictions": ["a", "b"], "references": [["a"], ["b"]]} | arguments
    with pytest.raises(error, match=said):
        score(given.pop("names"), given.pop("predictions"), given.pop("references"), **given)


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rougeL", "rouge_score")])
def test_missing_library_is_told_with_its_install_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"(?s)needs the package.*prefixtune\[compare\]"):
        score([name], ["a"], [["a"]])


def test_empty_answers_score_and_do_not_fail() -> None:
    found = score([name for name in METRICS if name != "json_equal"], ["", ""], [["a b"], ["c", "d"]])
    assert set(found.values()) == {0.0}


def test_empty_answer_to_an_empty_reference_is_right_but_not_for_rouge_score() -> None:
    found = score(["exact_match", "token_f1", "rouge1", "rougeL"], ["red", ""], [["red"], [""]])
    assert found == {"exact_match": 1.0, "token_f1": 1.0, "rouge1": 0.5, "rougeL": 0.5}


def test_every_metric_is_in_its_documents() -> None:
    table = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in table] == []
