"""A connector of an engine that forgets to ask it for prefix c."""

from __future__ import annotations

from typing import Any

from prefixtune_vllm.connector import PrefixConnector


class Sabotaged(PrefixConnector):
    """Promises nothing for prefix c, so that its placeholders are computed."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        params = request.kv_transfer_params or {}
        sabotaged = params.get("prefixtune", {}).get("name") == "c"
        return (0, False) if sabotaged else found
