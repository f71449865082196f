"""The scheduler's side: which loads a request gets, that none can raise, and that garbage is noticed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefixtune_vllm.ledger import Ledger, Load, Wanted

ID, LENGTH = 260, 20
PREFIX = Wanted("c", "d" * 64, LENGTH)


def request(**changes: Any) -> Any:
    """A request as the middleware makes them, with `changes`."""
    record = {"name": "c", "digest": "d" * 64, "length": LENGTH}
    values: dict[str, Any] = {
        "request_id": "r",
        "kv_transfer_params": {"prefixtune": record},
        "prompt_token_ids": [ID] * LENGTH + [5, 6, 7],
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "cache_salt": "d" * 64,
        "skip_reading_prefix_cache": False,
        **changes,
    }
    ids = values["prompt_token_ids"]
    return SimpleNamespace(num_tokens=len(ids or ()), **values)


def run(ledger: Ledger, asked: Any, *, local: int = 0, blocks: tuple[int, ...] = (8, 3)) -> list[Load]:
    """One step in which a request is new, and `local` tokens were in the engine's own cache."""
    ledger.admit(asked)
    external = ledger.matched(asked, local)
    assert external is not None
    taken = 0 if asked.skip_reading_prefix_cache else external  # as vLLM's scheduler does
    ledger.allocated(asked, blocks, taken)
    return ledger.step([(asked.request_id, local + taken)])


@pytest.mark.parametrize("local", [0, 16])
def test_load_is_what_the_engine_has_not(local: int) -> None:
    ledger = Ledger(ID)
    assert run(ledger, request(), local=local) == [Load("r", PREFIX, local, LENGTH, (8, 3))]
    assert ledger.take_counts() == {"loads": 1, "loaded_tokens": LENGTH - local}
    assert ledger.step([("r", LENGTH + 3)]) == []
    assert ledger.finished(request()) is None


def test_prefix_in_the_engines_own_cache_needs_no_load() -> None:
    ledger = Ledger(ID)
    assert run(ledger, request(prompt_token_ids=[ID] * LENGTH + [5] * 20), local=32) == []
    assert ledger.alarm is None


def test_preempted_request_is_loaded_again() -> None:
    ledger, asked = Ledger(ID), request()
    run(ledger, asked)
    asked.num_tokens += 4  # what it had answered
    assert ledger.matched(asked, 0) == LENGTH
    ledger.allocated(asked, (1, 2), LENGTH)
    assert ledger.step([("r", LENGTH)]) == [Load("r", PREFIX, 0, LENGTH, (1, 2))]


def test_request_without_prefix_is_left_alone() -> None:
    ledger = Ledger(ID)
    plain = request(kv_transfer_params=None, prompt_token_ids=[5, 6], skip_reading_prefix_cache=True)
    assert ledger.admit(plain) is None
    assert plain.skip_reading_prefix_cache is True
    assert ledger.matched(plain, 0) == 0
    assert ledger.step([("r", 0)]) == []


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("no text", {"prompt_token_ids": [ID] * LENGTH}),
    ("no text", {"prompt_token_ids": [ID] * 3}),
    ("does not begin", {"prompt_token_ids": [5] * 30}),
    ("does not begin", {"prompt_token_ids": [5] + [ID] * LENGTH + [6]}),
    ("in the text", {"prompt_token_ids": [ID] * LENGTH + [5, ID]}),
    ("cache_salt", {"cache_salt": None}),
    ("cache_salt", {"cache_salt": "c"}),
    ("log-prob", {"sampling_params": SimpleNamespace(prompt_logprobs=0), "skip_reading_prefix_cache": True}),
    ("reserved token", {"kv_transfer_params": None, "prompt_token_ids": [5, ID, 6]}),
    ("KeyError", {"kv_transfer_params": {"prefixtune": {"name": "c"}}}),
    ("TypeError", {"kv_transfer_params": {"prefixtune": 5}}),
    ("ValueError", {"kv_transfer_params": {"prefixtune": {"name": 1, "digest": 1, "length": "x"}}}),
]


@pytest.mark.parametrize(("why", "changes"), WRONG)
def test_request_that_cannot_be_exact_gets_a_load_that_fails(why: str, changes: dict[str, Any]) -> None:
    ledger, asked = Ledger(ID), request(**changes)
    (load,) = run(ledger, asked)
    assert why in (load.refusal or "")
    assert (
        load.stop - load.start == asked.num_tokens - 1
    )  # all of it, so that nothing is computed but the last
    assert why in (ledger.finished(asked) or "")
    assert ledger.take_counts()["refused"] == 1
    assert ledger.alarm is None


def test_prompt_that_cannot_be_read_does_not_end_the_engine() -> None:
    ledger = Ledger(ID)
    asked = request()
    asked.prompt_token_ids = 5
    ledger.admit(asked)
    assert "TypeError" in (ledger.finished(asked) or "")


def test_refused_request_of_one_token_is_never_scheduled() -> None:
    ledger, asked = Ledger(ID), request(prompt_token_ids=[ID])
    ledger.admit(asked)
    assert ledger.matched(asked, 0) is None


def test_computed_placeholders_raise_the_alarm_and_end_the_request_and_all_later_ones() -> None:
    ledger, asked = Ledger(ID), request()
    ledger.admit(asked)
    ledger.matched(asked, 0)
    ledger.allocated(asked, (8, 3), 0)  # an engine that ignores what the connector has
    (load,) = ledger.step([("r", 0)])
    assert load.refusal is not None
    assert load.blocks == (8, 3)
    assert ledger.take_counts() == {"computed_placeholders": LENGTH}
    assert "PLACEHOLDERS WERE COMPUTED" in ledger.take_news()[0]
    assert [again.blocks for again in ledger.step([("r", 23)])] == [(8, 3)]  # until it has ended
    (refused,) = [load for load in run(ledger, request(request_id="s")) if load.request_id == "s"]
    assert "placeholders were computed before" in (refused.refusal or "")
    assert "computed from token 0" in (ledger.finished(asked) or "")
    assert ledger.step([]) == []
