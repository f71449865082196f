"""A prefix comes back from disk to the bit, on its own base only, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import A, B, bare, every_family, logits, outcome
from torch import Tensor
from transformers import Trainer, TrainingArguments

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.errors import StorageError, UnsupportedModelError
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import Geometry
from prefixtune.storage import check_base, load_prefix, read_info

both_parameterisations = pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])

some_or_all_layers = pytest.mark.parametrize("layers", [None, "top:1"], ids=["all-layers", "top-layer"])


def trained(
    family: str, *, projection: bool = False, layers: str | None = None, seed: int = 0
) -> PrefixModel:
    """A prefix after one optimizer step, so that it is nothing that a start could give."""
    base = bare(family)  # made before the seed is set: making it sets another
    torch.manual_seed(seed)
    model = PrefixModel(base, PrefixConfig(length=5, projection=projection, layers=layers))
    gradients(model)
    torch.optim.AdamW(model.parameters(), lr=0.05).step()
    model.zero_grad()
    return model.eval()


def gradients(model: PrefixModel) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=B, labels=B).loss.backward()
    return [parameter.grad.clone() for parameter in model.prefix.parameters()]


def tensors(model: PrefixModel) -> list[Tensor]:
    return [tensor for layer in model.prefix.bake().layers for tensor in (layer.key, layer.value)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every_family
@both_parameterisations
@some_or_all_layers
def test_saved_prefix_serves_and_trains_as_before_to_the_bit(
    family: str, projection: bool, layers: str | None, tmp_path: Path
) -> None:
    model = trained(family, projection=projection, layers=layers)
    model.save_pretrained(tmp_path / "prefix")
    served = PrefixModel.from_pretrained(bare(family), tmp_path / "prefix")
    assert same(tensors(served), tensors(model))
    assert torch.equal(logits(served, B), logits(model, B))
    assert not any(parameter.requires_grad for parameter in served.parameters())
    again = PrefixModel.from_pretrained(bare(family), tmp_path / "prefix", is_trainable=True).eval()
    assert same(tensors(again), tensors(model))
    assert same(list(again.prefix.parameters()), list(model.prefix.parameters()))
    assert again.prefix.config == model.prefix.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert same(gradients(again), gradients(model))
    assert min(gradient.abs().max().item() for gradient in gradients(again)) > 0


def test_a_prefix_that_trains_on_has_no_figures_of_its_first_training(tmp_path: Path) -> None:
    model = trained("llama", projection=False, layers=None)
    model.record |= {"template": "human", "training": {"steps": 3}}
    model.save_pretrained(tmp_path / "prefix")
    for is_trainable, kept in ((False, {"steps": 3}), (True, None)):
        load(tmp_path / "prefix", is_trainable=is_trainable).save_pretrained(tmp_path / "again")
        info = read_info(tmp_path / "again")
        assert (info["template"], info["training"]) == ("human", kept)


@every_family
@both_parameterisations
@some_or_all_layers
def test_state_dict_holds_the_prefix_only_and_restores_it(
    family: str, projection: bool, layers: str | None
) -> None:
    model, other = (trained(family, projection=projection, layers=layers, seed=seed) for seed in (0, 1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(name.startswith("prefix.") for name in state)
    assert len(state) == len([*model.prefix.parameters(), *model.prefix.buffers()])
    assert not same(tensors(other), tensors(model))
    other.load_state_dict(state)
    assert same(tensors(other), tensors(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(state.items())[1:]))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "prefix.unknown": torch.zeros(1)})


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_state_of_other_layers_is_refused(projection: bool) -> None:
    lower, upper = (trained("llama", projection=projection, layers=layers) for layers in ("0", "1"))
    with pytest.raises(RuntimeError, match="frozen"):
        upper.load_state_dict(lower.state_dict())


def test_folder_from_before_layers_could_be_chosen_trains_in_all_of_them(folder: Path) -> None:
    info = json.loads((folder / "prefix.json").read_text())
    assert info["config"].pop("layers") is None
    expected = load(folder)
    (folder / "prefix.json").write_text(json.dumps(info))
    found = load(folder)
    assert found.prefix.config == expected.prefix.config
    assert same(list(found.prefix.parameters()), list(expected.prefix.parameters()))


def test_folder_that_names_layers_which_its_base_has_not_is_refused(folder: Path) -> None:
    info = json.loads((folder / "prefix.json").read_text())
    info["config"]["layers"] = "top:3"
    (folder / "prefix.json").write_text(json.dumps(info))
    for is_trainable in (False, True):
        with pytest.raises(StorageError, match="the model has 2 layers"):
            load(folder, is_trainable=is_trainable)


def test_projection_of_other_layers_than_the_folder_names_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    trained("llama", projection=True, layers="0").save_pretrained(folder)
    info = json.loads((folder / "prefix.json").read_text())
    info["config"]["layers"] = "1"  # of the same shape
    (folder / "prefix.json").write_text(json.dumps(info))
    with pytest.raises(StorageError, match="do not fit"):
        load(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained("llama", projection=True).save_pretrained(tmp_path / "prefix")
    return tmp_path / "prefix"


def load(folder: Path, base: Any = None, *, is_trainable: bool = True) -> PrefixModel:
    return PrefixModel.from_pretrained(base or bare("llama"), folder, is_trainable=is_trainable)


def test_base_with_other_weights_is_refused(folder: Path) -> None:
    with pytest.raises(StorageError, match="other weights"):
        load(folder, tiny_model("llama", seed=1))


@pytest.mark.parametrize("change", [0.05, -0.05])
def test_base_with_one_changed_matrix_is_refused(folder: Path, change: float) -> None:
    base = tiny_model("llama")
    base.get_input_embeddings().weight.data.add_(change)
    with pytest.raises(StorageError, match="other weights"):
        load(folder, base)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_whichever_weight_of_a_base_changed_it_is_another(family: str) -> None:
    base = tiny_model(family)
    before = Fingerprint.of(base)
    for weight in base.parameters():
        kept = weight.data.clone()
        weight.data.mul_(1.02).add_(1e-3)
        assert not before.matches(Fingerprint.of(base))
        weight.data.copy_(kept)
    assert before.matches(Fingerprint.of(tiny_model(family)))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_base_that_turns_its_keys_otherwise_is_refused(folder: Path, rope: dict[str, Any]) -> None:
    """The weights are the same: rope_parameters of the configuration are not among them."""
    base = tiny_model("llama", rope_parameters=rope)
    assert Fingerprint.of(base).values == Fingerprint.of(tiny_model("llama")).values
    with pytest.raises(StorageError, match="same shapes but another rotary embedding"):
        load(folder, base)
    info = json.loads((folder / "prefix.json").read_text())
    del info["fingerprint"]["rotary"]  # a folder of an earlier version
    (folder / "prefix.json").write_text(json.dumps(info))
    load(folder, base)


def test_rotary_that_a_long_pass_changed_or_a_cast_rounded_is_the_same() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    base = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    before = Fingerprint.of(base)
    base(torch.ones(1, 40, dtype=torch.long))
    assert Fingerprint.of(base) == before
    base.to(torch.bfloat16)
    assert base.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert Fingerprint.of(base).matches(before)


def test_base_without_a_weight_in_memory_is_refused_for_that(folder: Path) -> None:
    base = tiny_model("llama")
    stored, geometry, nothing = load_prefix(folder), Geometry.probe(base), Fingerprint.of(base.to("meta"))
    with pytest.raises(StorageError, match="same shapes but no weight in memory"):
        check_base(stored, geometry=geometry, fingerprint=nothing, name="me")


def test_saving_what_is_not_finite_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=2))
    model.save_pretrained(tmp_path / "finite")
    assert capsys.readouterr().err == ""
    next(model.prefix.parameters()).data[..., 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    assert "nan: saved, but the prefix has numbers that are not finite" in capsys.readouterr().err


def test_base_with_weights_on_a_disk_is_known_by_the_others() -> None:
    base = tiny_model("llama")
    whole, last = Fingerprint.of(base), base.model.layers[-1]
    last.to("meta")
    part = Fingerprint.of(base)
    assert part.values.keys() < whole.values.keys()
    assert part.matches(whole)
    base.model.embed_tokens.to("meta")
    assert Fingerprint.of(base).matches(whole)


def test_folder_that_has_numbers_of_a_few_matrices_still_finds_its_base(folder: Path) -> None:
    info = json.loads((folder / "prefix.json").read_text())
    sampled = info["fingerprint"]["values"]
    info["fingerprint"]["values"] = {name: all_of for name, all_of in sampled.items() if len(all_of) == 48}
    assert len(info["fingerprint"]["values"]) == 6 < len(sampled)
    (folder / "prefix.json").write_text(json.dumps(info))
    load(folder)
    with pytest.raises(StorageError, match="other weights"):
        load(folder, tiny_model("llama", seed=1))


def test_refusal_of_another_cache_names_the_first_layer_and_field_that_differ(folder: Path) -> None:
    base = bare("llama")
    stored, geometry = load_prefix(folder), Geometry.probe(base)
    first, second, *more = geometry.layers
    others = {
        "layer 1 has window None, not 5": (first, replace(second, window=5), *more),
        "layer 0 has kv_heads": (replace(first, kv_heads=99), replace(second, window=5), *more),
        f"{len(geometry.layers)} layers, not 1": (first,),
    }
    for said, layers in others.items():
        other = replace(geometry, layers=layers)
        with pytest.raises(StorageError, match=f"another KV cache than me: {said}"):
            check_base(stored, geometry=other, fingerprint=Fingerprint.of(base), name="me")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_another_precision_is_the_same_base(folder: Path, dtype: torch.dtype) -> None:
    assert same(tensors(load(folder, tiny_model("llama", dtype=dtype))), tensors(load(folder)))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "qwen3", "gemma2", "falcon-mqa"])
def test_base_of_another_architecture_is_refused(folder: Path, family: str) -> None:
    with pytest.raises((StorageError, UnsupportedModelError), match="trained on"):
        load(folder, bare(family))


@pytest.mark.parametrize("name", ["prefix.safetensors", "trainable.safetensors"])
@pytest.mark.parametrize("place", [0, 9, 0.5, -1])
def test_one_changed_byte_is_found(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place if isinstance(place, int) else int(len(data) * place)] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StorageError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["prefix.safetensors", "trainable.safetensors", "prefix.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_is_found(folder: Path, name: str, kept: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(StorageError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["prefix.safetensors", "trainable.safetensors", "prefix.json"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StorageError, match=name):
        load(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        load(tmp_path / "nowhere")


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda info: [info.pop(name) for name in names]


def _nested(outer: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda info: info[outer].update(values)


TAMPERINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "newer schema": lambda info: info.update(schema=2),
    "no schema": _without("schema"),
    "no config": _without("config"),
    "no geometry": _without("geometry"),
    "no fingerprint": _without("fingerprint"),
    "no checksums": _without("sha256"),
    "no training record": _without("template", "training", "quantization"),
    "checksum of nothing": lambda info: info["sha256"].update({"prefix.safetensors": "0" * 64}),
    "longer prefix": _nested("config", length=7),
    "narrower projection": _nested("config", hidden_size=8),
    "no projection": _nested("config", projection=False, hidden_size=None),
    "unknown option": _nested("config", colour="red"),
    "wrong type of option": _nested("config", length="five"),
    "no layers": _nested("geometry", layers=[]),
    "other heads": lambda info: info["geometry"]["layers"][0].update(kv_heads=3),
    "empty fingerprint": lambda info: info.update(fingerprint={}),
    "fingerprint that is no table": lambda info: info.update(fingerprint=[1, 2]),
    "fingerprint of words": lambda info: info.update(fingerprint={"model.embed_tokens.weight": ["a"]}),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
@pytest.mark.parametrize("is_trainable", [False, True], ids=["to serve", "to train"])
def test_tampered_json_is_refused_or_changes_nothing(
    folder: Path, tampering: str, is_trainable: bool
) -> None:
    expected = logits(load(folder, is_trainable=is_trainable).eval(), B)
    info = json.loads((folder / "prefix.json").read_text())
    TAMPERINGS[tampering](info)
    (folder / "prefix.json").write_text(json.dumps(info))
    found = outcome(lambda: load(folder, is_trainable=is_trainable), StorageError)
    if isinstance(found, StorageError):
        assert len(str(found)) > 40
    else:
        assert torch.equal(logits(found.eval(), B), expected)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", '"prefix"', "\x00"])
def test_json_that_is_no_record_is_refused(folder: Path, text: str) -> None:
    (folder / "prefix.json").write_text(text)
    with pytest.raises(StorageError, match=r"prefix\.json"):
        load(folder)


def test_what_trainer_saves_is_told_apart_from_a_prefix_folder(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    Trainer(model=trained("llama"), args=arguments).save_model(str(tmp_path / "saved"))
    with pytest.raises(StorageError, match=r"model\.save_pretrained\(folder\)"):
        load(tmp_path / "saved")


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def test_pickle_in_place_of_the_tensors_is_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prefix.safetensors", "trainable.safetensors"):
        (folder / name).write_bytes(pickle.dumps(_Payload()))
    info = json.loads((folder / "prefix.json").read_text())
    for name in info["sha256"]:
        info["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "prefix.json").write_text(json.dumps(info))
    with pytest.raises(StorageError, match="safetensors"):
        load(folder)
    assert not (tmp_path / "unpickled").exists()


def fail_at(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, except that its call number `count` (from 1) and all later ones meet a full disk."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] >= count:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("call", ["save_file", "_sync"])
@pytest.mark.parametrize("count", [1, 2])
def test_save_that_fails_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int
) -> None:
    model = trained("llama", projection=True)
    import prefixtune.storage as storage

    monkeypatch.setattr(storage, call, fail_at(count, getattr(storage, call)))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "prefix")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["storage.save_file", "storage._sync", "os.replace", "os.rename"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_save_that_fails_over_an_older_prefix_leaves_one_of_them_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int
) -> None:
    old, new = load(folder), trained("llama", projection=True, seed=9)
    target = {"storage": "prefixtune.storage", "os": "os"}
    module, name = call.split(".")
    with monkeypatch.context() as patch:
        original = getattr(__import__(target[module], fromlist=[name]), name)
        patch.setattr(f"{target[module]}.{name}", fail_at(count, original))
        failure = outcome(lambda: new.save_pretrained(folder), OSError)
    assert failure is None or "No space" in str(failure)
    found = load(folder)
    assert same(tensors(found), tensors(old)) or same(tensors(found), tensors(new))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_saving_over_an_older_prefix_replaces_all_of_it(folder: Path, projection: bool) -> None:
    (folder / "run.json").write_text("{}")
    new = trained("llama", projection=projection, seed=9)
    new.save_pretrained(folder)
    assert same(tensors(load(folder)), tensors(new))
    assert same(list(load(folder).prefix.parameters()), list(new.prefix.parameters()))
    assert (folder / "run.json").read_text() == "{}"
    assert (folder / "trainable.safetensors").exists() == projection


def no_links(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def syncs_files_only(handle: int) -> None:
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("fails", [False, True], ids=["replaces", "fails"])
def test_prefix_is_replaced_where_the_file_system_has_no_hard_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    old, new = load(folder), trained("llama", projection=True, seed=9)
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", syncs_files_only)
    if fails:  # between the first file and the second
        monkeypatch.setattr(os, "replace", fail_at(2, os.replace))
    failure = outcome(lambda: new.save_pretrained(folder), OSError)
    assert (failure is not None) == fails
    assert same(tensors(load(folder)), tensors(old if fails else new))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob(".*"))


def test_folder_on_another_disk_than_its_parent_or_in_one_that_is_not_writable_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 250)  # the longest name or nearly so
    folder.mkdir()

    def on_one_disk(call: Any) -> Any:
        def checked(*places: Any, **options: Any) -> Any:
            if not all(Path(place).is_relative_to(folder) for place in places):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return call(*places, **options)

        return checked

    def in_the_folder(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if not Path(dir).is_relative_to(folder):
            raise PermissionError(
                errno.EACCES, "Permission denied", dir
            )  # as in a parent that is not writable
        return own(suffix, prefix, dir)

    own = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", in_the_folder)
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, on_one_disk(getattr(os, name)))
    for saved in (trained("llama"), trained("llama", seed=9)):
        saved.save_pretrained(folder)
        assert same(tensors(load(folder)), tensors(saved))
    assert not list(folder.glob(".*"))


def test_sizes_on_disk_are_those_of_the_tensors(tmp_path: Path) -> None:
    model = PrefixModel(bare("llama"), PrefixConfig(length=A.shape[1]))
    model.save_pretrained(tmp_path / "prefix")
    numbers = sum(parameter.numel() for parameter in model.prefix.parameters())
    assert 0 < (tmp_path / "prefix" / "prefix.safetensors").stat().st_size - 4 * numbers < 4096
