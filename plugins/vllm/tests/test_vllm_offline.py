"""vLLM's LLM class, without the middleware: the engine's own side of each guard must hold by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import ENVIRONMENT, SETTINGS, Reference
from prefixtune_vllm import Export
from tiny import LENGTHS

pytestmark = pytest.mark.vllm

NEW = 12
ID = 260


def engine(place: Path, *, module: str = "prefixtune_vllm.connector") -> Any:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    transfer = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"export": str(place / "served")},
    }
    return LLM(
        model=str(place / "model"),
        tokenizer=str(place / "served/tokenizer"),
        dtype="float32",
        kv_transfer_config=transfer,
        disable_hybrid_kv_cache_manager=True,
        **SETTINGS,
    )


@pytest.fixture(scope="module")
def llm(made: Path) -> Iterator[Any]:
    found = engine(made)
    yield found
    found.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference(made: Path) -> Reference:
    return Reference(made)


def ask(llm: Any, requests: list[tuple[dict[str, Any], dict[str, Any] | None]], **sampling: Any) -> list[Any]:
    """(token ids, finish reason) of each request."""
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, **sampling}
    params = [SamplingParams(extra_args=extra, **settings) for _, extra in requests]
    found = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    return [(list(one.outputs[0].token_ids), one.outputs[0].finish_reason) for one in found]


def test_one_batch_of_16_prefixes_and_none_is_transformers_greedy_tokens(
    llm: Any, reference: Reference
) -> None:
    export = reference.export
    texts = [[5, 6, 7], [9], list(range(20, 90))]
    asked = [(name, ids) for name in (*LENGTHS, None) for ids in texts]
    requests = [export.place(name, ids) if name else ({"prompt_token_ids": ids}, None) for name, ids in asked]
    wanted = [(reference.greedy(name, ids, count=NEW), "length") for name, ids in asked]
    for _ in range(2):  # the second time from vLLM's own cache
        assert ask(llm, requests) == wanted


def spoiled(export: Export, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request for prefix c that the middleware would never make."""
    prompt, extra = export.place("c", [5, 6, 7])
    record = {**extra["kv_transfer_params"]["prefixtune"], **changes.pop("record", {})}
    return {**prompt, **changes}, {"kv_transfer_params": {"prefixtune": record}}


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({}, {"prompt_logprobs": 1}),
        ({"prompt_token_ids": [ID] * LENGTHS["c"]}, {}),
        ({"prompt_token_ids": [5] * 40}, {}),
        ({"prompt_token_ids": [ID] * LENGTHS["c"] + [5, ID]}, {}),
        ({"cache_salt": "c"}, {}),
        ({"record": {"name": "nope", "digest": "1" * 64}, "cache_salt": "1" * 64}, {}),
        ({"record": {"digest": "0" * 64}, "cache_salt": "0" * 64}, {}),
        ({"record": {"length": "x"}}, {}),
    ],
    ids=["prompt-logprobs", "no-text", "no-placeholders", "stray", "salt", "unknown", "replaced", "record"],
)
def test_request_that_cannot_be_exact_fails_alone_and_the_next_one_is_exact(
    llm: Any, reference: Reference, changes: dict[str, Any], sampling: dict[str, Any]
) -> None:
    good = reference.export.place("c", [5, 6, 7])
    ((tokens, reason),) = ask(llm, [spoiled(reference.export, **changes)], **sampling)
    assert (tokens, reason) == ([], "error")
    assert ask(llm, [good]) == [(reference.greedy("c", [5, 6, 7], count=NEW), "length")]


def test_engine_that_computes_placeholders_gives_no_answers(made: Path) -> None:
    export = Export.read(made / "served")
    sabotaged = engine(made, module="sabotage")
    try:
        (tokens, reason), (bare, bare_reason) = ask(
            sabotaged, [export.place("c", [5, 6, 7]), ({"prompt_token_ids": [5]}, None)]
        )
        assert reason == "error"
        assert len(tokens) <= 1
        assert (len(bare), bare_reason) == (NEW, "length")
        assert ask(sabotaged, [export.place("a", [5])]) == [
            ([], "error")
        ]  # from then on nobody gets a prefix
    finally:
        sabotaged.llm_engine.engine_core.shutdown()
