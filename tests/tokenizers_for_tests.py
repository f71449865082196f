"""Small real tokenizers, built here: byte-level, sentencepiece-like and slow. No downloads."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

# enough text for merges over spaces, words and Chinese characters
_CORPUS = [
    "Human: Give three tips for staying healthy.\n\nAssistant: Eat a balanced diet and sleep enough.",
    "the colours are red, blue and yellow\nsystem user assistant Question Answer",
    "什么是三原色？三原色是红、蓝、黄。写一个故事。",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (  # no generation prompt; a space before what the assistant says
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' </s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

HEADED = (  # role headers, but no generation prompt
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '</s>\n' }}{% endfor %}"
)

THINKING = (  # as Qwen3's: the last answer is rendered with an empty thought, the earlier ones without
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHANNELLED = (  # as gpt-oss's: special tokens, and a word between them, stand before an answer
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{{ '<|im_start|>final' if message['role'] == 'assistant' }}"
    "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)

OPEN_ENDED = (  # nothing but a line break ends a turn
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

_SAID = (  # a call is {name, arguments}, or has that as its function
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{% if call.function %}{% set call = call.function %}{% endif %}"
    "{{ '<call>' + call.name + ' ' + call.arguments | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>' }}"
)

TOOLS = (  # as Qwen2.5's: tools in a system turn, calls in the assistant's
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _SAID
    + "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TOOLS_MARKED = TOOLS.replace(
    _SAID,
    "{% if message['role'] == 'assistant' %}{% generation %}"
    + _SAID
    + "{% endgeneration %}{% else %}"
    + _SAID
    + "{% endif %}",
)


@cache
def _byte_level(trim_offsets: bool, bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer.to_str()


def byte_tokenizer(
    *,
    bos: bool = False,
    chat_template: str | None = None,
    trim_offsets: bool = False,
    eos: str | None = "</s>",
    around: str | None = None,
) -> Any:
    """Byte-level BPE, as GPT-2 and BLOOM have it: a Chinese character is up to three tokens.

    `around` is what it makes of each text $A, such as "<s> $A </s>".
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(trim_offsets, bos)), bos_token="<s>", eos_token=eos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    if around:
        specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around, pair=f"{around} $B", special_tokens=specials
        )
    return tokenizer


@cache
def _metaspace() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *SPECIALS, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS[1], _CORPUS[0]], trainer)
    return tokenizer.to_str()


def metaspace_tokenizer(*, chat_template: str | None = None) -> Any:
    """Spaces as part of the next token and bytes for unknown characters, as Llama 2 has it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_metaspace()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def slow_tokenizer(*, chat_template: str | None = None) -> Any:
    """A tokenizer in Python, without offsets; it adds its EOS to every text unless told not to."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = chat_template
    return tokenizer
