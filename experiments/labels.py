"""E2E turned round: a text is the input, one of its facts the target. For experiments/labels.toml.

python experiments/labels.py ../shared/data/e2e/trainset.csv runs/data/rating_train.jsonl "customer rating"
"""

import csv
import json
import random
import sys
from pathlib import Path


def main(source: str, target: str, fact: str) -> None:
    with open(source, encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    random.Random(7).shuffle(rows)
    first = {row["mr"]: row["ref"] for row in reversed(rows)}  # one text for each set of facts
    lines = []
    for facts in dict.fromkeys(row["mr"] for row in rows):
        found = dict(part.strip()[:-1].split("[") for part in facts.split(","))
        lines.append(json.dumps({"input": first[facts], "output": found.get(fact, "none")}) + "\n")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
