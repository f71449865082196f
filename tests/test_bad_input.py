"""Laws of bad input: each mistake is one message with its place, exit code 1 or 2, and nothing is written."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from click.testing import CliRunner, Result

from families import COMMON, randomised, tiny_model
from prefixtune.cli import main
from tokenizers_for_tests import byte_tokenizer

GOOD = json.dumps({"instruction": "Say a.", "input": "", "output": "a"}) + "\n"
LONG = json.dumps({"instruction": "Say it often.", "output": "x y z " * 30}) + "\n"
POSITIONS = 64  # of the model with learnt positions; where the rotary of others changes
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": POSITIONS,
}


def call(*args: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, sound and not, rows, and a prefix for the model called `model`."""
    folder = tmp_path_factory.mktemp("bad")
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    small: dict[str, Any] = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 1}
    bert = hf.BertConfig(**small, num_attention_heads=2, intermediate_size=16, initializer_range=0.5)
    models = {
        "model": tiny_model("llama", vocab_size=size),
        "twin": tiny_model("llama", vocab_size=size, seed=5),
        "learnt": tiny_model("gpt2", vocab_size=size, n_positions=POSITIONS),
        "dynamic": tiny_model(
            "llama",
            vocab_size=size,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
        "longrope": randomised(
            hf.Phi3Config(
                **COMMON | {"vocab_size": size},
                original_max_position_embeddings=POSITIONS,
                rope_parameters=LONGROPE,
            )
        ),
        "few-words": tiny_model("llama", vocab_size=50),
        "t5": hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=size, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        "mamba": hf.MambaForCausalLM(hf.MambaConfig(**small, state_size=4)),
        "bert": hf.BertForMaskedLM(bert),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text(GOOD * 6)
    (folder / "empty").mkdir()
    for name in ("no-weights", "cut-weights", "no-json", "no-type", "no-tokenizer", "bad-tokenizer"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "no-weights" / "model.safetensors").unlink()
    weights = folder / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "no-json" / "config.json").write_text("{no")
    (folder / "no-type" / "config.json").write_text("{}")
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (folder / "bad-tokenizer" / "tokenizer.json").write_text("{")
    result = call(*train(folder, folder / "prefix"))
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(autouse=True)
def only_this_test(place: Path) -> Iterator[None]:
    """What a test leaves by mistake is its own mistake only."""
    yield
    for name in ("never", "damaged", "unfinished"):
        shutil.rmtree(place / name, ignore_errors=True)


def train(place: Path, output: Path, *more: Any) -> list[Any]:
    args = ["train", "--model", place / "model", "--data", place / "rows.jsonl", "--output", output]
    return [*args, "--length", 4, "--max-steps", 2, "--dtype", "float32", "--report-to", "none", *more]


def refused(folder: Path, *args: Any, said: str, stdin: str | None = None) -> str:
    """stderr of a command that says once what is wrong, in words of ours, and leaves `folder` as it was."""
    before = contents(folder)
    result = call(*args, stdin=stdin)
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert len(re.findall(r"^[eE]rror: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert said in result.stderr
    assert contents(folder) == before
    return result.stderr


COMMANDS: dict[str, Callable[[Path, Any], list[Any]]] = {
    "train": lambda place, data: train(place, place / "never", "--data", data),
    "train --eval-data": lambda place, data: train(place, place / "never", "--eval-data", data),
    "evaluate": lambda place, data: ["evaluate", "--prefix", place / "prefix", "--data", data],
    "generate": lambda place, data: ["generate", "--prefix", place / "prefix", "--data", data],
    "data show": lambda place, data: ["data", "show", data, "--model", place / "model"],
}


# --- data --------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "blank": ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
    "malformed": ("a.jsonl", GOOD.encode() + b'{"instruction": "x", \n', "a.jsonl:2"),
    "array of numbers": ("a.json", b"[1, 2]", "a.json:1"),
    "empty array": ("a.json", b"[]", "there is no row"),
    "latin-1": ("a.jsonl", '{"instruction": "café", "output": "x"}\n'.encode("latin-1"), "a.jsonl:1"),
    "utf-16": ("a.jsonl", GOOD.encode("utf-16"), "iconv -f UTF-16"),
    "lone surrogate": ("a.jsonl", b'{"instruction": "\\ud83d", "output": "x"}\n', "a.jsonl:1"),
    "ragged": ("a.csv", b"instruction,output\nx,y\nz\n", "a.csv:3"),
    "ragged the other way": ("a.csv", b"instruction,output\nx,y,z\n", "a.csv:2"),
    "open quote": ("a.csv", b'instruction,output\nx,"y\n', "a.csv:2"),
    "header only": ("a.csv", b"instruction,output\n", "there is no row"),
    "unknown suffix": ("a.txt", b"x\n", "got '.txt'"),
    "no suffix": ("rows", b"x\n", "expected JSON"),
    "no parquet": ("a.parquet", b"PAR1 garbage", "not a readable Parquet file"),
    "field of another type": ("a.jsonl", b'{"instruction": ["x"], "output": "y"}\n', "a.jsonl:1"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", FILES)
def test_unreadable_data_is_told_with_file_and_line(
    place: Path, tmp_path: Path, kind: str, command: str
) -> None:
    name, data, said = FILES[kind]
    (tmp_path / name).write_bytes(data)
    refused(place, *COMMANDS[command](place, tmp_path / name), said=said)


@pytest.mark.parametrize("command", COMMANDS)
def test_data_that_is_not_there_is_told(place: Path, tmp_path: Path, command: str) -> None:
    refused(place, *COMMANDS[command](place, tmp_path / "no.jsonl"), said="no such file")
    refused(place, *COMMANDS[command](place, tmp_path), said="save_to_disk")
    refused(place, *COMMANDS[command](place, "demo:x"), said="no such demo data")


@pytest.mark.parametrize("command", COMMANDS)
def test_empty_name_of_data_is_not_the_current_folder(place: Path, command: str) -> None:
    message = refused(place, *COMMANDS[command](place, ""), said="data")
    assert "error: .:" not in message


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "generate"])
def test_rows_without_fields_or_targets_are_told(place: Path, tmp_path: Path, command: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "x", "answer": "y"}\n')
    assert "--fields output=" in refused(place, *COMMANDS[command](place, file), said="question, answer")
    file.write_text('{"instruction": "x"}\n')
    refused(place, *COMMANDS[command](place, file), said="a.jsonl:1: no 'output' field")
    file.write_text('{"instruction": "x", "output": null}\n' * 3)
    args = COMMANDS[command](place, file)
    assert "--on-no-target drop" in refused(place, *args, said="a.jsonl:1")
    refused(place, *args, "--on-no-target", "drop", said="no row has a target")


# --- rows that do not fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["learnt", "longrope", "dynamic"])
@pytest.mark.parametrize("length", [4, POSITIONS - 2, POSITIONS, 1000])
def test_prefix_and_row_beyond_the_models_positions_are_refused(
    place: Path, tmp_path: Path, length: int, model: str
) -> None:
    (tmp_path / "long.jsonl").write_text(GOOD + LONG)
    args = [*train(place, place / "never"), "--model", place / model, "--data", tmp_path / "long.jsonl"]
    message = refused(place, *args, "--length", length, said="long.jsonl:2")
    assert str(POSITIONS) in message
    hinted = message.partition("--max-length ")[2].partition(",")[0]
    if length < POSITIONS - 2:
        args[args.index(place / "never")] = tmp_path / "run"
        result = call(*args, "--length", length, "--max-length", hinted, "--on-no-target", "drop")
        assert result.exit_code == 0, result.stderr
    else:  # no --max-length helps
        assert hinted == ""


@pytest.mark.parametrize("model", ["learnt", "longrope", "dynamic"])
@pytest.mark.parametrize("by_evaluation_rows", [False, True])
def test_row_that_leaves_no_room_for_a_default_prefix_is_refused_with_what_makes_room(
    place: Path, tmp_path: Path, by_evaluation_rows: bool, model: str
) -> None:
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text(GOOD + LONG)
    short.write_text(GOOD)
    args = [*train(place, place / "never"), "--model", place / model, "--length", "auto"]
    args += ["--data", short, "--eval-data", long] if by_evaluation_rows else ["--data", long]
    message = refused(place, *args, "--max-length", POSITIONS - 1, said="long.jsonl:2")
    hinted = int(message.partition("--max-length ")[2].partition(" ")[0])
    refused(place, *args, "--max-length", hinted + 1, said=str(POSITIONS))
    args[args.index(place / "never")] = tmp_path / "run"
    result = call(*args, "--max-length", hinted, "--on-no-target", "drop")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "run" / "prefix.json").read_text())["length"] == POSITIONS - hinted == 8


