"""A row of a mixed batch, with its own prefix or none and its own padding, answers as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    LONG,
    NEW,
    SHORT,
    A,
    B,
    C,
    assert_close,
    bare,
    every_family,
    generated,
    joined,
    kv_of,
    left_padded,
    logits,
    step_logits,
    tokens,
)

from families import EXTRA, FAMILIES
from prefixtune.attachment import attach
from prefixtune.errors import AttachError

D = tokens(3, seed=6)
NOTHING = torch.zeros(1, 0, dtype=torch.long)
ROWS = ((A, B), (NOTHING, C), (SHORT, D), (LONG, C))  # (prefix, text): no two lengths and no two sums alike
IDS, MASK = left_padded([text for _, text in ROWS])
WIDTH = IDS.shape[1]
BY_TOKEN_COUNT = ("bloom", "falcon-alibi")


def prefixes(family: str) -> list[Any]:
    return [kv_of(family, front) if front.shape[1] else None for front, _ in ROWS]


def alone(family: str) -> list[torch.Tensor]:
    """Per row the bare model's logits of the text behind its front."""
    return [logits(bare(family), joined(front, text))[0, front.shape[1] :] for front, text in ROWS]


@pytest.mark.parametrize("family", FAMILIES + EXTRA)
def test_row_in_mixed_batch_equals_row_alone_in_forward_and_greedy(family: str) -> None:
    expected, base = alone(family), bare(family)
    steps = [step_logits(base, joined(front, text))[0] for front, text in ROWS]
    with attach(base, prefixes(family)):
        found = logits(base, IDS, attention_mask=MASK)
        greedy = step_logits(base, IDS, MASK)
        tokens = generated(base, IDS, MASK)
    for row, (_, text) in enumerate(ROWS):
        assert_close(found[row, WIDTH - text.shape[1] :], expected[row])
        assert_close(greedy[row], steps[row])
        assert tokens[row] == steps[row].argmax(-1).tolist()


@pytest.mark.parametrize("family", EXTRA)
def test_one_row_equals_the_bare_model_on_further_architectures(family: str) -> None:
    base = bare(family)
    expected, steps = logits(base, joined(A, B)), step_logits(base, joined(A, B))
    with attach(base, kv_of(family, A)):
        assert_close(logits(base, B), expected[:, A.shape[1] :])
        assert_close(step_logits(base, B), steps)


@every_family
def test_row_in_mixed_batch_equals_row_alone_in_beams_and_return_sequences(family: str) -> None:
    base = bare(family)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    expected = [generated(base, joined(front, text), **settings) for front, text in ROWS]
    with attach(base, prefixes(family)):
        found = generated(base, IDS, MASK, **settings)
    assert found == [sequence for row in expected for sequence in row]


@every_family
def test_row_in_mixed_batch_equals_row_alone_without_and_with_static_cache(family: str) -> None:
    base = bare(family)
    expected = [step_logits(base, joined(front, text))[0] for front, text in ROWS]
    with attach(base, prefixes(family)):
        uncached = step_logits(base, IDS, MASK, use_cache=False)
        static = step_logits(base, IDS, MASK, cache_implementation="static")
    for row, steps in enumerate(expected):
        assert_close(uncached[row], steps)
        assert_close(static[row], steps)


