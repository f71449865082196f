"""Laws of distillation: a prefix that is the whole text is the teacher, and training comes nearer to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from families import tiny_model
from prefixtune import PrefixKV, PrefixModel
from prefixtune.cli import main
from prefixtune.config import DistillConfig, PrefixConfig, TrainConfig
from prefixtune.data import Collator, Example
from prefixtune.distill import Context, closeness, distill
from prefixtune.distill.comparison import compare, greedy_answers, measure_speed, ways_without
from prefixtune.distill.context import length_of, prompts_of
from prefixtune.distill.questions import Question, _first_question, read_questions, split, write_questions
from prefixtune.distill.teacher import PARTS, Answered, answer, as_text, read_answered, with_aims
from prefixtune.errors import ConfigError, DataError
from prefixtune.load import LoadedBase
from prefixtune.loss import Passes, RowTokens
from prefixtune.memory import measure_step, without_weights
from prefixtune.train.forecast import setup_of
from tokenizers_for_tests import CHATML, LLAMA2, byte_tokenizer

FAMILIES = ["llama", "bloom", "gpt2", "mistral-sliding", "gemma3"]
DEFAULT_SYSTEM = CHATML.replace(  # as SmolLM2's: it writes a system turn where the conversation has none
    "{% for message in messages %}",
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}",
    1,
)
TEXT = "Give three tips. Eat a balanced diet. Red, blue and yellow."
QUESTIONS = ["What is red?", "Is it blue?", "Sleep how?"]


def rows_of(base: Any, *, seed: int = 3) -> list[Answered]:
    """Random questions and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    found = []
    for asked, said in ((3, 5), (6, 2), (4, 9)):
        prompt = ids(asked)
        found.append(
            Answered(
                part="train",
                question="",
                answer="",
                teacher_ids=prompt,
                student_ids=prompt,
                answer_ids=ids(said),
            )
        )
    return found


def context_of(count: int) -> Context:
    ids = tuple(torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(5)).tolist())
    return Context(ids=ids, text="", template="human", is_turn=False)


def whole_logits(base: Any, before: tuple[int, ...], example: Example) -> torch.Tensor:
    """The bare model's logits [targets, V] where it predicts a row's targets, with ids before the row."""
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[*before, *example.input_ids]])).logits[0]
    places = [len(before) + t - 1 for t, label in enumerate(example.labels) if label != -100]
    return logits[places]