def test_rows_and_answers_beyond_the_models_positions_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(LONG)
    for command in ("evaluate", "generate"):
        args = [command, "--model", place / "learnt", "--data", tmp_path / "long.jsonl"]
        refused(place, *args, said=f"{POSITIONS} positions")
    args = ["generate", "--model", place / "learnt", "--prompt", "x", "--max-new-tokens", 200]
    refused(place, *args, said=f"{POSITIONS} positions")


def test_tokens_beyond_the_models_vocabulary_are_told(place: Path) -> None:
    model = ["--model", place / "few-words"]
    refused(place, *train(place, place / "never", *model), said="vocabulary")
    refused(place, *train(place, place / "never", *model, "--init", "random"), said="vocabulary")
    refused(place, "generate", *model, "--prompt", "x", said="vocabulary")
    refused(place, "evaluate", *model, "--data", place / "rows.jsonl", said="vocabulary")


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-length", 0], "max_length"),
        (["--max-length", 1], "rows.jsonl:1"),
        (["--length", 0], "length"),
        (["--length", -1], "length"),
        (["--learning-rate", -1], "learning_rate"),
        (["--learning-rate", "nan"], "learning_rate"),
        (["--learning-rate", "inf"], "learning_rate"),
        (["--weight-decay", -1], "weight_decay"),
        (["--max-grad-norm", "nan"], "max_grad_norm"),
        (["--num-train-epochs", "inf"], "num_train_epochs"),
        (["--token-damping", 1.5], "token_damping"),
        (["--token-damping", "nan"], "token_damping"),
        (["--label-smoothing-factor", 1], "label_smoothing_factor"),
        (["--label-smoothing-factor", -0.1], "label_smoothing_factor"),
        (["--token-damping", 0.5, "--projection"], "token_damping"),
        (["--seed", -1], "seed"),
        (["--seed", 2**40], "seed"),
        (["--hidden-size", 4], "projection"),
        (["--layers", "top"], "expected top:N"),
        (["--layers", "0-9"], "layers: the model has 2 layers, 0 to 1; got '0-9'"),
        (["--init-text", ""], "init_text"),
        (["--init-text", "  "], "init_text"),
        (["--init", "text"], "init_text"),
        (["--init-tokens", "5,-1"], "vocabulary"),
        (["--fields", "input"], "FIELD=COLUMN"),
        (["--fields", "input=nothing"], "rows.jsonl:1"),
        (["--set", "nothing=1"], "nothing"),
        (["--set", "seed=x"], "seed"),
        (["--template", "humann"], "humann"),
        (["--template", "{output"], "template"),
        (["--template", "Q: {instruction} {output} end"], "end"),
        (["--dtype", "float16"], "float16"),
        (["--model", ""], "model"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_wrong_option_is_told_by_its_name(place: Path, options: list[Any], said: str) -> None:
    refused(place, *train(place, place / "never", *options), said=said)


@pytest.mark.parametrize(
    "options", [["--length", 0], ["--hidden-size", 4], ["--init-text", ""], ["--layers", "3-1"]]
)
def test_wrong_option_of_the_prefix_is_told_before_the_model_is_loaded(
    place: Path, options: list[Any]
) -> None:
    args = train(place, place / "never", *options, "--model", place / "no-weights")
    assert "no-weights" not in refused(place, *args, said="error: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nseed = 1\n", "trian"),
        ("[train]\nlerning_rate = 1\n", "learning_rate"),
        ("train = 3\n", "train"),
        ("[train]\nseed = {a = 1}\n", "train.seed"),
        ("[train]\nlearning_rate = nan\n", "learning_rate"),
        ("seed = \n", "bad.toml:1"),
    ],
)
def test_wrong_file_of_options_is_told(place: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    refused(place, *train(place, place / "never", "--config", tmp_path / "bad.toml"), said=said)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "said"),
    [(["--temperature", -1], "temperature"), (["--top-p", 0], "top_p"), (["--template", "x"], "template")],
)
def test_wrong_option_of_generation_is_told(place: Path, command: str, options: list[Any], said: str) -> None:
    asked = ["--prompt", "x"] if command == "generate" else []
    args = [command, "--model", place / "model", *asked, "--max-new-tokens", 2, *options]
    refused(place, *args, said=said, stdin="hello\n")