@every_family
def test_sampled_rows_are_drawn_from_their_own_logits(family: str) -> None:
    base = bare(family)
    greedy = [generated(base, joined(front, text))[0] for front, text in ROWS]
    with attach(base, prefixes(family)):
        assert generated(base, IDS, MASK, do_sample=True, top_k=1) == greedy
        torch.manual_seed(5)
        drawn = base.generate(
            input_ids=IDS,
            attention_mask=MASK,
            max_new_tokens=NEW,
            do_sample=True,
            top_k=0,
            num_return_sequences=2,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row, (front, text) in enumerate(ROWS):
        for sequence in (2 * row, 2 * row + 1):
            new = drawn.sequences[sequence, WIDTH:]
            whole = joined(front, text, new[None, :-1])
            expected = logits(base, whole)[0, -NEW:]
            found = torch.stack([step[sequence] for step in drawn.logits])
            assert_close(found, expected)


@every_family
def test_mixed_batch_goes_on_from_its_returned_cache(family: str) -> None:
    base = bare(family)
    with attach(base, prefixes(family)):
        first = base.generate(
            input_ids=IDS,
            attention_mask=MASK,
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        )
        turn = C.expand(len(ROWS), -1)
        talk = joined(first.sequences, turn)
        mask = joined(MASK, torch.ones_like(talk[:, WIDTH:]))
        found = generated(base, talk, mask, past_key_values=first.past_key_values, use_cache=True)
    for row, (front, text) in enumerate(ROWS):
        said = talk[row : row + 1, WIDTH - text.shape[1] :]
        assert [found[row]] == generated(base, joined(front, said))


@every_family
def test_right_padded_rows_of_a_mixed_batch_equal_rows_alone(family: str) -> None:
    base = bare(family)
    expected = [logits(base, joined(front, text.flip(1)))[0, front.shape[1] :] for front, text in ROWS]
    with attach(base, prefixes(family)):
        found = logits(base, IDS.flip(1), attention_mask=MASK.flip(1))
        unmasked = logits(base, IDS.flip(1))  # pads behind a causal text change nothing before them
    for row, logits_alone in enumerate(expected):
        assert_close(found[row, : len(logits_alone)], logits_alone)
        assert_close(unmasked[row, : len(logits_alone)], logits_alone)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in BY_TOKEN_COUNT])
def test_4d_mask_of_a_mixed_batch_leaves_each_row_its_prefix(family: str) -> None:
    base, length = bare(family), C.shape[1]
    causal = torch.zeros(1, 1, length, length).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min
    )
    fronts = (A, NOTHING, SHORT)
    kvs = [kv_of(family, front) if front.shape[1] else None for front in fronts]
    with attach(base, kvs):
        found = logits(base, C.expand(3, -1), attention_mask=causal)
    for row, front in enumerate(fronts):
        whole = joined(front, C)
        size = whole.shape[1]
        mask = torch.full((1, 1, size, size), torch.finfo(torch.float32).min).triu(1)
        positions = torch.arange(size)[None]
        expected = logits(base, whole, attention_mask=mask, position_ids=positions)
        assert_close(found[row], expected[0, front.shape[1] :])


@every_family
def test_row_without_prefix_is_untouched_by_its_neighbours_prefix(family: str) -> None:
    base = bare(family)
    with attach(base, [None, kv_of(family, A)]):
        one = logits(base, C.expand(2, -1))[0]
    with attach(base, [None, kv_of(family, LONG)]):
        other = logits(base, C.expand(2, -1))[0]
    assert_close(one, logits(base, C)[0])
    assert_close(other, one)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_forward_with_another_number_of_rows_is_refused(rows: int) -> None:
    base = bare("llama")
    with attach(base, prefixes("llama")), pytest.raises(AttachError, match=f"4 prefixes.*{rows} rows"):
        base(input_ids=C.expand(rows, -1))


@pytest.mark.parametrize("given", ["positional", "input_ids", "inputs_embeds", "attention_mask"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_generation_for_another_number_of_prompts_is_refused_whatever_its_beams_come_to(
    rows: int, given: str
) -> None:
    base, ids = bare("llama"), C.expand(rows, -1)
    inputs = {
        "input_ids": ids,
        "inputs_embeds": base.get_input_embeddings()(ids),
        "attention_mask": torch.ones(rows, 1, dtype=torch.long),
    }
    arguments = {given: inputs[given]} if given in inputs else {}
    with attach(base, prefixes("llama")), pytest.raises(AttachError, match=f"4 prefixes.*{rows} rows"):
        base.generate(*([] if arguments else [ids]), **arguments, num_beams=4, max_new_tokens=2)


def test_one_prefix_in_a_list_is_for_one_prompt() -> None:
    base = bare("llama")
    with attach(base, [kv_of("llama", A)]):
        one = generated(base, C, num_beams=2)
        with pytest.raises(AttachError, match=r"1 prefixes.*2 rows"):
            generated(base, C.expand(2, -1))
    assert one == generated(base, joined(A, C), num_beams=2)
