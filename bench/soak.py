"""A server under everything at once: mixed prefixes, clients that leave, bad requests, prefixes that change.

Run: python bench/soak.py [--minutes 5] [--model demo] [--clients 12]
While the clients ask, prefixes `c0`, `c1`, … are replaced by other content, and `s0`, `s1`, … are damaged,
taken away and restored. Each complete greedy answer must be that of transformers.generate for the content
that its system_fingerprint names; each bad request must get its status; a prefix that is not damaged must
always answer; what schemathesis makes up from the OpenAPI of the server must be answered as that says, and
never with a failure; the server's memory in the last third must be at most 5 % above that in the second.
Exit code 1 where something is violated.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import psutil

from servers import start_server

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from bad_requests import BODIES, CHAT, OF_THE_TINY_MODEL, REQUESTS, TEXT
from by_schema import MODES, ask_by_schema, operations_of
from serving import NAME, alone

STEADY, SHAKY = ("c0", "c1", "c2", "c3"), ("s0", "s1")
VERSIONS, PROMPTS, NEW_TOKENS = 2, 3, 10
GROWTH = 1.05
ADMIN_KEY = "soak"
LIMITS = ("--max-length", "128", "--body-limit", "20000", "--prefix-memory", "3", "--watch", "0.5")
LIMITS += ("--admin-key", ADMIN_KEY)


@dataclass
class Known:
    """What is expected: tokens by (digest or "base", prompt), and the folder of each name's versions."""

    prompts: list[list[int]]
    answers: dict[tuple[str, int], list[int]]
    versions: dict[str, list[Path]]


