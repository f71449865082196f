"""The laws on a CUDA device: what it computes is what the CPU does. Skipped where there is none.

What is made on the wrong device is found without one, by `test_gpu.py`; here are the GPU's own kernels, its
memory and its precision.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from families import EXTRA, FAMILIES, VOCAB, tiny_model
from laws.losses import by_passes, continued, reference, rows_of
from laws.oracle import without_dropout
from prefixtune import PrefixConfig, PrefixKV, PrefixModel, attach
from prefixtune.config import SCHEMES
from prefixtune.quantize import quantize_base
from tokenizers_for_tests import byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = "cuda"
PREFIX = 5
START = PrefixConfig(length=PREFIX, init="tokens", init_tokens=(5, 6, 7, 8, 9))
every_family = pytest.mark.parametrize("family", FAMILIES + EXTRA)


def pairs_of(kv: PrefixKV, device: str) -> list[tuple[Tensor, Tensor]]:
    def live(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device).requires_grad_()

    return [(live(layer.key), live(layer.value)) for layer in kv.layers]


def prefix_of(base: Any, length: int = PREFIX, seed: int = 2) -> PrefixKV:
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    return PrefixKV.from_tokens(base, ids)


@every_family
@pytest.mark.parametrize("common", [0, 11])
def test_loss_and_gradient_are_those_of_each_row_alone_on_the_cpu(family: str, common: int) -> None:
    base = tiny_model(family).requires_grad_(False)
    rows, kv = (continued(rows_of(), common) if common else rows_of()), prefix_of(base)
    expected, expected_gradient = reference(base, rows, pairs_of(kv, "cpu"))
    there = tiny_model(family).requires_grad_(False).to(GPU)
    for packing in (True, False):
        _, total, gradient = by_passes(there, rows, pairs_of(kv, GPU), packing=packing, capacity=50)
        assert total == pytest.approx(expected, rel=1e-4)
        assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "opt", "bloom"])
def test_bfloat16_gradient_stays_close_to_float32(family: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(family).to(torch.bfloat16).to(dtype).requires_grad_(False)
        rows, pairs = continued(rows_of((90, 60, 33)), 9), pairs_of(prefix_of(tiny_model(family)), GPU)
        found[dtype] = by_passes(base.to(GPU), rows, pairs, packing=True, capacity=200)[1:]
    (exact, gradient), (rounded, coarse) = found[torch.float32], found[torch.bfloat16]
    assert rounded == pytest.approx(exact, rel=0.03)
    assert F.cosine_similarity(gradient, coarse, dim=0) > 0.95
    assert coarse.norm() == pytest.approx(gradient.norm().item(), rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "opt"])
def test_checkpointing_changes_no_gradient(family: str) -> None:
    base = tiny_model(family).to(GPU)
    kv, found = prefix_of(tiny_model(family)), []
    for on in (False, True):
        model = without_dropout(PrefixModel(base, START))
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        rows, pairs = continued(rows_of(), 11), pairs_of(kv, GPU)
        found.append(by_passes(base, rows, pairs, packing=True, capacity=50)[1:])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_quantised_base_has_the_gradient_of_the_cpu(family: str, scheme: str) -> None:
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    base = quantize_base(tiny_model(family, **({"hidden_size": 64} if family == "llama" else {})), scheme)
    rows, kv = rows_of(), prefix_of(base)
    expected, expected_gradient = reference(base, rows, pairs_of(kv, "cpu"))
    _, total, gradient = by_passes(base.to(GPU), rows, pairs_of(kv, GPU), packing=True, capacity=50)
    assert total == pytest.approx(expected, rel=1e-4)
    assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


@every_family
def test_rows_of_a_mixed_batch_answer_as_text_in_the_context_does_on_the_cpu(family: str) -> None:
    base, there = tiny_model(family), tiny_model(family).to(GPU)
    fronts = [torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    texts = [torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 6, 4)]
    width = max(text.shape[1] for text in texts)
    ids = torch.cat([F.pad(text, (width - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (width - text.shape[1], 0)) for text in texts])
    settings: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prefixes = [PrefixKV.from_tokens(there, front) for front in fronts]
    with attach(there, [*prefixes, None]):
        found = there.generate(input_ids=ids.to(GPU), attention_mask=mask.to(GPU), **settings).cpu()
    for row, text in enumerate(texts):
        whole = torch.cat([*fronts[row : row + 1], text], dim=1)
        expected = base.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **settings)
        assert found[row, width:].tolist() == expected[0, whole.shape[1] :].tolist()


TRAIN = """
import sys
import torch
from transformers import Trainer
from prefixtune.cli import main