# --- the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_made_of_the_whole_text_is_the_teacher(family: str) -> None:
    base, context = tiny_model(family), context_of(14)
    passes = Passes.of(base, capacity=64, pad_token_id=0)
    kv = context.kv(base)
    examples = with_aims(passes, rows_of(base), kv)
    found = closeness(passes, examples, kv)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1.0
    assert closeness(passes, examples, None).divergence > 0.01
    assert (
        closeness(passes, examples, PrefixKV.from_tokens(base, torch.tensor([context.ids[:4]]))).divergence
        > 0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_is_that_of_whole_logits_with_the_text_in_the_context(family: str) -> None:
    base, context = tiny_model(family), context_of(14)
    passes = Passes.of(base, capacity=64, pad_token_id=0)
    examples = with_aims(passes, rows_of(base), context.kv(base))
    start = context.ids[:5]
    nats, same, count = 0.0, 0, 0
    for example in examples:
        theirs = F.log_softmax(whole_logits(base, context.ids, example).double(), dim=1)
        ours = F.log_softmax(whole_logits(base, start, example).double(), dim=1)
        nats += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        same += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
        count += len(theirs)
    found = closeness(passes, examples, PrefixKV.from_tokens(base, torch.tensor([start])))
    assert found.divergence == pytest.approx(nats / count, rel=1e-4)
    assert found.agreement == pytest.approx(same / count)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gradient_of_a_batch_with_aims_is_that_of_whole_logits(family: str) -> None:
    base, context = tiny_model(family, dtype=torch.float64), context_of(14)
    examples = with_aims(Passes.of(base, capacity=64, pad_token_id=0), rows_of(base), context.kv(base))
    model = PrefixModel(base, PrefixKV.from_tokens(base, torch.tensor([context.ids[:5]]))).double()
    passes = Passes.of(base, capacity=16, pad_token_id=0)
    rows = RowTokens.of_batch(Collator(0)(examples))
    by_passes = torch.zeros((), dtype=torch.float64)
    for group in passes.plan(rows):
        with passes.loss([rows[row] for row in group], model.prefix()) as loss:
            loss.backward()
            by_passes += loss.detach()
    gradient = [p.grad.clone() for p in model.prefix.parameters()]
    model.prefix.zero_grad()
    whole = torch.zeros((), dtype=torch.float64)
    for example in examples:
        places = [t - 1 for t, label in enumerate(example.labels) if label != -100]
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0][places]
        theirs = F.log_softmax(whole_logits(base, context.ids, example), dim=1)
        whole = whole + F.kl_div(F.log_softmax(logits, dim=1), theirs, reduction="sum", log_target=True)
    whole.backward()
    assert by_passes.item() == pytest.approx(whole.item(), rel=1e-5)
    for ours, parameter in zip(gradient, model.prefix.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_teacher_answers_as_the_model_with_the_text_in_its_context() -> None:
    tokenizer = byte_tokenizer(chat_template=DEFAULT_SYSTEM)
    base = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    for template in ("chat", "human"):
        context = Context.of(TEXT, tokenizer, template=template)
        parts = {"train": [Question(text=text, origin="q") for text in QUESTIONS]}
        settings = DistillConfig(max_new_tokens=6, batch_size=2)
        found = answer(base, tokenizer, context, context.kv(base), parts, config=settings, seed=1)
        for one in found:
            ids = torch.tensor([[*context.ids, *one.teacher_ids]])
            plain = base.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=1)
            assert one.answer_ids == tuple(plain[0, ids.shape[1] :].tolist())[: len(one.answer_ids)]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_exact_match_is_of_whole_answers_and_only_where_the_teacher_is_greedy(temperature: float) -> None:
    tokenizer = byte_tokenizer()
    base = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    loaded = LoadedBase(model=base, tokenizer=tokenizer, name="tiny", dtype_reason="")
    context = Context.of(TEXT, tokenizer, template="human")
    kv = context.kv(base)
    settings = DistillConfig(max_new_tokens=6, temperature=temperature)
    parts = {"heldout": [Question(text=text, origin="q") for text in QUESTIONS]}
    asked = answer(base, tokenizer, context, kv, parts, config=settings, seed=1)
    passes = Passes.of(base, capacity=256, pad_token_id=0)
    ways = ways_without(loaded, context, kv)  # a prefix that is the whole text, so the teacher
    prompts = [one.student_ids for one in asked]
    answers = {
        name: greedy_answers(loaded, prompts, way, max_new_tokens=6, batch_size=3, progress="answers")
        for name, way in ways.items()
    }
    found = compare(
        *(loaded, passes, with_aims(passes, asked, kv), asked),
        context=context,
        text_bytes=kv.nbytes,
        ways=ways,
        answers={**answers, "no text": [asked[0].answer, *answers["no text"][1:]]},
        greedy=settings.temperature == 0,
    )
    shares = {one.name: one.exact_match for one in found}
    names = ("text in the context", "prefix", f"first {len(context.ids)} tokens", "no text")
    expected = (1.0, 1.0, 1.0, pytest.approx(1 / 3)) if temperature == 0 else (None,) * 4
    assert shares == dict(zip(names, expected, strict=True))


# --- what is before a question -----------------------------------------------------------------------------


