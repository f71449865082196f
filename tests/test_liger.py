"""Liger's kernels: in Triton's interpreter, on a real GPU where there is one; what is told without one."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from families import tiny_model
from own_process import on_a_real_gpu, passes_alone
from prefixtune.attachment import check_liger, liger, use_liger
from prefixtune.cli import main
from prefixtune.config import TrainConfig
from prefixtune.errors import ConfigError, MissingExtraError
from prefixtune.load import LoadedBase
from prefixtune.train import defaults
from prefixtune.train.defaults import compiled_for


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("interpreted", ["1", on_a_real_gpu("0")])
def test_kernels_do_what_the_models_own_steps_do(interpreted: str) -> None:
    passes_alone("on_liger.py", TRITON_INTERPRET=interpreted)


def refused(folder: Path, *more: str) -> str:
    """What is told where a run with it is refused, before a model is looked for."""
    (folder / "rows.json").write_text(json.dumps([{"instruction": "Say", "output": "yes"}]), encoding="utf-8")
    line = f"train --liger --model {folder}/none --data {folder}/rows.json --output {folder}/run"
    done = CliRunner().invoke(main, [*line.split(), *more])
    assert done.exit_code == 2
    assert not (folder / "run").exists()
    return " ".join(done.stderr.split())


def test_without_a_gpu_it_is_told_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = refused(tmp_path)
    assert "liger: Liger's kernels run on a CUDA device, and this run is on cpu" in told
    assert "leave it out" in told


def test_without_the_package_its_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    liger._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    with pytest.raises(MissingExtraError, match="liger-kernel") as told:
        check_liger(torch.device("cuda"))
    assert "pip install 'prefixtune[liger]'" in str(told.value)


@pytest.mark.parametrize("other", ["--compile", "--no-packing"])
def test_it_goes_neither_with_compile_nor_without_packing(other: str, tmp_path: Path) -> None:
    assert "goes neither with compile nor without packing" in refused(tmp_path, other)


def test_a_base_on_the_cpu_is_refused() -> None:
    base = tiny_model("llama")
    with pytest.raises(ConfigError, match="run on a CUDA device, and this run is on cpu"):
        use_liger(base)


def test_a_run_with_it_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "COMPILED_FROM", 0.0)
    base = LoadedBase(model=tiny_model("llama").bfloat16(), tokenizer=None, name="tiny", dtype_reason="")
    assert not compiled_for(TrainConfig(liger=True), base, [])