def limit(self, *args, save=Trainer._save_checkpoint, **more):  # between two steps: the next one needs more
    save(self, *args, **more)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)

if sys.argv.pop(1) == "limited":
    Trainer._save_checkpoint = limit
main(prog_name="prefixtune")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 43 million parameters, whose activations are more than what an allocator keeps spare."""
    folder, tokenizer = tmp_path_factory.mktemp("cuda"), byte_tokenizer()
    sizes: Any = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=8, vocab_size=8_000)
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": "word " * (8 + i % 20), "input": "", "output": "yes " * 8} for i in range(16)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def train(
    place: Path, *more: Any, output: str, on_cpu: bool = False, limited: bool = False
) -> subprocess.CompletedProcess[str]:
    line = ["train", "--model", place / "model", "--data", place / "rows.json", "--output", place / output]
    line += ["--report-to", "none", "--json", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    how = "limited" if limited else "free"
    command = [sys.executable, "-c", TRAIN, how, *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170, check=False)


def test_training_ends_where_it_does_on_the_cpu(place: Path) -> None:
    """By the command, with its default start and packing: the loss of what was trained."""
    losses, peaks = [], []
    for on_cpu in (True, False):
        output = f"on-{'cpu' if on_cpu else 'gpu'}"
        # without neutral text: another device draws another
        line = ["--dtype", "float32", "--retain", 0, "--max-steps", 4, "--eval-data", place / "rows.json"]
        done = train(place, *line, output=output, on_cpu=on_cpu)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        losses.append(facts["eval_loss"])
        peaks.append(facts["peak_bytes"])
        (room,) = re.findall(r"rows are packed, up to ([\d,]+) tokens", done.stderr)
        assert (int(room.replace(",", "")) >= 2048) != on_cpu  # an empty GPU has room for large passes
    assert peaks[0] > 2 * peaks[1]  # of the process, and of what it has on the device
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16",
        "--dtype float32 --gradient-checkpointing",
        "--dtype bfloat16 --packing-length 2048 --per-device-train-batch-size 16",
        "--dtype float32 --projection",
    ],
)
def test_estimated_peak_is_within_15_percent_of_what_torch_allocates(place: Path, options: str) -> None:
    line = [*options.split(), "--max-steps", "2", "--retain", "0"]
    done = train(place, *line, output=options.replace(" ", ""))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    print(options, facts["estimated_peak_bytes"], facts["peak_bytes"])
    assert facts["estimated_peak_bytes"] == pytest.approx(facts["peak_bytes"], rel=0.15)


def test_full_gpu_says_what_to_do_and_the_run_can_be_resumed(place: Path) -> None:
    options = ["--dtype", "float32", "--max-steps", 3, "--save-steps", 1, "--retain", 0]
    stopped = train(place, *options, output="full", limited=True)
    assert stopped.returncode == 1, stopped.stderr
    assert "the memory is full" in stopped.stderr
    assert "--gradient-checkpointing" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    resumed = train(place, *options, "--resume", output="full")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 3


def test_methods_are_compared_on_the_gpu(place: Path) -> None:
    methods = "full,lora,prefix,peft-prefix"
    rows = place / "rows.json"
    line = ["compare", "--model", place / "model", "--train", rows, "--eval", rows, "--json"]
    line += ["--methods", methods, "--eval-rows", 2, "--seeds", 1, "--max-steps", 2, "--max-new-tokens", 3]
    line += ["--output", place / "compared"]
    command = [sys.executable, "-m", "prefixtune", *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in found] == methods.split(",")
    for row in found:
        assert row["dev_loss"] > 0
