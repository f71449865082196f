"""Training, answering and serving with the base on a GPU, real or not, beside the same on the CPU.

Not collected by itself: `test_gpu.py` runs it in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import test_distill
import test_serve_engine
from families import tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel, attach
from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import Example, build_examples, load_rows
from prefixtune.distill.comparison import closeness
from prefixtune.distill.teacher import with_aims
from prefixtune.evaluate import evaluate, target_loss
from prefixtune.forgetting import forgetting, neutral_texts
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes
from prefixtune.quantize import quantize_base
from prefixtune.serve.engine import Engine
from prefixtune.serve.selftest import check_batches
from prefixtune.train import build, trainer_for
from pretend_gpu import GPU, IS_REAL, moved, on_gpu
from tokenizers_for_tests import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = PrefixConfig(length=5, init="tokens", init_tokens=(5, 6, 7, 8, 9))
FAMILIES = ["llama", "gemma3", "bloom", "opt"]  # rotary, windows, alibi, learnt positions
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with on_gpu():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    lines = [{"instruction": "Say " + "x" * i, "output": ["yes", "no"][i % 2]} for i in range(18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_rows(str(tmp_path / "rows.jsonl"))


def bases(family: str) -> tuple[Any, Any]:
    """The same base on the host and on the device, without dropout."""
    made = [tiny_model(family, vocab_size=len(TOKENIZER)).eval() for _ in range(2)]
    return made[0], moved(made[1])


@contextmanager
def trainer_on(device: torch.device) -> Iterator[None]:
    """Trainer and accelerate take the device that they would find if it were a real one."""
    own: Any = TrainingArguments.device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "device", property(lambda args: (own.fget(args), device)[1]))
        yield


@pytest.mark.skipif(IS_REAL, reason="the device that pretends is what is tested")
def test_tensors_of_two_devices_refuse_each_other() -> None:
    there = torch.ones(3, device=GPU)
    assert (there + there).device == GPU
    assert (2 * there).tolist() == [2, 2, 2]
    for mixed in (lambda: there + torch.ones(3), lambda: torch.cat([there, torch.ones(3)])):
        with pytest.raises(RuntimeError, match="tensors on pretend:0 and on cpu"):
            mixed()


def trained(
    base: Any, examples: list[Example], output: Path, options: dict[str, Any], retain: float
) -> PrefixModel:
    loaded = LoadedBase(model=base, tokenizer=TOKENIZER, name="tiny", dtype_reason="")
    device = next(base.parameters()).device
    with trainer_on(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TOKENS", 12)  # of neutral text: few of the device's slow steps
        config = TrainConfig(max_steps=3, seed=3, retain=retain, report_to="none")
        trainer, _ = trainer_for(loaded, examples, prefix_options=options, config=config, output=output)
        trainer.accelerator.state.device = device  # where the rows go
        trainer.args.save_strategy = "no"  # safetensors wants the addresses of the numbers
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "options", "retain"),
    [
        *((family, {"length": 4}, 0.0) for family in FAMILIES),
        ("llama", {"length": 4}, 0.1),
        ("llama", {"length": 4, "projection": True}, 0.0),
        ("llama", {"layers": "top:1"}, 0.0),
    ],
)
def test_training_is_that_of_the_cpu(
    family: str, options: Any, retain: float, rows: Any, tmp_path: Path
) -> None:
    examples, _ = build_examples(rows, TOKENIZER, DataConfig())
    here, there = bases(family)
    for base in (here, there):  # the prefix trains in training mode
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    losses = []
    for name, base in (("there", there), ("here", here)):
        model = trained(base, examples, tmp_path / name, options, retain)
        assert model.device.type == (GPU if name == "there" else torch.device("cpu")).type
        losses.append(target_loss(model, examples, pad_token_id=0)[0])
    bare, _ = target_loss(here, examples, pad_token_id=0)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert abs(losses[0] - bare) > 0.01


@each_family
def test_answers_scores_and_forgetting_are_those_of_the_cpu(family: str, rows: Any) -> None:
    found, texts = [], None
    for base in bases(family):
        model = PrefixModel(base, CONFIG).eval()
        options: Any = {"labels": ["yes", "no"], "metrics": ["accuracy"], "max_new_tokens": 5}
        scores = evaluate(model, TOKENIZER, rows[:5], DataConfig(), progress=False, **options)
        drawn = neutral_texts(base, TOKENIZER, texts=2, tokens=12, seed=1)
        texts = texts or drawn  # a real device draws other ones
        found.append((scores, forgetting(model, None, TOKENIZER, texts=texts)))
    (here, once), (there, again) = found
    assert there.loss == pytest.approx(here.loss, abs=1e-5)
    assert [sample["prediction"] for sample in there.samples] == [
        sample["prediction"] for sample in here.samples
    ]
    assert again.rise == pytest.approx(once.rise, abs=1e-4)


def test_prefixes_are_mixed_in_a_batch_saved_and_loaded(tmp_path: Path) -> None:
    here, there = bases("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 3, 4, 5, 6]])
    mask = (ids != 0).long()
    settings: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answers = []
    for base, device in ((here, "cpu"), (there, GPU)):
        tokens = torch.tensor([[3, 4, 5]])
        prefixes = [PrefixKV.from_tokens(base, tokens), None, PrefixModel(base, CONFIG).prefix.bake()]
        with attach(base, prefixes):
            batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            answers.append(base.generate(**batch, **settings).tolist())
    assert answers[0] == answers[1]
    model = PrefixModel(there, CONFIG)
    model.save_pretrained(tmp_path / "prefix")
    loaded = PrefixModel.from_pretrained(there, tmp_path / "prefix")
    assert loaded.device == GPU
    assert torch.equal(loaded.prefix.bake().layers[0].key.cpu(), model.prefix.bake().layers[0].key.cpu())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantised_base_has_the_gradient_of_the_cpu(scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    ids = torch.tensor([[3, 4, 5, 6]])
    gradients = []
    for is_there in (False, True):
        base = quantize_base(tiny_model("llama", hidden_size=64), scheme)
        model = PrefixModel(moved(base) if is_there else base, CONFIG)
        model.gradient_checkpointing_enable()
        given = ids.to(GPU) if is_there else ids
        model(input_ids=given, labels=given).loss.backward()
        gradients.append(next(model.prefix.parameters()).grad.cpu())  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_distillation_aims_at_what_the_teacher_has_there() -> None:
    found = []
    for base in bases("llama"):
        kv = PrefixKV.from_tokens(base, torch.tensor([[3, 4, 5, 6, 7, 8]]))
        passes = Passes.of(base, capacity=64, pad_token_id=0)
        examples = with_aims(passes, test_distill.rows_of(base), kv)
        found.append(closeness(passes, examples, None).divergence)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("way", test_serve_engine.WAYS)
def test_server_answers_as_on_the_cpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Engine._loop

    def loop(engine: Engine) -> None:
        with on_gpu():
            own(engine)

    monkeypatch.setattr(Engine, "_loop", loop)
    here = test_serve_engine.served_base("llama")
    there = moved(test_serve_engine.served_base("llama"))
    assert check_batches(there).together
    asked = [test_serve_engine.random_ids(1 + (7 * i) % 45, seed=100 + i) for i in range(6)]
    engine = Engine(there, passes=test_serve_engine.WAYS[way](there), rows=24, chunk=16)
    engine.start()
    heard = [test_serve_engine.Heard() for _ in asked]
    jobs = [
        test_serve_engine.job_of(h, ids, test_serve_engine.prefix_of(there, 4, seed=i), max_tokens=6)
        for i, (h, ids) in enumerate(zip(heard, asked, strict=True))
    ]
    test_serve_engine.run(engine, *jobs)
    engine.close(0)
    for i, (h, ids) in enumerate(zip(heard, asked, strict=True)):
        kv = test_serve_engine.prefix_of(here, 4, seed=i)
        assert h.tokens[0] == test_serve_engine.alone(here, kv, ids, 6)
