"""Training in several processes gives what one process gives on the same rows (torch.distributed, gloo)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner, Result
from packaging.version import Version
from safetensors.torch import load_file

from families import tiny_model
from prefixtune.cli import main
from prefixtune.train.folder import last_checkpoint
from prefixtune.train.processes import least
from tokenizers_for_tests import byte_tokenizer

SCRIPT = """
import sys
import torch
from transformers import TrainingArguments
from families import VOCAB, tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.data import Collator, Example
from prefixtune.train import PrefixTrainer, leave

output, batch, projection = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(17)
rows = []
for targets in (1, 8, 2, 7, 3, 6, 4):  # the second of two processes has none of an epoch's second step
    ids = torch.randint(3, VOCAB, (3 + targets,), generator=generator).tolist()
    rows.append(Example(input_ids=tuple(ids), labels=(-100, -100, -100, *ids[3:]), origin="r", truncated=0))
torch.manual_seed(2)
config = PrefixConfig(length=5, projection=projection, init="tokens", init_tokens=(5, 6, 7, 8, 9))
model = PrefixModel(tiny_model("llama"), config)
arguments = TrainingArguments(
    output_dir=output, use_cpu=True, max_steps=6, learning_rate=0.01, per_device_train_batch_size=batch,
    gradient_accumulation_steps=3 if batch == 1 else 1, report_to="none", seed=5, logging_steps=1,
    remove_unused_columns=False, disable_tqdm=True, save_strategy="no",
)
trainer = PrefixTrainer(
    model=model, args=arguments, train_dataset=rows, data_collator=Collator(0), pad_token_id=0,
    lengths=[len(row.input_ids) for row in rows],
)
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"prefix": model.prefix.state_dict(), "losses": losses}, output + "/found.pt")
del trainer, model
leave()
"""


def launched(script: Path, *args: Any, processes: int, home: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launch, str(script), *(str(arg) for arg in args)],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trained(output: Path, *, processes: int, batch: int, projection: bool) -> dict[str, object]:
    output.mkdir()
    script = output / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = launched(script, output, batch, projection, processes=processes, home=output)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = torch.load(output / "found.pt", weights_only=True)
    return found


@pytest.mark.parametrize("projection", [False, True])
def test_two_processes_train_as_one_does_on_the_rows_of_both(tmp_path: Path, projection: bool) -> None:
    one = trained(tmp_path / "one", processes=1, batch=6, projection=projection)
    for name, batch in (("two", 3), ("two-accumulating", 1)):
        two = trained(tmp_path / name, processes=2, batch=batch, projection=projection)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for key, tensor in one["prefix"].items():  # type: ignore[attr-defined]
            assert torch.allclose(tensor, two["prefix"][key], atol=1e-4), key  # type: ignore[index]


LEAST = """
import os
from prefixtune.train.processes import joined, least, leave
found = least(512 * (1 + joined().process_index))
# at once: print writes a line in two parts, and that of the other process gets between them
os.write(1, f"{found}\\n".encode())
leave()
"""


def test_processes_agree_on_the_least_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LEAST, encoding="utf-8")
    done = launched(tmp_path / "script.py", processes=2, home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["512"] * 2
    assert least(700) == 700


def command(place: Path, output: Path, *, batch: int) -> list[str]:
    """`train` on 12 rows, 2 steps an epoch; the neutral text weighs nothing, as each process has its own."""
    args = ["train", "--model", place / "model", "--data", place / "rows.jsonl", "--output", output]
    args += ["--eval-data", place / "rows.jsonl", "--per-device-train-batch-size", batch, "--length", 4]
    args += ["--num-train-epochs", 3, "--save-steps", 3, "--logging-steps", 1, "--retain", 1e-9]
    return [str(arg) for arg in [*args, "--dtype", "float32", "--report-to", "none", "--json"]]


COMMAND = """
import torch, prefixtune.cli
torch.set_num_threads(1)
try:
    prefixtune.cli.main()
finally:
    assert not torch.distributed.is_initialized()
"""


def in_two(place: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = place / "command.py"
    script.write_text(COMMAND, encoding="utf-8")
    return launched(script, *command(place, output, batch=3), *more, processes=2, home=place)


def in_one(place: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, [*command(place, output, batch=6), *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and the same run in one process and in two."""
    folder = tmp_path_factory.mktemp("command")
    tiny_model("llama", vocab_size=len(byte_tokenizer())).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "yes" * (1 + i % 3)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one, two = in_one(folder, folder / "one"), in_two(folder, folder / "two")
    assert (one.exit_code, two.returncode) == (0, 0), two.stderr[-3000:]
    (folder / "two.json").write_text(two.stdout, encoding="utf-8")
    return folder


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_command_in_two_processes_trains_as_in_one_on_the_rows_of_both(place: Path) -> None:
    result = json.loads((place / "two.json").read_text())  # one process tells it
    assert result["steps"] == json.loads((place / "one" / "run.json").read_text())["resolved"]["steps"] == 6
    for folder in ("", "best"):
        one, two = (load_file(place / run / folder / "prefix.safetensors") for run in ("one", "two"))
        for name, tensor in one.items():
            assert torch.allclose(tensor, two[name], atol=1e-3), name
    losses = [[entry["loss"] for entry in metrics(place / run) if "loss" in entry] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.skipif(
    Version(hf.__version__) < Version("5.18"), reason="transformers 5.17 reads checkpoints onto cpu:0"
)
def test_run_in_two_processes_goes_on_in_two_and_not_in_one(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "two", tmp_path / "two")
    (tmp_path / "two" / "prefix.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")  # as it was in the second epoch, but for the log
    refused = in_one(place, tmp_path / "two", "--resume", "--per-device-train-batch-size", "3")
    assert refused.exit_code == 1
    assert "begun in 2 processes; this is 1" in refused.stderr
    done = in_two(place, tmp_path / "two", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(run / "two" / "prefix.safetensors") for run in (place, tmp_path))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [entry["step"] for entry in metrics(tmp_path / "two")] == [
        entry["step"] for entry in metrics(place / "two")
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoint_without_the_random_state_of_a_process_is_passed_over(
    place: Path, tmp_path: Path, rank: int
) -> None:
    run = Path(shutil.copytree(place / "two", tmp_path / "two"))
    assert last_checkpoint(run, processes=2) == run / "checkpoint-6"
    (run / "checkpoint-6" / f"rng_state_{rank}.pth").unlink()  # the processes write theirs one by one
    assert last_checkpoint(run, processes=2) == run / "checkpoint-3"
