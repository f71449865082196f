"""A folder to train in, with a small model and rows, and what a run there leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families import tiny_model
from tokenizers_for_tests import byte_tokenizer

__all__ = ["logged_losses", "write_place"]


def write_place(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `model`, a Llama without dropout that reads bytes, and `rows.json` into the folder."""
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def logged_losses(output: Path) -> list[float]:
    """The training losses that a run has logged."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
