"""Continues token ids with text, in batches. Knows no files, no metrics and no conversation.

Axes: B batch, T the longest prompt's tokens, N new tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from string import Formatter
from typing import Any

import torch
from transformers import GenerationConfig

from prefixtune.attachment import position_limit
from prefixtune.config import DataConfig
from prefixtune.data import Row, added_tokens, answer_text, build_examples, build_prompts
from prefixtune.errors import ConfigError, DataError, PrefixTuneError
from prefixtune.geometry import Geometry, quiet_eval, text_config
from prefixtune.progress import progress_bar
from prefixtune.rotary import alike, settle, virtual_tokens

__all__ = [
    "check_ids",
    "check_positions",
    "conversation_ids",
    "ending",
    "generate_batch",
    "generate_ids",
    "prompt_row",
    "sampling",
    "seeded",
    "with_target",
    "without_target",
]

PLAIN = {  # a model's generation config may have any of these
    name: value
    for name, value in {
        "use_cache": True,  # MPT's configuration leaves it off
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "min_length": 0,
        "min_new_tokens": None,
        "min_p": None,
        "typical_p": 1.0,
        "top_h": None,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "bad_words_ids": None,
        "sequence_bias": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "exponential_decay_length_penalty": None,
        "guidance_scale": None,
        "penalty_alpha": None,
        "stop_strings": None,
        "max_time": None,
    }.items()
    if hasattr(GenerationConfig(), name)  # not all are known to each version of transformers
}
PLACEHOLDER = "…"  # stands where a row has no target yet; a prompt ends before it


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    template: str | None = None,
    leads: Sequence[str] = (),
    dropped: frozenset[int] | None = None,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    progress: str | None = None,
) -> list[str]:
    """Continue each prompt until its end token, or for `max_new_tokens` tokens.

    Args:
        model: a PrefixModel, or a bare base model.
        prompts: token ids; no prompt may be empty.
        template: what made them: an answer to a chat ends where the chat template closes a turn.
        leads: of each prompt what stands before its answer (`Prompt.lead`), and is left out where it does.
        dropped: special tokens that are left out (`prefixtune.data.special_beside`); all unless given.
        temperature: 0 takes the most probable token, more samples from a flatter distribution.
        top_p: sample from the most probable tokens that share this much probability (Holtzman et al. 2020).
        seed: makes sampling repeatable; torch's own random state is left as it was.
        progress: what a bar on stderr says; no bar unless given.

    Returns:
        The new text for each prompt, in the order of the prompts, without special tokens.
    """
    settings = sampling(temperature=temperature, top_p=top_p)
    with seeded(seed):
        rows = generate_ids(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            settings=settings,
            template=template,
            progress=progress,
        )
    pairs = zip(rows, leads or [""] * len(rows), strict=True)
    return [answer_text(row, tokenizer, lead=lead, dropped=dropped) for row, lead in pairs]


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    settings: Mapping[str, Any],
    template: str | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """`generate_batch` with options of `model.generate`: each prompt's new ids before its end token."""
    _check(prompts, max_new_tokens=max_new_tokens)
    check_ids(model, prompts)
    check_positions(model, max(map(len, prompts), default=0) + max_new_tokens)
    settings = {**settings, **ending(model, tokenizer, template), "max_new_tokens": max_new_tokens}
    ends = set(settings["eos_token_id"] or ())
    answers: list[list[int]] = [[] for _ in prompts]
    with quiet_eval(model), progress_bar(progress, total=len(prompts)) as advance:
        for rows in _batches(model, prompts, batch_size, new=max_new_tokens):
            settle(model)
            batch = _left_padded([prompts[row] for row in rows], settings["pad_token_id"], model.device)
            with torch.no_grad():
                whole = model.generate(**batch, **settings)  # [B, T+N]
            new = whole[:, batch["input_ids"].shape[1] :]  # [B, N]
            for row, ids in zip(rows, new.tolist(), strict=True):
                answers[row] = list(takewhile(lambda token: token not in ends, ids))
            advance(len(rows))
    return answers