# --- models ------------------------------------------------------------------------------------------------

MODELS = {
    "no-weights": "weights",
    "cut-weights": "weights",
    "no-json": "config",
    "no-type": "model_type",
    "no-tokenizer": "tokenizer",
    "bad-tokenizer": "tokenizer",
    "empty": "config.json",
    "t5": "encoder-decoder",
    "mamba": "no KV cache",
    "bert": "encoder",
    "nothing.gguf": "no such folder or file",
    "rows.jsonl": "expected a hub name",
    "no-weights/config.json": "no weights, no tokenizer",
    "prefix": "prefix folder",
}


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "chat"])
@pytest.mark.parametrize("name", MODELS)
def test_unusable_model_is_told_by_name(place: Path, name: str, command: str) -> None:
    more = {"evaluate": ["--data", place / "rows.jsonl"], "generate": ["--prompt", "x"], "chat": []}
    model = ["--model", place / name]
    args = train(place, place / "never", *model) if command == "train" else [command, *model, *more[command]]
    message = refused(place, *args, said=MODELS[name], stdin="hello\n")
    assert name in message.lower()


@pytest.mark.parametrize("name", ["no-json", "no-type", "empty", "t5", "mamba", "bert", "rows.jsonl"])
def test_inspect_refuses_models_that_cannot_have_a_prefix(place: Path, name: str) -> None:
    refused(place, "inspect", place / name, said=MODELS[name])


