"""Laws of a comparison: all methods see the same, only the method differs, and nothing finished is lost."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from torch.nn import functional as F

from families import tiny_model
from operations import Operations
from prefixtune.cli import main
from prefixtune.compare import METHODS, CompareConfig, PeerConfig, Plan, compare, plan_of, read_file
from prefixtune.compare.cell import _after, _in_context, _start, run_cell
from prefixtune.compare.child import _run as run_child
from prefixtune.compare.peers import lora_config, peer_model, peer_trainer, summed_losses
from prefixtune.compare.prepare import make_rows
from prefixtune.compare.results import machines_of, result_rows, spread
from prefixtune.compare.rows import Rows
from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import Row, build_examples
from prefixtune.errors import ConfigError, DataError, MissingExtraError, RunError
from prefixtune.load import LoadedBase, load_base
from prefixtune.report import columns_of, missing_cells, require_matplotlib
from prefixtune.report.plots import draw
from prefixtune.report.table import Column, markdown
from prefixtune.train.folder import RETENTION
from prefixtune.train.retention import kept_texts
from prefixtune.train.sampler import LengthGroupedSampler
from tokenizers_for_tests import CHATML, THINKING, byte_tokenizer

INPUTS, ROWS = 5, 16  # several rows have one input
LENGTH = 7  # of the prefix: LoRA of rank 4 on queries and values has as many numbers, 448
TRAINED = [name for name, method in METHODS.items() if method.trains]


def make_model(folder: Path, family: str = "llama") -> Path:
    tokenizer = byte_tokenizer()
    sizes = {"max_position_embeddings": 512} if family == "llama" else {}
    tiny_model(family, vocab_size=len(tokenizer), **sizes).save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    rows = [
        {"instruction": "Count", "input": str(n % INPUTS), "output": " ".join("ab" * (n % 3 + 1))}
        for n in range(ROWS)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / family


def make_plan(model: Path, **values: Any) -> Plan:
    settings = values.pop("settings", {"prefix": {"length": LENGTH}})
    rows = str(model.parent / "rows.json")
    wanted = {"seeds": 1, "train_rows": 12, "eval_rows": 3, "max_steps": 3, "max_new_tokens": 4, **values}
    return plan_of(
        {"model": str(model), "train": rows, "eval": rows, "dtype": "float32", **wanted}, settings=settings
    )


@dataclass
class Measured:
    """All cells of a plan, run in this process."""

    plan: Plan
    rows: Rows
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Measured:
        found = cls(plan, make_rows(plan))
        for cell in plan.cells:
            place = folder / cell.name
            place.mkdir()
            about = {"method": cell.method.name, "seed": cell.seed, "train_rows": cell.rows}
            found.cells[cell.method.name] = about | run_cell(plan, cell, found.rows, place)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    plan = make_plan(model, methods=tuple(METHODS), metrics=("exact_match", "token_f1"))
    return Measured.of(plan, tmp_path_factory.mktemp("cells"))


# --- fairness ----------------------------------------------------------------------------------------------


def test_every_method_ends_in_a_line_of_the_table(measured: Measured) -> None:
    rows = result_rows(measured.plan, measured.cells.values())
    assert [row["method"] for row in rows] == list(METHODS)
    titles = [column.title for column in columns_of(rows)]
    assert titles[-5:] == ["tokens/s", "dev loss", "exact_match", "token_f1", "forgetting"]
    for row in rows:
        trains = METHODS[row["method"]].trains
        assert (row["trainable_parameters"] > 0) == (row["train_seconds"] is not None) == trains
        assert 0 < row["initial_memory_bytes"] <= row["peak_memory_bytes"]
        assert all(column.text(row) for column in columns_of(rows))


@pytest.mark.parametrize("family", ["llama", "bloom"])  # packed rows, and rows of similar length together
def test_all_methods_train_on_the_same_rows_in_the_same_order(family: str, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    methods = ("lora", "peft-prefix", "prefix", "full")
    sizes = {"per_device_train_batch_size": 2, "eval_rows": 1}
    plan = make_plan(make_model(tmp_path, family), methods=methods, forgetting=False, **sizes)
    found = Measured.of(plan, tmp_path / "cells")
    assert len({found.cells[name]["rows_seen"] for name in methods}) == 1
    assert len({found.cells[name]["resolved"]["steps"] for name in methods}) == 1
    lengths = [len(example.input_ids) for example in found.rows.train]
    order = LengthGroupedSampler(lengths, 1 if family == "llama" else 2, seed=plan.cells[0].seed)
    tokens = sum(lengths[row] for row in list(order)[:6])  # of 12 rows: three steps
    for cell in found.cells.values():
        assert cell["tokens_per_second"] * cell["train_seconds"] == pytest.approx(tokens)


def test_another_seed_is_another_order(model: Path, tmp_path: Path) -> None:
    plan = make_plan(model, methods=("lora",), seeds=2, forgetting=False, eval_rows=1)
    rows = make_rows(plan)
    seen = []
    for cell in plan.cells:
        (tmp_path / cell.name).mkdir()
        seen.append(run_cell(plan, cell, rows, tmp_path / cell.name)["rows_seen"])
    assert seen[0] != seen[1]


def test_training_time_holds_the_sampling_of_neutral_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(2)
        return kept_texts(*args, **options)

    monkeypatch.setattr("prefixtune.train.build.kept_texts", slowly)
    plan = make_plan(model, methods=("prefix",), seeds=1, forgetting=False, eval_rows=1)
    (cell,) = plan.cells
    found = run_cell(plan, cell, make_rows(plan), tmp_path)
    assert found["train_seconds"] > 2
    assert found["seconds"]["prepare_and_train"] - found["train_seconds"] < 2


def test_a_cell_that_runs_again_samples_its_own_neutral_text(model: Path, tmp_path: Path) -> None:
    plan = make_plan(model, methods=("prefix",), forgetting=False, eval_rows=1, max_steps=1)
    make_rows(plan).write(tmp_path / "data.json", key="any")
    task = {"cell": "prefix-1", "rows": tmp_path / "data.json", "folder": tmp_path / "prefix-1"}
    found = []
    for _ in range(2):
        run_child(plan, task)
        kept = tmp_path / "prefix-1" / RETENTION
        found.append(kept.read_text(encoding="utf-8"))
        kept.write_text("[[1, 2, 3, 4]]", encoding="utf-8")  # as another model's would be there
    assert found[0] == found[1]


@pytest.mark.parametrize("template", ["chat", "human"])
def test_answers_to_chats_alone_end_where_the_template_closes_a_turn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("prefixtune.generate._turn_end", lambda tokenizer: asked.append(tokenizer))
    copy = shutil.copytree(model, tmp_path / model.name)
    byte_tokenizer(chat_template=CHATML).save_pretrained(copy)
    rows = str(shutil.copy(model.parent / "rows.json", tmp_path))
    wanted = {"model": str(copy), "train": rows, "eval": rows, "methods": ("base",), "metrics": ("bleu",)}
    plan = plan_of(
        {**wanted, "eval_rows": 3, "forgetting": False, "max_new_tokens": 2}, data={"template": template}
    )
    (tmp_path / "cell").mkdir()
    run_cell(plan, plan.cells[0], make_rows(plan), tmp_path / "cell")
    assert bool(asked) == (template == "chat")


def test_a_chat_of_several_examples_is_one_row(model: Path, tmp_path: Path) -> None:
    """And what the template writes before an answer goes with the question, through the file of the rows."""
    copy = shutil.copytree(model, tmp_path / model.name)
    byte_tokenizer(chat_template=THINKING).save_pretrained(copy)
    turns = [{"role": role, "content": "a b c"} for _ in range(3) for role in ("user", "assistant")]
    chats = [{"messages": [*turns[:-1], {"role": "assistant", "content": str(i)}]} for i in range(4)]
    (tmp_path / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    files = dict.fromkeys(("train", "eval"), str(tmp_path / "chats.json"))
    asked = {"model": str(copy), **files, "methods": ("prefix",), "train_rows": (2, 4), "forgetting": False}
    made = make_rows(plan_of({**asked, "metrics": ("bleu",), "max_steps": 1}, data={"template": "chat"}))
    made.write(tmp_path / "data.json", key="any")
    rows = Rows.read(tmp_path / "data.json")
    assert rows == made
    assert [len(rows.first(count)) for count in (1, 2, None)] == [3, 6, 12]
    assert rows.key(2) != rows.key(4) == rows.key()
    assert [question.lead for question in rows.questions] == ["<think>\n\n</think>\n\n"]


@pytest.mark.parametrize("of", ["lora", "prefix"])
def test_answers_of_each_method_multiply_the_head_once(of: str, model: Path, tmp_path: Path) -> None:
    plan = make_plan(model, methods=(of,), seeds=1, metrics=("bleu",), forgetting=False)
    (cell,) = plan.cells
    with Operations(load_base(str(model)).model.config.vocab_size) as seen:
        run_cell(plan, cell, make_rows(plan), tmp_path)
    assert "aten::mm" in seen.names
    assert "aten::bmm" not in seen.names


def test_targets_of_any_method_can_be_smoothed_and_losses_are_told_without(
    model: Path, tmp_path: Path
) -> None:
    named = {"lora": {}, "prefix": {"length": LENGTH}}
    smoothed = {f"{of}-smoothed": {"of": of, "label_smoothing_factor": 0.3} for of in named}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 12, "seeds": 1, "forgetting": False}
    plan = make_plan(model, methods=(*named, *smoothed), settings={**named, **smoothed}, **sizes)
    cells = Measured.of(plan, tmp_path).cells
    for of in named:
        plain, other = cells[of], cells[f"{of}-smoothed"]
        assert [cell["resolved"]["label_smoothing_factor"] for cell in (plain, other)] == [0.0, 0.3]
        assert other["losses"] == [(1, pytest.approx(plain["losses"][0][1], abs=1e-4))]
        assert 1e-4 < abs(other["dev_loss"] - plain["dev_loss"]) < 0.2


def test_label_smoothing_of_a_peer_ends_as_ours(
    measured: Measured, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = load_base(str(model), dtype="float32"), []
    trainer = peer_trainer(
        "lora",
        base,
        measured.rows.train,
        replace(METHODS["lora"].peer, label_smoothing_factor=0.3),
        shared=TrainConfig(max_steps=3),
        steps=3,
        output=tmp_path,
        length=LENGTH,
        start=None,
        pad_token_id=0,
        precision=torch.float32,
    )

    def losses(*args: Any, smoothing: float) -> Any:
        seen.append((trainer.state.global_step, smoothing))
        return summed_losses(*args, smoothing=smoothing)

    monkeypatch.setattr("prefixtune.compare.peers.summed_losses", losses)
    trainer.train()
    assert set(seen) == {(0, 0.3), (1, 0.3), (2, 0.0)}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_peers_loss_is_the_smoothed_cross_entropy_of_targets_behind_virtual_tokens(smoothing: float) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 3 + 6, 90, requires_grad=True)  # 3 virtual tokens, 6 of text
    ids = torch.randint(3, 90, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][0, :3] = -100
    model = _Gives(given)
    loss, plain = summed_losses(model, batch, smoothing=smoothing)
    logits, labels = given[:, 3:-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item())
    assert plain.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item())
    ours, theirs = (torch.autograd.grad(one, given)[0] for one in (loss, expected))
    assert torch.allclose(ours, theirs)


class _Gives(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.weight = logits, torch.nn.Parameter(torch.zeros(()))

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def test_a_cell_says_what_all_settings_came_to(measured: Measured) -> None:
    resolved = {name: cell["resolved"] for name, cell in measured.cells.items()}
    shared = {"warmup_ratio": 0.06, "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0}
    for name in TRAINED:
        assert resolved[name].items() >= shared.items(), name
    ours = {name: resolved[name] for name in ("prefix", "prefix+projection")}
    assert {name: (one["retain"], one["token_damping"]) for name, one in ours.items()} == {
        "prefix": (0.1, 0.0),  # its rows are labels
        "prefix+projection": (0.1, 0.0),
    }
    for name in ("lora", "lora-all-linear"):
        assert resolved[name]["alpha"] == 2 * resolved[name]["rank"]


def test_lora_and_pefts_prefix_train_as_many_numbers_as_the_prefix(measured: Measured) -> None:
    counts = {name: cell["trainable_parameters"] for name, cell in measured.cells.items()}
    per_token = 2 * 2 * 2 * 8  # layers, keys and values, heads, head size
    assert counts["prefix"] == counts["lora"] == counts["peft-prefix"] == LENGTH * per_token
    assert counts["peft-prefix-default"] == counts["prefix"]


def sizes(plan: Plan, folder: Path) -> dict[str, tuple[int, int | None]]:
    """Numbers that each method trains, and its length."""
    cells = Measured.of(plan, folder).cells
    return {
        name: (cell["trainable_parameters"], cell["resolved"].get("length")) for name, cell in cells.items()
    }


def test_lora_is_as_large_as_a_prefix_in_some_layers_and_a_projected_prefix_as_long(
    model: Path, tmp_path: Path
) -> None:
    settings = {"prefix": {"layers": "top:1", "length": 2 * LENGTH, "retain": 0.0}}
    methods = ("prefix", "lora", "prefix+projection")
    plan = make_plan(model, methods=methods, forgetting=False, max_steps=1, settings=settings)
    ours, lora, projected = sizes(plan, tmp_path).values()
    assert ours[0] == lora[0] == LENGTH * 64
    assert ours[1] == projected[1] == 2 * LENGTH


def test_all_are_as_long_as_a_prefix_that_an_evaluation_row_leaves_few_positions(tmp_path: Path) -> None:
    def write(name: str, letters: int) -> str:
        row = {"instruction": "Count", "input": "1", "output": "q" * letters}
        (tmp_path / name).write_text(json.dumps([row] * ROWS), encoding="utf-8")
        return str(tmp_path / name)

    values = {"methods": ("prefix", "peft-prefix", "prompt-tuning", "p-tuning", "lora")}
    values |= {"max_steps": 1, "forgetting": False, "settings": {"prefix": {"retain": 0.0}}, "eval_rows": 1}
    model = make_model(tmp_path, "gpt2")
    values |= {"train": write("train.json", 10), "eval": write("eval.json", 104)}  # 120 of 128 positions
    (tmp_path / "cells").mkdir()
    found = sizes(make_plan(model, **values), tmp_path / "cells")
    per_token = 2 * 2 * 4 * 8  # layers, keys and values, heads, head size
    assert [found.pop("lora")[0], found["prefix"][0]] == [8 * per_token] * 2
    assert {length for _, length in found.values()} == {8}


def test_lora_trains_where_rows_leave_a_prefix_no_positions(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gpt2")
    row = {"instruction": "Count", "input": "1", "output": "q" * 110}  # 126 of 128 positions
    (tmp_path / "rows.json").write_text(json.dumps([row] * ROWS), encoding="utf-8")
    plan = make_plan(model, methods=("lora",), max_steps=1, eval_rows=1, forgetting=False, settings={})
    (tmp_path / "cells").mkdir()
    assert sizes(plan, tmp_path / "cells")["lora"][0] > 0


@pytest.mark.parametrize("family", ["gemma3-images", "qwen2.5-vl"])
@pytest.mark.parametrize("name", ["lora", "lora-all-linear"])
def test_all_numbers_that_lora_trains_on_a_model_that_sees_images_have_a_gradient(
    name: str, family: str
) -> None:
    model = peer_model("lora", tiny_model(family), METHODS[name].peer, length=16)
    ids = torch.randint(3, 90, (2, 10))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    summed_losses(model, batch, smoothing=0.0)[0].backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_ours_has_the_passes_of_the_others_on_a_gpu_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import prefixtune.compare.cell as cell

    class SeenError(Exception):
        pass

    def seen(*_: Any, **given: Any) -> Any:
        raise SeenError(given["pass_tokens"])

    monkeypatch.setattr(cell, "trainer_for", seen)
    unused: Any = SimpleNamespace(first=lambda rows: [], rows=None)
    unused.method = SimpleNamespace(prefix_options={"length": 4}, train_options={})
    with pytest.raises(SeenError, match=r"^512$"):
        cell._ours(unused, unused, unused, unused, {}, tmp_path)


@pytest.mark.parametrize(
    "family", ["falcon-mqa", "falcon-new", "mpt", "xglm", "opt-post-norm", "gpt-bigcode"]
)
@pytest.mark.parametrize("of", ["prompt-tuning", "p-tuning", "peft-prefix"])
def test_pefts_virtual_tokens_have_the_models_sizes_whatever_its_configuration_calls_them(
    of: str, family: str
) -> None:
    model = peer_model(of, tiny_model(family), PeerConfig(init="random"), length=3)
    ids = torch.arange(12).view(2, 6) + 5
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert trained
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in trained)


def test_pefts_prefix_is_refused_where_keys_and_values_have_two_sizes() -> None:
    with pytest.raises(ConfigError, match="keys and values of one size; deepseek_v3 has"):
        peer_model("peft-prefix", tiny_model("deepseek-v3"), PeerConfig(init="random"), length=3)


def test_a_prefix_trained_by_peft_starts_with_the_loss_of_ours(measured: Measured) -> None:
    """The same KV of the same text, rows and weighting: the first step's loss is the same number."""
    first = {name: measured.cells[name]["losses"][0][1] for name in ("prefix", "peft-prefix")}
    assert first["peft-prefix"] == pytest.approx(first["prefix"], rel=1e-5)
    assert len(measured.cells["prefix"]["losses"]) == len(measured.cells["peft-prefix"]["losses"]) == 3


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_on_the_rows_it_saw(measured: Measured, name: str) -> None:
    losses = [loss for _, loss in measured.cells[name]["losses"]]
    assert len(set(losses)) == 3  # every step moved it


