"""Laws of the command line: what beats what, what goes where, and what a mistake looks like."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from families import tiny_model
from prefixtune import PrefixModel, PrefixTuneError, __version__
from prefixtune.cli import main
from prefixtune.cli.group import Group
from prefixtune.cli.options import config_options
from prefixtune.config import DataConfig, PrefixConfig, TrainConfig
from prefixtune.load import load_base
from tokenizers_for_tests import CHATML, byte_tokenizer

BLOOM = {"model_type": "bloom", "vocab_size": 46145, "hidden_size": 2048, "n_layer": 24, "n_head": 16}
COMMANDS = (
    *(
        "quickstart",
        "estimate",
        "train",
        "evaluate",
        "generate",
        "chat",
        "serve",
        "compare",
        "report",
        "inspect",
        "export",
        "data",
    ),
)


def run(*args: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def succeed(*args: Any, stdin: str | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def fail(*args: Any, code: int, stdin: str | None = None) -> str:
    """stderr of a command that fails with this code, says why in one place, and prints no result."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("rror: ") == 1
    return result.stderr


# --- options -----------------------------------------------------------------------------------------------


@click.group(cls=Group)
def probe_group() -> None:
    """A group with one command, which prints what it was given."""


@click.command()
@click.option("--model", required=True)
@click.option("--data")
@click.option("--eval-data")
@click.option("--resume", is_flag=True)
@config_options("prefix", "data", "train")
def probe(**values: Any) -> None:
    click.echo(json.dumps(values))


probe_group.add_command(probe)


