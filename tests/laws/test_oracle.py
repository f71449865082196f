"""The oracle: the prefix made of A's KV, applied to B, answers as the bare model answers to [A; B]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    LONG,
    A,
    B,
    C,
    assert_close,
    bare,
    both_ways,
    every_family,
    generated,
    joined,
    kv_of,
    left_padded,
    logits,
    outcome,
    prefixed,
    step_logits,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from families import FAMILIES
from prefixtune.attachment import attach
from prefixtune.errors import AttachError

AB, P, T = joined(A, B), A.shape[1], B.shape[1]
NEW_IN_TURN = 4
BY_TOKEN_COUNT = ("bloom", "falcon-alibi")  # alibi from the mask's counts, which a 4D mask does not give


@every_family
@both_ways
def test_forward_equals_the_bare_model_on_both_texts(way: str, family: str) -> None:
    expected = logits(bare(family), AB)[:, P:]
    with prefixed(way, family, kv_of(family, A)) as model:
        assert_close(logits(model, B), expected)
        assert_close(logits(model, B, use_cache=False), expected)
        assert_close(model(input_ids=B, return_dict=False)[0].detach(), expected)
        assert_close(logits(model, B, logits_to_keep=1), expected[:, -1:])
    alone = logits(bare(family), B)
    assert (alone - expected).abs().max() > 0.1  # the prefix does matter
    assert_close(alone, logits(bare(family), joined(B, C))[:, :T])  # and is gone afterwards


@every_family
@both_ways
def test_prefix_longer_than_the_window_is_kept_whole(way: str, family: str) -> None:
    kv = kv_of(family, LONG)
    assert {layer.key.shape[1] for layer in kv.layers} == {LONG.shape[1]}
    expected = logits(bare(family), joined(LONG, B))[:, LONG.shape[1] :]
    steps = step_logits(bare(family), joined(LONG, B))
    with prefixed(way, family, kv) as model:
        assert_close(logits(model, B), expected)
        assert_close(step_logits(model, B), steps)


@every_family
@both_ways
def test_greedy_beam_and_uncached_generation_equal_the_bare_models(way: str, family: str) -> None:
    base = bare(family)
    expected, beams = step_logits(base, AB), generated(base, AB, num_beams=3)
    with prefixed(way, family, kv_of(family, A)) as model:
        assert_close(step_logits(model, B), expected)
        assert_close(step_logits(model, B, use_cache=False), expected)
        assert generated(model, B) == generated(model, B, use_cache=False) == expected.argmax(-1).tolist()
        assert generated(model, B, num_beams=3) == beams
        assert generated(model, B, num_beams=3, use_cache=False) == beams


@every_family
@both_ways
def test_seeded_sampling_draws_the_bare_models_tokens(way: str, family: str) -> None:
    def sampled(model: Any, ids: Tensor) -> list[list[int]]:
        torch.manual_seed(3)
        return generated(model, ids, do_sample=True, top_k=0, temperature=2.0, num_return_sequences=2)

    expected = sampled(bare(family), AB)
    with prefixed(way, family, kv_of(family, A)) as model:
        assert sampled(model, B) == expected
    assert expected[0] != expected[1]


@every_family
@both_ways
def test_static_cache_answers_as_the_dynamic_one(way: str, family: str) -> None:
    expected = step_logits(bare(family), AB)
    with prefixed(way, family, kv_of(family, A)) as model:
        assert_close(step_logits(model, B, cache_implementation="static"), expected)


@every_family
@both_ways
def test_prompt_lookup_equals_the_bare_models_or_is_refused_alike(way: str, family: str) -> None:
    repetitive = joined(C, C, C)
    lookup = {"prompt_lookup_num_tokens": 3}
    expected = outcome(lambda: generated(bare(family), joined(A, repetitive), **lookup), ValueError)
    with prefixed(way, family, kv_of(family, A)) as model:
        found = outcome(lambda: generated(model, repetitive, **lookup), ValueError)
    assert found == expected or (type(found), str(found)) == (ValueError, str(expected))


@every_family
def test_prefill_in_chunks_equals_the_bare_models(family: str) -> None:
    expected = step_logits(bare(family), AB)
    with attach(bare(family), kv_of(family, A)) as model:
        assert_close(step_logits(model, B, prefill_chunk_size=4, use_cache=True), expected)


@every_family
@both_ways
def test_padded_rows_equal_each_text_unpadded(way: str, family: str) -> None:
    base = bare(family)
    ids, mask = left_padded([B, C])
    with prefixed(way, family, kv_of(family, A)) as model:
        left = logits(model, ids, attention_mask=mask)
        right = logits(model, ids.flip(1), attention_mask=mask.flip(1))
        greedy, beams = generated(model, ids, mask), generated(model, ids, mask, num_beams=3)
        static = generated(model, ids, mask, cache_implementation="static")
    for row, text in enumerate((B, C)):
        whole, length = joined(A, text), text.shape[1]
        assert_close(left[row, T - length :], logits(base, whole)[0, P:])
        flipped = joined(A, text.flip(1))
        assert_close(right[row, :length], logits(base, flipped)[0, P:])
        assert [greedy[row]] == [static[row]] == generated(base, whole)
        assert [beams[row]] == generated(base, whole, num_beams=3)


@every_family
def test_masked_tokens_amid_the_text_are_masked_as_in_the_bare_model(family: str) -> None:
    mask = torch.ones_like(B)
    mask[0, 3:5] = 0
    whole = joined(torch.ones_like(A), mask)
    expected = logits(bare(family), AB, attention_mask=whole)[:, P + 5 :]
    with attach(bare(family), kv_of(family, A)) as model:
        assert_close(logits(model, B, attention_mask=mask)[:, 5:], expected)


@every_family
@both_ways
def test_next_turn_continues_from_the_returned_cache(way: str, family: str) -> None:
    with prefixed(way, family, kv_of(family, A)) as model:
        first = model.generate(
            input_ids=B,
            attention_mask=torch.ones_like(B),
            max_new_tokens=NEW_IN_TURN,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        )
        talk = joined(first.sequences, C)
        assert first.past_key_values.get_seq_length() == T + NEW_IN_TURN - 1
        found = generated(model, talk, past_key_values=first.past_key_values, use_cache=True)
    assert found == generated(bare(family), joined(A, talk))


@every_family
@both_ways
def test_input_embeddings_stand_for_their_tokens(way: str, family: str) -> None:
    embeds, expected = bare(family).get_input_embeddings()(B), logits(bare(family), AB)[:, P:]
    settings = {"attention_mask": torch.ones_like(B), "max_new_tokens": 5, "do_sample": False}
    tokens = generated(bare(family), AB, max_new_tokens=5)
    with prefixed(way, family, kv_of(family, A)) as model:
        assert_close(model(inputs_embeds=embeds).logits.detach(), expected)
        assert model.generate(inputs_embeds=embeds, **settings).tolist() == tokens


@pytest.mark.parametrize("cache", ["dynamic", "windowed", "static"])
@every_family
def test_decoding_token_by_token_with_the_callers_cache_equals_one_pass(family: str, cache: str) -> None:
    base, expected = bare(family), logits(bare(family), AB)[:, P:]
    make = {
        "dynamic": DynamicCache,
        "windowed": lambda: DynamicCache(config=base.config),
        "static": lambda: StaticCache(config=base.config, max_cache_len=T + 3),
    }[cache]
    with attach(base, kv_of(family, A)) as model:
        past = make()
        steps = [logits(model, B[:, :3], past_key_values=past)]
        for place in range(3, T):
            steps.append(logits(model, B[:, place : place + 1], past_key_values=past))
    assert int(past.get_seq_length()) == T
    assert_close(torch.cat(steps, dim=1), expected)


@every_family
@both_ways
def test_returned_cache_holds_the_texts_kv_and_nothing_else(way: str, family: str) -> None:
    whole = DynamicCache()
    logits(bare(family), AB, past_key_values=whole)
    with prefixed(way, family, kv_of(family, A)) as model:
        past = model(input_ids=B, use_cache=True).past_key_values
    assert past.get_seq_length() == T
    assert len(past.layers) == len(whole.layers)
    for mine, theirs in zip(past.layers, whole.layers, strict=True):
        kept = mine.keys.shape[2]  # a sliding layer forgets what left its window
        assert kept == T or mine.is_sliding
        assert_close(mine.keys.detach(), theirs.keys[:, :, -kept:])
        assert_close(mine.values.detach(), theirs.values[:, :, -kept:])


@every_family
def test_callers_positions_count_from_the_texts_start(family: str) -> None:
    gap = torch.arange(T)[None] + 4
    whole = {"position_ids": joined(torch.arange(P)[None], gap + P), "attention_mask": torch.ones_like(AB)}
    base = bare(family)
    with attach(base, kv_of(family, A)) as model:
        plain = logits(model, B, position_ids=torch.arange(T)[None])
        moved = logits(model, B, position_ids=gap, attention_mask=torch.ones_like(B))
    assert_close(plain, logits(base, AB)[:, P:])
    assert_close(moved, logits(base, AB, **whole)[:, P:])


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in BY_TOKEN_COUNT])
def test_callers_4d_mask_is_the_bare_models_mask_without_the_prefix(family: str, kind: torch.dtype) -> None:
    seen = torch.ones(P + T, P + T, dtype=torch.bool).tril()
    seen[P + 5 :, P + 2 : P + 4] = False
    added = torch.zeros(1, 1, P + T, P + T).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.arange(P + T)[None]  # OPT cannot count them in a 4D mask
    expected = logits(bare(family), AB, attention_mask=added, position_ids=positions)[:, P:]
    mask = added if kind == torch.float32 else seen[None, None]
    with attach(bare(family), kv_of(family, A)) as model:
        found = logits(model, B, attention_mask=mask[:, :, P:, P:])
        assert_close(found, expected)
        assert (found - logits(model, B)).abs().max() > 0.01  # the mask does matter


@pytest.mark.parametrize("family", BY_TOKEN_COUNT)
def test_4d_mask_is_refused_where_alibi_counts_tokens(family: str) -> None:
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    with attach(bare(family), kv_of(family, A)) as model, pytest.raises(AttachError, match="2D mask"):
        model(input_ids=B, attention_mask=mask)


@every_family
def test_eager_attention_equals_the_bare_models(family: str) -> None:
    base = bare(family)
    before = base.config._attn_implementation
    ids, mask = left_padded([B, C])
    base.set_attn_implementation("eager")
    try:
        with attach(base, kv_of(family, A)):
            found = logits(base, ids, attention_mask=mask)
        for row, text in enumerate((B, C)):
            assert_close(found[row, T - text.shape[1] :], logits(base, joined(A, text))[0, P:])
    finally:
        base.set_attn_implementation(before)
