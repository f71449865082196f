"""Trained prefixes on vLLM: a KV connector, and a middleware that gives each prefix a model name.

`prefixtune export --to vllm` writes what the two need, and the command that starts vLLM with them. Offline:

    exported = Export.read("my-export")
    prompt, extra = exported.place("mails", token_ids)
    llm.generate([prompt], SamplingParams(temperature=0, extra_args=extra))
"""

from __future__ import annotations

from prefixtune_vllm.errors import PrefixError
from prefixtune_vllm.export import Export
from prefixtune_vllm.middleware import PrefixMiddleware

__all__ = ["Export", "PrefixError", "PrefixMiddleware"]
__version__ = "0.1.0"
