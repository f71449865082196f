"""Training in several processes gives what one process gives on the same rows (torch.distributed, gloo)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from transformers import TrainingArguments
from families import VOCAB, tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.data import Collator, Example
from prefixtune.train import PrefixTrainer

output, batch, projection = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(17)
rows = []
for targets in (1, 8, 2, 7, 3, 6, 4, 5, 9, 2, 4, 3):
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
"""


def trained(output: Path, *, processes: int, batch: int, projection: bool) -> dict[str, object]:
    output.mkdir()
    script = output / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launch, str(script), str(output), str(batch), str(projection)],
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "HOME": str(output)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
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
