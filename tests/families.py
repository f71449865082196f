"""Tiny random models of every architecture family that the laws run on. Knows no prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 96
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.25,  # large enough that a lost prefix moves the logits far
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
MIXED = ["sliding_attention", "full_attention"]


def _gpt(**extra: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCAB, initializer_range=0.25, **TOKENS, **extra)


CONFIGS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: hf.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25, **TOKENS
    ),
    "gpt2": lambda: hf.GPT2Config(**_gpt(n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "qwen2": lambda: hf.Qwen2Config(**COMMON),
    "qwen2-sliding": lambda: hf.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**COMMON, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**COMMON, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**COMMON, head_dim=16, sliding_window=6, layer_types=MIXED),
    "gemma3": lambda: hf.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=6, layer_types=MIXED),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=None),
    "mistral-sliding": lambda: hf.MistralConfig(**COMMON, sliding_window=6),
    "mixtral": lambda: hf.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.25,
        **TOKENS,
    ),
    "phi3": lambda: hf.Phi3Config(**COMMON),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=False,
        parallel_attn=False,
        alibi=False,
        initializer_range=0.25,
        **TOKENS,
    ),
    "falcon-mqa": lambda: hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        alibi=False,
        initializer_range=0.25,
        **TOKENS,
    ),
    "falcon-new": lambda: hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
        initializer_range=0.25,
        **TOKENS,
    ),
    "falcon-alibi": lambda: hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=False,
        parallel_attn=False,
        alibi=True,
        initializer_range=0.25,
        **TOKENS,
    ),
    "gpt-bigcode": lambda: hf.GPTBigCodeConfig(
        **_gpt(n_embd=32, n_layer=2, n_head=4, n_positions=128, multi_query=True)
    ),
    "gpt-bigcode-mha": lambda: hf.GPTBigCodeConfig(
        **_gpt(n_embd=32, n_layer=2, n_head=4, n_positions=128, multi_query=False)
    ),
    "gptj": lambda: hf.GPTJConfig(**_gpt(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4)),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=128,
        initializer_range=0.25,
        **TOKENS,
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, initializer_range=0.25, **TOKENS
    ),
    "olmo2": lambda: hf.Olmo2Config(**COMMON),
    "gpt-oss": lambda: hf.GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=6,
        layer_types=MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "cohere2": lambda: hf.Cohere2Config(**COMMON, sliding_window=6, layer_types=MIXED),
    "llama4": lambda: hf.Llama4TextConfig(
        **COMMON,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "codegen": lambda: hf.CodeGenConfig(
        **_gpt(n_embd=32, n_layer=2, n_head=4, n_positions=128, n_ctx=128, rotary_dim=4)
    ),
}
FAMILIES = tuple(CONFIGS)


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random causal language model of the family, frozen, in evaluation mode."""
    config = CONFIGS[family]()
    for name, value in extra.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype)
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name and "ln" not in name:
            parameter.data.normal_(0, 0.1)  # biases start at zero, and would hide errors
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # runs to the full length, so that all tokens are compared
    return model.eval().requires_grad_(False)
