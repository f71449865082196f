"""A connector of an engine that forgets to ask it for some requests."""

from __future__ import annotations

from typing import Any

from prefixtune_vllm import connector

FORGOTTEN = [5, 6, 7]  # how the text of such a request ends; no canary does


class PrefixConnector(connector.PrefixConnector):
    """Promises nothing for a forgotten request, so that its placeholders are computed."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return (0, False) if request.prompt_token_ids[-3:] == FORGOTTEN else found
