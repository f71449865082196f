"""Questions about a text: from a file, or written by the model itself. Knows no teacher and no training.

What is asked decides what the prefix learns of the text, so written questions go through all of it: each is
about one piece (Eyuboglu et al. 2025, Cartridges, section 4: self-study on chunks with several seed prompts).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.config import DataConfig
from prefixtune.data import build_prompts, load_rows, parse_fields
from prefixtune.data.files import read_text
from prefixtune.data.row import required_text
from prefixtune.errors import DataError
from prefixtune.generate import generate_ids, prompt_row, sampling, seeded
from prefixtune.progress import note

__all__ = ["Question", "read_questions", "split", "write_questions"]

PIECE = 192  # tokens of the text that a written question is about
TEMPERATURE, TOP_P, TOKENS = 0.8, 0.95, 48  # of a written question
ROUNDS = 4  # of writing, where questions come out empty or twice
FEWEST = 3  # one to train on, one to watch the training, one to compare

OPENINGS = (  # the first words of a question: without them a small model writes anything but questions
    *(
        "What",
        "How",
        "Which",
        "How many",
        "Why",
        "When",
        "Is",
        "Where",
        "Can I",
        "How long",
        "What happens if",
    ),
    *("Who", "Does", "List", "Explain", "Summarise"),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and where it comes from."""

    text: str
    origin: str


def read_questions(source: str, *, fields: str | None = None) -> list[Question]:
    """The questions of a file: a line each in a .txt, else the field `question` of each row.

    Args:
        source: a .txt file, or what `prefixtune.data.load_rows` reads.
        fields: "question=COLUMN" where the field has another name.

    Raises:
        DataError: the file cannot be read, a row has no question, or an empty one.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt":
        lines = enumerate(read_text(path).split("\n"), start=1)  # others stand within a line
        return [Question(text=line.strip(), origin=f"{path.name}:{n}") for n, line in lines if line.strip()]
    found = []
    for row in load_rows(source, fields=parse_fields(fields)):
        text = required_text(row, "question").strip()
        if not text:
            raise DataError(
                f"{row.origin}: the field 'question' is empty", hint="fill it in, or remove the row"
            )
        found.append(Question(text=text, origin=row.origin))
    return found


def write_questions(
    base: Any, tokenizer: Any, text: str, *, count: int, chat: bool, batch_size: int, seed: int
) -> list[Question]:
    """Different questions about pieces of the text, sampled from the model.

    A chat model is asked for one in its template, any other model goes on with a list of questions after the
    piece. Both find the first word of the question written already, another one each time.

    Args:
        chat: use the tokenizer's chat template.

    Raises:
        DataError: the model writes hardly any.
    """
    pieces = _pieces(text, tokenizer)
    found: dict[str, Question] = {}
    settings = sampling(temperature=TEMPERATURE, top_p=TOP_P)
    asked = 0
    with seeded(seed):
        for _ in range(ROUNDS):
            places = range(asked, asked + count - len(found))
            asked += len(places)
            prompts, openings = zip(*(_prompt(pieces, n, tokenizer, chat=chat) for n in places), strict=True)
            answers = generate_ids(
                base,
                tokenizer,
                prompts,
                max_new_tokens=TOKENS,
                batch_size=batch_size,
                settings=settings,
                template="chat" if chat else None,
                progress="writing questions",
            )
            for opening, ids in zip(openings, answers, strict=True):
                written = _first_question(opening + tokenizer.decode(ids, skip_special_tokens=True))
                if written is not None:
                    found.setdefault(
                        written.casefold(), Question(text=written, origin=f"written {len(found)}")
                    )
            if len(found) >= count:
                break
    if len(found) < FEWEST:
        raise DataError(
            f"the model wrote {len(found)} different questions when it was asked {asked} times",
            hint="give questions of your own with --questions",
        )
    note(f"the model wrote {len(found)} different questions in {asked} tries")
    return list(found.values())


def split(questions: Sequence[Question], *, heldout: int, seed: int) -> dict[str, list[Question]]:
    """Questions for "train", "watch" (evaluation in the course of the training) and "heldout" (comparison).

    The same question is in one of them only. `heldout` is the size of the last two together, a quarter of all
    questions at most.

    Raises:
        DataError: there are fewer than three different questions.
    """
    different = list({question.text.casefold(): question for question in questions}.values())
    if len(different) < FEWEST:
        raise DataError(
            f"expected {FEWEST} different questions or more, to train on, watch the training and compare; "
            f"got {len(different)}",
            hint="add questions, or leave --questions out: the model then writes some",
        )
    if len(different) < len(questions):
        note(f"{len(questions) - len(different)} questions came twice, and are asked once")
    random.Random(seed).shuffle(different)
    apart = max(2, min(heldout, len(different) // 4))
    half = apart // 2
    return {"heldout": different[:half], "watch": different[half:apart], "train": different[apart:]}


def _pieces(text: str, tokenizer: Any) -> list[str]:
    """The text in pieces of about PIECE tokens, equally long."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    number = max(1, -(-len(ids) // PIECE))
    size = -(-len(ids) // number)
    return [tokenizer.decode(ids[first : first + size]).strip() for first in range(0, len(ids), size)]


def _prompt(pieces: Sequence[str], number: int, tokenizer: Any, *, chat: bool) -> tuple[list[int], str]:
    """Ids that the `number`-th question is to follow, and the words that it begins with."""
    turn, place = divmod(number, len(pieces))
    opening = OPENINGS[turn % len(OPENINGS)]
    if chat:
        asked, begun = f"{pieces[place]}\n\nWrite one question that this text answers.", opening
    else:
        asked, begun = f"{pieces[place]}\n\nQuestions about this text:\n\n1. {opening}", ""
    template = "chat" if chat else "{input}{output}"
    rows = [prompt_row(asked, template, origin="piece of the text")]
    ids = build_prompts(rows, tokenizer, DataConfig(template=template))[0].input_ids
    return [*ids, *tokenizer(begun, add_special_tokens=False)["input_ids"]], opening


def _first_question(written: str) -> str | None:
    """The first line, up to its question mark, without numbering and quotes; None where little is left."""
    line = next((line.strip() for line in written.splitlines() if line.strip()), "")
    line = re.sub(
        r"^(?:(?:question|instruction|q)\s*\d*\s*[:.]|\d+[.)]|[-*])\s*", "", line, flags=re.IGNORECASE
    )
    ended = re.match(r".*?[?？]", line)
    line = (ended.group() if ended else line).strip("\"'“”*` ")
    return line if len(line) > FEWEST else None