# --- prefixes ----------------------------------------------------------------------------------------------


def use(command: str, folder: Path, *more: Any) -> list[Any]:
    extra = {"evaluate": ["--data", folder.parent / "rows.jsonl"], "generate": ["--prompt", "x"]}
    return [command, "--prefix", folder, *extra.get(command, []), *more]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "blue"], "did you mean bleu?"),
        (["--metric", "blue"], "accuracy, or package.module:function"),
        (["--metric", "acuracy"], "did you mean accuracy?"),
        (["--metric", "bleu,"], "--metric: expected names with commas between them; got 'bleu,'"),
        (["--metric", "bleu,bleu"], "bleu is named twice"),
        (["--metric", "no_such_module:f"], "no_such_module"),
        (["--metric", "accuracy", "--labels", "a"], "expected two or more"),
        (["--labels", "a,a"], "a comes twice"),
        (["--language", "de"], "--language"),
        (["--forgetting"], "no --prefix is given"),
        (["--forgetting-text", "x.txt"], "no --prefix is given"),
        (["--no-exact-match", "--output", "x.jsonl"], "--no-exact-match makes none"),
    ],
)
def test_metrics_that_cannot_be_measured_are_told_before_any_work(
    place: Path, options: list[Any], said: str
) -> None:
    args = ["evaluate", "--model", place / "no-weights", "--data", place / "nowhere.jsonl"]
    refused(place, *args, *options, said=said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "accuracy"], "2 to 20 distinct references"),
        (["--labels", "b,c"], "rows.jsonl:1: accuracy: expected one of the labels b, c"),
        (
            ["--metric", "json_equal", "--max-new-tokens", 1],
            "rows.jsonl:1: json_equal: the reference is not JSON: 'a'",
        ),
        (["--forgetting-text", "nowhere.txt"], "nowhere.txt: expected a text file"),
    ],
)
def test_rows_that_a_metric_cannot_use_are_told(place: Path, options: list[Any], said: str) -> None:
    refused(place, *use("evaluate", place / "prefix", *options), said=said)


def test_answers_never_replace_what_is_read(place: Path, tmp_path: Path) -> None:
    for output in ("rows.jsonl", "prefix/prefix.json"):
        refused(place, *use("evaluate", place / "prefix", "--output", place / output), said="would be lost")
    rows = tmp_path / "my.metrics.json"  # where the metrics would be written
    rows.write_text("[]")
    args = ["evaluate", "--prefix", place / "prefix", "--data", rows, "--output", tmp_path / "my.jsonl"]
    refused(tmp_path, *args, said="would be lost")


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        info = json.loads((folder / "prefix.json").read_text())
        info = {name: value for name, value in {**info, **changes}.items() if value is not ...}
        (folder / "prefix.json").write_text(json.dumps(info))

    return apply


def _cut(folder: Path) -> None:
    file = folder / "prefix.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _flip(folder: Path) -> None:
    file = folder / "prefix.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "tensors cut": _cut,
    "a bit flipped": _flip,
    "tensors missing": lambda folder: (folder / "prefix.safetensors").unlink(),
    "json missing": lambda folder: (folder / "prefix.json").unlink(),
    "json cut": lambda folder: (folder / "prefix.json").write_text('{"schema": 1,'),
    "json empty": lambda folder: (folder / "prefix.json").write_text(""),
    "json not utf-8": lambda folder: (folder / "prefix.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda folder: (folder / "prefix.json").write_text("[]"),
    "later schema": edit(schema=9),
    "no geometry": edit(geometry=...),
    "geometry of another kind": edit(geometry="x"),
    "no fingerprint": edit(fingerprint=...),
    "fingerprint of another kind": edit(fingerprint={"dtype": "float32", "values": "x"}),
    "no checksums": edit(sha256={}),
    "no length": edit(length=...),
    "no training": edit(training=...),
    "no template": edit(template=...),
    "layers that the base has not": edit(config={"length": 4, "layers": "2"}),
    "another length": edit(config={"length": 99}),
}


