"""Laws of --quantize: one scheme from training to serving, recorded, and refused where it cannot be."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from families import tiny_model
from prefixtune.cli import main
from prefixtune.config import SCHEMES
from prefixtune.errors import ConfigError, MissingExtraError
from prefixtune.load import load_base
from prefixtune.quantize import QuantizedLinear, check_scheme, quantize_base
from tokenizers_for_tests import byte_tokenizer

CPU = torch.device("cpu")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def call(*args: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def succeed(*args: Any, stdin: str | None = None) -> Result:
    result = call(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of linear layers, one of Conv1D, a mixture, and rows."""
    folder = tmp_path_factory.mktemp("quantize")
    tokenizer = byte_tokenizer()
    for family in ("llama", "gpt2", "mixtral"):
        tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "yes" * (1 + i % 3)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(place: Path, output: Path, *options: Any, family: str = "llama") -> Result:
    fixed = ["--data", place / "rows.jsonl", "--length", 3, "--max-steps", 4, "--save-steps", 2]
    fixed += ["--dtype", "float32", "--report-to", "none", "--max-length", 64]
    return call("train", "--model", place / family, "--output", output, *fixed, *options)


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith((".packed", ".scale"))}


@each_scheme
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_base_is_the_quantised_saved_one(place: Path, scheme: str, family: str, dtype: str) -> None:
    base = load_base(str(place / family), dtype=dtype, device="cpu", quantize=scheme)
    plain = load_base(str(place / family), dtype=dtype, device="cpu").model
    expected, found = packed(quantize_base(plain, scheme)), packed(base.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert base.model.dtype == getattr(torch, dtype)
    assert {p.dtype for p in base.model.parameters()} == {base.model.dtype}
    assert base.quantization is not None
    assert base.quantization["scheme"] == scheme
    assert scheme in base.dtype_reason


def test_base_is_packed_from_the_precision_that_it_is_stored_in(place: Path, tmp_path: Path) -> None:
    """Asked for float32, a bfloat16 checkpoint is not widened before it is packed; the result is the same."""
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    wide = load_base(str(tmp_path), dtype="float32", device="cpu").model
    base = load_base(str(tmp_path), dtype="float32", device="cpu", quantize="int8").model
    expected = packed(quantize_base(wide, "int8"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in packed(base).items())
    assert base.dtype == torch.float32


@each_scheme
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scheme_goes_from_training_to_every_command(
    place: Path, tmp_path: Path, scheme: str, family: str
) -> None:
    run = tmp_path / "run"
    result = train(place, run, "--quantize", scheme, "--eval-data", place / "rows.jsonl", family=family)
    assert result.exit_code == 0, result.stderr
    assert f"its linear layers in {scheme}" in result.stderr
    library = {"int8": "torch", "nf4": "bitsandbytes"}[scheme]
    for name in ("run.json", "prefix.json", "best/prefix.json"):
        told = json.loads((run / name).read_text())["quantization"]
        assert (told["scheme"], told["library"]) == (scheme, library)
    assert f"trained on a base in {scheme} ({library} " in succeed("inspect", run).stdout

    measure = ["evaluate", "--prefix", run, "--data", place / "rows.jsonl", "--dtype", "float32", "--json"]
    measure += ["--no-exact-match"]
    result = succeed(*measure)
    assert f"trained on a base in {scheme}" in result.stderr
    losses = {None: json.loads(result.stdout)["loss"]}
    for other in ("none", *SCHEMES):
        result = succeed(*measure, "--quantize", other)
        assert "trained on a base" not in result.stderr
        losses[other] = json.loads(result.stdout)["loss"]
    assert losses[None] == losses[scheme]
    assert len({losses["none"], losses["int8"], losses["nf4"]}) == 3
    trained = json.loads((run / "prefix.json").read_text())["training"]["eval_loss"]
    assert losses[scheme] == pytest.approx(trained, rel=1e-5)

    for command, stdin in ((["generate", "--prompt", "hello"], None), (["chat"], "hello\n")):
        result = succeed(*command, "--prefix", run, "--max-new-tokens", 2, stdin=stdin)
        assert f"its linear layers in {scheme}" in result.stderr


def test_resumed_run_has_the_same_base_and_ends_the_same(place: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        assert train(place, run, "--quantize", "nf4").exit_code == 0
    for name in ("prefix.safetensors", "prefix.json", "checkpoint-4/trainer_state.json"):
        (cut / name).unlink()
    refused = train(place, cut, "--quantize", "int8", "--resume")
    assert refused.exit_code == 1
    assert "quantize" in refused.stderr
    resumed = train(place, cut, "--quantize", "nf4", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert (cut / "prefix.safetensors").read_bytes() == (whole / "prefix.safetensors").read_bytes()


def test_prefix_of_a_scheme_that_is_not_offered_is_served_in_full_precision(
    place: Path, tmp_path: Path
) -> None:
    assert train(place, tmp_path / "run").exit_code == 0
    file = tmp_path / "run" / "prefix.json"
    for told in ({"scheme": "llm.int8", "library": "bitsandbytes", "version": "0.50"}, "gptq"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": told}))
        result = succeed("generate", "--prefix", tmp_path / "run", "--prompt", "hello")
        assert "full precision" in result.stderr
        assert "linear layers in" not in result.stderr


def test_mixture_is_a_failure_that_names_the_layer(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "run", "--quantize", "int8", family="mixtral")
    assert result.exit_code == 1
    assert "MixtralExperts" in result.stderr
    assert not (tmp_path / "run").exists()


def test_scheme_that_does_not_exist_is_a_wrong_option(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "run", "--quantize", "int3").exit_code == 2
    with pytest.raises(ConfigError, match="int8 or nf4"):
        load_base(str(place / "llama"), quantize="int3")


def test_device_without_the_library_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match=r"meta.*cpu, cuda"):
        check_scheme("nf4", torch.device("meta"))
    check_scheme("int8", torch.device("meta"))
    check_scheme("nf4", torch.device("cuda:1"))  # needs no GPU to be known


def test_without_bitsandbytes_nf4_names_the_extra_and_int8_works(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what makes its import fail
    with pytest.raises(MissingExtraError) as caught:
        load_base(str(place / "llama"), quantize="nf4")
    assert "prefixtune[quant]" in str(caught.value.hint)
    result = train(place, tmp_path / "run", "--quantize", "nf4")
    assert result.exit_code == 1
    assert "pip install 'prefixtune[quant]'" in result.stderr
    assert not (tmp_path / "run").exists()
    base = load_base(str(place / "llama"), quantize="int8").model
    assert isinstance(base.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_importing_bitsandbytes_asks_no_hub_and_says_nothing(tmp_path: Path) -> None:
    """With the package `kernels` its import would download a kernel; without, it warns."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')\n")
    script = (
        "import logging, torch; from prefixtune.quantize import QuantizedLinear\n"
        "print(QuantizedLinear(torch.ones(2, 64), None, 'nf4').weight.sum().item())\n"
        "print(logging.getLogger('bitsandbytes').level)\n"
        "import kernels"  # and it can be imported again afterwards
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == f"128.0\n{logging.NOTSET}\n"
    assert done.stderr.strip() == "kernels was imported"