def test_chat_text_is_the_system_turn_and_the_student_reads_what_is_served() -> None:
    tokenizer = byte_tokenizer(chat_template=DEFAULT_SYSTEM)
    context = Context.of(TEXT, tokenizer, template="chat", instruction="Use this.")
    (theirs,) = context.prompts(["Why?"], tokenizer)
    (ours,) = prompts_of(["Why?"], tokenizer, "chat")
    said = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    text = f"<|im_start|>system\nUse this.\n\n{TEXT}<|im_end|>\n"
    assert tokenizer.decode([*context.ids, *theirs]) == text + said
    assert tokenizer.decode(ours) == f"<|im_start|>system\nBe kind.<|im_end|>\n{said}"


def test_text_comes_before_a_chat_that_has_no_system_turn_and_begins_it_once() -> None:
    tokenizer = byte_tokenizer(chat_template=LLAMA2, bos=True)
    context = Context.of(TEXT, tokenizer, template="chat")
    (theirs,) = context.prompts(["Why?"], tokenizer)
    assert not context.is_turn
    assert [*context.ids, *theirs].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(theirs).startswith("[INST] Why?")


def test_length_is_an_eighth_of_the_text_within_bounds() -> None:
    lengths = {tokens: length_of("auto", context_of(tokens)) for tokens in (5, 80, 800, 90_000)}
    assert lengths == {5: 5, 80: 16, 800: 100, 90_000: 512}
    assert length_of("80", context_of(80)) == 80
    with pytest.raises(ConfigError, match="80 tokens, and a prefix of 81"):
        length_of("81", context_of(80))


# --- questions ---------------------------------------------------------------------------------------------


def test_written_questions_differ_and_are_the_same_for_the_same_seed() -> None:
    for template in (CHATML, None):
        tokenizer = byte_tokenizer(chat_template=template)
        base = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
        options = {"count": 8, "chat": template is not None, "batch_size": 4}
        first, again, other = (
            write_questions(base, tokenizer, TEXT, **options, seed=seed) for seed in (1, 1, 2)
        )
        assert len({question.text.casefold() for question in first}) == len(first) >= 8
        assert first == again
        assert first != other


def test_question_is_the_first_line_without_its_number() -> None:
    found = {
        "\n 1. What is it? It is\n2. Why?": "What is it?",
        "Question: “How many?” asked": "How many?",
        "List the parts.\nMore": "List the parts.",
        "是什么？因为": "是什么？",
        " \n": None,
        "?": None,
    }
    assert {text: _first_question(text) for text in found} == found


def test_no_question_is_trained_on_and_compared() -> None:
    asked = [Question(text=f"Question {n % 30}?", origin=str(n)) for n in range(40)]
    parts = split(asked, heldout=32, seed=1)
    texts = {part: {question.text for question in parts[part]} for part in parts}
    assert {part: len(texts[part]) for part in texts} == {"heldout": 3, "watch": 4, "train": 23}
    assert len(set.union(*texts.values())) == 30
    assert parts == split(asked, heldout=32, seed=1)
    with pytest.raises(DataError, match="3 different questions"):
        split(asked[:2], heldout=2, seed=1)


def test_questions_come_from_lines_or_from_a_column(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("What?\r\n\r\n  Why?  \r\n", encoding="utf-8", newline="")
    (tmp_path / "q.csv").write_text("ask,n\nWhat?,1\nWhy?,2\n", encoding="utf-8")
    (tmp_path / "q.jsonl").write_text('{"question": "What?"}\n{"question": "Why?"}\n', encoding="utf-8")
    for name, fields in (("q.txt", None), ("q.csv", "question=ask"), ("q.jsonl", None)):
        found = read_questions(str(tmp_path / name), fields=fields)
        assert [question.text for question in found] == ["What?", "Why?"], name
    assert [question.origin for question in read_questions(str(tmp_path / "q.txt"))] == ["q.txt:1", "q.txt:3"]
    (tmp_path / "u.txt").write_text("What\u2028now?\nWhy\x0b?\n", encoding="utf-8")
    assert [question.text for question in read_questions(str(tmp_path / "u.txt"))] == [
        "What\u2028now?",
        "Why\x0b?",
    ]


# --- the whole of it ---------------------------------------------------------------------------------------

RUN = ["--length", 12, "--max-new-tokens", 6, "--heldout", 4, "--batch-size", 8, "--logging-steps", 1]
RUN += ["--dtype", "float32", "--report-to", "none"]


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
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and questions about it."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = byte_tokenizer(chat_template=CHATML)
    base = tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=256)
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = [json.dumps({"question": f"What is {n} and {n * n}?"}) + "\n" for n in range(20)]
    (folder / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def options(place: Path, output: Path, *more: Any) -> list[str]:
    args = ["distill", "--model", place / "model", "--text", place / "text.txt", "--output", output]
    args += ["--questions", place / "questions.jsonl", *RUN, *more]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Path, dict[str, Any]]:
    """A run that went through, and what it printed."""
    output = place / "done"
    result = succeed(*options(place, output, "--num-train-epochs", 12, "--save-steps", 3, "--json"))
    return output, json.loads(result.stdout)


