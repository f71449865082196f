"""vLLM: what plugins/vllm needs to serve prefixes of one base model."""

from prefixtune.interop.vllm.export import Exported, export

__all__ = ["Exported", "export"]
