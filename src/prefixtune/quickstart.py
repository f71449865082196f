"""The first ten minutes: a prefix for the demo model on mails to a shop, measured beside the bare model."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import load_rows
from prefixtune.evaluate import evaluate
from prefixtune.load import load_base
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.train import train

__all__ = ["Quickstart", "quickstart"]

# The prefix starts as the KV of what one would write into a prompt, one virtual token per token of it.
INSTRUCTION = (
    "Answer with JSON: name, order, product, issue. The issue is one of: late (it has not come), damaged "
    "(it is broken), wrong item (something else came), return (the customer sends it back for a refund), "
    "cancel (do not send it).\n"
)
LENGTH = 57
LONGEST_ANSWER = 48  # tokens; the longest reference has 40, and the bare model never stops by itself


def _is_ours(output: Path) -> bool:
    """Whether an earlier quickstart wrote this folder: no other run may be replaced."""
    try:
        asked = json.loads((output / "run.json").read_text(encoding="utf-8"))["asked"]
        return (asked["model"], asked["data"]) == ("demo", "demo:train")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What summary.json holds. Losses are nats per target token, times are seconds."""

    base_exact_match: float
    prefix_exact_match: float
    base_loss: float
    prefix_loss: float
    heldout_rows: int
    train_rows: int
    trainable_parameters: int
    prefix_file_bytes: int
    train_seconds: float
    evaluate_seconds: float
    total_seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]
    samples: list[dict[str, Any]]


def quickstart(output: Path) -> Quickstart:
    """Train on the packaged mails, save, load what was saved, and measure it on held-out mails.

    Writes the run and summary.json to `output`; an earlier run there is replaced.

    Raises:
        RunError: `output` holds something else than a run.
    """
    import torch
    import transformers

    start = time.perf_counter()
    data = DataConfig()
    config = TrainConfig(per_device_train_batch_size=4)
    prefix = {"length": LENGTH, "init_text": INSTRUCTION}
    note("1/2  training a prefix on 600 mails")
    overwrite = _is_ours(output)
    trained = train(
        model="demo",
        data="demo:train",
        output=output,
        prefix_options=prefix,
        data_config=data,
        config=config,
        overwrite=overwrite,
    )
    note("2/2  the saved prefix and the bare model on mails that share no sentence with them")
    middle = time.perf_counter()
    base = load_base("demo", dtype=trained.dtype)
    model = PrefixModel.from_pretrained(base.model, output)
    found = evaluate(
        model,
        base.tokenizer,
        load_rows("demo:heldout"),
        data,
        max_new_tokens=LONGEST_ANSWER,
        batch_size=60,
    )
    end = time.perf_counter()
    assert found.base_exact_match is not None
    assert found.exact_match is not None
    assert found.base_loss is not None
    result = Quickstart(
        base_exact_match=found.base_exact_match,
        prefix_exact_match=found.exact_match,
        base_loss=found.base_loss,
        prefix_loss=found.loss,
        heldout_rows=found.rows,
        train_rows=trained.train_rows,
        trainable_parameters=trained.trainable_parameters,
        prefix_file_bytes=trained.prefix_file_bytes,
        train_seconds=round(trained.train_seconds, 1),
        evaluate_seconds=round(end - middle, 1),
        total_seconds=round(end - start, 1),
        settings={
            "model": "demo (SmolLM2-135M-Instruct)",
            "prefix": prefix,
            "learning_rate": trained.learning_rate,
            "dtype": trained.dtype,
            "threads": torch.get_num_threads(),
            "seed": config.seed,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "steps": trained.steps,
        },
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        samples=found.samples,
    )
    text = json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n"
    (output / "summary.json").write_text(text, encoding="utf-8")
    return result
