"""prefixtune export --to vllm: what is written is what was trained, and what cannot be exact is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from families import tiny_model
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.attachment import attach
from prefixtune.cli import main
from prefixtune.config import DataConfig
from prefixtune.data import build_prompts
from prefixtune.errors import ConfigError, ModelError
from prefixtune.generate import conversation_ids, prompt_row
from prefixtune.interop.names import default_name
from prefixtune.interop.vllm.chat import chat_arguments, server_template
from prefixtune.interop.vllm.reserved import Placeholder, reserve
from prefixtune.load import load_base
from prefixtune.prefix import LayerKV, Prefix, PrefixKV
from prefixtune.storage import load_prefix
from tokenizers_for_tests import CHATML, LLAMA2, THINKING, byte_tokenizer, metaspace_tokenizer

FORMAT = "Q: {question}\\nA: {reply}"


def louder(kv: PrefixKV) -> PrefixKV:
    return PrefixKV(tuple(LayerKV(layer.key * 3, layer.value * 3) for layer in kv.layers))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and a prefix for each template in its folder."""
    place = tmp_path_factory.mktemp("export")
    tokenizer = byte_tokenizer(chat_template=CHATML, bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    base = tiny_model("llama", vocab_size=len(tokenizer) + 8)
    base.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    base = load_base(str(place / "model"), dtype="float32", device="cpu").model
    for seed, (name, template) in enumerate(
        {
            "chat": "chat",
            "human": "human",
            "format": FORMAT,
            "several": "{a} {b} {c}",
            "silent": "chat",
        }.items()
    ):
        torch.manual_seed(seed)
        model = PrefixModel(base, PrefixConfig(length=4 + seed))
        kv = louder(model.prefix.bake())
        if name == "silent":  # what an engine gets that computes the placeholders, so that none could tell
            kv = PrefixKV.from_tokens(base, torch.full((1, model.prefix.config.length), len(tokenizer)))
        model.prefix = Prefix(model.prefix.config, model.geometry, kv)
        model.record["template"] = template
        model.save_pretrained(place / name)
    return place


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["export", "--to", "vllm", *map(str, args)])


def export(place: Path, output: Path, *names: str, code: int = 0) -> Result:
    result = run(*(place / name for name in names), "--output", output, "--dtype", "float32", "--json")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def output(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / "all"
    result = export(place, output, "chat", "human", "format", "several")
    assert "reserved token: <|prefixtune|> (id " in result.stderr
    told = json.loads(result.stdout)
    assert told["models"]["human"] == "model:human"
    assert told["without_chat"] == ["several"]
    return output


@pytest.mark.parametrize("name", ["chat", "human", "format", "several"])
def test_canary_is_what_the_toolkit_says_with_the_prefix_and_not_without(
    place: Path, output: Path, name: str
) -> None:
    canary = json.loads((output / "prefixes" / name / "vllm.json").read_text())["canary"]
    placeholder = json.loads((output / "export.json").read_text())["placeholder"]["id"]
    base = load_base(str(place / "model"), dtype="float32", device="cpu").model
    kv = load_prefix(place / name).kv
    prompt, count = canary["prompt"], len(canary["tokens"])

    def greedy(ids: list[int]) -> list[int]:
        base.generation_config.eos_token_id = None
        row = torch.tensor([ids])
        whole = base.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False
        )
        return whole[0, len(ids) :].tolist()

    assert count >= 3
    with attach(base, kv):
        assert greedy(prompt) == canary["tokens"]
    assert greedy(prompt) != canary["tokens"]
    assert greedy([placeholder] * kv.length + prompt) != canary["tokens"]


def test_exported_prefix_is_the_trained_one_and_loads_as_a_prefix_folder(place: Path, output: Path) -> None:
    for name in ("chat", "human"):
        assert load_prefix(output / "prefixes" / name).kv.digest == load_prefix(place / name).kv.digest


@pytest.mark.parametrize("name", ["chat", "human", "format"])
@pytest.mark.parametrize("text", ["Why?", " two\n lines ", "为什么？"])
def test_chat_is_the_placeholders_and_the_prompt_of_training(
    place: Path, output: Path, name: str, text: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    chat = json.loads((output / "prefixes" / name / "vllm.json").read_text())["chat"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        chat_template=(output / "chat_template.jinja").read_text(),
        add_generation_prompt=True,
        prefixtune_length=5,
        **{f"prefixtune_{key}": value for key, value in chat.items()},
    )["input_ids"]
    template = load_prefix(place / name).info["template"]
    trained = build_prompts([prompt_row(text, template)], tokenizer, DataConfig(template=template))[0]
    placeholder = json.loads((output / "export.json").read_text())["placeholder"]["id"]
    assert rendered == [placeholder] * 5 + list(trained.input_ids)


def test_chat_without_a_prefix_is_what_it_was(place: Path, output: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML, bos=True)
    expected = conversation_ids([("Who?", "You.")], "Why?", tokenizer, "chat")
    messages = [("user", "Who?"), ("assistant", "You."), ("user", "Why?")]
    found = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=(output / "chat_template.jinja").read_text(),
        add_generation_prompt=True,
    )["input_ids"]
    assert found == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA2, THINKING, "\n" + CHATML + "\n", None])