def contestant(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [one for one in found["contestants"] if one["name"] == name]
    return dict(one)


def test_training_brings_the_prefix_nearer_to_the_teacher(done: tuple[Path, dict[str, Any]]) -> None:
    output, found = done
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    watched = [line["eval_loss"] for line in lines if "eval_loss" in line]
    trained, start, none = (
        contestant(found, name)["divergence"] for name in ("prefix", "first 12 tokens", "no text")
    )
    assert trained < 0.9 * start  # on questions that were not trained on
    assert trained < 0.9 * none
    assert min(watched) == found["training"]["eval_loss"]
    assert found["questions"] == {"train": 16, "watch": 2, "heldout": 2}


def test_comparison_counts_the_bytes_of_the_cache(place: Path, done: tuple[Path, dict[str, Any]]) -> None:
    _, found = done
    per_token = 2 * 2 * 32 * 4  # layers, keys and values, hidden size, float32
    for name, tokens in (("text in the context", found["text_tokens"]), ("prefix", 12), ("no text", 0)):
        one = contestant(found, name)
        assert (one["cache_tokens"], one["cache_bytes"]) == (tokens, tokens * per_token)
        assert one["first_token_seconds"] > 0
        assert one["tokens_per_second"] > 0
    assert contestant(found, "text in the context")["divergence"] == 0


@pytest.mark.parametrize("tokens", [4, 100])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-sliding", "mistral-sliding"])
def test_bytes_of_the_text_are_those_of_transformers_own_cache(family: str, tokens: int) -> None:
    base, context = tiny_model(family), context_of(tokens)
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([context.ids]), use_cache=True).past_key_values
    assert context.cache_bytes(base) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_comparison_has_the_share_of_answers_that_are_the_teachers(done: tuple[Path, dict[str, Any]]) -> None:
    _, found = done
    assert len(found["samples"]) == found["questions"]["heldout"]
    for name in ("prefix", "no text"):
        same = [one[name].strip() == one["teacher"].strip() for one in found["samples"]]
        assert contestant(found, name)["exact_match"] == sum(same) / len(same)


