"""From files to token ids: rows, templates, examples, batches. Knows no model and no training.

rows = load_rows("train.jsonl")
examples, report = build_examples(rows, tokenizer, DataConfig())
batch = Collator(tokenizer.pad_token_id)(examples[:8])
"""

from __future__ import annotations

from prefixtune.data.answers import answer_text, special_beside
from prefixtune.data.chat import fix_date
from prefixtune.data.collate import Collator, as_example
from prefixtune.data.examples import (
    DataReport,
    Example,
    Prompt,
    build_examples,
    build_prompts,
    default_template,
    rows_with_targets,
)
from prefixtune.data.row import Row
from prefixtune.data.show import example_text
from prefixtune.data.sources import check_splits, load_rows, parse_fields
from prefixtune.data.templates import added_tokens, text_start

__all__ = [
    "Collator",
    "DataReport",
    "Example",
    "Prompt",
    "Row",
    "added_tokens",
    "answer_text",
    "as_example",
    "build_examples",
    "build_prompts",
    "check_splits",
    "default_template",
    "example_text",
    "fix_date",
    "load_rows",
    "parse_fields",
    "rows_with_targets",
    "special_beside",
    "text_start",
]
