"""The laws of the demo data set: reproducible, one job, and held-out rows that training cannot have shown."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "src" / "prefixtune" / "datasets"
TOOL = ROOT / "tools" / "make_support_mail.py"

Row = dict[str, str]


def _read(side: str) -> list[Row]:
    text = (FOLDER / f"support_mail.{side}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _answers(rows: list[Row]) -> list[Row]:
    return [json.loads(row["output"]) for row in rows]


def _sentences(row: Row) -> set[str]:
    """The mail's sentences in lower case, with the name, the order and the product masked."""
    answer = json.loads(row["output"])
    mail = row["input"]
    for key in ("name", "order", "product"):
        mail = mail.replace(answer[key], f"<{key}>")
    parts = re.split(r"[.?!\n]+", mail.lower())
    found = {" ".join(part.split()) for part in parts}
    return {part for part in found if re.sub(r"<\w+>|\W", "", part)}  # "<name>" alone is no sentence


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return _read("train")


@pytest.fixture(scope="module")
def heldout() -> list[Row]:
    return _read("heldout")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_support_mail", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_support_mail"] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def test_the_generator_writes_the_shipped_files_byte_for_byte(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_support_mail.py", "--out", str(tmp_path)])
    tool.main()
    for side in ("train", "heldout"):
        name = f"support_mail.{side}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_another_seed_gives_other_mails(tool: ModuleType) -> None:
    first, _ = tool.make_sides(0, train=12, heldout=12)
    second, _ = tool.make_sides(1, train=12, heldout=12)
    assert not {row["input"] for row in first} & {row["input"] for row in second}


def test_sides_have_their_size_and_every_issue_equally_often(
    tool: ModuleType, train: list[Row], heldout: list[Row]
) -> None:
    for rows, size in ((train, 600), (heldout, 120)):
        assert len(rows) == size
        counts = Counter(answer["issue"] for answer in _answers(rows))
        assert counts == dict.fromkeys(tool.ISSUES, size // len(tool.ISSUES))


def test_every_row_is_the_same_job(tool: ModuleType, train: list[Row], heldout: list[Row]) -> None:
    for row in train + heldout:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == tool.INSTRUCTION
        answer = json.loads(row["output"])
        assert tuple(answer) == tool.KEYS
        assert row["output"] == json.dumps(answer)  # one line, one spelling: exact match is well defined


def test_the_answer_can_be_read_from_the_mail(train: list[Row], heldout: list[Row]) -> None:
    for row, answer in zip(train + heldout, _answers(train + heldout), strict=True):
        for key in ("name", "order", "product"):
            assert row["input"].count(answer[key]) == 1, (key, row)


def test_no_mail_occurs_twice(train: list[Row], heldout: list[Row]) -> None:
    mails = [row["input"] for row in train + heldout]
    assert len(set(mails)) == len(mails)


def test_no_sentence_of_a_heldout_mail_occurs_in_training(train: list[Row], heldout: list[Row]) -> None:
    seen = set().union(*(_sentences(row) for row in train))
    for row in heldout:
        assert not _sentences(row) & seen, row


def test_the_two_sides_share_no_phrasing(tool: ModuleType) -> None:
    def phrasings(side: object) -> set[str]:
        pools = ("greetings", "introductions", "inline", "references", "remarks", "farewells", "thanks")
        listed = [line for pool in pools for line in getattr(side, pool)]
        listed += [line for lines in side.issues.values() for line in lines]  # type: ignore[attr-defined]
        return {re.sub(r"\W+", " ", line.lower()).strip() for line in listed}

    assert not phrasings(tool.TRAIN) & phrasings(tool.HELDOUT)


def test_the_two_sides_share_no_name_no_order_number_and_no_product_noun(
    tool: ModuleType, train: list[Row], heldout: list[Row]
) -> None:
    ours, theirs = _answers(train), _answers(heldout)
    for key, shared in (("name", set()), ("product", set(tool.COLOURS))):
        words = [{word for answer in side for word in answer[key].lower().split()} for side in (ours, theirs)]
        assert words[0] & words[1] <= shared
    for key in ("name", "order", "product"):
        assert not {answer[key] for answer in ours} & {answer[key] for answer in theirs}
