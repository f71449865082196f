"""A tiny random Llama with a byte tokenizer, random prefixes for it, and an export of them. No downloads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixtune.config import PrefixConfig
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import Geometry
from prefixtune.interop.vllm import Exported, export
from prefixtune.load import load_base
from prefixtune.prefix import LayerKV, PrefixKV
from prefixtune.storage import save_prefix

# on and off the engine's blocks of 32; each length twice, so that only the content tells the two apart
LENGTHS = dict(zip("abcdefghijklmnop", (32, 64, 20, 5, 200, 1, 33, 128) * 2, strict=True))
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPARE = 12  # rows of the embedding beyond the tokenizer's tokens
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(*, chat_template: str | None = CHAT) -> Any:
    """Bytes and four special tokens; a text begins with <s>."""
    vocabulary = {token: id_ for id_, token in enumerate(SPECIALS)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    found.chat_template = chat_template
    return found


def write_base(folder: Path, *, seed: int = 0, spare: int = SPARE, tokenizer: Any = None) -> Path:
    """A model folder, as save_pretrained writes it."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_kv(geometry: Geometry, length: int, *, seed: int) -> PrefixKV:
    """[H, P, D] noise, loud enough to change every answer."""
    generator = torch.Generator().manual_seed(seed)

    def noise(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, length, dim, generator=generator) * 1.5

    return PrefixKV(
        tuple(
            LayerKV(noise(shape.kv_heads, shape.key_dim), noise(shape.kv_heads, shape.value_dim))
            for shape in geometry.layers
        )
    )


def write_prefix(folder: Path, model: Any, length: int, *, seed: int, template: str | None = "chat") -> Path:
    """A prefix folder for a loaded model."""
    geometry = Geometry.probe(model)
    return save_prefix(
        folder,
        random_kv(geometry, length, seed=seed),
        config=PrefixConfig(length=length),
        geometry=geometry,
        fingerprint=Fingerprint.of(model),
        base_name=str(model.config._name_or_path),
        extra={"template": template},
    )


def write_export(place: Path, **options: Any) -> Exported:
    """place/model, place/made/NAME for each of LENGTHS, and place/served."""
    write_base(place / "model")
    base = load_base(str(place / "model"), dtype="float32", device="cpu")
    prefixes = {
        name: write_prefix(place / "made" / name, base.model, length, seed=seed)
        for seed, (name, length) in enumerate(LENGTHS.items(), start=1)
    }
    return export(
        base, prefixes, place / "served", source=str(place / "model"), served_name="tiny", **options
    )


def retrain(place: Path, name: str, *, seed: int, length: int) -> None:
    """Another prefix under the same name, exported into the same folder."""
    model = str((place / "model").resolve())
    base = load_base(model, dtype="float32", device="cpu")
    made = place / "made" / name
    shutil.rmtree(made, ignore_errors=True)
    write_prefix(made, base.model, length, seed=seed)
    export(base, {name: made}, place / "served", source=model, served_name="tiny")