def sampling(*, temperature: float, top_p: float) -> dict[str, Any]:
    """Options of `model.generate`: greedy at temperature 0; else exactly what was asked. Penalties, beams and
    the like of the model's own generation config are switched off: `serve` has none of them either."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature: expected 0 or more; got {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected a share above 0, up to 1; got {top_p}")
    if temperature == 0:
        return {**PLAIN, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {**PLAIN, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def ending(model: Any, tokenizer: Any, template: str | None = None) -> dict[str, Any]:
    """Options of `model.generate`: the end tokens of the model, of the tokenizer and, where the prompts are
    chats, of the chat template's turns, and a padding token that has an embedding."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    known = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    known |= {_turn_end(tokenizer)} if template == "chat" else set()
    ids = sorted(token for token in known if token is not None)
    embedded = model.get_input_embeddings().weight.shape[0]  # a [PAD] may be in the tokenizer alone
    usable = (token for token in (tokenizer.pad_token_id, *ids) if token is not None and token < embedded)
    return {"eos_token_id": ids or None, "pad_token_id": next(usable, 0)}


def _turn_end(tokenizer: Any) -> int | None:
    """What a chat's target ends with: tokenizers of base models often have another token as their EOS."""
    row = Row(values={"messages": _messages("a", "b")}, origin="probe")
    try:
        (example,), _ = build_examples([row], tokenizer, DataConfig(template="chat", max_length=sys.maxsize))
    except PrefixTuneError:  # such a template trains no rows, so there is no turn to end
        return None
    added = {token for token, told in tokenizer.added_tokens_decoder.items() if told.special}
    special = added.union(tokenizer.all_special_ids)
    return next((token for token in reversed(example.labels) if token in special), None)


def check_positions(model: Any, tokens: int, *, origin: str | None = None) -> None:
    """Refuse rows of so many tokens where the model has no position for the last of them.

    Args:
        origin: of the row, for the error.

    Raises:
        DataError: a model with learnt positions would fail in the middle, on a GPU beyond repair; behind a
            prefix the same holds where the rotary embedding changes.
    """
    from prefixtune.model import PrefixModel

    is_prefixed = isinstance(model, PrefixModel)
    bare = model.base_model if is_prefixed else model
    geometry = Geometry.probe(bare.get_base_model() if hasattr(bare, "get_base_model") else bare)
    limit = geometry.learned_positions
    if is_prefixed:
        limit = position_limit(text_config(bare), geometry)
    if limit is None:
        return
    with torch.no_grad():
        taken = model.prefix.bake().layers[0].key.shape[1] if is_prefixed else virtual_tokens(model)
    if taken + tokens > limit:
        where = (
            "positions of" if limit == geometry.max_positions else "positions that a prefix is exact in with"
        )
        raise DataError(
            f"{f'{origin}: ' if origin else ''}{tokens} tokens"
            f"{f' after a prefix of {taken}' if taken else ''} do not fit into the {limit} {where} "
            f"{geometry.model_type}",
            hint="shorten the rows with --max-length, or the answers with --max-new-tokens",
        )


