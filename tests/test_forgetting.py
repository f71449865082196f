"""Laws of forgetting: the base forgets nothing, harm is a rise, and every method sees the same tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.data import Example
from prefixtune.errors import ConfigError, DataError, StorageError
from prefixtune.forgetting import (
    OPENINGS,
    NeutralTexts,
    forgetting,
    neutral_losses,
    neutral_texts,
    read_texts,
)
from prefixtune.likelihood import row_losses
from tokenizers_for_tests import byte_tokenizer, slow_tokenizer

TOKENIZER = byte_tokenizer()
TASK = "CAUSAL_LM"  # in PEFT's words


def bare(**options: Any) -> Any:
    """A model with opinions: sampled from the small weights of most tests, all text is about as likely."""
    model = tiny_model("llama", vocab_size=len(TOKENIZER), **options)
    model.lm_head.weight.data *= 4
    return model


def prefixed(base: Any, *, size: float) -> Any:
    model = PrefixModel(base, PrefixConfig(length=4))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.prefix.parameters():
            parameter.copy_(torch.randn_like(parameter) * size)
    return model


@pytest.fixture(scope="module")
def texts() -> NeutralTexts:
    return neutral_texts(bare(), TOKENIZER, texts=6, tokens=12)


def test_base_itself_forgets_nothing(texts: NeutralTexts) -> None:
    base = bare()
    found = forgetting(base, base, TOKENIZER, texts=texts)
    assert (found.rise, found.standard_error) == (0.0, 0.0)
    assert found.loss == found.base_loss > 0
    assert found.tokens == sum(row.target_tokens for row in texts.rows) > found.texts == 6


def test_harmful_prefix_raises_the_loss_by_what_it_costs_each_token(texts: NeutralTexts) -> None:
    model = prefixed(bare(), size=3.0)
    found = forgetting(model, model.base_model, TOKENIZER, texts=texts)
    nats = [0.0, 0.0]
    for which, one in enumerate((model, model.base_model)):
        for row in texts.rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            with torch.no_grad():
                nats[which] += float(one(input_ids=ids, labels=labels).loss) * row.target_tokens
    assert found.rise == pytest.approx((nats[0] - nats[1]) / texts.tokens, rel=1e-4)
    assert found.rise == pytest.approx(found.loss - found.base_loss)
    assert found.rise > 2 * found.standard_error > 0
    assert forgetting(model, None, TOKENIZER, texts=texts) == found


def test_text_that_the_base_writes_is_likelier_to_it_than_to_another_model(texts: NeutralTexts) -> None:
    other = bare(seed=9)
    assert forgetting(other, bare(), TOKENIZER, texts=texts).rise > 0.5


def test_losses_measured_before_the_training_stand_for_a_base_that_is_gone(texts: NeutralTexts) -> None:
    base = bare()
    before = neutral_losses(base, TOKENIZER, texts)
    expected = forgetting(bare(seed=9), base, TOKENIZER, texts=texts)
    assert forgetting(bare(seed=9), None, TOKENIZER, texts=texts, base_losses=before) == expected
    with pytest.raises(ConfigError, match="no base to compare this LlamaForCausalLM with"):
        forgetting(base, None, TOKENIZER, texts=texts)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_peft_model_is_measured_against_its_base_without_adapter(texts: NeutralTexts, method: str) -> None:
    import peft

    untouched = bare()
    configs = {
        "lora": peft.LoraConfig(task_type=TASK, r=2, target_modules=["q_proj"], init_lora_weights=False),
        "prompt": peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
    }
    model = peft.get_peft_model(copy.deepcopy(untouched), configs[method])
    within = forgetting(model, None, TOKENIZER, texts=texts)
    beside = forgetting(model, untouched, TOKENIZER, texts=texts)
    handed = forgetting(model, model.get_base_model(), TOKENIZER, texts=texts)
    assert within == beside == handed
    assert within.rise != 0.0
    alone = [row_losses(model, [row], pad_token_id=0)[0] for row in texts.rows]
    assert within.loss == pytest.approx(sum(alone) / texts.tokens, rel=1e-5)


def test_same_seed_writes_the_same_text_and_leaves_torchs_random_state() -> None:
    model = bare()

    def written(seed: int) -> Any:
        return [row.input_ids for row in neutral_texts(model, TOKENIZER, texts=3, tokens=8, seed=seed).rows]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = written(1)
    assert torch.equal(torch.rand(3), expected)
    assert first == written(1) != written(2)


def test_sampling_is_the_bases_own_whatever_its_generation_config_says() -> None:
    model = bare()
    plain = neutral_texts(model, TOKENIZER, texts=3, tokens=8)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0)
    assert neutral_texts(model, TOKENIZER, texts=3, tokens=8) == plain


def test_openings_are_no_targets() -> None:
    row = neutral_texts(bare(), TOKENIZER, texts=1, tokens=8, openings=["the colours"]).rows[0]
    given = len(TOKENIZER("the colours")["input_ids"])
    assert row.labels[:given] == (-100,) * given
    assert row.labels[given:] == row.input_ids[given:]
    assert len(row.input_ids) == given + 8


def test_text_ends_where_the_base_ends_it_and_short_ones_are_drawn_again() -> None:
    model = bare()
    plain = neutral_texts(model, TOKENIZER, texts=8, tokens=12)
    new = plain.rows[0].input_ids[-1]
    model.generation_config.eos_token_id = [new]
    ended = neutral_texts(model, TOKENIZER, texts=8, tokens=12)
    assert len(ended.rows) == 8
    for row in ended.rows:
        targets = [label for label in row.labels if label != -100]
        assert new not in targets
        assert 3 <= len(targets) <= 12


def few_positions() -> Any:
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER))  # of 128
    model.lm_head.weight.data *= 4
    return model


def test_text_is_as_long_as_the_positions_behind_the_longest_prefix(
    capsys: pytest.CaptureFixture[str],
) -> None:
    opening = max(len(TOKENIZER(text)["input_ids"]) for text in OPENINGS)
    for before in (0, 60):
        texts = neutral_texts(few_positions(), TOKENIZER, texts=2, before=before)
        assert max(row.target_tokens for row in texts.rows) <= 128 - opening - before
        assert f"neutral text: {128 - opening - before} tokens at most" in capsys.readouterr().err
    with pytest.raises(DataError, match="expected 16 positions for a text or more; of the 128 of gpt2"):
        neutral_texts(few_positions(), TOKENIZER, texts=2, before=128 - opening - 15)


def test_a_prefix_with_few_positions_is_measured_all_the_same() -> None:
    base = few_positions()
    model = PrefixModel(base, PrefixConfig(length=40))
    assert forgetting(model, base, TOKENIZER).texts == 32
    assert forgetting(peft_prompt(few_positions(), 40), None, TOKENIZER).texts == 32


def peft_prompt(base: Any, length: int) -> Any:
    import peft

    config = peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=length)
    return peft.get_peft_model(base, config)


def test_a_row_behind_pefts_virtual_tokens_that_has_no_position_is_told() -> None:
    model, row = peft_prompt(few_positions(), 40), tuple(range(5, 94))  # 89 and 40 of 128
    with pytest.raises(DataError, match="89 tokens after a prefix of 40 do not fit into the 128 positions"):
        row_losses(model, [Example(input_ids=row, labels=row, origin="a", truncated=0)], pad_token_id=0)


def test_base_that_ends_every_text_at_once_has_no_neutral_text() -> None:
    model = bare()
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    with pytest.raises(DataError, match="ended each of 2 texts"):
        neutral_texts(model, TOKENIZER, texts=2, tokens=8)


def test_kept_texts_are_read_back_for_the_same_base_and_seed_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "neutral.json"
    first = neutral_texts(bare(), TOKENIZER, texts=3, tokens=8, cache=path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [row["text"] for row in kept["rows"]] == [TOKENIZER.decode(row.input_ids) for row in first.rows]
    assert neutral_texts(bare(), TOKENIZER, texts=3, tokens=8, cache=path) == first
    kept["rows"][0]["input_ids"][-1] = 7  # so that a reading differs from sampling again
    path.write_text(json.dumps(kept))
    again = neutral_texts(bare(), TOKENIZER, texts=3, tokens=8, cache=path)
    assert again.rows[0].input_ids == (*first.rows[0].input_ids[:-1], 7)
    for changed in ({"seed": 1}, {"texts": 2}, {"openings": ["a"]}, {"base": bare(seed=9)}):
        base = changed.pop("base", None) or bare()
        options = {"texts": 3, "tokens": 8} | changed
        fresh = neutral_texts(base, TOKENIZER, cache=path, **options)
        assert fresh == neutral_texts(base, TOKENIZER, **options)
        path.write_text(json.dumps(kept))
    assert "sampled anew" in capsys.readouterr().err


def test_another_file_is_not_overwritten_by_neutral_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}')
    with pytest.raises(StorageError, match=r"rows.json: expected neutral texts"):
        neutral_texts(bare(), TOKENIZER, texts=2, tokens=8, cache=path)
    assert path.read_text() == '{"a": 1}'


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(bos=True), slow_tokenizer()])
def test_own_text_is_cut_into_pieces_that_each_begin_as_a_row_does(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Give three tips. 什么是三原色？\n" * 5, encoding="utf-8")
    found = read_texts(path, tokenizer, tokens=10)
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
    cut = [row.input_ids[len(starts) :] for row in found.rows]
    joined = [token for piece in cut for token in piece]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) <= 1
    assert {row.input_ids[: len(starts)] for row in found.rows} == {tuple(starts)}
    assert found.source == str(path)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_own_text_that_is_none_is_told_with_its_file(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"own.txt: expected a text"):
        read_texts(path, TOKENIZER)
