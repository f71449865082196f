"""What has no exact meaning is refused by name; nothing gives a wrong number in silence."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from oracle import (
    LONG,
    SHORT,
    A,
    B,
    C,
    assert_close,
    bare,
    both_ways,
    every_family,
    generated,
    joined,
    kv_of,
    left_padded,
    logits,
    outcome,
    prefixed,
    step_logits,
    tokens,
)
from transformers import DynamicCache

from families import COMMON, MIXED, TOKENS, VOCAB, randomised, sized_config, tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.attachment import attach, session
from prefixtune.errors import AttachError, ConfigError, PrefixTuneError, UnsupportedModelError
from prefixtune.geometry import Geometry
from prefixtune.prefix import LayerKV

SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
BART: dict[str, Any] = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    decoder_start_token_id=2,
    **TOKENS,
)
MAMBA: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, **TOKENS)
LINEAR: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)
RECURRENT_OR_SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", MAMBA),
    "mamba2": ("mamba2", dict(MAMBA, num_heads=4, head_dim=16, expand=2, n_groups=1)),
    "falcon-mamba": ("falcon_mamba", MAMBA),
    "jamba": ("jamba", dict(mamba_d_state=8, head_dim=None)),
    "bamba": ("bamba", dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_expand=2)),
    "recurrent-gemma": ("recurrent_gemma", dict(lru_width=32, head_dim=None)),
    "rwkv": ("rwkv", dict(attention_hidden_size=32)),
    "qwen3-next": ("qwen3_next", LINEAR),
    "minimax": ("minimax", {}),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "gemma3n": (
        "gemma3n_text",
        dict(
            num_hidden_layers=4,
            layer_types=MIXED * 2,
            num_kv_shared_layers=2,
            laurel_rank=8,
            altup_num_inputs=2,
            activation_sparsity_pattern=None,
        ),
    ),
    "openai-gpt": ("openai-gpt", {}),
    "xlnet": ("xlnet", {}),
}


def made(name: str) -> Any:
    model_type, differing = RECURRENT_OR_SHARED[name]
    if name == "xlnet":
        return randomised(hf.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48))
    return randomised(sized_config(model_type, **differing))


def other_architectures() -> dict[str, Callable[[], Any]]:
    makers: dict[str, Callable[[], Any]] = {name: partial(made, name) for name in RECURRENT_OR_SHARED}
    return makers | {
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        "whisper": lambda: hf.WhisperForCausalLM(hf.WhisperConfig(**BART, max_target_positions=64)),
        "deepseek-v32": lambda: randomised(
            sized_config("deepseek_v32", num_key_value_heads=4, head_dim=None)
        ),
        **{
            f"{kind}-encoder": partial(randomised_encoder, kind)
            for kind in ("bert", "electra", "ernie", "roformer", "roberta")
        },
    }


def randomised_encoder(model_type: str) -> Any:
    """Each of its tokens sees the later ones, so no prefix KV is the KV of a text."""
    return randomised(sized_config(model_type, is_decoder=False, num_hidden_layers=4))


UNSUPPORTED = other_architectures()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_carry_a_prefix_exactly_are_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    base = UNSUPPORTED[name]().eval()
    by_name = f"{type(base).__name__}|{base.config.model_type}"
    with pytest.raises(UnsupportedModelError, match=by_name):
        PrefixModel(base, PrefixConfig(length=3))
    with pytest.raises(UnsupportedModelError, match=by_name), attach(base, kv_of("llama", A)):
        pass
    assert not getattr(base, "prefixtune_attached", False)


def test_model_whose_own_call_cannot_be_followed_is_unsupported_and_not_called_wrongly() -> None:
    class OwnMasks(hf.Gemma2ForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **options: Any) -> Any:
            size = input_ids.shape[1]
            mask = torch.full((1, 1, size, size), torch.finfo(torch.float32).min).triu(1)
            return super().forward(input_ids, dict.fromkeys(MIXED, mask), **options)

    base = OwnMasks(sized_config("gemma2")).eval()
    with pytest.raises(UnsupportedModelError, match=r"OwnMasks.*did not run with a prefix: attention_mask"):
        PrefixModel(base, PrefixConfig(length=3))


def test_tokens_of_images_are_refused_where_the_model_makes_masks_of_them() -> None:
    base, types = bare("gemma3-images"), torch.zeros_like(B)
    with attach(base, kv_of("gemma3-images", A)):
        expected = logits(base, B)
        assert_close(logits(base, B, token_type_ids=types), expected)
        types[0, 3] = 1
        with pytest.raises(AttachError, match=r"token_type_ids.*text only"):
            logits(base, B, token_type_ids=types)


def test_packed_positions_of_several_axes_are_refused_as_those_of_one() -> None:
    base = bare("qwen2.5-vl")
    positions = torch.arange(B.shape[1]).expand(4, 1, -1).clone()
    with attach(base, kv_of("qwen2.5-vl", A)):
        assert_close(logits(base, B, position_ids=positions), logits(base, B))
        positions[:, :, 4:] -= 4
        with pytest.raises(AttachError, match="restart within a row"):
            logits(base, B, position_ids=positions)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_their_texts_have_no_prefix_kv(name: str) -> None:
    torch.manual_seed(0)
    base = UNSUPPORTED[name]().eval()
    with pytest.raises(UnsupportedModelError, match=f"{type(base).__name__}|{base.config.model_type}"):
        PrefixKV.from_tokens(base, A)


@pytest.mark.parametrize("model_type", ["roberta", "data2vec-text", "camembert", "xmod"])
def test_models_whose_positions_do_not_begin_at_zero_are_exact_or_refused(model_type: str) -> None:
    language = {"default_language": "en_XX"} if model_type == "xmod" else {}
    assert_exact_or_refused(
        randomised(sized_config(model_type, is_decoder=True, num_hidden_layers=4, **language))
    )


@pytest.mark.parametrize("floor", [3, 8, 12, 8192])
def test_temperature_by_position_is_exact_or_refused(floor: int) -> None:
    """Llama 4 scales the queries of its layers without rotary by the column in which they stand."""
    config = hf.Llama4TextConfig(
        **COMMON,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        num_local_experts=2,
        num_experts_per_tok=1,
        attn_temperature_tuning=True,
        floor_scale=floor,
        attn_scale=0.5,
    )
    assert_exact_or_refused(randomised(config))


def assert_exact_or_refused(base: Any) -> None:
    """Rows with other prefixes and other pads equal rows alone, unless one of our errors stops them."""
    texts, fronts = (B, C, C), (A, SHORT, LONG)
    ids, mask = left_padded(texts)
    expected = [logits(base, joined(front, text))[0] for front, text in zip(fronts, texts, strict=True)]

    def mixed() -> torch.Tensor:
        with attach(base, [PrefixKV.from_tokens(base, front) for front in fronts]):
            return logits(base, ids, attention_mask=mask)

    found = outcome(mixed, PrefixTuneError)
    if isinstance(found, PrefixTuneError):
        assert len(str(found)) > 40
        return
    for row, text in enumerate(texts):
        size = text.shape[1]
        assert_close(found[row, -size:], expected[row][-size:])


@every_family
def test_up_to_the_position_limit_is_exact_and_beyond_it_exact_or_refused(family: str) -> None:
    limits = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    known = tiny_model(family).config
    base = tiny_model(family, **{name: 16 for name in limits if hasattr(known, name)})
    with attach(base, PrefixKV.from_tokens(base, A)):
        found = {
            length: outcome(partial(logits, base, tokens(length, seed=31)), AttachError)
            for length in (11, 12, 15)
        }
    assert not isinstance(found[11], AttachError)
    for length, answer in found.items():
        if isinstance(answer, AttachError):
            assert "16" in str(answer)
        else:
            whole = joined(A, tokens(length, seed=31))
            assert_close(answer, logits(base, whole)[:, A.shape[1] :])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_text_beyond_learned_positions_is_refused_in_generation_too(family: str) -> None:
    base, kv = bare(family), kv_of(family, A)
    text = tokens(120, seed=32)
    with attach(base, kv):
        assert len(generated(base, text, max_new_tokens=4)[0]) == 4
        with pytest.raises(AttachError, match="128"):
            generated(base, text, max_new_tokens=5)
        with pytest.raises(AttachError, match="128"):
            base(input_ids=tokens(124, seed=33))
    assert_close(logits(base, B), logits(base, joined(B, C))[:, : B.shape[1]])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_that_changes_with_length_is_exact_within_its_first_range(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 20}
        config = hf.Phi3Config(**COMMON, rope_parameters=rope, original_max_position_embeddings=20)
    else:
        config = hf.LlamaConfig(
            **{**COMMON, "max_position_embeddings": 20}, rope_parameters=rope | {"factor": 4.0}
        )
    base = randomised(config)
    kv = PrefixKV.from_tokens(base, A)
    text = tokens(15, seed=34)
    with attach(base, kv):
        found = logits(base, text)
        with pytest.raises(AttachError, match="20"):
            base(input_ids=tokens(16, seed=34))
    assert_close(found, logits(base, joined(A, text))[:, A.shape[1] :])


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "glm4_moe_lite"]
)
def test_latent_attention_that_caches_full_keys_is_exact(family: str) -> None:
    extra = {"num_key_value_heads": 4, "head_dim": 8 if family == "longcat_flash" else None}
    base = randomised(sized_config(family, **extra))
    kv = PrefixKV.from_tokens(base, A)
    with attach(base, kv):
        found, steps = logits(base, B), step_logits(base, B)
    assert_close(found, logits(base, joined(A, B))[:, A.shape[1] :])
    assert_close(steps, step_logits(base, joined(A, B)))


def test_cache_computed_without_the_prefix_is_refused() -> None:
    base, past = bare("llama"), DynamicCache()
    logits(base, B, past_key_values=past)
    with attach(base, kv_of("llama", A)), pytest.raises(AttachError, match="without this prefix"):
        base(input_ids=C, past_key_values=past)
    with pytest.raises(AttachError, match="without this prefix"):
        PrefixModel(base, kv_of("llama", A))(input_ids=C, past_key_values=past)


def test_cache_computed_behind_another_prefix_is_refused() -> None:
    base = bare("llama")
    with attach(base, kv_of("llama", A)):
        past = base(input_ids=B, use_cache=True).past_key_values
    with attach(base, kv_of("llama", SHORT)), pytest.raises(AttachError, match="another prefix"):
        base(input_ids=C, past_key_values=past)
    with attach(base, [None]), pytest.raises(AttachError):
        base(input_ids=C, past_key_values=past)


@pytest.mark.parametrize(
    "make", [lambda past: past, copy.copy, copy.deepcopy], ids=["same", "copy", "deepcopy"]
)
def test_cache_used_after_leaving_attach_is_refused(make: Any) -> None:
    base = bare("llama")
    with attach(base, kv_of("llama", A)):
        past = base(input_ids=B, use_cache=True).past_key_values
    with pytest.raises(AttachError, match="no prefix is attached"):
        base(input_ids=C, past_key_values=make(past))
    with attach(base, kv_of("llama", A)):
        found = logits(base, C, past_key_values=make(past))
    assert_close(found, logits(base, joined(A, B, C))[:, -C.shape[1] :])


@pytest.mark.parametrize("make", [lambda past: past, copy.deepcopy], ids=["same", "deepcopy"])
def test_cache_that_was_emptied_is_anyones(make: Any) -> None:
    base = bare("llama")
    past = hf.StaticCache(config=base.config, max_cache_len=40)
    with attach(base, kv_of("llama", A)):
        base(input_ids=B, past_key_values=past)
    past = make(past)
    past.reset()
    assert_close(logits(base, B, past_key_values=past), logits(base, B))


def test_rows_of_a_mixed_cache_cannot_change_places() -> None:
    base, kv = bare("llama"), kv_of("llama", A)
    with attach(base, [kv, None]):
        past = base(input_ids=B.expand(2, -1), use_cache=True).past_key_values
    with attach(base, [None, kv]), pytest.raises(AttachError, match="another prefix"):
        base(input_ids=C.expand(2, -1), past_key_values=past)


def _stepped(model: PrefixModel, **options: Any) -> None:
    model(input_ids=B, labels=B).loss.backward()
    torch.optim.AdamW(model.prefix.parameters(), lr=0.1, **options).step()


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
@pytest.mark.parametrize(
    "change",
    [
        _stepped,
        partial(_stepped, fused=True),  # counts no parameter's version up, and is Trainer's default
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
    ],
    ids=["step", "fused step", "load"],
)
def test_cache_of_a_prefix_that_has_since_been_trained_is_refused(change: Any, projection: bool) -> None:
    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=3, projection=projection)).eval()
    past = model(input_ids=B, use_cache=True).past_key_values
    change(model)
    with pytest.raises(AttachError, match="another prefix"):
        model(input_ids=C, past_key_values=past)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_cache_of_a_model_is_refused_by_its_copy(make: Any) -> None:
    model = PrefixModel(tiny_model("llama"), kv_of("llama", A))
    other = make(model)
    for each in (model, other):  # each is trained as often as the other
        each(input_ids=B, labels=B).loss.backward()
        torch.optim.SGD(each.prefix.parameters(), lr=1.0).step()
    past = model(input_ids=B, use_cache=True).past_key_values
    with pytest.raises(AttachError, match="another prefix"):
        other(input_ids=C, past_key_values=past)
    assert_close(logits(model, C, past_key_values=past), logits(model, joined(B, C))[:, -C.shape[1] :])


def test_generating_while_training_under_checkpointing_is_refused_with_the_way_out() -> None:
    model = PrefixModel(tiny_model("llama"), kv_of("llama", A))
    model.gradient_checkpointing_enable()
    expected = generated(model.eval(), B)
    with pytest.raises(AttachError, match=r"model\.eval\(\)"):
        generated(model.train(), B)
    assert generated(model.eval(), B) == expected


def test_nested_attach_is_refused_and_the_outer_one_stays() -> None:
    base, kv = bare("llama"), kv_of("llama", A)
    with attach(base, kv):
        with pytest.raises(AttachError, match="already"), attach(base, kv):
            pass
        with pytest.raises(AttachError, match="already"):
            PrefixModel(base, kv)(input_ids=B)
        with pytest.raises(ConfigError, match="attached"):
            PrefixKV.from_tokens(base, A)
        found = logits(base, B)
    assert_close(found, logits(base, joined(A, B))[:, A.shape[1] :])


def test_copy_of_a_model_within_attach_is_refused() -> None:
    base = bare("llama")
    with attach(base, kv_of("llama", A)), pytest.raises(AttachError, match="a copy would keep"):
        copy.deepcopy(base)
    assert_close(logits(copy.deepcopy(base), B), logits(base, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_positions_that_count_pads_are_refused_in_each_precision(dtype: torch.dtype, seed: int) -> None:
    text = {**COMMON, "num_key_value_heads": 4}
    config = hf.FuyuConfig(text_config={**text, "model_type": "persimmon"}, patch_size=4, **text)
    base = randomised(config, seed=seed, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match="does not reproduce the text"):
        PrefixModel(base, PrefixConfig(length=3))


@pytest.mark.parametrize("row", [0, 1])
def test_a_prefix_that_gives_no_numbers_in_one_row_is_refused(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, relative, seen = tiny_model("llama"), session._relative, []

    def one_is_nan(*tensors: torch.Tensor) -> float:
        seen.append(0)
        return float("nan") if len(seen) == row + 1 else relative(*tensors)

    monkeypatch.setattr(session, "_relative", one_is_nan)
    with pytest.raises(UnsupportedModelError, match="nan"):
        PrefixModel(base, PrefixConfig(length=3))


def test_error_within_attach_leaves_the_base_as_it_was() -> None:
    base = bare("llama")
    before = {name: vars(base)[name] for name in vars(base) if not name.startswith("_")}
    expected = logits(base, B)
    with pytest.raises(KeyError), attach(base, kv_of("llama", A)):
        raise KeyError
    assert {name: vars(base)[name] for name in vars(base) if not name.startswith("_")} == before
    assert torch.equal(logits(base, B), expected)


@pytest.mark.parametrize("shape", [(1, 5), (1, 8), (2, 9), (1, 14, 1)])
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with attach(bare("llama"), kv_of("llama", A)) as base, pytest.raises(AttachError, match="attention_mask"):
        base(input_ids=B, attention_mask=torch.ones(shape, dtype=torch.long))


def test_mask_that_counts_the_prefix_is_refused() -> None:
    whole = torch.ones(1, A.shape[1] + B.shape[1], dtype=torch.long)
    with attach(bare("llama"), kv_of("llama", A)) as base, pytest.raises(AttachError, match="attention_mask"):
        base(input_ids=B, attention_mask=whole)


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4], [0, 1, 2, 7, 8, 9]])
def test_positions_that_transformers_reads_as_packed_documents_need_a_mask(positions: list[int]) -> None:
    with attach(bare("llama"), kv_of("llama", A)) as base, pytest.raises(AttachError, match="position_ids"):
        base(input_ids=C, position_ids=torch.tensor([positions]))


@pytest.mark.parametrize("prefixes", [[], None, "kv", [1], [None, "kv"]])
def test_what_is_no_prefix_is_refused(prefixes: Any) -> None:
    with pytest.raises(AttachError, match="PrefixKV"), attach(bare("llama"), prefixes):
        pass


@pytest.mark.parametrize("family", ["bloom", "qwen3", "falcon-mqa"])
def test_prefix_of_another_model_is_refused(family: str) -> None:
    kv = kv_of(family, A)
    with pytest.raises(UnsupportedModelError, match="another base"), attach(bare("llama"), kv):
        pass


@pytest.mark.parametrize("past", [((torch.zeros(1), torch.zeros(1)),), "cache", 3])
def test_what_is_no_cache_is_refused(past: Any) -> None:
    with (
        attach(bare("llama"), kv_of("llama", A)) as base,
        pytest.raises(AttachError, match="past_key_values"),
    ):
        base(input_ids=B, past_key_values=past)


@both_ways
@pytest.mark.parametrize(
    "option", [{"guidance_scale": 1.7}, {"assistant_ensemble_weight": 0.3}, {"assistant_early_exit": 1}]
)
@pytest.mark.parametrize("place", ["call", "config", "model"])
def test_generate_refuses_what_would_not_be_exact(
    way: str, option: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bare("llama")
    before = logits(base, B)
    with prefixed(way, "llama", kv_of("llama", A)) as model:
        given: dict[str, Any] = option
        if place == "config":
            given = {"generation_config": hf.GenerationConfig(max_new_tokens=2, eos_token_id=[], **option)}
        elif place == "model":
            (name, value), given = *option.items(), {}
            monkeypatch.setattr(base.generation_config, name, value)
        with pytest.raises(AttachError, match=next(iter(option))):
            model.generate(B, attention_mask=torch.ones_like(B), **given)
        monkeypatch.undo()
        generated(model, B, guidance_scale=1.0)
    assert torch.equal(logits(base, B), before)  # an early exit leaves out layers, and would after an error


def test_continuous_batching_of_transformers_is_refused() -> None:
    with attach(bare("llama"), kv_of("llama", A)) as base, pytest.raises(AttachError, match="serve"):
        base.generate_batch([B[0].tolist()])


def test_a_model_whose_own_code_asserts_is_refused_by_name() -> None:
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2)
    heads = dict(num_encoder_attention_heads=4, num_decoder_attention_heads=4, ngram=2)
    config = hf.ProphetNetConfig(**sizes, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48, **TOKENS)
    base = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="ProphetNet"):
        PrefixModel(base, PrefixConfig(length=3))


def test_a_model_that_reads_values_is_told_to_need_its_weights() -> None:
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(hf.BioGptConfig(**COMMON))
    with pytest.raises(UnsupportedModelError, match="without its weights"):
        Geometry.probe(base)


def test_layers_without_keys_and_values_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers 0 \(linear_attention\).*have none"):
        PrefixModel(made("qwen3-next"), PrefixConfig(length=3))


def test_models_that_name_their_padding_are_looked_at_without_weights_too() -> None:
    sizes = dict(COMMON, head_dim=16, global_head_dim=16, sliding_window=6, layer_types=MIXED)
    shared = dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    towers = dict(vision_config=None, audio_config=None)
    config = hf.AutoConfig.for_model("gemma4", text_config=sizes | shared, **towers)
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(config)
    assert Geometry.probe(base).layers == Geometry.probe(randomised(config)).layers


@pytest.mark.parametrize("window", [4, 128])
def test_a_cache_that_forgets_what_attention_sees_is_refused(window: int) -> None:
    base = randomised(sized_config("moshi", ffn_dim=48, num_codebooks=2, sliding_window=window))
    if window < base.config.max_position_embeddings:
        with pytest.raises(UnsupportedModelError, match=r"moshi.*forgets what left its window"):
            PrefixKV.from_tokens(base, A)
    else:
        with attach(base, PrefixKV.from_tokens(base, A)):
            answer = generated(base, B)
        assert answer == generated(base, joined(A, B))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prefix_longer_than_the_learned_positions_is_refused(family: str) -> None:
    base = bare(family)
    for length in (128, 129):
        with pytest.raises(ConfigError, match="128 positions"):
            PrefixModel(base, PrefixConfig(length=length, init="random"))
    with pytest.raises(ConfigError, match="129 tokens do not fit into the 128 positions"):
        PrefixKV.from_tokens(base, tokens(129, seed=3))
    assert PrefixModel(base, PrefixConfig(length=127, init="random")).geometry.max_positions == 128


def test_loss_of_trl_which_would_run_without_the_prefix_is_refused() -> None:
    model = PrefixModel(bare("llama"), PrefixConfig(length=3))

    def fused(self: Any, *, labels: Any, fused_lm_head: bool, **batch: Any) -> Any:  # as in trl 1.16
        return self.base_model(**batch, use_cache=False)

    model.forward = types.MethodType(fused, model)  # type: ignore[method-assign]
    model.add_model_tags(["sft"])
    with pytest.raises(AttachError, match=r"compute_loss = transformers\.Trainer\.compute_loss"):
        model(input_ids=B, labels=B, fused_lm_head=True)


def test_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    code = """
from prefixtune import PrefixModel, attach
assert callable(attach), attach
import prefixtune.model, prefixtune
assert callable(prefixtune.attach), prefixtune.attach
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PrefixKV.from_tokens(bare("llama"), torch.tensor([[VOCAB]])), f"token {VOCAB} is not one"),
        (lambda: PrefixKV.from_tokens(bare("llama"), torch.tensor([[-1]])), "token -1 is not one"),
        (lambda: PrefixKV.from_tokens(bare("llama"), [[5, 6]]), r"expected a tensor \[1, P\]; got list"),
        (lambda: PrefixKV(tuple(_without_tokens(kv_of("llama", A)))), "at least one virtual token"),
    ],
    ids=["beyond", "negative", "list", "no tokens"],
)
def test_what_cannot_be_a_prefix_is_a_clear_error(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def _without_tokens(kv: PrefixKV) -> list[LayerKV]:
    return [LayerKV(layer.key[:, :0], layer.value[:, :0]) for layer in kv.layers]
