"""Laws of the prefix store: identity is the content, and what is no good never takes a good one's place."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixtune.errors import ConfigError, StorageError
from prefixtune.serve.store import PrefixUnavailableError, Store, UnknownPrefixError
from prefixtune.storage import _sha256
from serving import copy_prefix, served_base, write_prefix


@pytest.fixture(scope="module")
def base() -> Any:
    return served_base()


@pytest.fixture
def folder(base: Any, tmp_path: Path) -> Path:
    place = tmp_path / "prefixes"
    for seed, name in enumerate("abc"):
        write_prefix(base, place / name, length=4 + seed, seed=seed)
    return place


def store_of(base: Any, folder: Path | None, *, budget: int = 10**9) -> Any:
    told: list[tuple[str, str, str]] = []
    store: Any = Store(
        base, base_name="tiny", budget=budget, folder=folder, on_event=lambda *event: told.append(event)
    )
    store.refresh()
    store.told = told
    return store


def damage(folder: Path) -> None:
    path = folder / "prefix.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(folder: Path, **tensors: Any) -> None:
    """Change tensors, and the checksum with them: a folder that is whole, but of other content."""
    path = folder / "prefix.safetensors"
    save_file({**load_file(path), **tensors}, path)
    info = json.loads((folder / "prefix.json").read_text())
    info["sha256"]["prefix.safetensors"] = _sha256(path)
    (folder / "prefix.json").write_text(json.dumps(info))


def test_each_folder_is_a_prefix_under_its_name_and_is_read_when_asked_for(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    assert store.names() == ["a", "b", "c"]
    assert store.count_in_memory == 0
    served = store.get("b")
    assert served.kv.length == 5
    assert served is store.get("b")
    assert (store.hits, store.misses, store.count_in_memory) == (1, 1, 1)


def test_same_content_has_one_identity_under_any_name(base: Any, folder: Path) -> None:
    copy_prefix(folder / "a", folder / "again")
    store = store_of(base, folder)
    assert store.get("a").digest == store.get("again").digest != store.get("b").digest


def test_least_recently_used_leaves_when_memory_is_full_and_comes_back(base: Any, folder: Path) -> None:
    sizes = {name: store_of(base, folder).get(name).kv.nbytes for name in "abc"}
    store = store_of(base, folder, budget=sizes["a"] + sizes["c"])
    for name in ("a", "b", "a", "c"):
        store.get(name)
    assert {item["name"] for item in store.describe() if item["in_memory"]} == {"a", "c"}
    assert store.bytes_in_memory <= sizes["a"] + sizes["c"]
    assert store.get("b").kv.length == 5
    assert ("evicted", "b", "") in store.told


def test_prefix_larger_than_the_memory_is_served_all_the_same(base: Any, folder: Path) -> None:
    store = store_of(base, folder, budget=1)
    for name in "abcab":
        assert store.get(name).name == name
    assert store.count_in_memory == 1


def test_retrained_prefix_takes_the_name_and_who_has_the_old_one_keeps_it(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    old = store.get("a")
    before = old.kv.layers[0].key.clone()
    new = write_prefix(base, folder / "a", length=9, seed=77, template="human")
    assert store.get("a") is old  # nobody has looked yet
    store.refresh()
    fresh = store.get("a")
    assert fresh.kv.length == 9
    assert fresh.digest == new.digest != old.digest
    assert fresh.template == "human"
    assert torch.equal(old.kv.layers[0].key, before)


def test_rewritten_folder_of_the_same_content_stays_in_memory(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    old = store.get("a")
    write_prefix(base, folder / "a", length=4, seed=0)
    store.refresh()
    assert store.get("a") is old


@pytest.mark.parametrize(
    "how", ["flipped byte", "cut short", "no tensors", "no json", "half a json", "foreign"]
)
def test_damaged_prefix_is_refused_and_the_old_one_goes_on(
    base: Any, folder: Path, tmp_path: Path, how: str
) -> None:
    store = store_of(base, folder)
    old = store.get("a")
    place = folder / "a"
    if how == "flipped byte":
        damage(place)
    elif how == "cut short":
        data = (place / "prefix.safetensors").read_bytes()
        (place / "prefix.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "no tensors":
        (place / "prefix.safetensors").unlink()
    elif how == "no json":
        (place / "prefix.json").write_text("")
    elif how == "half a json":
        text = (place / "prefix.json").read_text()
        (place / "prefix.json").write_text(text[: len(text) // 2])
    else:
        write_prefix(served_base(seed=5), place, length=4, seed=0)
    store.refresh()
    assert store.get("a") is old
    assert store.told[-1][:2] == ("refused", "a")
    with pytest.raises(StorageError):
        store.refresh("a")
    assert store.get("a") is old
    write_prefix(base, place, length=6, seed=9)
    store.refresh()
    assert store.get("a").kv.length == 6


def test_prefix_whose_files_are_damaged_is_not_let_go_from_memory(base: Any, folder: Path) -> None:
    store = store_of(base, folder, budget=1)
    old = store.get("a")
    damage(folder / "a")
    store.refresh()
    store.get("b")
    store.get("c")
    assert store.get("a") is old


def test_damaged_prefix_that_is_not_in_memory_is_unavailable_until_it_is_whole(
    base: Any, folder: Path
) -> None:
    good = (folder / "a" / "prefix.safetensors").read_bytes()
    store = store_of(base, folder)
    damage(folder / "a")
    with pytest.raises(PrefixUnavailableError, match="checksum"):
        store.get("a")
    (folder / "a" / "prefix.safetensors").write_bytes(good)
    assert store.get("a").kv.length == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_prefix_that_holds_no_numbers_is_refused(base: Any, folder: Path, value: float) -> None:
    key = load_file(folder / "a" / "prefix.safetensors")["layers.1.key"]
    key[0, 0, 0] = value
    rewrite(folder / "a", **{"layers.1.key": key})
    store = store_of(base, folder)
    with pytest.raises(PrefixUnavailableError, match="no finite number"):
        store.get("a")


def test_foreign_and_broken_folders_are_not_listed_and_the_others_are(base: Any, folder: Path) -> None:
    write_prefix(served_base(seed=5), folder / "foreign", length=4, seed=0)
    write_prefix(served_base("gpt2"), folder / "other-shape", length=4, seed=0)
    (folder / "broken").mkdir()
    (folder / "broken" / "prefix.json").write_text("[]")
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    shutil.copytree(folder / "a", folder / "-odd name")
    (folder / "a file").write_text("")
    store = store_of(base, folder)
    assert store.names() == ["a", "b", "c"]
    refused = {name for event, name, _ in store.told if event == "refused"}
    assert refused == {"foreign", "other-shape", "broken", "-odd name"}
    with pytest.raises(UnknownPrefixError):
        store.get("foreign")


def test_half_copied_folder_is_served_once_it_is_whole(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    place = folder / "late"
    place.mkdir()
    shutil.copy(folder / "a" / "prefix.json", place)
    store.refresh()
    with pytest.raises(PrefixUnavailableError):
        store.get("late")
    shutil.copy(folder / "a" / "prefix.safetensors", place)
    store.refresh()
    assert store.get("late").digest == store.get("a").digest


def test_new_folder_appears_and_removed_folder_goes(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    held = store.get("b")
    shutil.rmtree(folder / "b")
    write_prefix(base, folder / "new", length=3, seed=8)
    store.refresh()
    assert store.names() == ["a", "c", "new"]
    assert held.kv.length == 5
    with pytest.raises(UnknownPrefixError):
        store.get("b")


@pytest.mark.parametrize("how", ["relative", "link"])
def test_folder_that_was_named_from_outside_goes_too(
    base: Any, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    os.symlink(folder, "link")
    store = store_of(base, Path("prefixes") if how == "relative" else folder.parent / "link")
    store.add_within("x", "b")
    store.add_within("b", "b")
    shutil.rmtree(folder / "b")
    store.refresh()
    assert store.names() == ["a", "c"]


def test_unloaded_prefix_stays_away_until_it_is_loaded(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    store.get("a")
    store.remove("a")
    store.refresh()
    assert store.names() == ["b", "c"]
    assert store.count_in_memory == 0
    store.add_within("a", "a")
    assert store.get("a").kv.length == 4
    with pytest.raises(UnknownPrefixError):
        store.remove("nobody")


def test_loading_over_a_name_keeps_the_old_one_unless_the_new_one_is_good(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    old = store.get("a")
    damage(folder / "b")
    with pytest.raises(StorageError):
        store.add_within("a", "b")
    assert store.get("a") is old
    store.add_within("a", "c")
    assert store.get("a").kv.length == 6


def test_damaged_folder_takes_no_name_that_is_not_in_memory(base: Any, folder: Path) -> None:
    damage(folder / "b")
    store = store_of(base, folder)
    for name in ("a", "new"):
        with pytest.raises(StorageError, match="checksum"):
            store.add_within(name, "b")
    assert store.names() == ["a", "b", "c"]
    assert store.get("a").kv.length == 4
    with pytest.raises(StorageError, match="checksum"):
        store.refresh("b")
    store.add_within("new", "c")
    assert store.hits == 0
    assert store.get("new").kv.length == 6
    assert store.hits == 1  # it was kept as it was read


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "-a", "a b", "a\n", "a\0", "ä", "a" * 129, "%2e%2e", "a:b"]
)
def test_name_that_could_be_a_path_is_refused(base: Any, folder: Path, name: str) -> None:
    store = store_of(base, folder)
    with pytest.raises(ConfigError, match="cannot be a prefix's name"):
        store.add(name, folder / "a")
    with pytest.raises(UnknownPrefixError):
        store.get(name)


@pytest.mark.parametrize(
    "place", ["..", "../outside", "a/../../outside", "{outside}", "link", "link/x", ".", "", "a\0"]
)
def test_folder_outside_the_prefix_folder_is_refused(base: Any, folder: Path, place: str) -> None:
    outside = folder.parent / "outside"
    write_prefix(base, outside, length=4, seed=0)
    os.symlink(outside, folder / "link")
    store = store_of(base, folder)
    with pytest.raises(ConfigError, match="not within"):
        store.add_within("x", place.format(outside=outside))


@pytest.mark.parametrize("place", ["nowhere", "x" * 5000, "a/prefix.json"], ids=["none", "long", "file"])
def test_folder_that_holds_no_prefix_is_refused(base: Any, folder: Path, place: str) -> None:
    with pytest.raises(StorageError):
        store_of(base, folder).add_within("x", place)


def test_server_without_a_prefix_folder_loads_none(base: Any) -> None:
    with pytest.raises(ConfigError, match="--prefix-dir"):
        store_of(base, None).add_within("a", "a")


def test_folder_that_is_read_while_it_is_being_replaced_is_not_refused(base: Any, folder: Path) -> None:
    store = store_of(base, folder)
    write_prefix(base, folder / "new", length=9, seed=9)
    os.replace(folder / "new" / "prefix.safetensors", folder / "a" / "prefix.safetensors")
    end = threading.Timer(
        0.02, lambda: os.replace(folder / "new" / "prefix.json", folder / "a" / "prefix.json")
    )
    end.start()
    assert store.get("a").kv.length == 9
    end.join()


def test_prefix_in_memory_outlives_what_is_written_into_its_file(base: Any, folder: Path) -> None:
    served = store_of(base, folder).get("a")
    before = [layer.key.clone() for layer in served.kv.layers]
    path = folder / "a" / "prefix.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # into the same file, not over its name
    for layer, key in zip(served.kv.layers, before, strict=True):
        assert torch.equal(layer.key, key)
    path.write_bytes(b"")  # of a mapped file nothing could be read any more, not even an error
    assert all(torch.equal(layer.key, key) for layer, key in zip(served.kv.layers, before, strict=True))


def test_two_thousand_prefixes_on_disk_start_in_three_seconds_without_reading_tensors(
    base: Any, folder: Path
) -> None:
    for number in range(2000):
        os.makedirs(folder / f"user-{number}")
        os.link(folder / "a" / "prefix.json", folder / f"user-{number}" / "prefix.json")
    start = time.perf_counter()
    store = store_of(base, folder)
    seconds = time.perf_counter() - start
    assert len(store.names()) == 2003  # though 2,000 have no tensors: they were not looked at
    assert seconds < 3


def test_first_use_takes_less_than_50_ms(base: Any, folder: Path) -> None:
    taken = []
    for _ in range(5):
        store = store_of(base, folder)
        start = time.perf_counter()
        store.get("c")
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.05