def given(*args: Any) -> dict[str, Any]:
    result = CliRunner().invoke(probe_group, ["probe", *map(str, args)])
    assert result.exit_code == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def refused(*args: Any) -> str:
    result = CliRunner().invoke(probe_group, ["probe", "--model", "m", *map(str, args)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_field_of_every_config_is_an_option_with_its_help_and_default() -> None:
    words = " ".join(succeed("train", "--help").stdout.split())
    for config in (PrefixConfig(), DataConfig(), TrainConfig()):
        for name, field in config.__dataclass_fields__.items():
            assert f"--{name.replace('_', '-')}" in words
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert f"[default: {field.default}]" in words


@pytest.mark.parametrize(
    ("command", "epochs", "template"),
    [("train", "2; 1 where", "human-one-bos where"), ("distill", "8.0", "chat where")],
)
def test_help_tells_one_default_of_an_option(command: str, epochs: str, template: str) -> None:
    parts = succeed(command, "--help").stdout.split("\n  --")
    told = dict(" ".join(part.split()).partition(" ")[::2] for part in parts)
    assert f"[default: {epochs}" in told["num-train-epochs"]
    assert f"[default: {template}" in told["template"]
    for text in told.values():
        assert sum(map(text.count, ("[default", "by default", "unless given"))) <= 1, text


def test_nothing_given_is_nothing_passed_on() -> None:
    values = given("--model", "m")
    assert values["prefix_options"] == values["data_options"] == values["train_options"] == {}


def test_file_may_begin_with_a_byte_order_mark(toml: Any) -> None:
    assert given("--model", "m", "--config", toml('\ufeffdata = "b.jsonl"\n'))["data"] == "b.jsonl"


def test_option_beats_set_beats_file_beats_default(toml: Any) -> None:
    file = toml("[train]\nlearning_rate = 0.1\nseed = 1\nmax_steps = 10\n[prefix]\nprojection = true\n")
    args = [
        "--model",
        "m",
        "--seed",
        3,
        "--set",
        "train.seed=2",
        "--config",
        file,
        "--set",
        "learning_rate=0.2",
    ]
    values = given(*args)
    assert values["train_options"] == {"learning_rate": 0.2, "seed": 3, "max_steps": 10}
    assert given(*args, "--no-projection")["prefix_options"] == {"projection": False}
    assert values["prefix_options"] == {"projection": True}


def test_file_holds_the_commands_own_options_too(toml: Any) -> None:
    file = toml(
        'model = "m"\neval_data = "dev.jsonl"\nresume = true\n[data]\nsource = "a.jsonl"\nlimit = 3\n'
    )
    values = given("--config", file)
    assert (values["model"], values["data"], values["eval_data"]) == ("m", "a.jsonl", "dev.jsonl")
    assert values["resume"] is True
    assert values["data_options"] == {"limit": 3}
    assert given("--config", toml('model = "m"\ndata = "b.jsonl"'))["data"] == "b.jsonl"


def test_file_names_an_option_as_the_command_line_does(toml: Any, tmp_path: Path) -> None:
    file = toml(f'prefix = "{tmp_path / "nothing"}"\nprompt = ["a", "b"]\njson = true\n')
    assert str(tmp_path / "nothing") in fail("generate", "--config", file, code=1).replace("\n", "")
    assert "no option 'help'" in fail("generate", "--config", toml("help = true"), code=2)


def test_token_ids_are_a_list_with_commas_or_a_toml_list(toml: Any) -> None:
    file = toml("[prefix]\ninit_tokens = [5, 6]\n")
    assert given("--model", "m", "--config", file)["prefix_options"] == {"init_tokens": [5, 6]}
    assert given("--model", "m", "--init-tokens", "5, 6")["prefix_options"] == {"init_tokens": [5, 6]}
    assert "5,x" in refused("--init-tokens", "5,x")


@pytest.mark.parametrize("name", ["learning_rat", "learning-rat", "train.learning_rat"])
def test_unknown_name_is_refused_with_the_closest_one(name: str, toml: Any) -> None:
    assert "learning_rate" in refused("--set", f"{name}=1")
    section, _, key = name.rpartition(".")
    message = refused("--config", toml(f"[{section or 'train'}]\n{key} = 1\n"))
    assert "run.toml" in message
    assert "learning_rate" in message


def test_option_in_the_wrong_section_is_refused(toml: Any) -> None:
    assert "prefix.seed" in refused("--config", toml("[prefix]\nseed = 1\n"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('seed = "x"', "train.seed"),
        ("seed = 1.5", "whole number"),
        ("seed = true", "expected integer"),
        ("seed = [1]", "got a list"),
        ('lr_scheduler_type = "liner"', "linear"),
        ('gradient_checkpointing = "maybe"', "train.gradient_checkpointing"),
    ],
)
def test_value_of_another_type_names_file_and_option(line: str, said: str, toml: Any) -> None:
    message = " ".join(refused("--config", toml(f"[train]\n{line}\n")).split())
    assert "run.toml: train." in message
    assert said in message


@pytest.mark.parametrize(
    ("line", "said"),
    [("length = 2.9", "whole number; got 2.9"), ("init_tokens = [5.9, 6]", "expected integers with commas")],
)
def test_a_fraction_of_a_token_is_refused_and_not_cut(line: str, said: str, toml: Any) -> None:
    message = " ".join(refused("--config", toml(f"[prefix]\n{line}\n")).split())
    assert f"prefix.{line.split()[0]}" in message
    assert said in message


def test_device_that_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    result = run("estimate", "--model", tmp_path / "config.json", "--device", "meta")
    assert result.exit_code == 2
    assert "device 'meta' cannot be used" in result.stderr


def test_broken_toml_names_file_and_line(toml: Any) -> None:
    file = toml("[train]\nseed = 1\nlearning_rate = oops\n")
    assert f"{file}:3:" in refused("--config", file).replace("\n", "")


def test_missing_config_and_set_without_value_are_wrong_usage(tmp_path: Path) -> None:
    assert "nothing.toml" in refused("--config", tmp_path / "nothing.toml")
    assert "KEY=VALUE" in refused("--set", "seed")


# --- errors ------------------------------------------------------------------------------------------------


def broken(error: BaseException, *args: str) -> Result:
    group = Group("probe")

    def raise_it() -> None:
        raise error

    group.add_command(click.Command("go", callback=raise_it))
    return CliRunner().invoke(group, [*args, "go"])


def test_our_error_is_its_message_and_hint_without_markup() -> None:
    result = broken(PrefixTuneError("row [bold]1[/bold] is [/] bad", hint="see [red]"))
    assert result.exit_code == 1
    assert result.stderr == "error: row [bold]1[/bold] is [/] bad\nhint: see [red]\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt("at step 3"), 1, "interrupted: at step 3"),
        (OSError(28, "No space left on device", "run/x"), 1, "error: run/x: No space left on device"),
        (PermissionError(13, "Permission denied", "run"), 1, "error: run: Permission denied"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "error: No space left on device",
        ),
        (ZeroDivisionError("division"), 1, "error: internal error: ZeroDivisionError: division"),
    ],
)
def test_every_error_is_one_message_and_an_exit_code(error: BaseException, code: int, said: str) -> None:
    result = broken(error)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_lets_the_traceback_through(tmp_path: Path) -> None:
    for args in (["--debug", "inspect"], ["inspect", "--debug"]):
        result = run(*args, tmp_path / "nothing.gguf")
        assert isinstance(result.exception, PrefixTuneError)


