"""Compiled layers: they learn what plain ones do, in the runs that are long enough, and where they can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from families import tiny_model
from prefixtune.attachment import compile_layers, packed, uncompile_layers
from prefixtune.cli import main
from prefixtune.config import TrainConfig
from prefixtune.data import Example
from prefixtune.errors import ConfigError
from prefixtune.load import LoadedBase
from prefixtune.train import defaults
from prefixtune.train.defaults import compiled_for
from small_runs import logged_losses, write_place

RUN = ["--length", 4, "--max-steps", 4, "--logging-steps", 1, "--save-steps", 2, "--report-to", "none"]
COMPILED = "the layers are compiled"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model without dropout and rows to train on."""
    rows = [{"instruction": f"Say {i}.", "output": "yes" * (1 + i % 3)} for i in range(24)]
    return write_place(tmp_path_factory.mktemp("compile"), rows)


@pytest.fixture(autouse=True)
def _no_layer_is_left_out() -> Iterator[None]:
    """Torch would run a layer uncompiled that it has compiled for too many cases, and only warn."""
    dynamo: Any = torch._dynamo.config
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        yield


def train(place: Path, output: Path, *more: Any, dtype: str = "float32") -> Result:
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", output]
    return CliRunner().invoke(main, [str(arg) for arg in [*line, "--dtype", dtype, *RUN, *more]])


def succeed(*args: Any, **options: Any) -> str:
    result = train(*args, **options)
    assert result.exit_code == 0, result.stderr
    return result.stderr


def compiled(output: Path) -> bool:
    found: bool = json.loads((output / "run.json").read_text())["resolved"]["compile"]
    return found


def test_compiled_layers_learn_what_plain_ones_do(place: Path, tmp_path: Path) -> None:
    assert COMPILED not in succeed(place, tmp_path / "plain")
    assert COMPILED in succeed(place, tmp_path / "compiled", "--compile")
    assert not compiled(tmp_path / "plain")
    assert compiled(tmp_path / "compiled")
    assert len(logged_losses(tmp_path / "plain")) == 4
    assert logged_losses(tmp_path / "compiled") == pytest.approx(logged_losses(tmp_path / "plain"), rel=2e-3)


def test_a_compiled_run_that_stopped_ends_as_one_that_did_not(place: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(place, whole, "--compile")
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoint-4", cut / "best"):
        shutil.rmtree(path, ignore_errors=True)
    (cut / "prefix.json").unlink()
    plain = Path(shutil.copytree(cut, tmp_path / "plain"))
    assert "resuming from" in succeed(place, cut, "--compile", "--resume")
    first, second = (load_file(folder / "prefix.safetensors") for folder in (whole, cut))
    assert {name: tensor.tolist() for name, tensor in first.items()} == {
        name: tensor.tolist() for name, tensor in second.items()
    }
    told = succeed(place, plain, "--no-compile", "--resume")
    assert "compile: not as the run was begun" in told
    assert COMPILED not in told
    assert not compiled(plain)
    for name, tensor in load_file(plain / "prefix.safetensors").items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-3, atol=1e-4)


def test_compiling_without_a_compiler_is_told_before_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused = train(place, tmp_path / "run", "--compile")
    assert refused.exit_code == 2
    assert "C++ compiler" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_long_run_in_bfloat16_is_compiled_unless_that_is_refused_or_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILED not in succeed(place, tmp_path / "short", dtype="bfloat16")
    monkeypatch.setattr(defaults, "COMPILED_FROM", 1.0)
    told = succeed(place, tmp_path / "long", dtype="bfloat16")
    assert COMPILED in told
    assert "--no-compile" in told
    assert compiled(tmp_path / "long")
    assert COMPILED not in succeed(place, tmp_path / "refused", "--no-compile", dtype="bfloat16")
    assert not compiled(tmp_path / "refused")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    told = " ".join(succeed(place, tmp_path / "failed", dtype="bfloat16").split())
    assert "they run uncompiled: compile: torch.compile needs a C++ compiler" in told
    assert logged_losses(tmp_path / "failed") == logged_losses(tmp_path / "refused")


def test_a_run_is_long_by_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").bfloat16()
    base = LoadedBase(model=model, tokenizer=None, name="tiny", dtype_reason="")
    rows = [
        Example(input_ids=ids, labels=(-100, *ids[1:]), origin="", truncated=0)
        for ids in ((5, 6, 7, 8), (5, 6))
    ] * 8  # 3 tokens on average
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    config = TrainConfig(max_steps=10, gradient_accumulation_steps=2)
    operations = 4 * weights * 10 * 2 * 8 * 3
    monkeypatch.setattr(defaults, "COMPILED_FROM", operations)
    assert compiled_for(config, base, rows)
    monkeypatch.setattr(defaults, "COMPILED_FROM", operations + 1)
    assert not compiled_for(config, base, rows)
    monkeypatch.setattr(defaults, "COMPILED_FROM", 1.0)
    assert not compiled_for(config, base, rows, processes=2)
    for option in ({"gradient_checkpointing": True}, {"packing": False}):
        assert not compiled_for(TrainConfig(max_steps=10, **option), base, rows)
    assert compiled_for(TrainConfig(max_steps=1, compile=True, packing=False), base, rows)
    other = LoadedBase(model=tiny_model("bloom").bfloat16(), tokenizer=None, name="tiny", dtype_reason="")
    assert not compiled_for(config, other, rows)  # alibi: nothing is packed
    assert not compiled_for(
        config, LoadedBase(model=model.float(), tokenizer=None, name="", dtype_reason=""), rows
    )


def _wrong(layer: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: 1.5 * layer.forward(*args, **kwargs)


def _refused(layer: nn.Module) -> Callable[..., Any]:
    raise RuntimeError("torch.compile is not supported on this Python")


def _broken(layer: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("fatal error: Python.h: No such file or directory\nand much more")

    return run


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (_wrong, r"other hidden states \(off by"),
        (_broken, r"Python\.h: No such file"),
        (_refused, "not supported on this Python"),
    ],
)
def test_layers_that_compile_to_something_else_run_as_they_are(
    instead: Callable[[nn.Module], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(self: nn.Module, **options: Any) -> None:
        self._compiled_call_impl = instead(self)

    base = tiny_model("llama")
    ids = torch.arange(9)[None]
    with packed(base, None, (5, 4)) as run:
        expected = run(ids)
    monkeypatch.setattr(nn.Module, "compile", replaced)
    with pytest.raises(ConfigError, match=said) as told:
        compile_layers(base)
    assert "much more" not in str(told.value)
    with packed(base, None, (5, 4)) as run:
        torch.testing.assert_close(run(ids), expected, rtol=0, atol=0)


def test_a_base_is_uncompiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[nn.Module] = []

    def watched(self: nn.Module, **options: Any) -> None:
        self._compiled_call_impl = lambda *args, **kwargs: (
            called.append(self) or self.forward(*args, **kwargs)
        )

    monkeypatch.setattr(nn.Module, "compile", watched)
    base = tiny_model("llama")
    compile_layers(base)
    tried = len(called)
    assert tried
    compile_layers(base)  # already
    assert len(called) == tried
    with packed(base, None, (5, 4)) as run:
        run(torch.arange(9)[None])
    assert len(called) > tried
    uncompile_layers(base)
    called.clear()
    with packed(base, None, (5, 4)) as run:
        run(torch.arange(9)[None])
    assert called == []
