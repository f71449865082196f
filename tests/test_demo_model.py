"""The laws on the real demo model, and its way through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from prefixtune import PrefixKV, PrefixModel, attach
from prefixtune.cli import main
from prefixtune.load import LoadedBase, load_base

pytestmark = pytest.mark.slow

TEXT = "Answer every question with one short sentence."
QUESTION = "\nQuestion: What is the capital of France?\nAnswer:"


@pytest.fixture(scope="module")
def demo() -> LoadedBase:
    return load_base("demo", dtype="float32")


def ids(demo: LoadedBase, text: str) -> torch.Tensor:
    assert demo.tokenizer is not None
    return torch.tensor([demo.tokenizer(text)["input_ids"]])


def prefixtune(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result


def test_the_kv_of_a_text_answers_as_the_text_does(demo: LoadedBase) -> None:
    before, after = ids(demo, TEXT), ids(demo, QUESTION)
    whole = torch.cat([before, after], dim=1)
    kv = PrefixKV.from_tokens(demo.model, before)
    with torch.no_grad():
        expected = demo.model(whole).logits[:, before.shape[1] :]
        with attach(demo.model, kv):
            found = demo.model(after).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # logits of size 20, 30 layers in float32
    settings = {"max_new_tokens": 12, "do_sample": False}
    bare = demo.model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    ours = PrefixModel(demo.model, kv).generate(after, attention_mask=torch.ones_like(after), **settings)
    assert ours[0, after.shape[1] :].tolist() == bare[0, whole.shape[1] :].tolist()


def test_a_prefix_is_trained_measured_and_used_from_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prefixtune(
        *("train", "--model", "demo", "--data", "demo", "--limit", 64, "--output", run, "--max-steps", 8),
        *("--retain", 0),  # sampling neutral text with the demo model takes a minute
    )
    measured = prefixtune(
        *("evaluate", "--prefix", run, "--data", "demo:heldout", "--limit", 16, "--no-exact-match", "--json"),
    )
    found = json.loads(measured.stdout)
    assert found["loss"] < 0.5 * found["base_loss"]
    asked = ["generate", "--prompt", "Hello", "--max-new-tokens", 4, "--json"]
    assert prefixtune(*asked, "--prefix", run).stdout != prefixtune(*asked, "--model", "demo").stdout