@dataclass
class Seen:
    """What happened, and what should not have."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def violated(self, what: str) -> None:
        self.violations.append(what[:500])


def prepare(model: str, folder: Path) -> Known:
    """Prefixes of several contents per name, and what each must answer."""
    import torch

    from prefixtune import PrefixKV, PrefixModel
    from prefixtune.generate import ending
    from prefixtune.load import load_base

    loaded = load_base(model, dtype="float32")
    base, generator = loaded.model, torch.Generator().manual_seed(0)
    top = base.config.vocab_size

    def draw(count: int) -> list[int]:
        return torch.randint(5, top, (count,), generator=generator).tolist()

    ends = set(ending(base, loaded.tokenizer)["eos_token_id"] or ())

    def answer(kv: PrefixKV | None, prompt: list[int]) -> list[int]:
        tokens = alone(base, kv, prompt, NEW_TOKENS)
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]

    known = Known([draw(count) for count in (3, 17, 40)[:PROMPTS]], {}, {})
    for name in ("human", *STEADY, *SHAKY):
        known.versions[name] = []
        for version in range(1 if name == "human" else VERSIONS):
            kv = PrefixKV.from_tokens(base, torch.tensor([draw(4 + 5 * version + len(known.versions))]))
            place = folder / "versions" / f"{name}-{version}"
            prefixed = PrefixModel(base, kv)
            prefixed.record["template"] = "human" if name == "human" else None
            prefixed.save_pretrained(place)
            known.versions[name].append(place)
            for number, prompt in enumerate(known.prompts):
                known.answers[kv.digest[:16], number] = answer(kv, prompt)
        shutil.copytree(known.versions[name][0], folder / "served" / name)
    for number, prompt in enumerate(known.prompts):
        known.answers["base", number] = answer(None, prompt)
    return known


class Clients:
    """What clients do: each turn one thing by chance."""

    def __init__(self, client: httpx.AsyncClient, known: Known, seen: Seen, seed: int) -> None:
        self.client, self.known, self.seen, self.draw = client, known, seen, random.Random(seed)

    async def turn(self) -> None:
        act = self.draw.choices((self.ask, self.leave, self.err, self.sample), weights=(60, 12, 18, 10))[0]
        try:
            await act()
        except httpx.HTTPError as error:
            self.seen.violated(f"{act.__name__}: {type(error).__name__} {error}")
        self.seen.counts[act.__name__] += 1

    def body(self, name: str | None, number: int, **more: Any) -> dict[str, Any]:
        model = f"{NAME}:{name}" if name else NAME
        asked = {"model": model, "prompt": self.known.prompts[number], "max_tokens": NEW_TOKENS}
        return {**asked, "return_token_ids": True, **more}

    def pick(self) -> tuple[str | None, int]:
        return self.draw.choice((None, *STEADY, *SHAKY)), self.draw.randrange(PROMPTS)

    async def ask(self) -> None:
        """A greedy answer, whole or in chunks, is the expected one."""
        name, number = self.pick()
        stream = self.draw.random() < 0.5
        body = self.body(name, number, temperature=0, stream=stream)
        response = await self.client.post(TEXT, json=body)
        if not self.is_answer(response, name):
            return
        if stream:
            lines = response.text.split("\n\n")
            parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            if "data: [DONE]" not in lines or any("error" in part for part in parts):
                self.seen.violated(f"a stream of {name} has no good end: {lines[-3:]}")
                return
        else:
            parts = [response.json()]
        tokens = [token for part in parts for token in part["choices"][0]["token_ids"]]
        content = parts[0]["system_fingerprint"].rpartition("-")[2]
        expected = self.known.answers.get((content, number))
        if tokens != expected:
            self.seen.violated(f"{name} ({content}), prompt {number}: {tokens}, expected {expected}")

    async def leave(self) -> None:
        """A client that goes away in the middle."""
        name, number = self.pick()
        body = self.body(name, number, stream=True, max_tokens=60)
        async with self.client.stream("POST", TEXT, json=body) as response:
            if response.status_code == 200:
                async for _ in response.aiter_lines():
                    if self.draw.random() < 0.4:
                        return
            else:
                await response.aread()
                self.is_answer(response, name)

    async def err(self) -> None:
        """A bad request gets the status that the catalogue tells."""
        if self.draw.random() < 0.8:
            name = self.draw.choice(sorted(REQUESTS.keys() - OF_THE_TINY_MODEL))
            (path, asked), status, _ = REQUESTS[name]
            content = json.dumps(asked).encode()
        else:
            name = self.draw.choice(sorted(BODIES))
            (content, status), path = BODIES[name], self.draw.choice((CHAT, TEXT))
        response = await self.client.post(path, content=content, headers={"content-type": "application/json"})
        if response.status_code != status:
            self.seen.violated(f"bad request {name!r}: {response.status_code} {response.text}")

    async def sample(self) -> None:
        """Several sampled answers with all that can be told of them."""
        name, number = self.pick()
        more = {"n": 2, "logprobs": 3, "presence_penalty": 0.5, "top_p": 0.9, "stop": ["e"]}
        response = await self.client.post(TEXT, json=self.body(name, number, **more))
        if self.is_answer(response, name) and len(response.json()["choices"]) != 2:
            self.seen.violated(f"two answers were asked for: {response.text}")

    def is_answer(self, response: httpx.Response, name: str | None) -> bool:
        if response.status_code == 200:
            return True
        code = response.json()["error"]["code"]
        if name in SHAKY and code in ("prefix_unavailable", "model_not_found"):
            self.seen.counts["refused while damaged"] += 1
        else:
            self.seen.violated(f"{name}: {response.status_code} {response.text}")
        return False


def disturb(known: Known, served: Path, draw: random.Random, seen: Seen) -> None:
    """Replace a prefix by other content, or damage one."""
    from prefixtune.storage import write_folder

    name = draw.choice((*STEADY, *SHAKY))
    deed = draw.choice(("replace", "cut", "garble", "remove")) if name in SHAKY else "replace"
    folder = served / name
    tensors, info = folder / "prefix.safetensors", folder / "prefix.json"
    if deed == "cut" and tensors.exists():
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif deed == "garble" and info.exists():
        info.write_text("{", encoding="utf-8")
    elif deed == "remove":
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with write_folder(folder) as draft:  # as training writes it
            shutil.copytree(draw.choice(known.versions[name]), draft, dirs_exist_ok=True)
    seen.counts[deed] += 1


async def soak(url: str, process: psutil.Process, known: Known, served: Path, options: Any) -> Seen:
    seen, end = Seen(), time.monotonic() + 60 * options["minutes"]
    many = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=many) as client:

        async def one(seed: int) -> None:
            clients = Clients(client, known, seen, seed)
            while time.monotonic() < end:
                await clients.turn()

        async def meanwhile() -> None:
            draw = random.Random(options["seed"])
            while time.monotonic() < end:
                await asyncio.to_thread(disturb, known, served, draw, seen)
                seen.memory.append(process.memory_info().rss)
                await asyncio.sleep(draw.uniform(0.1, 1.0))

        def by_schema() -> None:
            draw = random.Random(options["seed"])
            with httpx.Client(base_url=url, timeout=300) as other:
                operations = operations_of(other)
                while time.monotonic() < end:
                    operation, mode = draw.choice(operations), draw.choice(MODES)
                    try:
                        seen.counts["by schema"] += ask_by_schema(
                            other,
                            operation,
                            mode,
                            key=ADMIN_KEY,
                            number=draw.randrange(2**32),
                            examples=10,
                            spared=known.versions,
                        )
                    except (Exception, BaseExceptionGroup) as error:  # a failed check, a lost connection
                        said = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
                        seen.violated(f"by schema: {operation.label} {mode.value}: {said!r}")

        seeds = range(options["seed"] + 1, options["seed"] + 1 + options["clients"])
        await asyncio.gather(meanwhile(), asyncio.to_thread(by_schema), *map(one, seeds))
        metrics = (await client.get("/metrics")).text
    for name in ("failures_total", "active_rows", "queue_length"):
        (value,) = re.findall(rf"^prefixtune_{name} (\S+)$", metrics, re.MULTILINE)
        if float(value):
            seen.violated(f"at the end {name} is {value}")
    return seen


def growth(memory: list[int]) -> float:
    """The memory of the last third, by that of the second one; the first is for warming up."""
    third = len(memory) // 3
    return median(memory[-third:]) / median(memory[third : 2 * third]) if third else 1.0


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--clients", default=12, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--grows/--no-grows", "checks_memory", default=True, help="check the growth of memory")
@click.option(
    "--log", type=click.Path(path_type=Path), default=os.devnull, help="what the server writes to stderr"
)
def main(model: str, checks_memory: bool, log: Path, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        known = prepare(model, Path(place))
        served = Path(place) / "served"
        process, url = start_server(model, served, "float32", 8, name=NAME, options=LIMITS, log=log)
        try:
            seen = asyncio.run(soak(url, psutil.Process(process.pid), known, served, options))
        finally:
            process.terminate()
            code = process.wait(90)
    factor = growth(seen.memory)
    if checks_memory and factor > GROWTH:
        seen.violated(f"memory grew by {factor - 1:.1%}")
    if code:
        seen.violated(f"the server ended with code {code}")
    click.echo(f"{dict(sorted(seen.counts.items()))}; memory x {factor:.3f} ({seen.memory[-1] / 1e6:.0f} MB)")
    for violation in seen.violations[:50]:
        click.echo(violation, err=True)
    click.echo(f"{len(seen.violations)} violations")
    sys.exit(1 if seen.violations else 0)


if __name__ == "__main__":
    main()
