"""Where a prefix starts: exactly at the KV of a text, or at noise of the model's own scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import A, B, assert_close, bare, every_family, joined, logits, tokens

from families import VOCAB, tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.errors import ConfigError
from tokenizers_for_tests import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROJECTIONS = ("k_proj", "v_proj", "qkv", "query_key_value", "c_attn", "c_kv")
PROJECTED = 1e-4  # what the fit of the MLP's last layer may miss, on KV numbers of size 1 to 5


def started(family: str, ids: torch.Tensor, *, length: int, projection: bool = False) -> PrefixKV:
    config = PrefixConfig(
        length=length, projection=projection, init="tokens", init_tokens=tuple(ids[0].tolist())
    )
    return PrefixModel(bare(family), config).prefix.bake()


def assert_same(found: PrefixKV, expected: PrefixKV, tolerance: float = 0.0) -> None:
    assert found.length == expected.length
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for a, b in ((mine.key, theirs.key), (mine.value, theirs.value)):
            assert a.shape == b.shape
            assert (a - b).abs().max().item() <= tolerance


@every_family
def test_direct_start_is_the_texts_kv_to_the_bit(family: str) -> None:
    assert_same(started(family, A, length=5), PrefixKV.from_tokens(bare(family), A))


@every_family
def test_projection_starts_at_the_texts_kv(family: str) -> None:
    expected = PrefixKV.from_tokens(bare(family), A)
    assert_same(started(family, A, length=5, projection=True), expected, PROJECTED)


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
@every_family
def test_model_with_a_started_prefix_answers_as_on_the_text(family: str, projection: bool) -> None:
    config = PrefixConfig(length=5, projection=projection, init="tokens", init_tokens=tuple(A[0].tolist()))
    model = PrefixModel(bare(family), config).eval()
    assert_close(logits(model, B), logits(bare(family), joined(A, B))[:, 5:], 1e-3)


@every_family
def test_longer_text_gives_its_first_tokens_on_sliding_layers_too(family: str) -> None:
    text = tokens(12, seed=8)
    assert_same(started(family, text, length=9), PrefixKV.from_tokens(bare(family), text[:, :9]))


@every_family
def test_shorter_text_is_repeated_from_its_start(family: str) -> None:
    cycle = joined(A, A, A[:, :1])
    assert_same(started(family, A, length=11), PrefixKV.from_tokens(bare(family), cycle))


@pytest.mark.parametrize("length", [4, 30])
def test_text_start_is_the_start_from_its_token_ids(length: int) -> None:
    base = tiny_model("llama", vocab_size=len(TOKENIZER))
    text = "Summarise the mail:"
    ids = TOKENIZER(text)["input_ids"]
    model = PrefixModel(base, PrefixConfig(length=length, init="text", init_text=text), tokenizer=TOKENIZER)
    expected = PrefixKV.from_tokens(base, torch.tensor([(ids * 5)[:length]]))
    assert_same(model.prefix.bake(), expected)


@pytest.mark.parametrize("length", [1, 5, 30])
def test_what_a_tokenizer_puts_around_a_text_is_there_once_and_not_at_its_end(length: int) -> None:
    tokenizer = byte_tokenizer(bos=True, around="<s> $A </s>")
    base = tiny_model("llama", vocab_size=len(tokenizer))
    bos, *text, eos = tokenizer("Be brief.")["input_ids"]
    assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    config = PrefixConfig(length=length, init="text", init_text="Be brief.")
    expected = PrefixKV.from_tokens(base, torch.tensor([[bos, *text * 5][:length]]))
    assert_same(PrefixModel(base, config, tokenizer=tokenizer).prefix.bake(), expected)


@every_family
def test_random_start_has_the_mean_and_spread_of_the_models_own_kv(family: str) -> None:
    base = tiny_model(family)
    for name, parameter in base.named_parameters():
        if any(part in name for part in PROJECTIONS):
            parameter.data.mul_(10.0)  # away from the scale 1, which plain noise would have too
    torch.manual_seed(21)
    start = PrefixModel(base, PrefixConfig(length=100)).prefix.bake()
    own = PrefixKV.from_tokens(base, torch.randint(0, VOCAB, (1, 100)))
    for mine, theirs in zip(start.layers, own.layers, strict=True):
        assert_same_scale(mine.key, theirs.key)
        assert_same_scale(mine.value, theirs.value)
        assert theirs.value.std() > 3


def assert_same_scale(found: torch.Tensor, own: torch.Tensor) -> None:
    """Per channel of [H, P, D]; position 0 is not like the others."""
    spread = own[:, 1:].std(dim=1)  # [H, D]
    ratio = (found.std(dim=1) / spread).log().abs().mean().exp().item()
    shift = ((found.mean(dim=1) - own[:, 1:].mean(dim=1)) / spread).abs().mean().item()
    assert ratio < 1.6
    assert shift < 1.3


def test_two_random_starts_differ_and_a_seed_repeats_one() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return PrefixModel(bare("llama"), PrefixConfig(length=5)).prefix.bake().layers[0].key

    assert torch.equal(start(1), start(1))
    assert (start(1) - start(2)).abs().max() > 0.1


def test_start_leaves_the_base_in_its_mode_and_without_prefix() -> None:
    base = tiny_model("llama").train()
    expected = logits(base, B)
    PrefixModel(base, PrefixConfig(length=5, init="tokens", init_tokens=(5, 6)))
    assert all(module.training for module in base.modules())
    assert torch.equal(logits(base, B), expected)


def test_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCAB}"):
        PrefixModel(bare("llama"), PrefixConfig(length=2, init="tokens", init_tokens=(3, VOCAB)))


@pytest.mark.parametrize("tokens", [("a",), (1.5,), (True,), [3, None], "3,4", 3])
def test_start_of_what_is_no_token_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="init_tokens: expected token ids"):
        PrefixConfig(length=2, init="tokens", init_tokens=tokens)