def check_ids(model: Any, rows: Iterable[Sequence[int]]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: the tokenizer belongs to another model.
    """
    known = model.get_input_embeddings().weight.shape[0]
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= known:
        raise DataError(
            f"token id {largest} is beyond the model's vocabulary of {known}",
            hint="the tokenizer belongs to another model, or has tokens that were added to it alone",
        )


def prompt_row(text: str, template: str | None, *, origin: str = "prompt") -> Row:
    """A row that asks `text`: the instruction of the human and chat templates, or a format's only field.

    Raises:
        ConfigError: the format has several fields before its target, so that one text does not fill it.
    """
    target = _target_field(template)
    if template is None or "{" not in template:
        return Row(values={"instruction": text, target: PLACEHOLDER}, origin=origin)
    fields = [name for name in _format_fields(template) if name != target]
    if "instruction" in fields and set(fields) <= {"instruction", "input"}:
        values = {"instruction": text, "input": ""}
    elif len(fields) == 1:
        values = {fields[0]: text}
    else:
        raise ConfigError(
            f"the template has the fields {', '.join(fields) or 'none'} before its target, but one text came",
            hint="give the rows as a file with these columns: --data",
        )
    return Row(values={**values, target: PLACEHOLDER}, origin=origin)


def without_target(rows: Sequence[Row], template: str | None) -> list[Row]:
    """The rows for prompting: a placeholder, which no prompt holds, for the target; a chat is asked for what
    the assistant says last, or after the user's last turn."""
    target = _target_field(template)
    filled = []
    for row in rows:
        turns = row.values.get("messages") if template == "chat" else None
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            said = turns[:-1] if turns[-1].get("role") == "assistant" else turns
            values = {**row.values, "messages": [*said, {"role": "assistant", "content": PLACEHOLDER}]}
        else:
            values = {**row.values, target: PLACEHOLDER}
        filled.append(Row(values=values, origin=row.origin))
    return filled


def with_target(row: Row, text: str, template: str | None) -> Row:
    """The row with `text` for its target: in a chat, for what the assistant says last."""
    target = _target_field(template)
    messages = row.values.get("messages") if template == "chat" else None
    if not isinstance(messages, list):
        return Row(values={**row.values, target: text}, origin=row.origin)
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in messages]
    said = [index for index, role in enumerate(roles) if role == "assistant"]
    if not said:
        raise DataError(f"{row.origin}: field 'messages': the assistant says nothing, so nothing is wanted")
    asked = [*messages[: said[-1]], {**messages[said[-1]], "content": text}]
    return Row(values={**row.values, "messages": asked}, origin=row.origin)


def conversation_ids(
    turns: Sequence[tuple[str, str]], text: str, tokenizer: Any, template: str | None
) -> list[int]:
    """Token ids of a conversation up to the answer to `text`.

    Args:
        turns: what was said before, as (question, answer), neither of them empty.
        template: where it has no turns (all but chat), rows are written one after another, each as it is in
            training, with its end token.
    """
    config = DataConfig(template=template, max_length=sys.maxsize)
    if template == "chat":
        said = [message for turn in [*turns, (text, PLACEHOLDER)] for message in _messages(*turn)]
        rows = [Row(values={"messages": said}, origin="conversation")]
        return list(build_prompts(rows, tokenizer, config)[0].input_ids)
    target = _target_field(template)
    ids: list[int] = []
    for question, answer in turns:
        row = prompt_row(question, template, origin="conversation")
        row = Row(values={**row.values, target: answer}, origin=row.origin)
        examples, _ = build_examples([row], tokenizer, config)
        ids += _without_start(examples[0].input_ids, tokenizer, is_first=not ids)
    prompt = build_prompts([prompt_row(text, template, origin="conversation")], tokenizer, config)[0]
    return [*ids, *_without_start(prompt.input_ids, tokenizer, is_first=not ids)]


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _without_start(ids: Sequence[int], tokenizer: Any, *, is_first: bool) -> Sequence[int]:
    """A conversation begins once, so only its first row keeps what begins each text."""
    start, _ = added_tokens(tokenizer)
    return ids[len(start) :] if not is_first and list(ids[: len(start)]) == start else ids


def _target_field(template: str | None) -> str:
    fields = _format_fields(template) if template and "{" in template else ["output"]
    return fields[-1] if fields else "output"


def _format_fields(template: str) -> list[str]:
    try:
        return [name.strip() for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"template: {error}, in {template!r}") from None


def _check(prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> None:
    if max_new_tokens <= 0:
        raise ConfigError(f"max_new_tokens: expected more than 0; got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {row} is empty: there is no token to continue")


def _batches(model: Any, prompts: Sequence[Sequence[int]], size: int, *, new: int) -> Iterator[list[int]]:
    """Rows of similar length together: less padding; the longest first, so a batch too large fails at once.

    Of one length where PEFT puts virtual tokens before them: it drops the positions, so that padding between
    virtual tokens and text would take some. So also where a row's rotary embedding changes as it grows.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    if virtual_tokens(model):
        sets = [list(rows) for _, rows in groupby(order, key=lambda row: len(prompts[row]))]
    else:
        places = alike(model, [len(prompts[row]) for row in order], new=new)
        sets = [[order[place] for place in some] for some in places]
    for rows in sets:
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> Mapping[str, torch.Tensor]:
    """input_ids and attention_mask [B, T]: new tokens follow the last one, so the padding goes before."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
    }


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