@pytest.mark.parametrize("form", ["chat", "human", "human-one-bos", FORMAT])
@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_chat_is_exact_or_not_offered(make: Any, form: str, template: str | None) -> None:
    tokenizer = make(chat_template=template)
    placeholder = reserve(tokenizer, vocabulary=9999, chosen=None)
    server = server_template(template, placeholder)
    found = chat_arguments(form, tokenizer, server=server, placeholder=placeholder)
    if make is byte_tokenizer and (form != "chat" or template in (CHATML, LLAMA2)):
        assert found is not None  # bytes know no words, so nothing depends on what stands before
    if form == "chat" and template is None:
        assert found is None


@pytest.mark.parametrize("named", [{"default": CHATML}, {"default": CHATML + "\n", "tool_use": THINKING}])
def test_of_several_templates_each_chat_gets_the_one_that_it_had(named: dict[str, str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = named
    placeholder = reserve(tokenizer, vocabulary=9999, chosen=None)
    server = server_template(named, placeholder)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    for tools in (None, [{"type": "function", "function": {"name": "look", "parameters": {}}}]):
        options: dict[str, Any] = {"tools": tools, "tokenize": False}
        expected = tokenizer.apply_chat_template(messages, **options)
        assert tokenizer.apply_chat_template(messages, chat_template=server, **options) == expected
    assert chat_arguments("chat", tokenizer, server=server, placeholder=placeholder) is not None


def test_several_templates_without_a_default_are_refused_by_their_names() -> None:
    tokenizer = byte_tokenizer()
    placeholder = reserve(tokenizer, vocabulary=9999, chosen=None)
    with pytest.raises(ModelError, match="rag, tool_use"):
        server_template({"rag": CHATML, "tool_use": CHATML}, placeholder)


def test_text_form_takes_one_message_of_the_user(output: Path) -> None:
    tokenizer = byte_tokenizer()
    chat = json.loads((output / "prefixes/human/vllm.json").read_text())["chat"]
    arguments = {f"prefixtune_{key}": value for key, value in chat.items()}
    template = (output / "chat_template.jinja").read_text()
    said = {"role": "user", "content": "x"}
    for messages in ([said, said], [{"role": "system", "content": "x"}]):
        with pytest.raises(Exception, match="send one message"):
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)


LOOPS = (  # as the one of Gemma 3 does
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for item in message['content'] %}{{ item['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("form", ["human", FORMAT])
def test_text_form_takes_a_text_in_parts_as_vllm_gives_it_for_some_templates(form: str) -> None:
    tokenizer = byte_tokenizer(chat_template=LOOPS)
    server = server_template(LOOPS, reserve(tokenizer, vocabulary=9999, chosen=None))
    placeholder = reserve(tokenizer, vocabulary=9999, chosen=None)
    found = chat_arguments(form, tokenizer, server=server, placeholder=placeholder)
    assert found is not None
    options: dict[str, Any] = {f"prefixtune_{key}": value for key, value in found.items()}
    options |= {"chat_template": server, "tokenize": False}

    def rendered(content: Any) -> Any:
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)

    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "it?"}]
    assert rendered(parts) == rendered("Where is\nit?")
    assert "Where is\nit?" in rendered(parts)
    with pytest.raises(Exception, match="send nothing else"):
        rendered([*parts, {"type": "image_url", "image_url": {"url": "x"}}])


# --- the reserved token


def test_reserved_token_is_new_where_the_model_has_room() -> None:
    tokenizer = byte_tokenizer()
    count = len(tokenizer)
    assert reserve(tokenizer, vocabulary=count + 1, chosen=None) == Placeholder(
        id=count, text="<|prefixtune|>"
    )
    assert reserve(tokenizer, vocabulary=count + 1, chosen=None).id == count  # again, and it is the same


def test_full_vocabulary_gives_a_token_that_is_called_reserved_or_a_choice() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match="all") as error:
        reserve(tokenizer, vocabulary=len(tokenizer), chosen=None)
    assert "--reserved-token '<|im_end|>'" in str(error.value)
    assert reserve(tokenizer, vocabulary=len(tokenizer), chosen="<|im_end|>").text == "<|im_end|>"