@pytest.mark.parametrize("command", ["generate", "evaluate", "chat", "inspect"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_prefix_is_told_with_its_folder(place: Path, damage: str, command: str) -> None:
    folder = Path(shutil.copytree(place / "prefix", place / "damaged"))
    DAMAGES[damage](folder)
    model = [] if command == "inspect" else ["--model", place / "model"]
    refused(place, *use(command, folder, *model), said=str(folder), stdin="hello\n")


@pytest.mark.parametrize("command", ["generate", "evaluate", "chat"])
def test_prefix_of_another_model_is_refused_with_the_name_of_its_own(place: Path, command: str) -> None:
    for other, why in (("twin", "other weights"), ("learnt", "another KV cache")):
        args = use(command, place / "prefix", "--model", place / other, "--dtype", "float32")
        message = refused(place, *args, said=why, stdin="hello\n")
        assert str(place / "model") in message
        assert "LayerGeometry" not in message


@pytest.mark.parametrize("command", ["generate", "evaluate", "chat", "inspect"])
def test_checkpoint_or_unfinished_run_is_no_prefix_and_the_hint_is_resume(place: Path, command: str) -> None:
    unfinished = Path(shutil.copytree(place / "prefix", place / "unfinished"))
    for name in ("prefix.json", "prefix.safetensors"):
        (unfinished / name).unlink()
    for folder in (unfinished, unfinished / "checkpoint-2"):
        message = refused(place, *use(command, folder), said=str(folder), stdin="hello\n")
        assert "--resume" in message


def test_prefix_whose_model_has_moved_asks_for_it(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "prefix", tmp_path / "prefix"))
    edit(base_name=str(tmp_path / "gone"))(folder)
    message = refused(place, "generate", "--prefix", folder, "--prompt", "x", said=str(tmp_path / "gone"))
    assert "--model" in message


# --- where output goes -------------------------------------------------------------------------------------


def test_output_that_cannot_be_a_folder_is_told_before_the_model_is_loaded(place: Path) -> None:
    for output in (place / "rows.jsonl", place / "rows.jsonl" / "run"):
        args = train(place, output, "--model", place / "no-weights")
        refused(place, *args, said=str(place / "rows.jsonl"))


def test_output_in_folders_that_are_not_there_makes_them(place: Path, tmp_path: Path) -> None:
    result = call(*train(place, tmp_path / "a" / "b" / "c"))
    assert result.exit_code == 0, result.stderr
    assert call("inspect", tmp_path / "a" / "b" / "c").exit_code == 0


@pytest.mark.parametrize("name", ["empty", "rows.jsonl/answers.jsonl", "nowhere/answers.jsonl"])
def test_answers_that_cannot_be_written_are_told_before_any_work(place: Path, name: str) -> None:
    args = ["evaluate", "--model", place / "no-weights", "--data", place / "rows.jsonl"]
    refused(place, *args, "--output", place / name, said=str(place / name))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond so many bytes of a file fails as it does on a full disk, which no test may fill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 1000, 2500, 6000, 9000])
def test_full_disk_is_told_and_leaves_no_prefix_that_looks_whole(
    place: Path, tmp_path: Path, size: int
) -> None:
    output = tmp_path / "run"
    with largest_file(size):
        result = call(*train(place, output, "--eval-data", place / "rows.jsonl"))
    assert result.exit_code == 1, result.output
    assert "internal error" not in result.stderr
    assert len(re.findall(r"^[eE]rror: ", result.stderr, re.MULTILINE)) == 1
    assert not (output / "prefix.json").exists()
    assert not list(tmp_path.rglob(".prefixtune.*"))


def test_full_disk_is_named_when_answers_are_written_and_what_was_measured_is_told(place: Path) -> None:
    args = ["evaluate", "--model", place / "model", "--data", place / "rows.jsonl", "--max-new-tokens", 2]
    result = call(*args, "--output", "/dev/full", "--json")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["loss"] > 0