@pytest.mark.parametrize(("template", "ended"), [("chat", 4), ("human", 0)])
def test_answers_to_chats_alone_end_where_the_template_closes_a_turn(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, ended: int
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("prefixtune.generate._turn_end", lambda tokenizer: asked.append(tokenizer))
    succeed(*options(place, tmp_path / "run", "--template", template))
    assert (
        len(asked) == ended
    )  # the teacher's, and at the end those with a prefix, with the text's first tokens, and without


def test_prefix_of_the_run_is_served_with_its_template(done: tuple[Path, dict[str, Any]]) -> None:
    output, found = done
    sample = found["samples"][0]
    result = succeed(
        *("generate", "--prefix", output, "--prompt", sample["question"], "--max-new-tokens", 6),
        *("--dtype", "float32", "--json"),
    )
    assert json.loads(result.stdout)[0]["text"] == sample["prefix"]
    info = json.loads((output / "prefix.json").read_text(encoding="utf-8"))
    assert info["template"] == "chat"
    assert info["training"]["eval_loss"] == found["training"]["eval_loss"]


def bits(output: Path) -> dict[str, bytes]:
    tensors = load_file(output / "prefix.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def cut(done: Path, target: Path, *, step: int) -> Path:
    """The run as a kill after the checkpoint of `step` leaves it."""
    shutil.copytree(done, target)
    for folder in target.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)
    for name in ("prefix.json", "prefix.safetensors", "comparison.json"):
        (target / name).unlink()
    return target


def test_resumed_run_ends_with_the_same_bits_and_the_same_comparison(
    place: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    whole, found = done
    first = min(int(path.name.partition("-")[2]) for path in whole.glob("checkpoint-*"))
    run = cut(whole, place / "cut", step=first)
    more = ["--num-train-epochs", 12, "--save-steps", 3, "--json", "--resume"]
    result = succeed(*options(place, run, *more))
    assert f"resuming from {run}/checkpoint-{first}" in result.stderr
    assert "the teacher answers" not in result.stderr
    assert bits(run) == bits(whole)
    again = json.loads(result.stdout)
    for name in ("prefix", "no text"):
        for what in ("divergence", "agreement"):
            assert contestant(again, name)[what] == contestant(found, name)[what]
    assert again["samples"] == found["samples"]


def test_resumed_run_has_the_date_at_which_it_was_begun(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("done", "cut")))
    # microseconds differ from one reading of the clock to the next, as dates do from day to day
    dated = byte_tokenizer(chat_template="{{ strftime_now('%d %b %Y, %f') }}" + CHATML)
    dated.save_pretrained(folder / "model")
    args = options(folder, tmp_path / "run", "--num-train-epochs", 2, "--save-steps", 1)
    succeed(*args)
    run = cut(tmp_path / "run", tmp_path / "cut", step=1)
    args[args.index(str(tmp_path / "run"))] = str(run)
    succeed(*args, "--resume")
    assert bits(run) == bits(tmp_path / "run")


def test_finished_run_is_told_again_and_an_uncompared_one_is_compared(
    place: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    whole, found = done
    more = ["--num-train-epochs", 12, "--save-steps", 3, "--json", "--resume"]
    result = succeed(*options(place, whole, *more))
    assert "nothing to do" in result.stderr
    assert json.loads(result.stdout) == found
    run = Path(shutil.copytree(whole, place / "uncompared"))
    (run / "comparison.json").unlink()
    again = json.loads(succeed(*options(place, run, *more)).stdout)
    assert contestant(again, "prefix")["divergence"] == contestant(found, "prefix")["divergence"]


def test_finished_run_of_other_weights_is_told(place: Path, done: tuple[Path, dict[str, Any]]) -> None:
    run = Path(shutil.copytree(done[0], place / "other-weights"))
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        tensors = {name: 1.5 * tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        more = ["--num-train-epochs", 12, "--save-steps", 3, "--resume"]
        assert "not the weights that the run in" in fail(*options(place, run, *more))
        (run / "comparison.json").unlink()
        assert "not the weights that the run in" in fail(*options(place, run, *more))
    finally:
        weights.write_bytes(before)


def test_model_writes_the_questions_about_an_instruction_alone(place: Path) -> None:
    result = succeed(
        *("distill", "--model", place / "model", "--instruction", "Answer in red and blue.", "--json"),
        *(
            "--template",
            "human",
            "--output",
            place / "written",
            "--write-questions",
            12,
            "--max-steps",
            2,
            *RUN,
        ),
    )
    found = json.loads(result.stdout)
    assert sum(found["questions"].values()) >= 12
    assert found["template"] == "human"
    kept = (place / "written" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == sum(found["questions"].values())


def test_text_is_read_from_stdin_and_the_result_is_a_table(place: Path) -> None:
    args = options(place, place / "stdin", "--max-steps", 1, "--rows", 1)
    args[args.index("--text") + 1] = "-"
    result = CliRunner().invoke(main, args, input="\ufeff" + TEXT)  # as editors of Windows begin a file
    assert result.exit_code == 0, result.stderr
    found = json.loads((place / "stdin" / "comparison.json").read_text(encoding="utf-8"))
    context = Context.of(TEXT, byte_tokenizer(chat_template=CHATML), template=found["template"])
    assert found["text_tokens"] == len(context.ids)
    for word in (
        "teacher:",
        "no text",
        "first 12 tokens",
        "tokens/s",
        "2 questions that were not trained on",
    ):
        assert word in " ".join(result.stdout.split()), result.stdout


def test_estimate_of_rows_with_aims_has_the_teachers_logits() -> None:
    base, context = tiny_model("llama", vocab_size=5000), context_of(14)  # the head is the peak
    examples = with_aims(Passes.of(base, capacity=64, pad_token_id=0), rows_of(base), context.kv(base))
    empty, sizes = without_weights(base), PrefixConfig(length=4)
    plain = [Example(input_ids=e.input_ids, labels=e.labels, origin="", truncated=0) for e in examples]
    setups = [
        setup_of(TrainConfig(retain=0), sizes, rows, packing=True, dtype=torch.float32, device="cpu")
        for rows in (examples, plain)
    ]
    with_teacher, without = (measure_step(empty, setup) for setup in setups)
    assert with_teacher.logits > without.logits > 0


def test_speed_and_answers_are_of_the_model_with_its_prefix() -> None:
    tokenizer = byte_tokenizer()
    base = tiny_model("llama", vocab_size=len(tokenizer))
    loaded = LoadedBase(model=base, tokenizer=tokenizer, name="tiny", dtype_reason="")
    text, asked = [5, 6, 7, 8], [9, 10, 11]
    kv = PrefixKV.from_tokens(base, torch.tensor([text]))
    (found,) = greedy_answers(loaded, [asked], kv, max_new_tokens=5, batch_size=1, progress="answers")
    plain = base.generate(input_ids=torch.tensor([[*text, *asked]]), max_new_tokens=5, do_sample=False)
    assert found == tokenizer.decode(plain[0, 7:], skip_special_tokens=True)
    speeds = measure_speed(base, tokenizer, {"with": (asked, kv), "without": (asked, None)})
    assert all(one.first_token_seconds > 0 and one.tokens_per_second > 0 for one in speeds.values())


# --- what cannot be used -----------------------------------------------------------------------------------


def written(place: Path, name: str, content: str) -> Path:
    path = place / name
    path.write_text(content, encoding="utf-8")
    return path


WRONG: dict[str, tuple[Callable[[Path], list[Any]], str, int]] = {
    "no text": (lambda place: ["--text", place / "none.txt"], "none.txt: cannot be read", 1),
    "an empty text": (
        lambda place: ["--text", written(place, "e.txt", " \n")],
        "e.txt: the file is empty",
        1,
    ),
    "a text that is too long": (
        lambda place: ["--text", written(place, "long.txt", "diet " * 400)],
        "has 256 positions",
        1,
    ),
    "a text that leaves room for its answers but not for those whose speed is measured": (
        lambda place: ["--text", written(place, "long.txt", "diet " * 68)],
        "has 256 positions",
        1,
    ),
    "a long prefix": (
        lambda place: ["--length", 4000],
        "a prefix of 4000 was asked for hint: a prefix of",
        2,
    ),
    "a wrong length": (lambda place: ["--length", "long"], "length: expected auto, or a number", 2),
    "no question file": (lambda place: ["--questions", place / "no.jsonl"], "no.jsonl: no such file", 1),
    "an empty question file": (
        lambda place: ["--questions", written(place, "e.jsonl", "\n")],
        "e.jsonl: the file is empty",
        1,
    ),
    "rows without questions": (
        lambda place: ["--questions", written(place, "w.jsonl", '{"ask": "Why?"}\n')],
        "w.jsonl:1: no 'question' field; the row has ask hint: map it with --fields question=<column>",
        1,
    ),
    "an empty question": (
        lambda place: ["--questions", written(place, "b.jsonl", '{"question": " "}\n')],
        "b.jsonl:1: the field 'question' is empty",
        1,
    ),
    "too few questions": (
        lambda place: ["--questions", written(place, "f.txt", "Why?\nwhy?\nWhat?\n")],
        "expected 3 different questions or more",
        1,
    ),
    "both kinds of questions": (lambda place: ["--write-questions", 9], "--write-questions has no say", 2),
    "fields of lines": (
        lambda place: [
            "--questions",
            written(place, "q.txt", "Why?\nWhat?\nWho?\n"),
            "--fields",
            "question=a",
        ],
        "q.txt has lines, and no fields",
        2,
    ),
    "too few written": (lambda place: ["--set", "write_questions=2"], "leave one of them out", 2),
    "a template with two fields": (
        lambda place: ["--template", "{a} {b}: {c}"],
        "the template has the fields a, b before its target",
        2,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_input_that_cannot_be_used_is_told(place: Path, tmp_path: Path, what: str) -> None:
    more, message, code = WRONG[what]
    output = tmp_path / "run"
    stderr = fail(*options(place, output, *more(tmp_path)), code=code)
    assert message in stderr, stderr
    assert not output.exists()


def test_fields_without_questions_are_told(place: Path, tmp_path: Path) -> None:
    line = ("distill", "--model", place / "model", "--text", place / "text.txt", "--output", tmp_path / "run")
    assert "there are no --questions" in fail(*line, "--fields", "question=a", code=2)


def test_targets_of_a_teacher_are_not_smoothed(place: Path, tmp_path: Path) -> None:
    line = options(place, tmp_path / "run", "--label-smoothing-factor", 0.1)
    assert "No such option" in fail(*line, code=2)
    asked = {"model": str(place / "none"), "text": "x", "output": tmp_path / "run"}  # before any work
    with pytest.raises(ConfigError, match="label_smoothing_factor: a teacher's"):
        distill(**asked, config=TrainConfig(label_smoothing_factor=0.1))


def test_neither_text_nor_instruction_is_wrong_usage(place: Path, tmp_path: Path) -> None:
    stderr = fail("distill", "--model", place / "model", "--output", tmp_path / "run", code=2)
    assert "neither --text nor --instruction is given" in stderr
    stderr = fail("distill", "--model", "m", "--instruction", " ", "--output", tmp_path / "run")
    assert "the text is empty" in stderr


def test_questions_with_any_line_break_of_unicode_are_read_as_they_were_written(tmp_path: Path) -> None:
    said = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    ids: dict[str, Any] = {"teacher_ids": (1,), "student_ids": (2,), "answer_ids": (3,)}
    rows = [Answered(part=part, question=said, answer=said, **ids) for part in PARTS]
    (tmp_path / "questions.jsonl").write_text(as_text(rows), encoding="utf-8")
    assert read_answered(tmp_path) == rows


def test_run_with_another_text_or_damaged_questions_is_not_resumed(
    place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    more = ["--num-train-epochs", 12, "--save-steps", 3, "--resume"]
    other = written(tmp_path, "other.txt", "Another text.")
    assert "text_sha256" in fail(*options(place, done[0], *more, "--text", other))
    asked = place / "questions.jsonl"
    before = asked.read_text(encoding="utf-8")
    asked.write_text(before.replace("?", "!"), encoding="utf-8")
    assert "questions_sha256" in fail(*options(place, done[0], *more))
    asked.write_text(before, encoding="utf-8")
    run = cut(done[0], tmp_path / "cut", step=3)
    (run / "questions.jsonl").write_text("{}\n", encoding="utf-8")
    assert "questions.jsonl: missing or damaged" in fail(*options(place, run, *more))