def test_closed_pipe_is_silent() -> None:
    code = "from prefixtune.cli import main; main()"
    command = f'"{sys.executable}" -c "{code}" train --help | true'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment(), check=False)
    assert done.stderr == ""


def test_unknown_command_is_refused_with_the_closest_one() -> None:
    assert "did you mean train?" in fail("trian", code=2)


@pytest.mark.parametrize("command", ["train", "evaluate", "data show"])
def test_wrong_value_is_wrong_usage_before_any_work(command: str, tmp_path: Path) -> None:
    args = [*command.split(), "--model", "no/such/model", "--max-length", 0]
    args += [tmp_path] if command == "data show" else ["--data", tmp_path]
    if command == "train":
        args += ["--output", tmp_path / "run"]
    assert "max_length: expected more than 0; got 0" in fail(*args, code=2)


# --- help --------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)


def test_help_answers_in_three_tenths_of_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        python("from prefixtune.cli import main; main()", "--help")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.3, seconds


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["train", "--help"], ["data", "show", "--help"]])
def test_help_imports_nothing_heavy(args: Sequence[str]) -> None:
    code = (
        "import sys\nfrom prefixtune.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert python(code, *args).stdout.splitlines()[-1] == "[]"


def test_a_library_that_nothing_uses_warns_of_nothing() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    CliRunner().invoke(main, ["data", "show", "nowhere.json"])
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_version_is_the_packages() -> None:
    assert succeed("--version").stdout.strip() == f"prefixtune, version {__version__}"


# --- inspect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trainable", "total", "percent"),
    [
        (["--length", "10"], 983_040, 1_304_094_720, 0.0754),
        (["--length", "10", "--projection"], 205_641_728, 1_508_753_408, 13.6299),
        (["--length", "10", "--layers", "top:24"], 983_040, 1_304_094_720, 0.0754),
        (["--length", "10", "--layers", "top:8"], 983_040 // 3, 1_303_439_360, 0.0251),
        # of the projection only the last layer, [2048 + 1, numbers of the KV], is a third
        (
            ["--length", "10", "--layers", "0,5-11", "--projection"],
            205_641_728 - 2049 * 16 * 2 * 2048,
            1_303_111_680 + 71_358_464,
            5.1917,
        ),
    ],
)
def test_parameters_of_the_tutorials_bloom_are_the_tutorials(
    tmp_path: Path, options: Sequence[str], trainable: int, total: int, percent: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    facts = json.loads(succeed("inspect", tmp_path / "config.json", *options, "--json").stdout)
    assert facts["trainable_parameters"] == trainable
    assert facts["all_parameters"] == total
    assert facts["trainable_percent"] == percent
    assert (facts["layers"], facts["kv_heads"], facts["key_dim"], facts["value_dim"]) == (24, 16, 128, 128)
    assert facts["prefix_file_bytes"] == 10 * 24 * 2 * 2048 * 4


@pytest.mark.parametrize("command", [("inspect",), ("estimate", "--model")], ids=["inspect", "estimate"])
def test_length_auto_without_rows_is_the_most_that_train_takes_and_told(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    config = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = (*command, tmp_path / "config.json", "--json", "--length")
    auto, most, few = (succeed(*line, length) for length in ("auto", "128", "10"))
    name = {"inspect": "trainable_parameters", "estimate": "prefix_bytes"}[command[0]]
    counts = [json.loads(result.stdout)[name] for result in (auto, most, few)]
    assert counts[0] == counts[1] > counts[2]
    assert "128 virtual tokens" in auto.stderr


def test_inspect_tells_which_layers_train(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    facts = json.loads(succeed("inspect", tmp_path / "config.json", "--layers", "0,20-22", "--json").stdout)
    assert facts["trained_layers"] == [0, 20, 21, 22]
    assert "4 of 24 layers" in succeed("inspect", tmp_path / "config.json", "--layers", "0,20-22").stdout
    everywhere = json.loads(succeed("inspect", tmp_path / "config.json", "--json").stdout)
    assert everywhere["trained_layers"] == list(range(24))
    assert "24 layers, 0 to 23" in fail("inspect", tmp_path / "config.json", "--layers", "24", code=2)


@pytest.mark.parametrize("option", [[], ["--model"]])
def test_checkpoint_of_a_whole_model_is_a_model(tmp_path: Path, option: list[str]) -> None:
    for name, content in (("config.json", BLOOM), ("trainer_state.json", {"global_step": 2})):
        (tmp_path / name).write_text(json.dumps(content))
    facts = json.loads(succeed("inspect", *option, tmp_path, "--json").stdout)
    assert facts["trainable_parameters"] == 983_040


def test_inspect_without_json_says_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    text = succeed("inspect", tmp_path / "config.json").stdout
    assert "983,040" in text
    assert "1,304,094,720" in text
    assert "0 to 23" in text


# --- commands on a tiny model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer(chat_template=CHATML)
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"instruction": f"Give {i} tips.", "input": "", "output": f"{i} tips [b]here[/b]"} for i in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix folder of a short run."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ["--length", 4, "--max-steps", 2, "--report-to", "none", "--dtype", "float32"]
    args = ["--model", base, "--data", rows, "--output", output, "--json", *options]
    document = json.loads(succeed("train", *args, "--set", "template=Q: {instruction}\\nA: {output}").stdout)
    assert document
    return next(path.parent for path in sorted(output.rglob("prefix.json"), key=lambda path: len(path.parts)))


def test_data_show_marks_the_targets_and_counts(base: Path, rows: Path) -> None:
    document = json.loads(succeed("data", "show", rows, "--model", base, "--rows", 2, "--json").stdout)
    assert [row["target"] for row in document["rows"]] == ["0 tips [b]here[/b]</s>", "1 tips [b]here[/b]</s>"]
    assert document["rows"][0]["text"] == "Human: Give 0 tips.\n\nAssistant: 0 tips [b]here[/b]</s>"
    assert document["report"]["rows"] == 6
    shown = succeed("data", "show", rows, "--model", base, "--rows", 1)
    assert "0 tips [b]here[/b]</s>" in shown.stdout
    assert "6 rows: 6 examples" in shown.stderr


def test_model_without_tokenizer_is_told_by_the_commands_that_need_one(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert "tokenizer" in fail("generate", "--model", tmp_path, "--prompt", "x", code=1)
    assert "tokenizer" in fail("data", "show", "demo", "--model", tmp_path, code=1)


def test_generate_prints_answers_alone_on_stdout_in_order(base: Path, rows: Path) -> None:
    common = ["generate", "--model", base, "--max-new-tokens", 5, "--dtype", "float32"]
    prompts = ["--prompt", "Give 0 tips.", "--prompt", "Give 1 tips."]
    document = json.loads(succeed(*common, *prompts, "--json").stdout)
    assert [item["prompt"] for item in document] == [
        f"Human: Give {i} tips.\n\nAssistant: " for i in range(2)
    ]
    assert succeed(*common, *prompts).stdout == "".join(item["text"] + "\n" for item in document)
    read = json.loads(succeed(*common, "--data", rows, "--json").stdout)
    assert [item["text"] for item in read[:2]] == [item["text"] for item in document]
    assert len(read) == 6


def test_generate_needs_a_prompt_or_data_and_a_model(base: Path, rows: Path) -> None:
    assert "--prompt or --data" in fail("generate", "--model", base, code=2)
    assert "--prompt or --data" in fail("generate", "--model", base, "--prompt", "x", "--data", rows, code=2)
    assert "--model" in fail("generate", "--prompt", "x", code=2)


def test_prefix_brings_its_base_and_its_template(base: Path, trained: Path) -> None:
    common = ["--max-new-tokens", 5, "--dtype", "float32", "--json"]
    args = ["generate", "--prefix", trained, "--prompt", "Give 0 tips.", *common]
    stored = json.loads(succeed(*args).stdout)
    assert stored[0]["prompt"] == "Q: Give 0 tips.\nA: "
    assert json.loads(succeed(*args, "--model", base).stdout) == stored
    assert json.loads(succeed(*args, "--template", "human").stdout)[0]["prompt"].startswith("Human: ")


def test_inspect_reads_a_prefix_folder(trained: Path) -> None:
    assert json.loads(succeed("inspect", trained, "--json").stdout)["length"] == 4
    assert "prefix of 4 tokens" in succeed("inspect", "--prefix", trained).stdout


def test_evaluate_measures_prefix_and_bare_model(
    base: Path, trained: Path, rows: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    common = ["evaluate", "--data", rows, "--max-new-tokens", 5, "--dtype", "float32"]
    both = json.loads(succeed(*common, "--prefix", trained, "--json", "--output", answers).stdout)
    template = ["--template", "Q: {instruction}\\nA: {output}"]
    bare = json.loads(succeed(*common, "--model", base, *template, "--no-exact-match", "--json").stdout)
    assert both["base_loss"] == bare["loss"]
    assert both["loss"] != bare["loss"]
    assert bare["samples"] == []
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert lines[:3] == both["samples"]
    assert len(lines) == both["rows"] == 6
    assert f"{both['loss']:.4f}" in succeed(*common, "--prefix", trained).stdout


def test_evaluate_writes_answers_with_their_references_and_the_metrics_beside_them(
    trained: Path, tmp_path: Path
) -> None:
    rows, answers = tmp_path / "rows.csv", tmp_path / "answers.jsonl"
    rows.write_text("mr,ref\na,one\nb,two\na,three\n")
    common = ["evaluate", "--prefix", trained, "--data", rows, "--fields", "instruction=mr,output=ref"]
    common += ["--max-new-tokens", 5, "--dtype", "float32"]
    metrics = ["--metric", "bleu,rougeL", "--metric", "json"]
    found = json.loads(succeed(*common, *metrics, "--output", answers, "--json").stdout)
    assert list(found["metrics"]) == list(found["base_metrics"]) == ["exact_match", "bleu", "rougeL", "json"]
    assert found["exact_match"] == found["metrics"]["exact_match"]
    assert (found["rows"], found["inputs"]) == (3, 2)
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert lines == found["samples"]
    assert [line["references"] for line in lines] == [["one", "three"], ["two"]]
    beside = json.loads((tmp_path / "answers.metrics.json").read_text(encoding="utf-8"))
    assert beside == {name: value for name, value in found.items() if name != "samples"}
    shown = succeed(*common, *metrics).stdout
    assert f"bleu: {found['metric_settings']['bleu']}" in shown
    assert "3 rows, 2 inputs" in shown


def test_evaluate_chooses_labels_and_makes_no_answers_where_nothing_else_is_asked(
    trained: Path, rows: Path
) -> None:
    labels = ",".join(f"{i} tips [b]here[/b]" for i in range(6))
    common = ["evaluate", "--prefix", trained, "--data", rows, "--max-new-tokens", 2, "--dtype", "float32"]
    found = json.loads(succeed(*common, "--metric", "accuracy", "--json").stdout)
    named = json.loads(succeed(*common, "--labels", labels, "--json").stdout)
    assert found == named
    assert list(found["metrics"]) == ["accuracy"]
    assert len(found["labels"]) == 6
    assert found["exact_match"] is None
    assert "prediction" not in found["samples"][0]
    both = json.loads(succeed(*common, "--metric", "accuracy,json", "--json").stdout)
    assert list(both["metrics"]) == ["exact_match", "json", "accuracy"]
    assert "accuracy" in succeed(*common, "--metric", "accuracy").stdout


def test_evaluate_measures_forgetting_on_text_of_the_base_or_of_ones_own(
    trained: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("The colours are red, blue and yellow.\n" * 9)
    common = ["evaluate", "--prefix", trained, "--data", rows, "--no-exact-match", "--dtype", "float32"]
    sampled = json.loads(succeed(*common, "--forgetting", "--seed", 3, "--json").stdout)
    own = json.loads(succeed(*common, "--forgetting-text", tmp_path / "own.txt", "--json").stdout)
    for found in (sampled, own):
        detail = found["forgetting_detail"]
        assert found["forgetting"] == detail["rise"] == pytest.approx(detail["loss"] - detail["base_loss"])
    assert "seed 3" in sampled["forgetting_detail"]["source"]
    assert own["forgetting_detail"]["source"].endswith("own.txt")
    assert "forgetting" in succeed(*common, "--forgetting-text", tmp_path / "own.txt").stdout


def test_evaluate_measures_forgetting_where_a_prefix_leaves_few_positions(tmp_path: Path) -> None:
    tokenizer, rows = byte_tokenizer(), tmp_path / "rows.csv"
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")  # of 128 positions
    tokenizer.save_pretrained(tmp_path / "model")
    base = load_base(str(tmp_path / "model"), dtype="float32")
    PrefixModel(base.model, PrefixConfig(length=60, init="random")).save_pretrained(tmp_path / "prefix")
    rows.write_text("instruction,input,output\na,b,c\n")
    (tmp_path / "own.txt").write_text("qz" * 500)
    common = ["evaluate", "--model", tmp_path / "model", "--prefix", tmp_path / "prefix", "--data", rows]
    common += ["--no-exact-match", "--dtype", "float32", "--json"]
    for option in (["--forgetting"], ["--forgetting-text", tmp_path / "own.txt"]):
        assert json.loads(succeed(*common, *option).stdout)["forgetting_detail"]["tokens"] > 0


def test_own_metric_is_found_in_the_working_folder(
    trained: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own.py").write_text(
        "def longest(predictions, references): return max(map(len, predictions))"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    common = ["evaluate", "--prefix", trained, "--data", rows, "--max-new-tokens", 5, "--dtype", "float32"]
    found = json.loads(succeed(*common, "--metric", "my_own:longest", "--json").stdout)
    longest = max(len(sample["prediction"]) for sample in found["samples"])
    assert found["metrics"]["my_own:longest"] >= longest > 0


def test_own_metric_that_fails_is_told_before_the_answers_and_loses_none_of_them(
    trained: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_errors.py").write_text(
        "calls = []\n"
        "def always(predictions, references): return 1 / 0\n"
        "def later(predictions, references):\n"
        "    calls.append(1)\n"
        "    return 1 / max(0, 3 - len(calls))\n"  # after two that find out, one model's answers
    )
    monkeypatch.syspath_prepend(tmp_path)
    answers = tmp_path / "answers.jsonl"
    common = ["evaluate", "--prefix", trained, "--data", rows, "--max-new-tokens", 2, "--dtype", "float32"]
    common += ["--output", answers, "--no-base", "--json"]
    before = run(*common, "--metric", "my_errors:always")
    assert before.exit_code == 2
    assert "my_errors:always: it failed: ZeroDivisionError" in before.stderr
    assert not answers.exists()
    after = run(*common, "--metric", "my_errors:later")
    assert after.exit_code == 2
    assert "metric my_errors:later could not be measured: " in after.stderr
    found = json.loads(after.stdout)
    assert list(found["failed_metrics"]) == ["my_errors:later"]
    assert set(found["metrics"]) == {"exact_match"}
    assert len(answers.read_text(encoding="utf-8").splitlines()) == found["inputs"] == 6


def test_own_metric_with_other_keys_for_the_bare_model_has_a_line_for_each(
    trained: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_keys.py").write_text(
        "calls = []\n"
        "def score(predictions, references):\n"
        "    calls.append(1)\n"
        "    return {'both': 1, 'prefix' if len(calls) == 3 else 'bare': 2}\n"  # after two that find out
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = ["evaluate", "--prefix", trained, "--data", rows, "--max-new-tokens", 2, "--dtype", "float32"]
    shown = succeed(*common, "--metric", "my_keys:score").stdout
    lines = [line.split("│")[1:4] for line in shown.splitlines() if "my keys:score" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["my keys:score.both", "1.0000", "1.0000"],
        ["my keys:score.prefix", "2.0000", "–"],
        ["my keys:score.bare", "–", "2.0000"],
    ]


@pytest.mark.parametrize("template", ["chat", "human"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "chat"])
def test_answers_to_chats_alone_end_where_the_template_closes_a_turn(
    base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, command: str, template: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("prefixtune.generate._turn_end", lambda tokenizer: asked.append(tokenizer))
    line = [command, "--model", base, "--template", template, "--max-new-tokens", 2]
    more = {
        "generate": ["--prompt", "x"],
        "evaluate": ["--data", rows, "--metric", "exact_match"],
        "chat": [],
    }
    succeed(*line, *more[command], stdin="x\n" if command == "chat" else None)
    assert bool(asked) == (template == "chat")


# --- chat --------------------------------------------------------------------------------------------------


def test_chat_answers_each_line_and_switches_between_prefix_and_bare_model(base: Path, trained: Path) -> None:
    common = ["--max-new-tokens", 5, "--dtype", "float32"]
    turns = "Give 0 tips.\n/reset\n/base\nGive 0 tips.\n/reset\n/prefix\nGive 0 tips.\n/quit\nnever read\n"
    spoken = succeed("chat", "--prefix", trained, *common, stdin=turns).stdout
    template = ["--template", "Q: {instruction}\\nA: {output}"]
    asked = ["--prompt", "Give 0 tips.", *common]
    tuned = succeed("generate", "--prefix", trained, *asked).stdout
    # the bare model has no template of its own, so it speaks by its tokenizer's
    plain = succeed("generate", "--model", base, "--template", "chat", *asked).stdout
    assert spoken == tuned + plain + tuned
    assert tuned != succeed("generate", "--model", base, *template, *asked).stdout


def test_chat_remembers_what_was_said(base: Path) -> None:
    common = ["chat", "--model", base, "--max-new-tokens", 5, "--dtype", "float32"]
    twice = succeed(*common, stdin="Give 0 tips.\nGive 0 tips.\n").stdout
    once = succeed(*common, stdin="Give 0 tips.\n").stdout
    forgotten = succeed(*common, stdin="Give 0 tips.\n/reset\nGive 0 tips.\n").stdout
    assert twice.startswith(once)
    assert forgotten == once + once
    assert twice != forgotten


def test_chat_takes_the_folder_of_that_name_before_the_last_prefix_of_that_name(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = PrefixModel(load_base(str(base), dtype="float32").model, PrefixConfig(length=3))
    made.save_pretrained(tmp_path / trained.name)
    common = ["--dtype", "float32", "--max-new-tokens", 5]

    def said(folder: Path, turns: str) -> str:
        return succeed("chat", "--prefix", folder, *common, stdin=turns).stdout

    asked = f"/prefix {trained.name}\nGive 0 tips.\n"
    last, here = (said(folder, "Give 0 tips.\n") for folder in (trained, tmp_path / trained.name))
    assert last != here
    assert said(trained, asked) == last  # there is no such folder where it runs
    monkeypatch.chdir(tmp_path)
    assert said(trained, asked) == here


def test_chat_reads_a_file_that_begins_with_a_byte_order_mark(base: Path) -> None:
    result = succeed("chat", "--model", base, "--max-new-tokens", 2, stdin="\ufeff/help\n")
    assert "/reset" in result.stderr
    assert not result.stdout


def test_letters_that_stdout_has_no_code_for_end_no_command(base: Path) -> None:
    line = [sys.executable, "-m", "prefixtune", "generate", "--model", base, "--max-new-tokens", "2"]
    line += ["--prompt", "三é😀"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    for more in (["--json"], []):
        done = subprocess.run([*line, *more], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        if more:
            assert json.loads(done.stdout)[0]["prompt"].count("三é😀") == 1


def test_chat_goes_on_after_a_mistake(base: Path, tmp_path: Path) -> None:
    turns = f"/perfix\n/prefix\n/prefix {tmp_path}\n/help\nGive 0 tips.\n"
    result = succeed("chat", "--model", base, "--max-new-tokens", 5, stdin=turns)
    assert result.stderr.count("error: ") == 3
    assert "/reset" in result.stderr
    assert result.stdout.count("\n") >= 1


def test_the_package_runs_as_a_module() -> None:
    line = [sys.executable, "-m", "prefixtune"]
    asked, unknown = (
        subprocess.run([*line, word], capture_output=True, text=True, check=False)
        for word in ("--version", "--nonsense")
    )
    assert asked.returncode == 0
    assert asked.stdout.startswith("prefixtune")
    assert unknown.returncode == 2
    assert "Usage: prefixtune" in unknown.stderr
