"""Laws of training: a run that was stopped ends as one that was not, and a folder is never lost."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from click.testing import CliRunner, Result
from filelock import FileLock
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState, TrainingArguments

from families import tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.cli import main
from prefixtune.config import DataConfig, TrainConfig
from prefixtune.data import Collator, Example, Row, build_examples, load_rows
from prefixtune.evaluate import target_loss
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes
from prefixtune.train import PrefixTrainer, TrainResult, default_length, default_start, telling_rows
from prefixtune.train.callbacks import KeepBest, Metrics
from prefixtune.train.defaults import prefix_config_of
from prefixtune.train.folder import last_checkpoint
from prefixtune.train.sampler import LengthGroupedSampler
from prefixtune.train.trainer import training_arguments
from tokenizers_for_tests import CHATML, THINKING, byte_tokenizer

EPOCHS, STEPS, SAVED = 12, 72, 5  # 24 rows, 2 x 2 rows a step
PARAMETERISATIONS = {
    "direct": [],
    "projection": ["--projection", "--hidden-size", 8],
    "top-layer": ["--layers", "top:1", "--init", "random"],  # the frozen layer's noise is restored too
}
LONG_RUN = ["--length", 4, "--num-train-epochs", EPOCHS, "--save-steps", SAVED, "--eval-steps", 8]
LONG_RUN += ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2, "--logging-steps", 1]
SHORT_RUN = ["--length", 4, "--max-steps", 2]
TIMEOUT = 60  # seconds that a subprocess may take


def call(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def succeed(*args: Any) -> Result:
    result = call(*args)
    assert result.exit_code == 0, result.stderr
    return result


def fail(*args: Any, code: int = 1) -> str:
    result = call(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(re.findall(r"^[eE]rror: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert "internal error" not in result.stderr
    return result.stderr


def write_rows(path: Path, count: int, *, first: int = 0) -> Path:
    rows = [
        {"instruction": f"Say {i}." + " Please." * (i % 4), "input": "", "output": "yes" * (1 + i % 3)}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has dropout, rows to train on and rows to evaluate on."""
    folder = tmp_path_factory.mktemp("train")
    tokenizer = byte_tokenizer()
    dropout = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    tiny_model("gpt2", vocab_size=len(tokenizer), **dropout).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "eval.jsonl", 6, first=100)
    return folder


def options(place: Path, output: Path, *more: Any, evaluates: bool = True) -> list[str]:
    args = ["train", "--model", place / "model", "--data", place / "rows.jsonl", "--output", output]
    args += ["--eval-data", place / "eval.jsonl"] if evaluates else []
    args += ["--dtype", "float32", "--report-to", "none", *more]
    return [str(arg) for arg in args]


def bits(output: Path) -> dict[str, bytes]:
    """All tensors of a prefix folder, and of the projection where there is one."""
    files = [output / "prefix.safetensors", output / "trainable.safetensors"]
    return {
        f"{file.name}/{name}": tensor.numpy().tobytes()
        for file in files
        if file.exists()
        for name, tensor in load_file(file).items()
    }


def logged(output: Path, kind: str) -> list[tuple[int, float]]:
    """What metrics.jsonl tells of `kind`, as (step, value)."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[kind]) for line in lines if kind in line]


def training_record(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "prefix.json").read_text(encoding="utf-8"))["training"]
    return record


# --- stopped and resumed -----------------------------------------------------------------------------------


def stop(args: Sequence[str], output: Path, *, step: int, sign: signal.Signals) -> tuple[int, str, str]:
    """Run the command line in a process of its own; once checkpoint-`step` is complete, send it a signal."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = "from prefixtune.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state, deadline = output / f"checkpoint-{step}" / "trainer_state.json", time.monotonic() + TIMEOUT
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sign)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


@pytest.fixture(scope="module", params=PARAMETERISATIONS)
def killed(request: pytest.FixtureRequest, place: Path) -> tuple[Path, Path, list[str]]:
    """A run that went through, the same run killed on its way, and its options."""
    more = [*LONG_RUN, *PARAMETERISATIONS[request.param]]
    whole, cut = place / f"{request.param}-whole", place / f"{request.param}-killed"
    succeed(*options(place, whole, *more))
    code, _, stderr = stop(options(place, cut, *more), cut, step=3 * SAVED, sign=signal.SIGKILL)
    assert code == -signal.SIGKILL, stderr
    assert not (cut / "prefix.json").exists()
    return whole, cut, more


