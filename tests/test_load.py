"""Laws of load: what is found is what was saved; what cannot be used says why, and nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from families import tiny_model
from prefixtune.errors import ConfigError, ModelError
from prefixtune.load import empty_model, load_base, load_tokenizer
from tokenizers_for_tests import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with its tokenizer, as save_pretrained writes it."""
    tiny_model("llama", vocab_size=400).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refused(name: Any, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_base(str(name), **options)
    assert str(name) in caught.value.message
    assert len(str(caught.value)) < 600
    return caught.value


def test_loaded_base_is_the_saved_one(folder: Path) -> None:
    base = load_base(str(folder), dtype="float32")
    saved = load_file(folder / "model.safetensors")
    weights = dict(base.model.named_parameters())
    assert all(torch.equal(weights[name].cpu(), tensor) for name, tensor in saved.items())
    assert not base.model.training
    assert base.name == str(folder)


def test_folder_with_weights_only_has_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)  # for gpt2, transformers makes up an empty tokenizer
    assert load_base(str(tmp_path)).tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_padding_token_is_the_end_token_unless_there_is_one(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    own = byte_tokenizer()
    own.pad_token = "<s>"
    own.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token == "<s>"


def test_missing_tensors_are_refused_not_filled_with_random_numbers(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refused(folder).message


def test_weights_of_another_shape_are_refused_by_name_and_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    assert "[32, 48], expected [32, 56]" in refused(folder).message


@pytest.mark.parametrize("keep", [0, 4, 3000])
def test_cut_weights_are_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert refused(folder).hint == "fetch or save the model again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{bad", "not a valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "nothing-of-this-name"}', "nothing-of-this-name"),
        ('{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "configuration"),
    ],
)
def test_broken_config_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        empty_model(str(tmp_path))
    refused(tmp_path)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    hf.T5Config(d_model=16, num_layers=1, d_ff=16, num_heads=2, d_kv=8).save_pretrained(tmp_path)
    assert "encoder-decoder" in refused(tmp_path).message
    with pytest.raises(ModelError, match="encoder-decoder"):
        empty_model(str(tmp_path))


def test_names_that_are_no_models_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "prefix.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.gguf").write_bytes(b"no magic" * 9)
    assert "--prefix" in str(refused(tmp_path / "prefix"))
    assert "bad.gguf" in str(refused(tmp_path))
    assert "GGUF" in refused(tmp_path / "bad.gguf").message
    assert ".gguf file" in refused(tmp_path / "notes.txt").message
    for missing in ("nothing.gguf", "nothing/", "no/folder/here"):
        assert "no such folder or file" in refused(str(tmp_path / missing)).message
    assert "name that the hub could have" in refused("two words").message


def test_hub_name_out_of_reach_is_one_error_without_waiting() -> None:
    assert "hub" in refused("nobody-prefixtune-knows/nothing-of-this-name").message


def test_dtype_is_what_was_asked_and_auto_says_why(folder: Path) -> None:
    assert load_base(str(folder), dtype="float32").model.dtype == torch.float32
    assert load_base(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    auto = load_base(str(folder))
    assert auto.dtype_reason.startswith(str(auto.model.dtype).removeprefix("torch."))
    with pytest.raises(ConfigError, match="float8"):
        load_base(str(folder), dtype="float8")


def test_scores_are_capped_whatever_attention_the_library_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("gemma2", attn_logit_softcapping=0.5).save_pretrained(tmp_path)
    monkeypatch.setattr(hf.Gemma2PreTrainedModel, "_supports_sdpa", True)  # as transformers 5.17 has it
    ids = torch.arange(3, 12)[None]
    base = load_base(str(tmp_path), dtype="float32", device="cpu").model
    capped = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(base(ids).logits, capped(ids).logits)


def test_unusable_device_is_a_wrong_option(folder: Path) -> None:
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError, match=device):
            load_base(str(folder), device=device)


def test_loading_leaves_transformers_as_loud_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base(str(folder))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights" not in err


def test_empty_model_has_the_parameters_and_no_weights(folder: Path) -> None:
    whole = load_base(str(folder)).model
    for name in (folder, folder / "config.json"):
        empty = empty_model(str(name))
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        shapes = {name: p.shape for name, p in empty.named_parameters()}
        assert shapes == {name: p.shape for name, p in whole.named_parameters()}


@pytest.mark.slow
def test_demo_can_be_saved_and_loaded_as_any_model(tmp_path: Path) -> None:
    base = load_base("demo", dtype="bfloat16")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)  # type: ignore[union-attr]
    again = load_base(str(tmp_path), dtype="bfloat16")
    ids = torch.tensor([again.tokenizer("The sky is")["input_ids"]])  # type: ignore[misc]
    assert torch.equal(base.model(ids).logits, again.model(ids).logits)
    assert base.model.config._name_or_path == "demo"
    assert sum(p.numel() for p in empty_model("demo").parameters()) == 134_515_008