@pytest.mark.parametrize("of", ["lora", "prompt-tuning", "p-tuning", "peft-prefix"])
def test_a_peer_leaves_the_base_as_it_was(of: str, measured: Measured, model: Path, tmp_path: Path) -> None:
    base = load_base(str(model), dtype="float32")
    before = {tensor.data_ptr(): tensor.detach().clone() for tensor in base.model.parameters()}
    trainer = peer_trainer(
        of,
        base,
        measured.rows.train,
        METHODS[of].peer,
        shared=TrainConfig(max_steps=3),
        steps=3,
        output=tmp_path,
        length=LENGTH,
        start=measured.rows.train[0].input_ids,
        pad_token_id=base.tokenizer.pad_token_id,
        precision=torch.float32,
    )
    trainer.train()
    now = {tensor.data_ptr(): tensor for tensor in trainer.model.parameters()}
    for place, tensor in before.items():
        assert torch.equal(now[place], tensor)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "told"), [("base", "the model as it is"), ("prompt-tuning", "the training diverged")]
)
def test_a_loss_that_is_not_finite_is_the_trainings_only_where_there_was_one(
    name: str, told: str, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixtune.compare.cell.row_losses", lambda *_, **__: [float("inf")])
    (cell,) = (cell for cell in measured.plan.cells if cell.method.name == name)
    with pytest.raises(RunError, match=told):
        run_cell(measured.plan, cell, measured.rows, tmp_path)


def test_base_has_forgotten_nothing_and_text_before_it_is_no_training(measured: Measured) -> None:
    assert measured.cells["base"]["forgetting"] == 0.0
    assert measured.cells["prompt"]["forgetting"] != 0.0
    assert measured.cells["prompt"]["dev_loss"] != measured.cells["base"]["dev_loss"]


@pytest.mark.parametrize("around", ["<s> $A", "</s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("instruction", ["Do it.", None])
def test_prompt_begins_once_and_ends_as_the_row_does(instruction: str | None, around: str) -> None:
    tokenizer = byte_tokenizer(around=around)
    row = Row(values={"instruction": "Count", "output": "a b"}, origin="r")
    ((example,), _) = build_examples([row], tokenizer, DataConfig())
    base = LoadedBase(model=None, tokenizer=tokenizer, name="none", dtype_reason="none")
    context = _in_context(instruction, base, [example]).context
    start, text = around.partition("$A")[0].strip(), "Human: Count\n\nAssistant: a b</s>"
    after = _after(context, example, tokenizer)
    assert tokenizer.decode(after.input_ids) == start + (f"{instruction}\n" if instruction else text) + text
    assert tokenizer.decode([label for label in after.labels if label != -100]) == "a b</s>"


@pytest.mark.parametrize("bos", ["<|im_start|>", "<s>"])
def test_a_mark_that_begins_each_turn_stays_with_a_row_after_a_prompt(bos: str) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    tokenizer.bos_token = bos  # SmolLM2's is its mark of a turn
    row = Row(values={"instruction": "Count", "output": "a b"}, origin="r")
    ((example,), _) = build_examples([row], tokenizer, DataConfig(template="chat"))
    base = LoadedBase(model=None, tokenizer=tokenizer, name="none", dtype_reason="none")
    after = _after(_in_context(None, base, [example]).context, example, tokenizer)
    assert after.input_ids == example.input_ids * 2
    assert _start(base, [example], len(example.input_ids)) == example.input_ids
    assert _start(base, [example] * 2, 2 * len(example.input_ids)) == example.input_ids * 2
    assert after.labels == (*[-100] * len(example.labels), *example.labels)


def test_rows_with_one_input_are_references_of_one_another(measured: Measured) -> None:
    assert [question.text.split("\n")[1] for question in measured.rows.questions] == ["0", "1", "2"]
    assert len(measured.rows.eval) == 2 * 3  # the loss is measured on two rows of each
    assert [len(question.references) for question in measured.rows.questions] == [3, 3, 3]


# --- the plan ----------------------------------------------------------------------------------------------


def test_a_cell_that_trains_nothing_runs_once_for_all_seeds_and_numbers_of_rows() -> None:
    plan = plan_of({"train": "t", "eval": "e", "methods": ("base", "lora"), "seeds": 2, "train_rows": [4, 8]})
    names = [cell.name for cell in plan.cells]
    assert names == ["base-1", "lora-4rows-1", "lora-8rows-1", "lora-4rows-2", "lora-8rows-2"]
    cell = {"initial_memory_bytes": 1, "peak_memory_bytes": 2, "train_seconds": None, "dev_loss": 1.0}
    cell |= {"tokens_per_second": None, "trainable_parameters": 0, "file_bytes": 0, "forgetting": 0.0}
    rows = result_rows(plan, [{**cell, "method": "base", "seed": 1, "train_rows": None, "metrics": {}}])
    assert [(row["method"], row["train_rows"]) for row in rows] == [("base", 4), ("base", 8)]


def test_a_metric_that_gives_other_keys_for_each_seed_is_the_mean_of_those_that_have_it(
    measured: Measured,
) -> None:
    cells = [
        {**measured.cells["base"], "metrics": metrics} for metrics in ({"f.a": 1.0}, {"f.a": 3.0, "f.b": 5.0})
    ]
    plan = plan_of({"train": "t", "eval": "e", "methods": ("base",)})
    (row,) = result_rows(plan, cells)
    assert {name: found["mean"] for name, found in row["metrics"].items()} == {"f.a": 2.0, "f.b": 5.0}
    assert [column.text(row) for column in columns_of([row])][-3:-1] == ["2.00 ± 1.41", "5.00 (1 of 2 seeds)"]


def test_memory_and_time_of_several_machines_have_no_mean(measured: Measured) -> None:
    plan = plan_of({"train": "t", "eval": "e", "methods": ("base", "lora"), "seeds": 2})
    cell = {**measured.cells["lora"], "train_rows": None}
    other = {**cell, "machine": {**cell["machine"], "threads": 999}}
    base, lora = result_rows(plan, [measured.cells["base"], cell, other])
    names = ("initial_memory_bytes", "peak_memory_bytes", "train_seconds", "tokens_per_second")
    assert all(lora[name] is None for name in names)
    assert lora["dev_loss"] == cell["dev_loss"]
    assert base["peak_memory_bytes"] == measured.cells["base"]["peak_memory_bytes"]
    assert [column.text(lora) for column in columns_of([base, lora])]  # it can be shown
    assert machines_of([cell, other, cell]) == [cell["machine"], other["machine"]]
    found = {"failed": [], "unfinished": [], "machines": machines_of([cell, other])}
    (line,) = missing_cells(found)
    assert "999 threads" in line


def test_a_mean_over_fewer_seeds_than_were_planned_says_so(measured: Measured) -> None:
    plan = plan_of({"train": "t", "eval": "e", "methods": ("base", "lora"), "seeds": 3})
    losses = ((1, 1.0), (3, 1.2))  # the second seed failed
    cells = [
        {**measured.cells["lora"], "train_rows": None, "seed": seed, "dev_loss": x} for seed, x in losses
    ]
    base, lora = result_rows(plan, [measured.cells["base"], *cells])
    loss, *others = [column.text(lora) for column in columns_of([base, lora])][-4:]
    assert loss == "1.1000 ± 0.1414 (2 of 3 seeds)"
    assert all(text.endswith(" (2 of 3 seeds)") for text in others)
    assert not any("seeds" in column.text(base) for column in columns_of([base, lora]))


def test_methods_whose_names_look_alike_in_a_file_name_have_cells_of_their_own() -> None:
    def names(*methods: str, **settings: Any) -> list[str]:
        tables = settings or {name: {"of": "lora"} for name in methods}
        values = {"train": "t", "eval": "e", "methods": methods, "seeds": 1, "train_rows": [4, 8]}
        return [cell.name for cell in plan_of(values, settings=tables).cells]

    assert len(set(names("基线一", "基线二", "r=8", "r 8", "r_8"))) == 5 * 2
    assert names("r_8") == ["r_8-4rows-1", "r_8-8rows-1"]
    with pytest.raises(ConfigError, match="a and a-4rows would both be kept"):
        names("a", "a-4rows", **{"a": {"of": "lora"}, "a-4rows": {"of": "base"}})
    with pytest.raises(ConfigError, match="lora and Lora"):
        names("lora", "Lora")  # one file where a disk knows no case


def test_a_changed_setting_changes_the_key_of_its_method_alone(model: Path) -> None:
    def keys(**settings: Any) -> dict[str, str]:
        plan = make_plan(model, methods=("base", "lora", "full"), settings=settings)
        return {cell.name: plan.cell_key(cell, "rows") for cell in plan.cells}

    before, after = keys(), keys(lora={"learning_rate": 1e-3})
    assert [name for name in before if before[name] != after[name]] == ["lora-1"]


def test_what_others_follow_of_the_prefix_changes_their_keys(model: Path) -> None:
    def keys(**prefix: Any) -> dict[str, str]:
        methods = ("full", "lora", "peft-prefix", "prefix+projection")
        plan = make_plan(model, methods=methods, settings={"prefix": prefix})
        return {cell.method.name: plan.cell_key(cell, "rows") for cell in plan.cells}

    before = keys()
    for prefix, changed in (({"length": 9}, [*before][1:]), ({"layers": "top:1"}, ["lora"])):
        after = keys(**prefix)
        assert [name for name in before if before[name] != after[name]] == changed


def test_a_cell_is_known_by_the_rows_that_it_trains_on(model: Path) -> None:
    def keys(*counts: int, **values: Any) -> dict[str, str]:
        methods = ("base", "prompt", "lora")
        plan = make_plan(model, methods=methods, train_rows=counts, forgetting=False, **values)
        rows = replace(known, train=known.train[: max(counts)])
        return {cell.name: plan.cell_key(cell, rows.key(plan.rows_of(cell))) for cell in plan.cells}

    known = make_rows(make_plan(model, forgetting=False))
    few, more = keys(4, 8), keys(4, 8, 12)
    assert set(more) - set(few) == {"lora-12rows-1"}
    assert all(more[name] == key for name, key in few.items())
    told = keys(4, 8, instruction="Count")
    known = replace(known, train=known.train[1:])  # other rows, the same number
    assert [name for name, key in keys(4, 8).items() if key == few[name]] == ["base-1"]
    again = keys(4, 8, instruction="Count")
    assert [name for name, key in again.items() if key == told[name]] == ["base-1", "prompt-1"]


def test_rows_of_another_layout_are_made_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(model)
    before = plan.data_key()
    monkeypatch.setattr("prefixtune.compare.plan.LAYOUT", 0)
    assert plan.data_key() != before


def test_other_longest_answers_change_the_key(model: Path) -> None:
    keys = set()
    for limit, longest in ((None, 512), (None, 256), (9, 512)):
        plan = make_plan(model, methods=("base",), max_new_tokens=limit)
        plan = replace(plan, data=replace(plan.data, max_length=longest))
        keys.add(plan.cell_key(plan.cells[0], "rows"))
    assert len(keys) == 3


def test_an_edited_metric_and_other_packages_change_the_key(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> dict[str, str]:
        plan = make_plan(model, methods=("prefix", "lora"), metrics=("metric_of_mine:score",))
        return {cell.method.name: plan.cell_key(cell, "rows") for cell in plan.cells}

    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "metric_of_mine.py"
    file.write_text("def score(predictions, references):\n    return 1.0\n", encoding="utf-8")
    before = keys()
    assert keys() == before
    file.write_text("def score(predictions, references):\n    return 0.0\n", encoding="utf-8")
    edited = keys()
    assert all(edited[name] != before[name] for name in before)
    for package, changed in (("peft", ["lora"]), ("torch", ["prefix", "lora"])):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", lambda name, package=package: str(name == package))
            found = keys()
            patch.setattr("importlib.metadata.version", lambda name: "False")
            assert [name for name, key in keys().items() if key != found[name]] == changed


def test_other_weights_or_settings_at_the_same_place_are_another_base(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "llama"
    shutil.copytree(model, place)
    shutil.copy(model.parent / "rows.json", tmp_path)
    plan = make_plan(place, methods=("base",), forgetting=False)
    (cell,) = plan.cells
    files, rows = [plan.data_key()], [make_rows(plan)]
    other = load_base(str(place), dtype="float32").model
    for parameter in other.parameters():
        parameter.data.mul_(1.0001)
    other.save_pretrained(place)
    for _ in range(2):
        files.append(plan.data_key())
        rows.append(make_rows(plan))
        (place / "generation_config.json").write_text('{"repetition_penalty": 1.5}', encoding="utf-8")
    assert rows[0].train == rows[1].train == rows[2].train
    assert len(set(files)) == len({one.key(0) for one in rows}) == 3
    with pytest.raises(RunError, match="other weights than when data"):
        run_cell(plan, cell, rows[0], tmp_path)


def test_one_other_number_is_another_base(model: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(model, tmp_path / "llama"))
    shutil.copy(model.parent / "rows.json", tmp_path)
    plan = make_plan(place, methods=("base",), forgetting=False)
    before = make_rows(plan)
    other = load_base(str(place), dtype="float32").model
    other.get_input_embeddings().weight.data[7, 5] += 1
    other.save_pretrained(place)
    after = make_rows(plan)
    assert after.about["base"]["fingerprint"] == before.about["base"]["fingerprint"]  # it does not sample it
    assert after.key(0) != before.key(0)


def test_a_row_without_a_target_is_neither_asked_nor_in_the_loss(model: Path, tmp_path: Path) -> None:
    shutil.copy(model.parent / "rows.json", tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    long = {**rows[0], "instruction": "long " * 200}
    (tmp_path / "eval.json").write_text(json.dumps([long, *rows[:3]]), encoding="utf-8")
    values = {"model": str(model), "train": str(tmp_path / "rows.json"), "eval": str(tmp_path / "eval.json")}
    made = make_rows(
        plan_of({**values, "forgetting": False}, data={"on_no_target": "drop", "max_length": 200})
    )
    assert len(made.questions) == 3
    assert len(made.eval) == 3


def test_other_rows_in_a_folder_and_other_packages_have_the_rows_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(answer: str) -> str:
        for part in ("train", "dev"):
            rows = datasets.Dataset.from_list([{"output": answer if part == "dev" else "same"}])
            rows.save_to_disk(tmp_path / "rows" / part)
            (tmp_path / "rows" / part / "state.json").write_text("{}")  # it has a hash of its own
        (tmp_path / "rows" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
        return plan_of({"train": str(tmp_path / "rows"), "eval": "demo:heldout"}).data_key()

    before = key("a")
    assert key("a") == before != key("b")
    for package in ("prefixtune", "transformers", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", lambda name, package=package: str(name == package))
            found = key("a")
            patch.setattr("importlib.metadata.version", lambda name: "False")
            assert key("a") != found


def test_a_file_says_what_options_say_and_adds_methods_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        'model = "m"\ntrain = "t"\neval = "e"\nmethods = ["lora", "big"]\ntrain_rows = 50\n'
        '[data]\nfields = "input=mr"\n[settings.big]\nof = "lora"\nrank = 64\n',
        encoding="utf-8",
    )
    table = read_file(file)
    data, settings = table.pop("data"), table.pop("settings")
    plan = plan_of(table, data=data, settings=settings)
    assert plan.config == CompareConfig(
        model="m", train="t", eval="e", methods=("lora", "big"), train_rows=(50,)
    )
    assert plan.data.fields == "input=mr"
    big = plan.methods[1]
    assert (big.of, big.peer.rank, big.peer.learning_rate) == ("lora", 64, METHODS["lora"].peer.learning_rate)


def test_a_bar_in_a_title_or_a_cell_of_a_page_is_no_border() -> None:
    columns = [
        Column(title="method", text=lambda row: "a|b"),
        Column(title="my:m.len|x", text=lambda row: "1"),
    ]
    head, rule, row = markdown(columns, [{}]).splitlines()
    assert (head, rule, row) == (r"| method | my:m.len\|x |", "| --- | ---: |", r"| a\|b | 1 |")


def test_peft_projection_is_said_to_start_from_the_noise_that_it_starts_from() -> None:
    def planned(**table: Any) -> Plan:
        options = {"train": "t", "eval": "e", "methods": ("mine",)}
        return plan_of(options, settings={"mine": {"of": "peft-prefix", "projection": True, **table}})

    for table in ({}, {"init": "random"}):
        assert planned(**table).methods[0].shown()["init"] == "random"
    with pytest.raises(ConfigError, match=r"settings\.mine: init: PEFT's projection starts from noise"):
        planned(init="text")
    assert METHODS["peft-prefix"].shown()["init"] == "text"


def test_an_instruction_that_no_method_reads_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = "only the method prompt reads it"
    for methods in (("base", "prompt"), ("base",)):
        assert said not in capsys.readouterr().err
        plan_of({"train": "t", "eval": "e", "methods": methods, "instruction": "Be brief."})
    assert said in capsys.readouterr().err


def test_lora_leaves_out_a_router_that_gives_more_than_a_tensor() -> None:
    base = tiny_model("llama4")
    names = lora_config(base, like=10_000, targets="all-linear").target_modules
    assert not any(name.endswith("router") for name in names)
    assert any(name.endswith("q_proj") for name in names)
    falcon = tiny_model("falcon")  # its linear layers have a forward of their own
    assert len(lora_config(falcon, like=10_000, targets="all-linear").target_modules) == 8


def test_tables_say_the_same_in_any_order() -> None:
    tables = {
        "mine": {"of": "ours", "retain": 0.0},
        "ours": {"of": "prefix", "length": 9},
        "prefix": {"max_grad_norm": 0.5},
    }
    for names in permutations(tables):
        settings = {name: tables[name] for name in names}
        plan = plan_of({"train": "t", "eval": "e", "methods": tuple(tables)}, settings=settings)
        assert [dict(method.options) for method in plan.methods] == [
            {"max_grad_norm": 0.5, "length": 9, "retain": 0.0},
            {"max_grad_norm": 0.5, "length": 9},
            {"max_grad_norm": 0.5},
        ]


def test_a_length_of_auto_is_the_default() -> None:
    tables = {"prefix": {"length": "auto"}, "short": {"of": "prefix", "length": 9}}
    tables["as-ever"] = {"of": "short", "length": "auto"}
    plan = plan_of({"train": "t", "eval": "e", "methods": ("prefix", "as-ever")}, settings=tables)
    plain = plan_of({"train": "t", "eval": "e", "methods": ("prefix",)})
    assert [dict(method.options) for method in plan.methods] == [{}, {}]
    assert plan.cell_key(plan.cells[0], "rows") == plain.cell_key(plain.cells[0], "rows")


def test_list_as_json_has_the_methods_and_settings_that_are_listed() -> None:
    found = json.loads(invoke("compare", "--list", "--json").stdout)
    listed = [line.partition(":")[0] for line in invoke("compare", "--list").stdout.splitlines()]
    assert list(found) == listed
    assert found["lora"]["learning_rate"] == METHODS["lora"].shown()["learning_rate"]
    assert found["base"] == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("output = 5", "x.toml: output: expected the name of a folder; got 5"),
        ("[data]\nfield = 'input=mr'", "x.toml: data: unknown option field hint: the options are"),
        ("[data]\nmax_length = '9'", "x.toml: data: max_length: expected int; got '9'"),
        (
            "[data]\nlimit = 5",
            "x.toml: data: limit: a comparison has no such option; got 5 hint: train_rows and eval_rows",
        ),
        ("methods = 5", "x.toml: methods: expected names; got 5"),
        ("seeds = '3'", "x.toml: seeds: expected int; got '3'"),
        ("sedes = 3", "x.toml: unknown option sedes hint: the options are model, "),
        ("sedes = 3", "dtype, output, data, settings"),
        ("settings = {lora = 1}", "x.toml: settings.lora: expected a table [settings.lora]; got 1"),
        ("[settings.lora]\nrank = '8'", "x.toml: settings.lora: rank: expected int or nothing; got '8'"),
        (
            "[settings.lora]\nranks = 8",
            "x.toml: settings.lora: lora has no setting ranks hint: it has alpha, ",
        ),
        ("[settings.lora]\nwarmup_ratio = 7", "x.toml: settings.lora: warmup_ratio: expected a share"),
        ("[settings.lora]\nlabel_smoothing_factor = 1", "lora: label_smoothing_factor: expected a share"),
        ("[settings.full]\nweight_decay = -3", "x.toml: settings.full: weight_decay: expected 0 or more"),
        ("[settings.p-tuning]\nmax_grad_norm = -1", "x.toml: settings.p-tuning: max_grad_norm: expected 0"),
        ("methods = ['loar']", "x.toml: methods: there is no method 'loar' hint: did you mean lora?"),
        ("metrics = ['bleux']", "x.toml: metric: expected one of exact_match"),
        ("[settings.prefix]\nretain = 'no'", "x.toml: settings.prefix: retain: expected float; got 'no'"),
        ("[settings.a]\nof = ['lora']", "x.toml: settings.a: of: expected the name of a method; got"),
        (
            "[settings.lroa]\nrank = 8",
            "x.toml: settings.lroa: there is no method 'lroa' hint: did you mean lora?",
        ),
        ("methods = {lora = 1}", "methods: expected names; got {'lora': 1}"),
        ("train_rows = 5.5", "train_rows: expected whole numbers above 0; got 5.5"),
        ("train_rows = true", "train_rows: expected whole numbers above 0; got (True,)"),
    ],
)
def test_a_slip_in_the_file_is_told_as_the_users(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f"train = 't'\neval = 'e'\n{line}\n", encoding="utf-8")
    result = invoke("compare", tmp_path / "x.toml")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("values", "settings", "words"),
    [
        ({"methods": ("a",)}, {"a": {"of": "b"}, "b": {"of": "a"}}, "a of b of a"),
        ({"methods": ("a",)}, {"a": {"of": "loar"}}, "did you mean lora"),
        ({"methods": ("a",)}, {"a": {"of": ["lora"]}}, "of: expected the name"),
        ({"methods": ("a",)}, {"a": {"rank": 3}}, "there is no method 'a'"),
        ({"methods": ("loar",)}, {}, "did you mean lora"),
        ({"methods": ("lora", "lora")}, {}, "named twice"),
        ({"methods": ("lora",)}, {"lora": {"ranks": 3}}, "no setting ranks"),
        ({"methods": ("full",)}, {"full": {"rank": 3}}, "no setting rank"),
        ({"methods": ("prefix",)}, {"prefix": {"seed": 3}}, "no setting seed"),
        ({"methods": ("prefix",)}, {"prefix": {"packing": False}}, "decides that for all methods"),
        ({"methods": ("lora",)}, {"lora": {"rank": -1}}, "rank: expected more than 0"),
        (
            {},
            {"prefix+projection": {"token_damping": 0.5}},
            "settings.prefix+projection: token_damping: the tokens of a projection have no steps",
        ),
        ({"train_rows": 0}, {}, "train_rows"),
        ({"train_rows": (4, 8, 4)}, {}, "train_rows: 4 is named twice"),
        ({"max_new_tokens": -1}, {}, "max_new_tokens: expected more than 0"),
        ({"trian": "x"}, {}, "unknown option trian"),
    ],
)
def test_a_wrong_plan_is_told_before_any_work(values: Any, settings: Any, words: str) -> None:
    with pytest.raises(ConfigError) as told:
        plan_of({"train": "t", "eval": "e", **values}, settings=settings)
    assert words in str(told.value)


def test_a_misspelt_table_is_told_as_one_and_not_offered_itself() -> None:
    with pytest.raises(ConfigError) as told:
        plan_of({"train": "t", "eval": "e"}, settings={"lroa": {"rank": 8}})
    assert told.value.message == "settings.lroa: there is no method 'lroa'"
    assert told.value.hint == "did you mean lora?"
    with pytest.raises(ConfigError, match=r"^settings\.lora: of: there is no method 'loar'"):
        plan_of({"train": "t", "eval": "e"}, settings={"lora": {"of": "loar"}})
    with pytest.raises(ConfigError, match=r"^methods: there is no method 'loar'"):
        plan_of({"train": "t", "eval": "e", "methods": ("loar",)})


def test_spread_is_mean_and_sample_deviation() -> None:
    values = [1.0, 2.0, 4.0]
    assert spread(values) == {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
    assert spread([3.0]) == {"mean": 3.0, "std": 0.0}
    assert spread([None]) == {"mean": None, "std": None}


# --- processes ---------------------------------------------------------------------------------------------


def invoke(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@dataclass
class Folder:
    """A comparison from the command line, with a method that cannot work: its prefix leaves no positions."""

    path: Path
    model: Path
    first: Result

    def arguments(self, methods: str) -> list[str]:
        return self.arguments_in(self.path, self.model, methods)

    @staticmethod
    def arguments_in(path: Path, model: Path, methods: str) -> list[str]:
        rows = str(model.parent / "rows.json")
        return [
            *("compare", str(path / "x.toml"), "--methods", methods, "--output", str(path / "out")),
            *("--model", str(model), "--train", rows, "--eval", rows, "--json"),
        ]


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("compare")
    (path / "x.toml").write_text(
        "train_rows = 8\neval_rows = 2\nseeds = 1\nforgetting = false\ndtype = 'float32'\n"
        "[settings.long]\nof = 'prefix'\nlength = 500\n",
        encoding="utf-8",
    )
    plan = make_plan(
        model, train_rows=8, eval_rows=2, forgetting=False, max_steps=None, max_new_tokens=None, settings={}
    )
    (path / "out").mkdir()
    make_rows(plan).write(path / "out" / "data.json", key=plan.data_key())  # saves the time of a process
    arguments = Folder.arguments_in(path, model, "long,prefix")
    return Folder(path, model, invoke(*arguments))


@pytest.mark.parametrize("metric", ["json_equal", "metric_that_fails:score", "metric_that_fails:strict"])
def test_a_metric_that_cannot_be_scored_is_told_before_any_cell(
    metric: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text = "def score(predictions, references):\n    return {}['key']\n"
    text += "def strict(predictions, references):\n    return float(all(text[0] for text in predictions))\n"
    (tmp_path / "metric_that_fails.py").write_text(text, encoding="utf-8")
    plan = make_plan(model, methods=("base",), metrics=(metric,), forgetting=False)
    make_rows(plan).write(tmp_path / "data.json", key=plan.data_key())
    with pytest.raises((ConfigError, DataError), match=f"{metric}: "):
        compare(plan, tmp_path)
    assert list((tmp_path / "cells").iterdir()) == []


METRIC = """def score(predictions, references):
    if set(predictions) - {text for texts in references for text in texts} - {""}:
        raise ValueError("a strange answer")
    return 1.0
"""


def test_a_metric_that_fails_on_answers_is_told_and_scores_them_when_it_is_mended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def in_this_process(plan: Plan, output: Path, **task: Any) -> None:
        ran.append(task["name"])
        if task["cell"] is None:
            make_rows(plan).write(task["result"], key=plan.data_key())
            return
        folder = output / "cells" / task["name"]
        place = {"cell": task["name"], "rows": output / "data.json", "folder": folder}
        found = {**task["about"], **run_child(plan, place), "wall_seconds": 1.0}
        task["result"].write_text(json.dumps(found), encoding="utf-8")

    def again(text: str) -> Result:
        (tmp_path / "metric_of_ours.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "metric_of_ours", raising=False)
        options = ["--metric", "metric_of_ours:score,exact_match", "--eval-rows", 3, "--max-new-tokens", 4]
        return invoke(*Folder.arguments_in(tmp_path, model, "base"), *options)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("prefixtune.compare.run._child", in_this_process)
    (tmp_path / "x.toml").write_text("seeds = 1\nforgetting = false\n", encoding="utf-8")
    first = again(METRIC)
    assert first.exit_code == 1
    assert "NOT SCORED by metric_of_ours:score: metric metric_of_ours:score: it failed" in first.stderr
    (row,) = json.loads(first.stdout)["rows"]
    assert row["metrics"]["exact_match"]["mean"] == 0.0
    assert [column.text(row) for column in columns_of([row])][-2:] == ["0.0000", "–"]
    assert "NOT SCORED base, seed 1" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    second = again(METRIC.replace("raise ValueError", "print"))
    assert second.exit_code == 0, second.stderr
    (row,) = json.loads(second.stdout)["rows"]  # what the metric prints is not in it
    assert row["metrics"]["metric_of_ours:score"]["mean"] == 1.0
    assert ran == ["rows", "base-1"]


def test_a_failed_cell_is_told_and_loses_no_other(folder: Folder) -> None:
    assert folder.first.exit_code == 1
    assert "1 cells failed: long (seed 1)" in folder.first.stderr
    found = json.loads(folder.first.stdout)
    assert [row["method"] for row in found["rows"]] == ["prefix"]
    (failure,) = found["failed"]
    assert "512" in failure["error"]  # the positions that the model has
    assert "Traceback" not in folder.first.stderr


def test_results_hold_the_columns_and_what_they_carry(folder: Folder) -> None:
    found = json.loads((folder.path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found == json.loads(folder.first.stdout)
    (row,) = found["rows"]
    assert row["trainable_parameters"] == 9 * 64  # the length for so few rows
    assert row["metrics"] == {}
    assert row["forgetting"] == {"mean": None, "std": None}
    cell = json.loads((folder.path / "out" / "cells" / "prefix-1.json").read_text(encoding="utf-8"))
    assert (row["dev_loss"], row["dev_loss_std"]) == (cell["dev_loss"], 0.0)
    assert row["peak_memory_bytes"] == cell["peak_memory_bytes"] > 50e6  # of a process of its own
    assert cell["versions"] == found["versions"]
    assert {"settings", "seeds", "versions", "machine", "command"} <= found.keys()


def test_a_folder_that_another_process_compares_in_is_refused_and_kept(folder: Folder) -> None:
    files = {path: path.read_bytes() for path in (folder.path / "out").rglob("*") if path.is_file()}
    with FileLock(folder.path / "out" / ".lock"):
        result = invoke(*folder.arguments("prefix"))
    assert result.exit_code == 1
    assert "another process trains in it" in result.stderr
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_finished_cell_is_not_run_again(folder: Folder) -> None:
    cell = folder.path / "out" / "cells" / "prefix-1.json"
    before = cell.stat().st_mtime_ns
    again = invoke(*folder.arguments("prefix"))
    assert again.exit_code == 0, again.stderr
    assert "1 of 1 cells are finished already" in again.stderr
    assert cell.stat().st_mtime_ns == before
    assert json.loads(again.stdout)["rows"] == json.loads(folder.first.stdout)["rows"]


def test_rows_that_cannot_be_read_are_told_with_their_file(folder: Folder, tmp_path: Path) -> None:
    options = (
        "--train",
        "none.json",
        "--eval",
        "none.json",
        "--methods",
        "base",
        "--output",
        tmp_path / "out",
    )
    result = invoke("compare", *options)
    assert result.exit_code == 1
    assert "error: none.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_that_are_dropped_do_not_count_among_the_rows_to_train_on(model: Path, tmp_path: Path) -> None:
    rows = json.loads((model.parent / "rows.json").read_text(encoding="utf-8"))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{**row, "output": None} if n % 2 else row for n, row in enumerate(rows)]))
    sources = {"train": str(file), "eval": str(model.parent / "rows.json"), "train_rows": [6, 12]}
    values = {"model": str(model), "forgetting": False, **sources}
    plan = plan_of(values, data={"on_no_target": "drop"})
    with pytest.raises(DataError, match="expected 12 rows with a target; of the first 12 there are 6"):
        make_rows(plan)


def test_more_evaluation_inputs_than_there_are_is_told_and_the_default_takes_what_there_is(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"rows.json: expected 6 inputs to measure on; got 5"):
        make_rows(make_plan(model, eval_rows=6, forgetting=False))
    plan = make_plan(model, eval_rows=None, methods=("base",), forgetting=False)
    rows = make_rows(plan)
    assert len(rows.questions) == INPUTS
    assert len(make_rows(make_plan(model, eval_rows=5, forgetting=False)).questions) == INPUTS
    hundred = make_plan(model, eval_rows=100, methods=("base",), forgetting=False)
    assert hundred.data_key() == plan.data_key()  # as before there was a difference
    rows.write(tmp_path / "data.json", key=plan.data_key())
    with pytest.raises(DataError, match="expected 100 inputs"):
        compare(hundred, tmp_path)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (
            "prefix",
            {"prefix": {"layers": "top:9"}},
            "prefix: layers: the model has 2 layers, 0 to 1; got 'top:9'",
        ),
        ("lora", {"prefix": {"layers": "0,2"}}, "prefix: layers: the model has 2 layers, 0 to 1; got '0,2'"),
        (
            "top",
            {"top": {"of": "prefix", "layers": "2"}},
            "top: layers: the model has 2 layers, 0 to 1; got '2'",
        ),
        (
            "long",
            {"long": {"of": "prefix", "length": 512}},
            "long: length: 512 virtual tokens leave no room in the 512 positions of the model",
        ),
        (
            "prefix",
            {"prefix": {"init_tokens": [5, 9999]}},
            "prefix: init_tokens: expected token ids of the mode",
        ),
    ],
)
def test_a_prefix_that_cannot_be_on_the_model_is_told_before_any_cell(
    method: str, settings: Any, words: str, data: tuple[Path, Rows], tmp_path: Path
) -> None:
    model, rows = data
    plan = make_plan(model, methods=("base", method), forgetting=False, settings=settings)
    rows.write(tmp_path / "data.json", key=plan.data_key())
    with pytest.raises(ConfigError) as told:
        compare(plan, tmp_path)
    assert told.value.message.startswith(words)
    assert list((tmp_path / "cells").iterdir()) == []


@pytest.fixture(scope="module")
def data(model: Path) -> tuple[Path, Rows]:
    return model, make_rows(make_plan(model, forgetting=False))


def test_evaluation_rows_that_are_trained_on_are_counted(measured: Measured, folder: Folder) -> None:
    rows = measured.rows
    assert rows.trained_on() == (6, 6)  # one file
    assert replace(rows, train=rows.train[:6]).trained_on() == (4, 6)  # of its rows 0, 5, 1, 6, 2 and 7
    other = replace(rows.train[0], labels=(*rows.train[0].labels[:-1], 0))  # the same prompt, another target
    assert replace(rows, train=(other,)).trained_on() == (0, 6)
    chat = (rows.train[0], replace(rows.train[1], part=1))  # whose first turn alone is that of a row
    assert replace(rows, train=chat, eval=(rows.train[0],)).trained_on() == (0, 1)
    assert replace(rows, train=chat, eval=chat).trained_on() == (1, 1)
    told = "evaluation: 4 of 4 rows are training rows too (identical prompt and target)"
    assert told in " ".join(folder.first.stderr.split())
    assert json.loads(folder.first.stdout)["data"]["evaluation_rows_trained_on"] == 4
    report = (folder.path / "out" / "report.md").read_text(encoding="utf-8")
    assert "; 4 of these rows are training rows too\n" in report


def test_an_evaluation_row_without_positions_is_told_before_any_cell(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gpt2")  # of 128 positions

    def make(letters: int, *methods: str, **values: Any) -> Rows:
        file = tmp_path / "eval.json"
        file.write_text(json.dumps([{"instruction": "i" * letters, "input": "", "output": "a"}]))
        values |= {"eval": str(file), "eval_rows": 1}
        plan = make_plan(model, methods=methods, forgetting=False, **values)
        return make_rows(plan)

    def refused(*args: Any, **values: Any) -> str:
        with pytest.raises(DataError) as told:
            make(*args, **values)
        return told.value.message

    other = len(make(1, "lora", "prefix").eval[0].input_ids) - 1  # tokens of a row but for its instruction
    fits = 128 - other
    make(fits, "base", "lora")
    assert refused(fits + 1, "lora") == "eval.json:1: 129 tokens do not fit into the 128 positions of gpt2"
    for name in ("prefix", "prompt-tuning"):
        make(fits - LENGTH, "lora", name)
        assert f"after a prefix of {LENGTH}" in refused(fits - LENGTH + 1, "lora", name)
    answered = {"metrics": ("exact_match",), "max_new_tokens": 40}
    make(1, "lora", "prefix", **answered)
    told = refused(fits - LENGTH, "lora", **answered)
    assert "with an answer of up to 40" in told
    assert "do not fit into the 128 positions of gpt2" in told
    short = {"settings": {"short": {"of": "prefix", "length": 2}}}
    make(fits - 2, "short", **short)
    make(fits - 8, "prefix", settings={})  # one without a given length is shorter than by its number of rows
    assert "leave 7 of the model's 128 positions to the prefix" in refused(fits - 7, "prefix", settings={})


def test_neutral_text_is_as_long_as_the_positions_behind_what_comes_before_it(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gpt2")  # of 128 positions

    def longest(*methods: str, **values: Any) -> int:
        return max(
            len(row.input_ids) for row in make_rows(make_plan(model, methods=methods, **values)).neutral
        )

    assert longest("base", "lora") == 128
    assert longest("prefix", "peft-prefix") == 128 - LENGTH
    context = len(make_rows(make_plan(model, methods=("base",), forgetting=False)).train[0].input_ids)
    assert longest("prompt", "prefix") == 128 - context  # the first training row


def test_cells_behind_few_positions_are_measured_to_the_end(tmp_path: Path) -> None:
    plan = make_plan(
        make_model(tmp_path, "gpt2"), methods=("prompt", "prompt-tuning", "peft-prefix"), max_steps=1
    )
    (tmp_path / "cells").mkdir()
    cells = Measured.of(plan, tmp_path / "cells").cells
    assert all(cell["forgetting"] is not None for cell in cells.values())


def test_a_row_without_a_prompt_is_told_where_answers_are_made(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"input": "", "output": "a b"}, {"input": "q", "output": "a"}]', encoding="utf-8")

    def made(*metrics: str) -> Rows:
        values = {"model": str(model), "train": str(file), "eval": str(file), "methods": ("base",)}
        more = {"metrics": metrics, "forgetting": False, "dtype": "float32"}
        return make_rows(plan_of({**values, **more}, data={"template": "{input}{output}"}))

    assert len(made().questions) == 2
    with pytest.raises(DataError, match=r"rows\.json:1: the prompt is empty"):
        made("exact_match")


def test_a_context_that_leaves_a_row_no_positions_is_told_before_any_cell(tmp_path: Path) -> None:
    plan = make_plan(
        make_model(tmp_path, "gpt2"), methods=("prompt",), instruction="i" * 110, forgetting=False
    )
    with pytest.raises(
        DataError, match=r"tokens after the text in the context of 111 do not fit into the 128"
    ):
        make_rows(plan)


def test_an_evaluation_row_beyond_the_change_of_the_rotary_is_told_where_a_prefix_is_trained(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    file = tmp_path / "eval.json"
    file.write_text(json.dumps([{"instruction": "i" * 60, "input": "", "output": "a"}]))
    plan = {"eval": str(file), "eval_rows": 1, "forgetting": False}
    make_rows(make_plan(model, methods=("base", "lora", "prompt-tuning"), **plan))
    with pytest.raises(
        DataError, match=r"eval.json:1: \d+ tokens after a prefix of .* into the 64 positions"
    ):
        make_rows(make_plan(model, methods=("base", "prefix"), **plan))


def test_evaluation_rows_come_from_a_split_of_their_own(model: Path, tmp_path: Path) -> None:
    def rows(answer: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"instruction": "a", "input": "", "output": answer}])

    source = str(tmp_path / "rows")
    datasets.DatasetDict({"train": rows("train"), "dev": rows("dev")}).save_to_disk(source)
    values = {"model": str(model), "train": source, "eval": source, "forgetting": False}
    found = make_rows(plan_of(values, data={"eval_split": "dev"}))
    assert [question.references for question in found.questions] == [("dev",)]
    assert [example.origin for example in (*found.train, *found.eval)] == ["rows[0]", "rows[0]"]
    assert found.train != found.eval
    with pytest.raises(ConfigError, match="the split 'train' is trained on"):
        make_rows(plan_of(values))


def test_report_makes_the_page_again_from_the_folder(folder: Folder) -> None:
    pytest.importorskip("matplotlib")
    page = folder.path / "out" / "report.md"
    page.unlink()
    result = invoke("report", folder.path / "out")
    assert result.exit_code == 0, result.stderr
    row = json.loads(folder.first.stdout)["rows"][0]
    assert f"| prefix | 576 | {row['file_bytes'] / 1000:.2f} kB |" in page.read_text(encoding="utf-8")
    for name in ("loss", "quality_memory", "quality_time"):
        assert f"]({name}.png)" in page.read_text(encoding="utf-8")
        assert (folder.path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_comparison_is_told(tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 1
    assert "holds no comparison" in result.stderr


def test_report_tells_the_cells_that_failed(folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = shutil.copytree(folder.path / "out", tmp_path / "out")
    (out / "results.json").write_text(folder.first.stdout, encoding="utf-8")
    result = invoke("report", out)
    assert result.exit_code == 0, result.stderr
    assert "FAILED long, seed 1: " in result.stderr


DAMAGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "a cell cut short": ("cells/prefix-1.json", lambda text: text[:100]),
    "a cell without its losses": ("cells/prefix-1.json", lambda text: text.replace('"losses"', '"lost"')),
    "another file's contents": ("results.json", lambda text: '{"rows": []}'),
    "a list": ("results.json", lambda text: "[1]"),
    "no cells": ("results.json", lambda text: text.replace('"cells"', '"cell"')),
    "a word for a number": (
        "results.json",
        lambda text: re.sub(r'"dev_loss": [0-9.]+', '"dev_loss": "x"', text),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_with_its_file(damage: str, folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name, change = DAMAGES[damage]
    path = shutil.copytree(folder.path / "out", tmp_path / "out") / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    result = invoke("report", tmp_path / "out")
    assert result.exit_code == 1
    assert f"error: {path}: damaged (" in result.stderr
    assert "hint: run the comparison again" in result.stderr


def test_a_report_that_fails_does_not_lose_the_table(folder: Folder, tmp_path: Path) -> None:
    out = shutil.copytree(folder.path / "out", tmp_path / "out")
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    again = invoke(*folder.arguments("prefix"), "--output", out)
    assert again.exit_code == 1
    assert "report.md" in again.stderr
    assert json.loads(again.stdout)["rows"] == json.loads(folder.first.stdout)["rows"]


def test_plots_take_names_with_signs_of_formulas_as_they_are(tmp_path: Path) -> None:
    rows = [
        {
            "method": "pre $x_{$ fix",
            "train_rows": count,
            "metrics": {"own $^{$": {"mean": 0.5, "std": 0.1}},
            "peak_memory_bytes": 1e9,
            "train_seconds": 2.0,
        }
        for count in (8, 16)
    ]
    cells = [{"method": row["method"], "train_rows": 8, "losses": [[1, 2.0], [2, 1.0]]} for row in rows]
    drawn = draw(rows, cells, tmp_path)
    assert {file for _, file in drawn} == {path.name for path in tmp_path.iterdir()}


def test_plots_without_matplotlib_name_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as told:
        require_matplotlib()
    assert "pip install 'prefixtune[report]'" in str(told.value)
