"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import prefixtune

SOURCE = Path(prefixtune.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


def test_examples_are_found_and_not_all_of_them_skipped() -> None:
    names = ("prefixtune.data.collate", "prefixtune.data.sources", "prefixtune.train.defaults")
    assert set(names) < set(WITH_EXAMPLES)
    assert all(doctest.testmod(import_module(name)).attempted for name in names)
