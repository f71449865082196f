"""Tiny random models of every architecture family that the laws run on. Knows no prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from packaging.version import Version

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
    "cohere2": lambda: hf.Cohere2Config(**COMMON, sliding_window=6, layer_types=MIXED, logit_scale=1.0),
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

# Names under which architectures hold the same sizes, beyond those of COMMON.
SIZES: dict[str, Any] = dict(
    **COMMON,
    head_dim=8,
    kv_channels=8,
    init_std=0.25,
    sliding_window=6,
    rotary_dim=4,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=128,
    d_model=32,
    n_layers=2,
    n_heads=4,
    num_heads=4,
    num_layers=2,
    attention_heads=4,
    ffn_dim=48,
    dff=48,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    shared_intermediate_size=48,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
)
MLA = dict(num_key_value_heads=4, head_dim=None)
FALCON = dict(head_dim=None, intermediate_size=None, num_key_value_heads=None)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
GEMMA3N = dict(layer_types=MIXED, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=None)


def _rope(kind: str, **extra: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **extra))


# More architectures, on which the shorter laws run: name -> (model_type, what differs from SIZES).
EXTRA_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            *("apertus", "arcee", "biogpt", "bitnet", "cohere", "ctrl", "diffllama", "doge", "ernie4_5"),
            *("flex_olmo", "glm", "glm4", "granite", "granitemoeshared", "gpt_neox_japanese", "helium"),
            *("hunyuan_v1_dense", "jetmoe", "ministral", "nemotron", "olmo", "olmoe", "phi", "phimoe"),
            *("qwen3_moe", "seed_oss", "stablelm", "starcoder2", "vaultgemma", "xglm"),
        )
    },
    "bert-decoder": ("bert", dict(is_decoder=True)),
    "bloom-slow-but-exact": ("bloom", dict(slow_but_exact=True, pretraining_tp=2)),
    "bloom-six-heads": ("bloom", dict(n_head=6, hidden_size=48)),
    "deepseek-v2": ("deepseek_v2", MLA),
    "deepseek-v3": ("deepseek_v3", MLA),
    "exaone4": ("exaone4", dict(sliding_window_pattern=2)),
    "falcon-new-alibi": (
        "falcon",
        dict(**FALCON, new_decoder_architecture=True, num_kv_heads=2, alibi=True),
    ),
    "falcon-mqa-alibi": ("falcon", dict(**FALCON, multi_query=True, alibi=True)),
    "gemma3-images": (
        "gemma3",
        dict(
            text_config=dict(COMMON, head_dim=16, sliding_window=6, layer_types=MIXED),
            vision_config=dict(VISION, num_attention_heads=2, image_size=28, patch_size=14),
            mm_tokens_per_image=4,
            image_token_id=VOCAB - 1,
        ),
    ),
    "gemma3n": ("gemma3n_text", dict(**GEMMA3N, num_kv_shared_layers=0)),
    "gpt2-scaled": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=8)),
    "llama-llama3": (
        "llama",
        _rope(
            "llama3",
            factor=4.0,
            original_max_position_embeddings=8,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "ministral3": (
        "ministral3",
        _rope("yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.5),
    ),
    "modernbert-decoder": (
        "modernbert-decoder",
        dict(local_attention=12, head_dim=None, sliding_window=None),
    ),
    "mpt-without-alibi": ("mpt", dict(attn_config=dict(alibi=False))),
    "olmo3": ("olmo3", dict(layer_types=MIXED)),
    "opt-post-norm": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "persimmon": ("persimmon", dict(qk_layernorm=True)),
    "qwen2-moe": ("qwen2_moe", dict(use_sliding_window=True, max_window_layers=1)),
    "qwen2.5-vl": (
        "qwen2_5_vl",
        dict(
            text_config=dict(
                COMMON,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]),
            ),
            vision_config=dict(VISION, depth=1, num_heads=2, out_hidden_size=32),
        ),
    ),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, use_sliding_window=True)),
}
EXTRA = tuple(EXTRA_CONFIGS)


def sized_config(model_type: str, **extra: Any) -> Any:
    """A tiny configuration of any architecture; None in `extra` leaves a size at its default."""
    default = hf.AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    sizes |= extra
    return hf.AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if v is not None})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random causal language model of the family, frozen, in evaluation mode."""
    if family in CONFIGS:
        config = CONFIGS[family]()
    else:
        model_type, differing = EXTRA_CONFIGS[family]
        config = sized_config(model_type, **differing)
    return randomised(config, seed=seed, dtype=dtype, **extra)


def randomised(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A model of any configuration with random weights and biases, frozen, in evaluation mode."""
    for name, value in extra.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    # transformers 5.17: fused attention leaves out Gemma 2's cap, and shows Doge the tokens to come
    eager = config.model_type in ("gemma2", "doge") and Version(hf.__version__) < Version("5.23")
    chosen = {"attn_implementation": "eager"} if eager else {}
    causal = type(config) in hf.AutoModelForCausalLM._model_mapping
    auto = hf.AutoModelForCausalLM if causal else hf.AutoModelForImageTextToText
    model = auto.from_config(config, **chosen).to(dtype)
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name and "ln" not in name:
            parameter.data.normal_(0, 0.1)  # biases start at zero, and would hide errors
        elif not torch.isfinite(parameter).all():
            parameter.data.normal_(0, 0.1)  # some architectures leave parameters uninitialised
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # runs to the full length, so that all tokens are compared
    return model.eval().requires_grad_(False)


def stir_norms(base: Any) -> None:
    """Weights of norms are 1 in a new model, which would hide one that is left out."""
    generator = torch.Generator().manual_seed(4)
    for name, weight in base.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator).to(weight)
