"""The contract with the toolkit: what is read, what is refused, and where it goes in the paged cache."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixtune_vllm import Export, PrefixError
from prefixtune_vllm.base import check_base, local_checkpoint
from prefixtune_vllm.errors import RefusalError
from prefixtune_vllm.folder import read_folder, read_tensors
from prefixtune_vllm.ledger import Load
from prefixtune_vllm.placement import check_layers, layer_index, own_heads, rows, slots
from tiny import write_base


def prefix_of(place: Path, name: str = "a") -> Any:
    return read_folder(place / "served/prefixes" / name)


def test_tensors_are_those_that_the_toolkit_wrote(place: Path) -> None:
    from prefixtune.storage import load_prefix

    stored = load_prefix(place / "served/prefixes/a")
    pairs = read_tensors(prefix_of(place))
    for layer, (key, value) in zip(stored.kv.layers, pairs, strict=True):
        assert torch.equal(layer.key, key)
        assert torch.equal(layer.value, value)


def test_one_changed_byte_is_found(place: Path) -> None:
    file = place / "served/prefixes/a/prefix.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PrefixError, match="checksum"):
        read_tensors(prefix_of(place))


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def test_pickle_with_the_right_checksum_is_never_run(place: Path) -> None:
    folder = place / "served/prefixes/a"
    raw = pickle.dumps(Bomb())
    (folder / "prefix.safetensors").write_bytes(raw)
    info = json.loads((folder / "prefix.json").read_text())
    info["sha256"]["prefix.safetensors"] = hashlib.sha256(raw).hexdigest()
    (folder / "prefix.json").write_text(json.dumps(info))
    with pytest.raises(PrefixError, match="not a safetensors file"):
        read_tensors(prefix_of(place))


def test_tensors_of_another_shape_are_refused(place: Path) -> None:
    folder = place / "served/prefixes/a"
    tensors = load_file(folder / "prefix.safetensors")
    save_file(
        {name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, folder / "prefix.safetensors"
    )
    info = json.loads((folder / "prefix.json").read_text())
    raw = (folder / "prefix.safetensors").read_bytes()
    info["sha256"]["prefix.safetensors"] = hashlib.sha256(raw).hexdigest()
    (folder / "prefix.json").write_text(json.dumps(info))
    with pytest.raises(PrefixError, match="layer 0 is not of the shapes"):
        read_tensors(prefix_of(place))


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"length": 0}, {"sha256": {}}, {"geometry": 5}, {"fingerprint": {}}]
)
def test_record_that_cannot_be_right_is_refused(place: Path, change: dict[str, Any]) -> None:
    file = place / "served/prefixes/a/prefix.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PrefixError, match=r"prefix\.json"):
        prefix_of(place)


def test_base_is_recognised_by_its_weights(place: Path, tmp_path: Path) -> None:
    prefix = prefix_of(place)
    check_base(prefix, place / "model")
    check_base(prefix, local_checkpoint(str(place / "model"), None))
    halved = tmp_path / "bf16"
    halved.mkdir()
    tensors = load_file(place / "model/model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, halved / "model.safetensors")
    check_base(prefix, halved)
    short = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}  # as GPT-2's and BLOOM's are
    save_file(short, halved / "model.safetensors")
    check_base(prefix, halved)


def test_other_weights_of_the_same_shapes_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="has other weights"):
        check_base(prefix_of(place), write_base(tmp_path / "other", seed=1))


def test_weights_that_cannot_be_compared_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="no tensor"):
        check_base(prefix_of(place), tmp_path)
    with pytest.raises(PrefixError, match="cannot be looked at"):
        local_checkpoint("nobody/nothing", None)


def layers(count: int = 3, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_kv_heads": 2,
        "head_size": 32,
        "kv_cache_torch_dtype": torch.float32,
        "kv_cache_dtype": "auto",
        "impl": SimpleNamespace(do_kv_cache_update=None),
        **changes,
    }
    return {f"model.layers.{index}.self_attn.attn": SimpleNamespace(**values) for index in range(count)}


def test_model_of_the_prefixs_shapes_is_accepted(place: Path) -> None:
    check_layers(prefix_of(place), layers(), ranks=1, is_whole=True)
    check_layers(prefix_of(place), layers(num_kv_heads=1), ranks=4, is_whole=True)
    check_layers(prefix_of(place), layers(2), ranks=1, is_whole=False)  # a stage of a pipeline


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (layers(2), "for a model of 3 layers"),
        (layers(4), "for a model of 3 layers"),
        (layers(num_kv_heads=4), "kv_heads, key_dim, value_dim"),
        (layers(head_size=64), "kv_heads, key_dim, value_dim"),
        (layers(head_size_v=16), "kv_heads, key_dim, value_dim"),
        (layers(kv_cache_torch_dtype=torch.uint8, kv_cache_dtype="fp8"), "fp8 would round"),
        (layers(impl=SimpleNamespace()), "no way to write"),
    ],
)
def test_model_of_other_shapes_is_refused(place: Path, found: dict[str, Any], why: str) -> None:
    with pytest.raises(PrefixError, match=why):
        check_layers(prefix_of(place), found, ranks=1, is_whole=True)


@pytest.mark.parametrize(
    ("name", "index"), [("transformer.h.11.attn.attn", 11), ("gpt_neox.layers.0.attn", 0)]
)
def test_layer_is_found_by_the_number_in_its_name(name: str, index: int) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize("name", ["attn", "model.layers.1.experts.2.attn"])
def test_layer_whose_number_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(PrefixError, match="cannot be told"):
        layer_index(name)


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [(8, 2, [(0, 4), (4, 8)]), (2, 2, [(0, 1), (1, 2)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)])],
)
def test_each_rank_has_its_own_heads(total: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    found = [own_heads(total, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [(heads.start, heads.stop) for heads in found] == expected


def test_tokens_go_into_the_slots_of_their_blocks() -> None:
    load = Load("r", None, 30, 66, (7, 2, 9))
    assert slots(load, 32).tolist() == [7 * 32 + 30, 7 * 32 + 31, *range(64, 96), 9 * 32, 9 * 32 + 1]
    keys = torch.arange(2 * 66 * 3.0).reshape(2, 66, 3)
    written = rows(keys, load, slice(1, 2), torch.empty(0, dtype=torch.bfloat16))
    assert written.shape == (36, 1, 3)
    assert torch.equal(written[0, 0], keys[1, 30].bfloat16())


def test_offline_prompt_is_placed_or_refused(place: Path) -> None:
    export = Export.read(place / "served")
    prompt, extra = export.place("d", [5, 6])
    assert prompt["prompt_token_ids"] == [260] * 5 + [5, 6]
    assert prompt["cache_salt"] == extra["kv_transfer_params"]["prefixtune"]["digest"]
    for ids in ([], [5, 260]):
        with pytest.raises(RefusalError):
            export.place("d", ids)
    with pytest.raises(KeyError):
        export.place("nope", [5])


def test_folder_that_is_no_export_is_refused(place: Path) -> None:
    with pytest.raises(PrefixError, match=r"export\.json"):
        Export.read(place)
    shutil.rmtree(place / "served/prefixes")
    with pytest.raises(PrefixError, match="prefixes"):
        Export.read(place / "served").names()
