"""Laws of generate: an answer depends on its prompt alone, not on neighbours, nor on the model's habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import tiny_model
from operations import Operations
from prefixtune import PrefixConfig, PrefixModel
from prefixtune.attachment import empty_rows, row_runner
from prefixtune.compare.peers import peer_model
from prefixtune.compare.settings import PeerConfig
from prefixtune.config import DataConfig
from prefixtune.data import Row, build_examples, build_prompts
from prefixtune.errors import ConfigError, DataError
from prefixtune.generate import conversation_ids, ending, generate_batch, prompt_row, without_target
from tokenizers_for_tests import CHATML, CHATML_MARKED, OPEN_ENDED, THINKING, byte_tokenizer

ROLES = ("user", "assistant")
TEXTS = ["Human: yes", "the colours are red, blue and yellow, system user", "a", "Answer the Question"]


def tokenizer_with_padding(**options: Any) -> Any:
    tokenizer = byte_tokenizer(**options)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZER = tokenizer_with_padding()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in TEXTS]


def bare() -> Any:
    return tiny_model("llama", vocab_size=len(TOKENIZER))


def prefixed() -> Any:
    torch.manual_seed(0)
    return PrefixModel(bare(), PrefixConfig(length=4))


@pytest.mark.parametrize("make", [bare, prefixed])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answer_in_a_batch_is_the_answer_alone_in_the_prompts_order(make: Any, batch_size: int) -> None:
    model = make()
    together = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=7, batch_size=batch_size)
    alone = [
        TOKENIZER.decode(
            model.generate(input_ids=torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :],
            skip_special_tokens=True,
        )
        for ids in PROMPTS
    ]
    assert together == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("of", "family"),
    [("prompt-tuning", "llama"), ("prompt-tuning", "gpt2"), ("p-tuning", "llama"), ("peft-prefix", "gemma3")],
)
def test_answer_after_pefts_virtual_tokens_in_a_batch_is_that_of_forward_passes_alone(
    of: str, family: str
) -> None:
    torch.manual_seed(0)
    base = tiny_model(family, vocab_size=len(TOKENIZER))
    model = peer_model(of, base, PeerConfig(), length=5, start=range(10, 15)).eval()
    ends, generator = set(ending(model, TOKENIZER)["eos_token_id"]), torch.Generator().manual_seed(0)
    lengths = (9, 11, 12, 3, 20, 15, 7, 18)
    prompts = [torch.randint(5, len(TOKENIZER), (n,), generator=generator).tolist() for n in lengths]
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] not in ends:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate_batch(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=16) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_head_of_a_frozen_base_is_multiplied_once_for_all_rows(family: str, rows: int) -> None:
    """PyTorch copies its weight for each row in a bmm, which costs a prompt in bfloat16 seconds."""
    base = tiny_model(family)
    width = base.config.vocab_size
    prefix = PrefixModel(base, PrefixConfig(length=4))
    batch = {"input_ids": torch.ones(rows, 5, dtype=torch.long)}
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    served = tiny_model(family)  # frozen as well, and without a PrefixModel
    run, joined = row_runner(served), empty_rows(served)
    for _ in range(rows):
        joined.join(joined.fresh([prefix.prefix.bake()]))
    with Operations(width) as seen:
        prefix.generate(**batch, **settings)
        base.generate(**batch, **settings)  # bare: frozen all the same
        run(joined, batch["input_ids"])
    assert "aten::mm" in seen.names
    assert "aten::bmm" not in seen.names


def test_prefix_changes_the_answers() -> None:
    answers = [generate_batch(make(), TOKENIZER, PROMPTS, max_new_tokens=7) for make in (bare, prefixed)]
    assert answers[0] != answers[1]


def test_answer_ends_before_the_end_token_of_the_tokenizer_or_the_model() -> None:
    model = bare()
    ids = model.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=7, do_sample=False)[0]
    new = ids[len(PROMPTS[0]) :].tolist()
    before = TOKENIZER.decode(new[: new.index(new[4])], skip_special_tokens=True)
    model.generation_config.eos_token_id = [new[4]]
    assert generate_batch(model, TOKENIZER, PROMPTS[:1], max_new_tokens=7) == [before]
    own = tokenizer_with_padding(eos=TOKENIZER.convert_ids_to_tokens(new[4]))
    assert generate_batch(bare(), own, PROMPTS[:1], max_new_tokens=7) == [before]


def test_greedy_is_greedy_whatever_the_models_generation_config_says() -> None:
    model = bare()
    plain = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=7)
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.9, top_k=40, num_beams=3)
    model.generation_config.update(repetition_penalty=1.5, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7])
    assert generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=7) == plain


@pytest.mark.parametrize(
    ("template", "closing"),
    [(CHATML, "<|im_end|>"), (CHATML_MARKED, "<|im_end|>"), (THINKING, "<|im_end|>"), (OPEN_ENDED, None)],
)
def test_answer_ends_where_the_chat_template_closes_a_turn(template: str, closing: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    ends = {tokenizer.eos_token, *([closing] if closing else [])}
    found = ending(bare(), tokenizer, "chat")["eos_token_id"]
    assert set(tokenizer.convert_ids_to_tokens(found)) == ends
    assert ending(bare(), tokenizer)["eos_token_id"] == [tokenizer.eos_token_id]  # of a plain text


def test_padding_token_that_the_model_has_no_embedding_for_is_not_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = bare()
    assert tokenizer.pad_token_id == model.config.vocab_size
    expected = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=7)
    assert generate_batch(model, tokenizer, PROMPTS, max_new_tokens=7) == expected


def test_seed_repeats_a_sample_and_leaves_torchs_random_state() -> None:
    def sample(seed: int) -> list[str]:
        return generate_batch(bare(), TOKENIZER, PROMPTS, max_new_tokens=7, temperature=1.0, seed=seed)

    model = bare()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=7, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_from_a_tiny_share_is_greedy() -> None:
    greedy = generate_batch(bare(), TOKENIZER, PROMPTS, max_new_tokens=7)
    assert generate_batch(bare(), TOKENIZER, PROMPTS, max_new_tokens=7, temperature=1, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate_batch(bare(), TOKENIZER, PROMPTS, **({"max_new_tokens": 3} | wrong))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate_batch(bare(), TOKENIZER, [[5], []], max_new_tokens=3)


@pytest.mark.parametrize(("make_prefix", "room"), [(False, 128), (True, 124)])
def test_model_with_learnt_positions_is_not_asked_beyond_the_last(make_prefix: bool, room: int) -> None:
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER))
    model = PrefixModel(model, PrefixConfig(length=4)) if make_prefix else model
    prompt = [5] * 100
    generate_batch(model, TOKENIZER, [prompt], max_new_tokens=room - 100)
    with pytest.raises(DataError, match="128 positions of gpt2"):
        generate_batch(model, TOKENIZER, [prompt], max_new_tokens=room - 99)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("human", {"instruction": "Why?", "output": "So."}),
        ("human-one-bos", {"instruction": "Why?", "output": "So."}),
        ("chat", {"instruction": "Why?", "output": "So."}),
        ("Q: {question}\\nA: {reply}", {"question": "Why?", "reply": "So."}),
        ("{instruction}|{input}|{output}", {"instruction": "Why?", "input": "", "output": "So."}),
    ],
)
def test_prompt_of_a_text_is_the_prompt_of_a_row_that_asks_it(template: str, row: dict[str, str]) -> None:
    tokenizer = tokenizer_with_padding(chat_template=CHATML)
    config = DataConfig(template=template)
    target = "reply" if "reply" in row else "output"
    asked = Row(values={key: value for key, value in row.items() if key != target}, origin="r")
    rows = [Row(values=row, origin="r"), prompt_row("Why?", template), *without_target([asked], template)]
    answered, typed, read = build_prompts(rows, tokenizer, config)
    assert answered.input_ids == typed.input_ids == read.input_ids
    assert answered.text == typed.text == read.text


@pytest.mark.parametrize("before", [[], [("Who?", "You.")]])
def test_chat_that_ends_with_the_user_is_asked_for_the_answer(before: list[tuple[str, str]]) -> None:
    tokenizer = tokenizer_with_padding(chat_template=CHATML)
    said = [
        {"role": role, "content": text} for turn in before for role, text in zip(ROLES, turn, strict=True)
    ]
    asked = [*said, {"role": "user", "content": "Why?"}]
    rows = [
        Row(values={"messages": asked}, origin="r"),
        Row(values={"messages": [*asked, {"role": "assistant", "content": "So."}]}, origin="r"),
    ]
    prompts = build_prompts(without_target(rows, "chat"), tokenizer, DataConfig(template="chat"))
    expected = conversation_ids(before, "Why?", tokenizer, "chat")
    assert [list(prompt.input_ids) for prompt in prompts] == [expected, expected]


def test_one_text_does_not_fill_a_format_of_several_fields() -> None:
    with pytest.raises(ConfigError, match="question, context"):
        prompt_row("Why?", "{question} {context} {reply}")


@pytest.mark.parametrize("template", ["human", "human-one-bos", "Q: {question}\\nA: {reply}"])
@pytest.mark.parametrize("around", ["<s> $A", "</s> $A", "<s> $A </s>", "$A"])
def test_conversation_is_its_rows_as_in_training_and_begins_once(template: str, around: str) -> None:
    tokenizer = tokenizer_with_padding(around=around)
    fields = ("question", "reply") if "{" in template else ("instruction", "output")
    turns = [("Who?", "You."), ("Where?", "There.")]
    rows = [Row(values=dict(zip(fields, turn, strict=True)), origin="r") for turn in turns]
    trained, _ = build_examples(rows, tokenizer, DataConfig(template=template))
    prompt = build_prompts([prompt_row("Why?", template)], tokenizer, DataConfig(template=template))[0]
    start = 0 if around.startswith("$A") else 1
    expected = [*trained[0].input_ids, *trained[1].input_ids[start:], *prompt.input_ids[start:]]
    assert conversation_ids(turns, "Why?", tokenizer, template) == expected


def test_conversation_by_chat_template_is_what_the_template_renders() -> None:
    tokenizer = tokenizer_with_padding(chat_template=CHATML)
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "You."},
        {"role": "user", "content": "Why?"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert conversation_ids([("Who?", "You.")], "Why?", tokenizer, "chat") == expected


def test_tokens_are_read_once_though_the_configuration_says_otherwise() -> None:
    base = tiny_model("mpt", vocab_size=len(TOKENIZER))
    base.generation_config.use_cache = False  # as MPT's configuration has it
    generate_batch(base, TOKENIZER, PROMPTS[:1], max_new_tokens=1)  # looks at the model, once
    read: list[int] = []
    base.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    generate_batch(base, TOKENIZER, PROMPTS[:1], max_new_tokens=4)
    assert read == [len(PROMPTS[0]), 1, 1, 1]