@pytest.mark.parametrize("spare", ["<|reserved_special_7|>", "<unused99>", "[unused1]", "<reserved_106>"])
def test_words_that_texts_have_are_never_reserved(spare: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Ġreserved", "reserved", "unused", "Ġ[unused", "<reserved"])  # a vocabulary's own
    with pytest.raises(ModelError, match="none is called reserved or unused"):
        reserve(tokenizer, vocabulary=len(tokenizer), chosen=None)
    tokenizer.add_tokens([spare])
    assert reserve(tokenizer, vocabulary=len(tokenizer), chosen=None).text == spare


@pytest.mark.parametrize("chosen", ["</s>", "<s>", "<nothing>", ""])
def test_token_that_is_needed_or_unknown_is_not_reserved(chosen: str) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="reserved token"):
        reserve(tokenizer, vocabulary=len(tokenizer) + 9, chosen=chosen)


@pytest.mark.parametrize("named", [False, True])
def test_token_that_the_chat_template_writes_is_neither_recommended_nor_reserved(named: bool) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|rare|>", "<|im_start|>", "<|im_end|>"]})
    if named:
        tokenizer.chat_template = {"default": LLAMA2, "tool_use": CHATML}
    for chosen in ("<|im_start|>", "<|im_end|>"):
        with pytest.raises(ConfigError, match="no text needs") as refused:
            reserve(tokenizer, vocabulary=len(tokenizer), chosen=chosen)
        assert "for example <|rare|>" in str(refused.value)
    with pytest.raises(ModelError, match=r"--reserved-token '<\|rare\|>'"):
        reserve(tokenizer, vocabulary=len(tokenizer), chosen=None)
    assert reserve(tokenizer, vocabulary=len(tokenizer), chosen="<|rare|>").text == "<|rare|>"


def test_where_no_token_is_left_to_recommend_none_is() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    with pytest.raises(ConfigError, match="hint: leave --reserved-token out"):
        reserve(tokenizer, vocabulary=len(tokenizer) + 9, chosen="<|im_start|>")


def test_chat_that_holds_the_placeholder_is_not_offered() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    placeholder = Placeholder(id=id, text="<|im_start|>")
    server = server_template(CHATML, placeholder)
    assert chat_arguments("chat", tokenizer, server=server, placeholder=placeholder) is None


# --- refusals


def test_prefix_that_cannot_be_told_from_its_absence_is_refused(place: Path, tmp_path: Path) -> None:
    result = export(place, tmp_path / "x", "silent", code=1)
    assert "silent" in result.stderr
    assert not (tmp_path / "x").exists()


def test_base_with_other_weights_is_refused(place: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", seed=1, vocab_size=len(byte_tokenizer()) + 8)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "other")
    result = run(place / "chat", "--model", tmp_path / "other", "--output", tmp_path / "x")
    assert (result.exit_code, "other weights" in result.stderr) == (1, True)


def test_damaged_prefix_is_refused(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "chat", tmp_path / "bad")
    file = tmp_path / "bad/prefix.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    result = run(tmp_path / "bad", "--output", tmp_path / "x")
    assert (result.exit_code, "checksum" in result.stderr) == (1, True)


def test_names_are_told_apart_and_fit_into_an_address(place: Path, tmp_path: Path) -> None:
    twice = run(place / "chat", f"chat={place / 'human'}", "--output", tmp_path / "x")
    assert (twice.exit_code, "two prefixes are called 'chat'" in twice.stderr) == (2, True)
    for name in ("a/b", "a:b", "..", "é"):
        wrong = run(f"{name}={place / 'chat'}", "--output", tmp_path / "x")
        assert (wrong.exit_code, "prefix name" in wrong.stderr) == (2, True)
    base = run(place / "chat", "--served-name", "org:mail", "--output", tmp_path / "x")
    assert (base.exit_code, "--served-name org-mail" in base.stderr) == (2, True)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "demo"),
        ("models/Qwen2.5-0.5B/", "Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("models/my model.Q4_0.gguf", "my-model.Q4_0"),
    ],
)
def test_base_is_called_by_the_last_part_of_where_it_came_from(source: str, name: str) -> None:
    assert default_name(source) == name


def test_another_export_adds_prefixes_and_one_of_something_else_is_refused(
    place: Path, tmp_path: Path
) -> None:
    export(place, tmp_path / "x", "chat")
    export(place, tmp_path / "x", "human")
    assert sorted(os.listdir(tmp_path / "x/prefixes")) == ["chat", "human"]
    other = run(place / "chat", "--output", tmp_path / "x", "--dtype", "float32", "--served-name", "another")
    assert (other.exit_code, "another base" in other.stderr) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    full = run(place / "chat", "--output", tmp_path / "full")
    assert (full.exit_code, "not empty" in full.stderr) == (2, True)


def test_script_names_what_was_exported_wherever_it_lies(output: Path, place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a place with 'quotes'"
    os.symlink(output, moved)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$VLLM_HTTP_TIMEOUT_KEEP_ALIVE" "$@"; do echo "$word"; done\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    said = subprocess.run(
        [moved / "serve.sh", "--port", "1"], env=environment, capture_output=True, text=True, check=True
    )
    seconds, *words = said.stdout.splitlines()
    assert int(seconds) > 5  # what httpx keeps an idle connection for
    assert words[words.index("--model") + 1] == str(place / "model")
    assert words[words.index("--tokenizer") + 1] == str(moved / "tokenizer")
    assert words[words.index("--kv-transfer-config.kv_connector_extra_config.export") + 1] == str(moved)
    assert words[words.index("--middleware") + 1] == "prefixtune_vllm.PrefixMiddleware"
    assert words[-2:] == ["--port", "1"]
