"""The connector without an engine: how vLLM must be set up, or it does not start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixtune_vllm import PrefixError

pytestmark = pytest.mark.vllm

GROUP = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=32))


def connector(place: Path, *, groups: int = 1, speculative: Any = None, **transfer: Any) -> Any:
    """A connector in the scheduler of a vLLM that is set up as serve.sh does, with changes."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from prefixtune_vllm.connector import PrefixConnector

    settings = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefixtune_vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"export": str(place / "served")},
        **transfer,
    }
    config = SimpleNamespace(kv_transfer_config=KVTransferConfig(**settings), speculative_config=speculative)
    cache = SimpleNamespace(kv_cache_groups=[GROUP] * groups)
    return PrefixConnector(config, KVConnectorRole.SCHEDULER, cache)


def test_settings_of_serve_sh_are_accepted(made: Path) -> None:
    connector(made)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kv_load_failure_policy": "recompute"}, "recomputed placeholders are garbage"),
        ({"speculative": SimpleNamespace(method="ngram")}, "speculative decoding"),
        ({"groups": 2}, "disable-hybrid-kv-cache-manager"),
        ({"kv_connector_extra_config": {}}, "the folder of the export"),
    ],
)
def test_settings_by_which_placeholders_would_be_computed_are_refused(
    made: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(PrefixError, match=why):
        connector(made, **changes)