@pytest.fixture
def copied(killed: tuple[Path, Path, list[str]], tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """As `killed`, with a copy of the killed run that a test may change."""
    whole, cut, more = killed
    return whole, Path(shutil.copytree(cut, tmp_path / "run")), more


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def test_killed_run_resumed_ends_with_the_same_bits(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    result = succeed(*options(place, cut, *more, "--resume"))
    assert f"resuming from {checkpoints(cut)[0].parent}/checkpoint-" in result.stderr
    assert bits(cut) == bits(whole)
    assert (whole / "trainable.safetensors").exists() == ("--projection" in more)
    assert bits(cut / "best") == bits(whole / "best")


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_killed_run_goes_on_with_options_that_take_less_memory(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    longest = json.loads((cut / "run.json").read_text())["resolved"]["packing_length"]
    assert longest == 512
    less = ["--gradient-checkpointing", "--packing-length", 300]
    result = succeed(*options(place, cut, *more, *less, "--resume"))
    assert "gradient_checkpointing, packing_length: not as the run was begun" in result.stderr
    record = json.loads((cut / "run.json").read_text())
    assert record["resolved"]["packing_length"] == 300
    assert record["asked"]["train_config"]["gradient_checkpointing"] is True
    first, second = (load_file(folder / "prefix.safetensors") for folder in (whole, cut))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_a_packing_length_that_is_no_longer_given_is_the_default_again(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    record = json.loads((cut / "run.json").read_text())
    record["resolved"]["packing_length"] = record["asked"]["train_config"]["packing_length"] = 300
    (cut / "run.json").write_text(json.dumps(record))
    result = succeed(*options(place, cut, *more, "--resume"))
    assert "packing_length: not as the run was begun" in result.stderr
    assert json.loads((cut / "run.json").read_text())["resolved"]["packing_length"] == 512
    assert bits(cut) == bits(whole)


def test_killed_run_resumed_reports_what_the_whole_run_reports(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    succeed(*options(place, cut, *more, "--resume"))
    first, second = training_record(whole), training_record(cut)
    own = {"train_seconds": 0, "peak_bytes": 0, "estimated_peak_bytes": 0}  # of the process, not of the run
    assert {**first, **own} == {**second, **own}


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_seconds_of_a_resumed_run_are_those_of_all_its_parts(place: Path, copied: Any) -> None:
    _, cut, more = copied
    last = last_checkpoint(cut, processes=1)  # the kill may have come while a later one was written
    assert last is not None
    for folder in set(checkpoints(cut)) - {last}:
        shutil.rmtree(folder)
    state = json.loads((last / "trainer_state.json").read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < TIMEOUT
    state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 5000.0
    (last / "trainer_state.json").write_text(json.dumps(state))
    earlier = Path(shutil.copytree(cut, cut.with_name("earlier")))
    succeed(*options(place, cut, *more, "--resume"))
    seconds = training_record(cut)["train_seconds"]
    assert 5000 < seconds < 5000 + TIMEOUT
    assert str(seconds) in (cut / "README.md").read_text()
    del state["stateful_callbacks"]["Clock"]  # as an earlier version wrote it
    (earlier / last.name / "trainer_state.json").write_text(json.dumps(state))
    succeed(*options(place, earlier, *more, "--resume"))
    assert 0 < training_record(earlier)["train_seconds"] < TIMEOUT


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_an_option_that_the_run_did_not_have_is_its_default(place: Path, copied: Any) -> None:
    _, cut, more = copied
    record = json.loads((cut / "run.json").read_text())
    del record["asked"]["train_config"]["label_smoothing_factor"]  # as an earlier version wrote it
    (cut / "run.json").write_text(json.dumps(record))
    again = options(place, cut, *more, "--resume")
    told = " ".join(fail(*again, "--label-smoothing-factor", 0.1).split())
    assert "other options (label_smoothing_factor)" in told
    succeed(*again)


def test_metrics_of_a_resumed_run_tell_each_step_once(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a kill leaves
    succeed(*options(place, cut, *more, "--resume"))
    for kind in ("loss", "eval_loss", "learning_rate", "train_runtime"):
        steps = [step for step, _ in logged(cut, kind)]
        assert steps == sorted(set(steps)), kind
    assert [step for step, _ in logged(cut, "loss")] == list(range(1, STEPS + 1))
    for kind in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        assert logged(cut, kind) == logged(whole, kind)


def test_run_killed_before_its_first_checkpoint_is_resumed_from_the_start(place: Path, copied: Any) -> None:
    whole, cut, more = copied
    for folder in checkpoints(cut):
        shutil.rmtree(folder)
    succeed(*options(place, cut, *more, "--resume"))
    assert bits(cut) == bits(whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "model.safetensors", "rng_state.pth", "scheduler.pt"]
)
@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_half_written_checkpoint_is_passed_over(place: Path, copied: Any, name: str, damage: Any) -> None:
    whole, cut, more = copied
    last = next(folder for folder in reversed(checkpoints(cut)) if (folder / "trainer_state.json").exists())
    damage(last / name)
    result = succeed(*options(place, cut, *more, "--resume"))
    assert str(last) in result.stderr
    assert f"resuming from {last}\n" not in result.stderr
    assert bits(cut) == bits(whole)


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_checkpoint_with_the_state_of_another_optimizer_is_refused(place: Path, copied: Any) -> None:
    """Keys and values were trained with AdamW before HeadwiseSoap."""
    _, cut, more = copied
    for folder in cut.glob("checkpoint-*"):
        if (folder / "optimizer.pt").exists():
            state = torch.load(folder / "optimizer.pt")
            for kept in state["state"].values():
                del kept["covariance"], kept["basis"]
            torch.save(state, folder / "optimizer.pt")
    told = fail(*options(place, cut, *more, "--resume"), code=1)
    assert "optimizer.pt cannot be used" in told
    assert "--overwrite" in told


# evaluated in its last step, after it
@pytest.mark.parametrize("more", [LONG_RUN, [*SHORT_RUN, "--eval-steps", 3]])
def test_finished_run_resumed_is_left_as_it_is(place: Path, tmp_path: Path, more: list[Any]) -> None:
    run = tmp_path / "run"
    succeed(*options(place, run, *more))
    before, record, told = bits(run), training_record(run), (run / "metrics.jsonl").read_text()
    for killed in (False, True):  # before it wrote the prefix
        if killed:
            (run / "prefix.json").unlink()
            (run / "prefix.safetensors").unlink()
        document = json.loads(succeed(*options(place, run, *more, "--resume", "--json")).stdout)
        assert bits(run) == before
        assert (run / "metrics.jsonl").read_text() == told
        for name in ("steps", "eval_loss", "best_step", "base_loss", "train_loss"):
            assert document[name] == record[name]


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*LONG_RUN, "--logging-steps", 24]  # the stop comes between two of them
    succeed(*options(place, whole, *more, evaluates=False))
    args = options(place, cut, *more, evaluates=False)
    code, stdout, stderr = stop(args, cut, step=SAVED, sign=signal.SIGINT)
    assert code == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "--resume" in stderr
    reached = int(stderr.rpartition("stopped at step ")[2].split(";")[0])
    assert checkpoints(cut)[-1].name == f"checkpoint-{reached}"
    succeed(*args, "--resume")
    assert bits(cut) == bits(whole)
    assert [step for step, _ in logged(cut, "loss")] == list(range(24, STEPS + 1, 24))
    for kind in ("loss", "divergence"):
        assert logged(cut, kind) == logged(whole, kind)
    if Version(hf.__version__) >= Version("5.20"):  # before, Trainer divided the second by all steps
        (_, before), (_, after) = logged(cut, "train_loss")  # means over the steps of each part
        both = before * reached + after * (STEPS - reached)
        assert both / STEPS == pytest.approx(logged(whole, "train_loss")[0][1], rel=1e-5)


# --- the run folder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(place: Path) -> Path:
    """A finished short run."""
    succeed(*options(place, place / "short", *SHORT_RUN))
    return place / "short"


@pytest.fixture
def run_folder(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "short"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--max-steps", 3], "max_steps"),
        (["--length", 5], "length"),
        (["--learning-rate", 0.5], "learning_rate"),
        (["--template", "Q: {instruction} A: {output}"], "template"),
        (["--init", "random"], "init"),
        (["--layers", "top:1"], "layers"),
    ],
)
def test_resume_with_other_options_is_refused_and_names_them(
    place: Path, run_folder: Path, changed: list[Any], said: str
) -> None:
    before = contents(run_folder)
    message = fail(*options(place, run_folder, *SHORT_RUN, *changed, "--resume"))
    assert "run.json" in message
    assert said in message
    assert contents(run_folder) == before


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("changed", ["rows", "evaluation rows", "weights"])
def test_resume_on_what_changed_under_the_same_name_is_refused(
    place: Path, tmp_path: Path, changed: str, ended: bool
) -> None:
    rows, watched = write_rows(tmp_path / "rows.jsonl", 24), write_rows(tmp_path / "eval.jsonl", 6)
    output, model = tmp_path / "run", shutil.copytree(place / "model", tmp_path / "model")
    args = [*options(place, output, *SHORT_RUN, "--model", model), "--data", rows, "--eval-data", watched]
    succeed(*args)
    if ended:
        kept = contents(output)
        assert "nothing to do" in succeed(*args, "--resume").stderr
        assert contents(output) == kept
    else:
        (output / "prefix.json").unlink()
    if changed == "weights":
        tiny_model("gpt2", seed=5, vocab_size=340).save_pretrained(model)
    else:
        write_rows(rows if changed == "rows" else watched, 24 if changed == "rows" else 6, first=7)
    before = contents(output)
    message = fail(*args, "--resume")
    called = {"rows": "rows.jsonl", "evaluation rows": "eval.jsonl", "weights": "weights"}
    assert called[changed] in message
    assert contents(output) == before
    record = json.loads((output / "run.json").read_text())  # of a version that noted the training rows only
    record["resolved"] = {k: v for k, v in record["resolved"].items() if k not in ("eval_rows", "base")}
    (output / "run.json").write_text(json.dumps(record))
    assert (call(*args, "--resume").exit_code == 0) == (changed != "rows")


def test_folder_that_another_process_trains_in_is_left_alone(
    place: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "prefix.json").unlink()
    with FileLock(run_folder / ".lock"):
        before = contents(run_folder)
        for how in ("--resume", "--overwrite"):
            assert "another process" in fail(*options(place, run_folder, *SHORT_RUN, how))
        monkeypatch.setattr("prefixtune.train.session.open_run", lambda *args, **options: None)
        assert "another process" in fail(*options(place, run_folder, *SHORT_RUN))
    assert "meanwhile" in fail(*options(place, run_folder, *SHORT_RUN))  # it was not there at the start
    assert {name: text for name, text in contents(run_folder).items() if name != ".lock"} == {
        name: text for name, text in before.items() if name != ".lock"
    }


def test_folder_that_cannot_be_locked_is_told_and_trained_in(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileLock, **options: Any) -> None:
        raise NotImplementedError("no flock on this file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    told = succeed(*options(place, tmp_path / "run", *SHORT_RUN)).stderr
    assert "no lock is to be had here (no flock on this file system)" in told.replace("\n", " ")
    assert (tmp_path / "run" / "prefix.json").is_file()


def test_trainer_takes_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Several(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.n_gpu  # noqa: B018  (counts the machine's own first)
            self._n_gpu = 2

    monkeypatch.setattr("prefixtune.train.trainer.TrainingArguments", Several)
    resolved = {"steps": 4, "learning_rate": 0.1, "save_steps": 2}
    assert training_arguments(TrainConfig(), tmp_path, resolved, evaluates=False).n_gpu == 1


def test_resume_goes_on_on_another_day_with_a_template_that_prints_the_date(tmp_path: Path) -> None:
    # microseconds differ from one reading of the clock to the next, as dates do from day to day
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%d %b %Y, %f') + '\n' }}" + CHATML)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 8)
    output = tmp_path / "run"
    args = options(tmp_path, output, *SHORT_RUN, "--template", "chat", evaluates=False)
    succeed(*args)
    ended = bits(output)
    (output / "prefix.json").unlink()  # as if it had not come to its end
    succeed(*args, "--resume")
    assert bits(output) == ended


def test_a_chat_that_is_an_example_for_each_turn_is_told_as_one_row(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": role, "content": "a"} for _ in range(2) for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    args = options(tmp_path, tmp_path / "run", *SHORT_RUN, "--template", "chat", "--json", evaluates=False)
    done = succeed(*args)
    assert "an example for EACH TURN of 1 row" in done.stderr.replace("\n", " ")
    assert json.loads(done.stdout)["train_rows"] == 1


def test_resume_without_a_run_is_refused(place: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "nothing", tmp_path):
        assert "no run to resume" in fail(*options(place, output, *SHORT_RUN, "--resume"))
    assert not any(tmp_path.iterdir())


def test_damaged_run_record_is_told(place: Path, run_folder: Path) -> None:
    for text in ("{", "[]", "{}", '{"asked": 3}', ""):
        (run_folder / "run.json").write_text(text)
        message = fail(*options(place, run_folder, *SHORT_RUN, "--resume"))
        assert "run.json" in message.replace("\n", "")
        assert "damaged" in message


def test_evaluation_rows_come_from_a_split_of_their_own(place: Path, tmp_path: Path) -> None:
    files = {"train": place / "rows.jsonl", "dev": place / "eval.jsonl"}
    rows = {name: map(json.loads, file.read_text().splitlines()) for name, file in files.items()}
    splits = {name: datasets.Dataset.from_list(list(part)) for name, part in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "rows")
    both = ["--data", tmp_path / "rows", "--eval-data", tmp_path / "rows"]
    line = [*options(place, tmp_path / "run", *SHORT_RUN, evaluates=False), *both, "--json"]
    assert "--eval-split" in fail(*line, code=2)
    found = json.loads(succeed(*line, "--eval-split", "dev").stdout)
    separate = json.loads(succeed(*options(place, tmp_path / "files", *SHORT_RUN), "--json").stdout)
    assert found["base_loss"] == separate["base_loss"]


def test_folder_in_use_is_refused_and_kept(place: Path, run_folder: Path) -> None:
    before = contents(run_folder)
    message = fail(*options(place, run_folder, *SHORT_RUN))
    assert "--resume" in message
    assert "--overwrite" in message
    assert contents(run_folder) == before


def test_overwrite_replaces_a_run_and_nothing_else(place: Path, run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    assert "no run" in fail(*options(place, other, *SHORT_RUN, "--overwrite"))
    assert contents(other) == {"letter.txt": b"dear"}
    (run_folder / "checkpoint-1000").mkdir()
    succeed(*options(place, run_folder, "--length", 3, "--max-steps", 1, "--overwrite"))
    assert json.loads((run_folder / "prefix.json").read_text())["length"] == 3
    assert not (run_folder / "checkpoint-1000").exists()


def test_overwrite_keeps_what_the_user_put_into_the_run_folder(place: Path, run_folder: Path) -> None:
    mine = write_rows(run_folder / "my_rows.jsonl", 24)
    call(*options(place, run_folder, *SHORT_RUN, "--overwrite"), "--data", mine)
    assert mine.exists()


def test_run_behind_a_link_is_overwritten_and_the_link_stays(
    place: Path, run_folder: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(run_folder)
    succeed(*options(place, link, "--length", 3, "--max-steps", 1, "--overwrite"))
    assert link.is_symlink()
    assert json.loads((run_folder / "prefix.json").read_text())["length"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--data", "{place}/nothing.jsonl"],
        ["--eval-data", "{place}/nothing.jsonl"],
        ["--model", "{place}/nothing.gguf"],
        ["--max-length", 5],
        ["--fields", "input=nothing"],
        ["--init-tokens", "100000"],
        ["--report-to", "no-such-service"],
    ],
)
def test_old_run_survives_an_overwrite_that_cannot_begin(
    place: Path, run_folder: Path, wrong: list[Any]
) -> None:
    before = contents(run_folder)
    arguments = [str(arg).format(place=place) for arg in wrong]
    result = call(*options(place, run_folder, *SHORT_RUN, "--overwrite"), *arguments)
    assert result.exit_code in (1, 2)
    assert contents(run_folder) == before


# --- the same training, said or cut up in another way ------------------------------------------------------


@pytest.fixture(scope="module")
def examples(place: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    return build_examples(load_rows(str(place / "rows.jsonl")), tokenizer, DataConfig())[0]


def trained_prefix(examples: list[Example], folder: Path, *, batch: int, accumulation: int) -> torch.Tensor:
    model = PrefixModel(tiny_model("llama", vocab_size=340), PrefixConfig(length=4, init="random"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=6,
        learning_rate=0.02,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=3,
    )
    trainer = PrefixTrainer(
        model=model, args=arguments, train_dataset=examples, data_collator=Collator(0), pad_token_id=0
    )
    trainer.train()
    layers = model.prefix.bake().layers
    return torch.cat([torch.cat([layer.key, layer.value]).flatten() for layer in layers]).detach()


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (1, 8), (4, 2)])
def test_accumulated_batches_are_one_large_batch(
    examples: list[Example], tmp_path: Path, batch: int, accumulation: int
) -> None:
    start = PrefixModel(tiny_model("llama", vocab_size=340), PrefixConfig(length=4, init="random"))
    before = start.prefix.bake().layers[0].key.detach()
    together = trained_prefix(examples, tmp_path, batch=8, accumulation=1)
    apart = trained_prefix(examples, tmp_path, batch=batch, accumulation=accumulation)
    assert len({example.target_tokens for example in examples}) > 1  # else any weighting would do
    # Adam's division makes a rounding error visible where a gradient is near zero, hence not 1e-6
    torch.testing.assert_close(apart, together, rtol=0, atol=2e-4)
    assert (together[: before.numel()] - before.flatten()).abs().max() > 0.02


def test_file_and_set_and_options_are_the_same_run(place: Path, tmp_path: Path) -> None:
    wanted = {"length": 3, "max_steps": 3, "learning_rate": 0.1, "seed": 7, "limit": 9}
    wanted |= {"per_device_train_batch_size": 2}
    flags = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", value)]
    sets = [part for name, value in wanted.items() for part in ("--set", f"{name}={value}")]
    file = tmp_path / "run.toml"
    sections = {"prefix": ["length"], "data": ["limit"]}
    sections["train"] = [name for name in wanted if name not in ("length", "limit")]
    lines = [[f"[{name}]", *(f"{key} = {wanted[key]}" for key in keys)] for name, keys in sections.items()]
    file.write_text("\n".join(line for section in lines for line in section))
    runs = {"flags": flags, "sets": sets, "file": ["--config", file]}
    for name, more in runs.items():
        succeed(*options(place, tmp_path / name, *more))
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in runs]
    dates = {record["asked"].pop("date") for record in records}
    assert len(dates) == 3
    assert records[0] == records[1] == records[2]
    asked = records[0]["asked"]
    recorded = {**asked["prefix"], **asked["data_config"], **asked["train_config"]}
    assert {name: recorded[name] for name in wanted} == wanted
    assert (asked["model"], asked["data"]) == (str(place / "model"), str(place / "rows.jsonl"))
    assert bits(tmp_path / "flags") == bits(tmp_path / "sets") == bits(tmp_path / "file")


# --- the start ---------------------------------------------------------------------------------------------

STILL = ["--length", 6, "--max-steps", 1, "--learning-rate", 1e-12]  # the prefix stays where it starts


def assert_starts_from(output: Path, place: Path, ids: list[int]) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = PrefixKV.from_tokens(base, torch.tensor([ids]))
    found = load_file(output / "prefix.safetensors")
    for index, layer in enumerate(expected.layers):
        torch.testing.assert_close(found[f"layers.{index}.key"], layer.key, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[f"layers.{index}.value"], layer.value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [None, "human"])
def test_run_records_the_template_of_its_rows(tmp_path: Path, bos: bool, template: str | None) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 2)
    chosen = ["--template", template] if template else []
    result = succeed(*options(tmp_path, tmp_path / "run", *SHORT_RUN, *chosen, evaluates=False))
    default = "human-one-bos" if bos else "human"
    assert json.loads((tmp_path / "run/prefix.json").read_text())["template"] == (template or default)
    assert ("template human-one-bos: the BOS of the tokenizer once a row" in result.stderr) == (
        bos and not template
    )
    assert ("A SECOND BOS" in result.stderr) == (bos and template == "human")


def test_prefix_starts_from_the_kv_of_a_whole_training_row(place: Path, tmp_path: Path) -> None:
    examples, _ = build_examples(
        load_rows(str(place / "rows.jsonl")), AutoTokenizer.from_pretrained(place / "model"), DataConfig()
    )
    rows = sorted((list(example.input_ids) for example in examples), key=len)
    for length in (6, len(rows[-1]), 60):  # less than the shortest row, just the longest, more than any
        output = tmp_path / str(length)
        succeed(*options(place, output, *STILL, "--length", length))
        ids = default_start([example.input_ids for example in examples], length)
        assert len(ids) == length
        best = max((len(row) for row in rows if len(row) <= length), default=len(rows[0]))
        assert list(ids)[-best:] in [row[-length:] for row in rows if len(row) == best]
        assert_starts_from(output, place, list(ids))


def test_a_row_without_an_answer_is_no_start() -> None:
    rows = [
        Row(values={"instruction": "a b c", "output": text}, origin="r") for text in ("", "yes yes", "no")
    ]
    (empty, long, short), _ = build_examples(rows, byte_tokenizer(), DataConfig())
    assert telling_rows([empty, long, short]) == [long.input_ids, short.input_ids]
    assert telling_rows([empty]) == [empty.input_ids]


@pytest.mark.parametrize(
    ("length", "front", "expected"),
    [
        (1, (), (9,)),  # none fits: the end of the shortest
        (4, (), (1, 5, 6, 7)),  # the longest that fits
        (9, (), (1, 5, 6, 7, 1, 2, 3, 4, 9)),  # the others in their order, before it
        (6, (), (7, 1, 2, 3, 4, 9)),
        (2, (1,), (1, 9)),  # what begins every text stays first, and comes once
        (6, (1,), (1, 7, 2, 3, 4, 9)),
        (20, (1,), (1, 8, 9, 5, 6, 7, 2, 3, 4, 9)),  # all there is
        (2, (8,), (8, 9)),  # no row begins with it
    ],
)
def test_start_is_a_whole_row_and_the_end_of_others(
    length: int, front: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    rows = [(1, 2, 3, 4, 9), (1, 5, 6, 7), (1, 8, 9)]
    assert default_start(rows, length, front=front) == expected


@pytest.mark.parametrize(
    ("rows", "targets", "length"),
    [(1, 10, 8), (99, 10, 32), (100, 10, 45), (100, 11, 32), (400, 10, 64), (400, 11, 64), (5000, 11, 128)],
)
def test_a_prefix_is_longer_for_more_rows_and_for_a_hundred_labels(
    rows: int, targets: int, length: int
) -> None:
    ids = (5,) * (1 + targets)
    row = Example(input_ids=ids, labels=(-100, *ids[1:]), origin="", truncated=0)
    assert default_length([row] * rows) == length


def test_a_start_is_no_longer_than_the_prefix() -> None:
    assert default_start([(1, 2, 3), (1, 2, 4, 5)], 1, front=(1, 2)) == (1,)


def test_a_mark_that_begins_each_turn_of_a_chat_stays_in_the_start() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's
    rows = [Row(values={"instruction": text, "output": "yes"}, origin="r") for text in ("a", "b")]
    examples, _ = build_examples(rows, tokenizer, DataConfig(template="chat"))
    base = LoadedBase(model=None, tokenizer=tokenizer, name="none", dtype_reason="none")
    length = 2 * len(examples[0].input_ids)
    config = prefix_config_of(None, {"length": length}, base, examples)
    assert config.init_tokens == examples[1].input_ids + examples[0].input_ids


def test_prefix_starts_from_the_kv_of_the_text_that_is_given(place: Path, tmp_path: Path) -> None:
    succeed(*options(place, tmp_path / "run", *STILL, "--init-text", "Answer with yes."))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert_starts_from(tmp_path / "run", place, tokenizer("Answer with yes.")["input_ids"][:6])


def test_how_much_of_a_text_a_prefix_starts_from_is_told(place: Path, tmp_path: Path) -> None:
    def told(*more: Any) -> str:
        lines = succeed(*options(place, tmp_path / "run", *STILL, "--overwrite", *more)).stderr
        return " ".join(lines.split())

    text = "Answer with yes."
    count = len(AutoTokenizer.from_pretrained(place / "model")(text)["input_ids"])
    assert f"starts from 3 of the {count} tokens of init_text: 'Ans" in told(
        "--init-text", text, "--length", 3
    )
    assert f"--length {count} has room for all" in told("--init-text", text, "--length", 3)
    more = ("--init-text", text, "--length", count + 1)
    assert f"init_text has {count} tokens: it is repeated up to the prefix's length of {count + 1}" in told(
        *more
    )
    assert "init_text" not in told("--init-text", text, "--length", count)


def test_run_of_one_step_trains(place: Path, tmp_path: Path) -> None:
    """The first step of a warm-up has a rate of 0."""
    options = [
        "--model",
        place / "model",
        "--data",
        place / "rows.jsonl",
        "--length",
        4,
        "--init-text",
        "Say yes.",
    ]
    succeed("train", *options, "--dtype", "float32", "--max-steps", 1, "--output", tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PrefixModel.from_pretrained(base, tmp_path / "run")
    start = PrefixModel(
        base, PrefixConfig(length=4, init="text", init_text="Say yes."), tokenizer=byte_tokenizer()
    )
    assert not torch.equal(model.prefix.bake().layers[0].key, start.prefix.bake().layers[0].key)


@pytest.mark.parametrize(
    ("estimated", "said"),
    [
        (2**30, "1.00 GiB, of loading; no more were estimated for training"),
        (2**29, "1.00 GiB; 512 MiB were estimated (-50%)"),
        (None, "1.00 GiB"),
    ],
)
def test_peak_that_was_over_before_it_was_estimated_is_no_success(estimated: int | None, said: str) -> None:
    numbers = {field.name: 0 for field in dataclasses.fields(TrainResult)}
    texts = {"output": "run", "eval_loss": None, "peak_bytes": 2**30, "estimated_peak_bytes": estimated}
    told = TrainResult(**{**numbers, **texts}).summary().splitlines()  # type: ignore[arg-type]
    assert told[1] == f"peak memory {said}"


@pytest.mark.parametrize("family", ["modernbert-decoder", "biogpt", "jetmoe"])
def test_model_that_does_not_run_without_weights_trains(family: str, place: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--data", place / "rows.jsonl", *SHORT_RUN, "--retain", 0]
    result = succeed("train", *options, "--output", tmp_path / "run")
    is_told = "the memory of this run is not estimated" in result.stderr
    assert is_told == (family != "modernbert-decoder")
    assert ("were estimated" in result.stdout) == (not is_told)
    assert "peak memory" in result.stdout


def test_random_start_differs_by_seed_and_is_no_kv_of_the_rows(place: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        succeed(*options(place, tmp_path / str(seed), *STILL, "--init", "random", "--seed", seed))
    succeed(*options(place, tmp_path / "rows", *STILL))
    keys = [load_file(tmp_path / name / "prefix.safetensors")["layers.0.key"] for name in ("1", "2", "rows")]
    assert not torch.allclose(keys[0], keys[1], atol=0.01)
    assert not torch.allclose(keys[0], keys[2], atol=0.01)


def test_layers_that_do_not_train_keep_the_kv_of_the_text(place: Path, tmp_path: Path) -> None:
    args = options(place, tmp_path / "run", *SHORT_RUN, "--init-text", "Answer.", "--layers", "1", "--json")
    document = json.loads(succeed(*args).stdout)
    ids = AutoTokenizer.from_pretrained(place / "model")("Answer.")["input_ids"][:4]
    start = PrefixKV.from_tokens(AutoModelForCausalLM.from_pretrained(place / "model"), torch.tensor([ids]))
    found = load_file(tmp_path / "run" / "prefix.safetensors")
    for side in ("key", "value"):
        assert torch.equal(found[f"layers.0.{side}"], getattr(start.layers[0], side))
        assert not torch.equal(found[f"layers.1.{side}"], getattr(start.layers[1], side))
    assert document["trainable_parameters"] == sum(found[f"layers.1.{s}"].numel() for s in ("key", "value"))
    assert json.loads((tmp_path / "run" / "prefix.json").read_text())["config"]["layers"] == "1"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["prefix"]["layers"] == "1"


def test_projection_starts_from_the_same_kv_as_the_direct_prefix(place: Path, tmp_path: Path) -> None:
    more = [*STILL, "--init-text", "Answer with yes.", "--projection", "--hidden-size", 8]
    document = json.loads(succeed(*options(place, tmp_path / "run", *more, "--json")).stdout)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert_starts_from(tmp_path / "run", place, tokenizer("Answer with yes.")["input_ids"][:6])
    weights = load_file(tmp_path / "run" / "trainable.safetensors")
    assert document["trainable_parameters"] <= sum(weight.numel() for weight in weights.values())
    assert any(8 in weight.shape for weight in weights.values())


# --- evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def easy(place: Path) -> Path:
    """A run that learns well."""
    more = ["--length", 8, "--max-steps", 60, "--eval-steps", 10]
    succeed(*options(place, place / "easy", *more))
    return place / "easy"


@pytest.fixture(scope="module")
def spoilt(place: Path) -> Path:
    """A run that is evaluated on other answers than it learns, so that it gets worse after its best step."""
    lines = (place / "eval.jsonl").read_text().replace("yes", "nos")
    (place / "other.jsonl").write_text(lines)
    succeed(*spoiling(place, place / "spoilt"))
    return place / "spoilt"


def spoiling(place: Path, output: Path) -> list[str]:
    more = ["--length", 8, "--max-steps", 40, "--eval-steps", 4, "--eval-data", place / "other.jsonl"]
    more += ["--learning-rate", 0.3, "--lr-scheduler-type", "constant", "--save-steps", 10]
    return options(place, output, *more, evaluates=False)


def loss_on_eval_rows(place: Path, prefix: Path | None, name: str = "eval.jsonl") -> float:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rows, _ = build_examples(load_rows(str(place / name)), tokenizer, DataConfig())
    model = base if prefix is None else PrefixModel.from_pretrained(base, prefix)
    return target_loss(model, rows, pad_token_id=0)[0]


def test_easy_task_is_learnt(place: Path, easy: Path) -> None:
    record = training_record(easy)
    assert record["eval_loss"] < record["base_loss"] - 1
    assert record["base_loss"] == pytest.approx(loss_on_eval_rows(place, None), abs=1e-6)
    assert record["eval_loss"] == pytest.approx(loss_on_eval_rows(place, easy), abs=1e-5)


def test_kept_prefix_is_the_one_of_the_best_step(place: Path, spoilt: Path) -> None:
    record, told = training_record(spoilt), logged(spoilt, "eval_loss")
    best = min(told, key=lambda pair: pair[1])
    assert told[0][1] > best[1] < told[-1][1] - 0.02  # else the first or the last one would do
    assert (record["best_step"], record["eval_loss"]) == best
    assert bits(spoilt) == bits(spoilt / "best")
    assert loss_on_eval_rows(place, spoilt, "other.jsonl") == pytest.approx(best[1], abs=1e-5)


def test_a_resumed_run_has_the_best_prefix_of_its_checkpoint(
    place: Path, spoilt: Path, easy: Path, tmp_path: Path
) -> None:
    """best/ may be of a later step, which the resumed run does not come to with the same numbers."""
    run = Path(shutil.copytree(spoilt, tmp_path / "run"))
    assert training_record(run)["best_step"] <= 30
    (run / "prefix.json").unlink()
    shutil.rmtree(run / "checkpoint-40")
    shutil.rmtree(run / "best")
    shutil.copytree(easy / "best", run / "best")
    succeed(*spoiling(place, run), "--resume")
    assert bits(run) == bits(run / "best") == bits(spoilt)


def test_the_last_steps_are_logged_too(place: Path, tmp_path: Path) -> None:
    more = ["--length", 2, "--max-steps", 7, "--logging-steps"]
    for name, every in (("each", 1), ("three", 3)):
        succeed(*options(place, tmp_path / name, *more, every, evaluates=False))
    each = [loss for _, loss in logged(tmp_path / "each", "loss")]
    told = logged(tmp_path / "three", "loss")
    assert [step for step, _ in told] == [3, 6, 7]
    means = [sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert [loss for _, loss in told] == pytest.approx(means, abs=1e-4)
    # the last one alone would be of one step
    assert training_record(tmp_path / "three")["train_loss"] == pytest.approx(sum(each[3:]) / 4, abs=1e-4)


def test_last_step_is_evaluated_once(easy: Path, place: Path, tmp_path: Path) -> None:
    assert [step for step, _ in logged(easy, "eval_loss")] == [10, 20, 30, 40, 50, 60]
    succeed(*options(place, tmp_path / "run", "--length", 2, "--max-steps", 5, "--eval-steps", 2))
    assert [step for step, _ in logged(tmp_path / "run", "eval_loss")] == [2, 4, 5]


def test_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    model = PrefixModel(tiny_model("llama"), PrefixConfig(length=2))
    keep, state = KeepBest(tmp_path), TrainerState(global_step=1)
    for step, loss in ((1, math.nan), (2, 3.0), (3, math.nan), (4, math.inf), (5, 3.5)):
        state.global_step = step
        keep.on_evaluate(None, state, None, metrics={"eval_loss": loss}, model=model)
    assert (state.best_metric, state.best_global_step) == (3.0, 2)


def test_numbers_that_are_none_are_null_in_the_log(tmp_path: Path) -> None:
    state = TrainerState(global_step=1, is_world_process_zero=True)
    Metrics(tmp_path).on_log(None, state, None, logs={"loss": math.nan, "grad_norm": math.inf, "epoch": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "epoch": 0.5}\n'


def test_a_run_that_diverges_never_shows_a_loss_of_nothing(place: Path, tmp_path: Path) -> None:
    options_ = ("--max-steps", 4, "--learning-rate", 1e38, "--max-grad-norm", 0, "--logging-steps", 1)
    result = call(*options(place, tmp_path / "run", "--length", 2, *options_, evaluates=False))
    assert result.exit_code == 1
    assert "loss nan" in result.stderr
    assert "loss 0.0000" not in result.stderr


def test_without_evaluation_rows_the_last_prefix_is_kept(place: Path, tmp_path: Path) -> None:
    succeed(*options(place, tmp_path / "run", *SHORT_RUN, evaluates=False))
    record = training_record(tmp_path / "run")
    assert record["eval_loss"] is record["base_loss"] is record["best_step"] is None
    assert record["train_loss"] > 0  # though it has fewer steps than there are between two logs
    kept = load_file(tmp_path / "run" / "prefix.safetensors")["layers.0.key"]
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PrefixModel.from_pretrained(base, tmp_path / "run", is_trainable=True)
    state = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    model.load_state_dict(state)
    assert torch.equal(model.prefix.bake().layers[0].key.detach(), kept)


# --- the order of rows -------------------------------------------------------------------------------------


@pytest.fixture
def lengths() -> list[int]:
    return torch.randint(5, 500, (203,), generator=torch.Generator().manual_seed(1)).tolist()


def batches_of(sampler: LengthGroupedSampler) -> list[list[int]]:
    rows = list(sampler)
    return [rows[start : start + sampler.batch_size] for start in range(0, len(rows), sampler.batch_size)]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 203, 500])
def test_each_row_comes_once_an_epoch_and_in_another_order_in_the_next(
    lengths: list[int], batch_size: int
) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(lengths)))
        assert list(sampler) == orders[-1]
    if batch_size < len(lengths):
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert list(LengthGroupedSampler(lengths, batch_size, seed=1)) != orders[0]


def test_batches_hold_rows_of_similar_length_and_only_the_last_is_short(lengths: list[int]) -> None:
    batches = batches_of(LengthGroupedSampler(lengths, 8, seed=0))
    assert all(len(batch) == 8 for batch in batches[:-1])
    assert len(batches[-1]) == 203 % 8

    def padding(parts: list[list[int]]) -> int:
        return sum(max(lengths[row] for row in part) - lengths[row] for part in parts for row in part)

    as_they_come = [list(range(start, min(start + 8, 203))) for start in range(0, 203, 8)]
    assert padding(batches) < padding(as_they_come) / 3


def test_longest_full_batch_comes_first_and_lengths_do_not_drift(lengths: list[int]) -> None:
    batches = batches_of(LengthGroupedSampler(lengths, 8, seed=0))
    longest = [max(lengths[row] for row in batch) for batch in batches[:-1]]
    assert longest[0] == max(longest)
    rises = [later > earlier for earlier, later in pairwise(longest)]
    assert any(rises)
    assert not all(rises)


@pytest.mark.parametrize("packing", [True, False])
def test_batches_that_are_trained_on_are_the_samplers(
    packing: bool, examples: list[Example], tmp_path: Path
) -> None:
    lengths = [len(example.input_ids) for example in examples]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=5, report_to="none", use_cpu=True, seed=9
    )
    arguments.remove_unused_columns = False
    model = PrefixModel(tiny_model("llama", vocab_size=340), PrefixConfig(length=2))
    trainer = PrefixTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=Collator(0),
        pad_token_id=0,
        passes=Passes.of(model.base_model, capacity=512, pad_token_id=0, packing=packing),
        lengths=lengths,
    )
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        sampler = LengthGroupedSampler(lengths, 1 if packing else 5, seed=9)
        sampler.set_epoch(epoch)
        rows = list(sampler)  # rows that are packed need no company of their length
        expected = [[lengths[row] for row in rows[i : i + 5]] for i in range(0, len(rows), 5)]
        assert [batch["attention_mask"].sum(dim=1).tolist() for batch in loader] == expected


# --- where numbers go --------------------------------------------------------------------------------------


def test_unknown_reporter_is_wrong_usage_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    message = fail(*options(place, tmp_path / "run", *SHORT_RUN, "--report-to", "tensorbord"), code=2)
    assert "tensorbord" in message
    assert "report" in message
    assert not any(tmp_path.iterdir())


def test_reporter_that_is_not_installed_is_told_with_its_name(place: Path, tmp_path: Path) -> None:
    result = call(*options(place, tmp_path / "run", *SHORT_RUN, "--report-to", "clearml"))
    assert result.exit_code in (1, 2)
    assert "clearml" in result.stderr
    assert "internal error" not in result.stderr
    assert not any(tmp_path.iterdir())


def test_event_file_is_written_in_the_run_folder_when_asked_for(place: Path, tmp_path: Path) -> None:
    succeed(*options(place, tmp_path / "quiet", *SHORT_RUN, "--report-to", "none"))
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    args = options(place, tmp_path / "run", *SHORT_RUN, "--report-to", "tensorboard")
    if importlib.util.find_spec("tensorboard") is None:
        assert "prefixtune[tensorboard]" in fail(*args)
    else:
        succeed(*args)
        assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_json_is_one_document_on_stdout(place: Path, tmp_path: Path) -> None:
    args = options(place, tmp_path / "run", *SHORT_RUN, "--json")
    document = json.loads(succeed(*args).stdout)
    record = training_record(tmp_path / "run")
    assert {name: document[name] for name in record} == record
    assert document["prefix_file_bytes"] == (tmp_path / "run" / "prefix.safetensors").stat().st_size
    assert document["output"] == str(tmp_path / "run")


def test_summary_says_the_same_numbers(place: Path, tmp_path: Path) -> None:
    text = succeed(*options(place, tmp_path / "run", *SHORT_RUN)).stdout
    record = training_record(tmp_path / "run")
    assert f"{record['base_loss']:.4f} (bare model) -> {record['eval_loss']:.4f}" in text
    assert f"{record['trainable_parameters']:,} trainable parameters" in text


@pytest.mark.parametrize("killed", ["direct"], indirect=True)
def test_room_of_a_pass_is_that_of_the_device_and_stays_when_a_run_is_resumed(
    place: Path, copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefixtune.train.session as session

    def passes(run: Path) -> Any:
        return json.loads((run / "run.json").read_text())["resolved"]["packing_length"]

    monkeypatch.setattr(session, "pass_tokens_for", lambda *_, **__: 2048)  # as on a GPU
    succeed(*options(place, tmp_path / "begun", *SHORT_RUN))
    assert passes(tmp_path / "begun") == 2048
    _, cut, more = copied
    other = shutil.copytree(cut, tmp_path / "other")
    succeed(*options(place, cut, *more, "--resume"))
    assert passes(cut) == 512
    record = json.loads((other / "run.json").read_text())
    record["resolved"]["packing_length"] = record["asked"]["train_config"]["packing_length"] = 300
    (other / "run.json").write_text(json.dumps(record))
    succeed(*options(place, other, *more, "--resume"))
    assert passes(other) == 2048


EVERY_LOSS = ["--length", 4, "--max-steps", 6, "--logging-steps", 1]


# --- passes ------------------------------------------------------------------------------------------------


def test_packing_length_below_a_row_names_the_row_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    told = fail(*options(place, tmp_path / "run", *SHORT_RUN, "--packing-length", 6))
    assert re.search(r"rows\.jsonl:\d+: \d+ tokens do not fit a pass of packing_length 6", told)
    assert "use --packing-length" in told
    assert "--max-length" not in told  # with 6 tokens no row would have a target
    longest = int(re.findall(r"(\d+) tokens do not fit", told)[0])
    told = fail(*options(place, tmp_path / "run", *SHORT_RUN, "--packing-length", longest - 1))
    assert f"or --max-length {longest - 1}" in told
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def steady(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same place with a model without dropout, whose numbers depend on nothing else."""
    folder = shutil.copytree(place, tmp_path_factory.mktemp("steady") / "place")
    shutil.rmtree(folder / "model")
    tiny_model("llama", vocab_size=len(byte_tokenizer())).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder


def test_packed_short_and_checkpointed_runs_learn_the_same(steady: Path, tmp_path: Path) -> None:
    """Rows, order and steps are the same; only how they run through the model differs."""
    ways = {"packed": [], "short": ["--packing-length", 60], "checkpointed": ["--gradient-checkpointing"]}
    found = {}
    for name, more in ways.items():
        told = succeed(*options(steady, tmp_path / name, *EVERY_LOSS, *more)).stderr
        assert "rows are packed" in told
        found[name] = logged(tmp_path / name, "loss")
    for losses in found.values():
        assert len(losses) == 6
        assert losses == [(step, pytest.approx(loss, rel=2e-3)) for step, loss in found["packed"]]


def test_rows_that_cannot_be_packed_are_told(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "place")
    tiny_model("bloom", vocab_size=340).save_pretrained(tmp_path / "place" / "model")
    told = succeed(*options(tmp_path / "place", tmp_path / "run", *SHORT_RUN)).stderr
    assert re.search(r"rows of similar length share a pass: bloom has\s+alibi", told)
    assert "packed" in fail(*options(tmp_path / "place", tmp_path / "other", *SHORT_RUN, "--compile"), code=2)
