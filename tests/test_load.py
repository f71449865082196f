"""Laws of load: what is found is what was saved; what cannot be used says why, and nothing is made up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from families import tiny_model
from prefixtune import load
from prefixtune.demo import CACHE_VARIABLE, demo_copy, new_demo_copy
from prefixtune.errors import ConfigError, ModelError, OutOfMemoryError
from prefixtune.fingerprint import Fingerprint
from prefixtune.gguf_file import check_read_whole, set_special_tokens
from prefixtune.load import empty_model, load_base, load_tokenizer, weight_files
from prefixtune.precision import choose_dtype, device_of
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


def test_tensors_that_the_config_has_no_place_for_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_base(str(folder))
    assert "no place" not in capsys.readouterr().err
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_base(str(folder))
    told = capsys.readouterr().err
    assert "1 of its tensors" in told
    assert "q_proj.bias" in told


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


@pytest.mark.parametrize(("place", "expected"), [("cuda:0", "bfloat16"), ("cuda:1", "float32")])
def test_a_gpu_that_emulates_bfloat16_is_used_in_float32(
    place: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first GPU is an A100 and the current one, the second a T4."""
    current = [0]

    @contextmanager
    def chosen(device: torch.device) -> Iterator[None]:
        current[0] = device.index
        yield
        current[0] = 0

    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device", chosen)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    gpus = [SimpleNamespace(major=8, minor=0), SimpleNamespace(major=7, minor=5)]
    monkeypatch.setattr("torch.cuda.get_device_properties", gpus.__getitem__)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    dtype, reason = choose_dtype("auto", torch.device(place))
    assert dtype == getattr(torch, expected)
    assert reason.startswith(f"{expected}: this GPU has ")


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


def test_a_processor_with_a_number_is_the_processor() -> None:
    assert device_of("cpu:7") == torch.device("cpu") != torch.device("cpu:7")


def test_full_memory_is_not_told_as_a_damaged_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(OutOfMemoryError, match="its weights cannot be loaded: the memory is full") as told:
        load_base(str(folder))
    assert "--quantize" in str(told.value.hint)


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


def test_weight_files_are_those_that_are_loaded(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert weight_files(str(folder)) == [folder / "model.safetensors"]
    load_base(str(folder))


def test_empty_model_has_the_parameters_and_no_weights(folder: Path) -> None:
    whole = load_base(str(folder)).model
    for name in (folder, folder / "config.json"):
        empty = empty_model(str(name))
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        shapes = {name: p.shape for name, p in empty.named_parameters()}
        assert shapes == {name: p.shape for name, p in whole.named_parameters()}


def reading_gguf_once(own: Any) -> Any:
    """Half a minute, each time the same."""
    known: list[Any] = []

    def read(source: Any, *args: Any, **more: Any) -> Any:
        if source.gguf_file is None:
            return own(source, *args, **more)
        if not known:
            known.append(own(source, *args, **more))
        return known[0]

    return read


@pytest.mark.slow
def test_demo_is_kept_as_a_copy_of_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_read_model", "_read_tokenizer"):
        monkeypatch.setattr(load, name, reading_gguf_once(getattr(load, name)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))  # where nothing can be written
    read = load_base("demo", dtype="float32")
    assert CACHE_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    kept = load_base("demo", dtype="float32")
    assert capsys.readouterr().err == ""
    (copy,) = (tmp_path / "cache").iterdir()

    assert_same(read.model.state_dict(), kept.model.state_dict())
    assert_same(dict(read.model.named_buffers()), dict(kept.model.named_buffers()))
    configs = [base.model.config.to_dict() | {"architectures": None} for base in (read, kept)]
    assert configs[0] == configs[1]
    assert read.model.generation_config.to_dict() == kept.model.generation_config.to_dict()
    assert Fingerprint.of(read.model) == Fingerprint.of(kept.model)
    tokenizers = [base.tokenizer for base in (read, kept)]
    assert tokenizers[0].backend_tokenizer.to_str() == tokenizers[1].backend_tokenizer.to_str()
    for about in ("chat_template", "special_tokens_map", "padding_side"):
        assert getattr(tokenizers[0], about) == getattr(tokenizers[1], about)
    assert (read.name, kept.name, kept.model.config._name_or_path) == ("demo", "demo", "demo")

    half = load_base("demo", dtype="bfloat16").model  # from the copy
    assert_same(half.state_dict(), {n: t.to(torch.bfloat16) for n, t in read.model.state_dict().items()})
    assert sum(p.numel() for p in empty_model("demo").parameters()) == 134_515_008
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_base("demo", dtype="float32")
    assert f"delete {copy}" in str(caught.value)


def test_environments_share_the_copy_of_one_file(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name / "a.gguf" for name in ("one", "same", "other"))
    for file, content in ((one, b"1"), (same, b"1"), (other, b"2")):
        file.parent.mkdir()
        file.write_bytes(content)
    os.utime(same, (0, 0))
    assert demo_copy(one) == demo_copy(same) != demo_copy(other)


def test_begin_and_end_of_a_text_are_those_of_the_gguf_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    tokenizer = byte_tokenizer()
    begin, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    tokenizer.eos_token = "<|im_start|>"  # as transformers 5.17 reads the file
    set_special_tokens(tokenizer, tmp_path / "a.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("change", "unread"),
    [
        (lambda writer: None, None),
        (lambda writer: writer.add_rope_freq_base(10_000.0), None),
        (lambda writer: writer.add_rope_freq_base(500_000.0), "llama.rope.freq_base"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), None),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.full(4, 2, np.float32)),
            "rope_freqs.weight",
        ),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), "32 of its numbers"),
    ],
    ids=["whole", "base", "other base", "no scaling", "scaling", "factors of 1", "factors", "biases"],
)
def test_a_gguf_file_of_which_something_would_be_left_out_is_refused(
    change: Any, unread: str | None, tmp_path: Path
) -> None:
    model, file = tiny_model("llama"), tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("all.weight", np.zeros(sum(p.numel() for p in model.parameters()), np.float32))
    change(writer)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    if unread is None:
        check_read_whole(model, file)
    else:
        with pytest.raises(ModelError, match=f"does not read {unread}"):
            check_read_whole(model, file)


def test_a_gguf_file_is_looked_at_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny_model("llama"), tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("rope_freqs.weight", np.full(4, 2, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    report = {name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, report))
    with pytest.raises(ModelError, match="does not read rope_freqs"):
        load_base(str(file), dtype="float32")


@pytest.mark.slow
def test_the_demo_ends_a_turn_as_its_model_does() -> None:
    base = load_base("demo", dtype="float32")
    assert base.tokenizer.eos_token == base.tokenizer.pad_token == "<|im_end|>"
    assert base.tokenizer.eos_token_id == base.model.generation_config.eos_token_id


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_copy_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    copy = tmp_path / "cache" / "copy"
    with suppress(KeyboardInterrupt), new_demo_copy(copy) as half:
        (half / "config.json").write_text("{")
        raise KeyboardInterrupt
    assert [*copy.parent.iterdir()] == []
    with new_demo_copy(copy) as late:
        (late / "config.json").write_text("late")
        with new_demo_copy(copy) as first:
            (first / "config.json").write_text("first")
        assert (copy / "config.json").read_text() == "first"
    assert [*copy.parent.iterdir()] == [copy]
    assert (copy / "config.json").read_text() == "first"
