"""Many clients, each with a prefix of its own: the server, the same load without prefixes, and PEFT.

Run: make bench-serve, or python bench/serve.py [--clients 32] [--requests 96] [--rate 50] [--new-tokens 32]
Writes bench/results/serve.json and prints the table. Arrivals are Poisson; a client asks for the next answer
when it has the last one. PEFT is one model with an adapter per client, switched request by request, in this
process and without HTTP; the server is `prefixtune serve` in a process of its own, and pays for HTTP.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from machine import command, describe_machine, versions

RESULTS = Path(__file__).parent / "results" / "serve.json"
PEFT, BASE = "PEFT, adapters switched", "base only"
START_SECONDS = 600  # a .gguf file takes its time on a busy machine


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests in the order of their arrival: when, whose, and what."""

    arrivals: Sequence[float]  # seconds from the start
    clients: Sequence[int]
    prompts: Sequence[Sequence[int]]
    new_tokens: int


@dataclass
class Timed:
    """One answer: when it arrived, and when each of its tokens came, in seconds from the start."""

    arrival: float
    tokens: list[float] = field(default_factory=list)


def make_load(
    *, clients: int, requests: int, rate: float, new_tokens: int, vocabulary: int, seed: int
) -> Load:
    """Prompts of 8 to 256 tokens, log-normal around 48, as people's messages are."""
    draw, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        arrivals.append(now)
    lengths = [min(256, max(8, round(math.exp(draw.gauss(math.log(48), 0.7))))) for _ in arrivals]
    return Load(
        arrivals=arrivals,
        clients=[number % clients for number in range(requests)],
        prompts=[[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths],
        new_tokens=new_tokens,
    )


# --- the server


async def ask_server(url: str, load: Load, *, with_prefix: bool) -> list[Timed]:
    locks = [asyncio.Lock() for _ in set(load.clients)]
    start = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(number: int) -> Timed:
            await asyncio.sleep(load.arrivals[number])
            timed, whose = Timed(time.perf_counter() - start), load.clients[number]
            body = {
                "model": f"bench:c{whose}" if with_prefix else "bench",
                "prompt": load.prompts[number],
                "max_tokens": load.new_tokens,
                "temperature": 0,
                "stream": True,
                "return_token_ids": True,
            }
            async with locks[whose], client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        made = len(json.loads(line[6:])["choices"][0]["token_ids"])
                        timed.tokens += [time.perf_counter() - start] * made
            return timed

        return list(await asyncio.gather(*(ask(number) for number in range(len(load.arrivals)))))


def start_server(
    model: str,
    prefixes: Path,
    dtype: str,
    rows: int,
    *,
    name: str = "bench",
    options: Sequence[str] = (),
    log: Path = Path(os.devnull),
) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = ["-c", "from prefixtune.cli import main; main()", "serve", "--model", model, "--dtype", dtype]
    line += ["--prefix-dir", str(prefixes), "--served-name", name, "--port", str(port), "--rows", str(rows)]
    line += options
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, *line], stderr=stderr, env=dict(os.environ))
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise click.ClickException("the server did not start")


# --- PEFT


class Stamps:
    """A streamer that notes when tokens come."""

    def __init__(self, start: float, timed: Timed) -> None:
        self.start, self.timed, self.is_prompt = start, timed, True

    def put(self, tokens: Any) -> None:
        if not self.is_prompt:
            self.timed.tokens.append(time.perf_counter() - self.start)
        self.is_prompt = False

    def end(self) -> None:
        pass


def peft_model(base: Any, *, clients: int, length: int) -> Any:
    """One model with an adapter per client."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
    model = get_peft_model(base, config, adapter_name="c0").eval()
    for client in range(1, clients):
        model.add_adapter(f"c{client}", config)
    return model


def ask_peft(model: Any, load: Load) -> list[Timed]:
    """One request after another, in the order of arrival, each with its client's adapter."""
    import torch

    found, start = [], time.perf_counter()
    for arrival, client, prompt in zip(load.arrivals, load.clients, load.prompts, strict=True):
        time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        timed = Timed(arrival)
        model.set_adapter(f"c{client}")
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=load.new_tokens,
                min_new_tokens=load.new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=Stamps(start, timed),
            )
        found.append(timed)
    return found


# --- figures


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def figures(answers: Sequence[Timed], *, cpu: float) -> dict[str, float]:
    """Tokens per second from first arrival to last token; seconds to the first and to the next token.

    Args:
        cpu: seconds that the process computed for it, which other work on the machine changes little.
    """
    made = sum(len(answer.tokens) for answer in answers)
    seconds = max(answer.tokens[-1] for answer in answers) - min(answer.arrival for answer in answers)
    first = [answer.tokens[0] - answer.arrival for answer in answers]
    gaps = [b - a for answer in answers for a, b in zip(answer.tokens, answer.tokens[1:], strict=False)]
    return {
        "tokens": made,
        "seconds": seconds,
        "tokens_per_second": made / seconds,
        "cpu_per_token": cpu / made,
        "first_token_p50": percentile(first, 0.5),
        "first_token_p99": percentile(first, 0.99),
        "next_token_p50": percentile(gaps, 0.5),
        "next_token_p99": percentile(gaps, 0.99),
    }


def write_prefixes(base: Any, folder: Path, *, clients: int, length: int) -> None:
    import torch

    from prefixtune import PrefixKV, PrefixModel

    generator = torch.Generator().manual_seed(0)
    for client in range(clients):
        ids = torch.randint(5, base.config.vocab_size, (1, length), generator=generator)
        PrefixModel(base, PrefixKV.from_tokens(base, ids)).save_pretrained(folder / f"c{client}")


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--clients", default=32, show_default=True, help="each with a prefix of its own")
@click.option("--length", default=20, show_default=True, help="virtual tokens of each prefix")
@click.option("--requests", default=96, show_default=True)
@click.option(
    "--peft-requests", default=16, show_default=True, help="of these, since PEFT takes them in turn"
)
@click.option("--rate", default=50.0, show_default=True, help="arrivals per second, on average")
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="of the three contestants, in turns")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def main(
    model: str,
    dtype: str,
    clients: int,
    length: int,
    requests: int,
    peft_requests: int,
    rate: float,
    new_tokens: int,
    rounds: int,
    output: Path,
) -> None:
    import torch

    from prefixtune.load import load_base

    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(model, dtype=dtype).model
        made = {"clients": clients, "rate": rate, "new_tokens": new_tokens, "seed": 0}
        made["vocabulary"] = base.config.vocab_size
        load, few = (make_load(requests=count, **made) for count in (requests, peft_requests))
        precision = str(base.dtype).removeprefix("torch.")
        write_prefixes(base, Path(folder), clients=clients, length=length)
        peft = peft_model(base, clients=clients, length=length)
        process, url = start_server(model, Path(folder), precision, clients)
        own, servers = psutil.Process(), psutil.Process(process.pid)
        contestants: dict[str, tuple[psutil.Process, Callable[[], list[Timed]]]] = {
            PEFT: (own, lambda: ask_peft(peft, few)),
            BASE: (servers, lambda: asyncio.run(ask_server(url, load, with_prefix=False))),
            f"{clients} prefixes": (servers, lambda: asyncio.run(ask_server(url, load, with_prefix=True))),
        }
        try:
            warm = make_load(requests=clients, **made | {"new_tokens": 4})
            asyncio.run(ask_server(url, warm, with_prefix=True))
            for _ in range(rounds):
                for name, (computes, ask) in contestants.items():
                    before = cpu_seconds(computes)
                    answers = ask()
                    found = figures(answers, cpu=cpu_seconds(computes) - before)
                    runs.setdefault(name, []).append(found)
        finally:
            process.terminate()
            process.wait(60)
    best = {name: max(found, key=lambda run: run["tokens_per_second"]) for name, found in runs.items()}
    rates = {name: run["tokens_per_second"] for name, run in best.items()}
    computed = {name: min(run["cpu_per_token"] for run in found) for name, found in runs.items()}
    ours, our_cpu = rates[f"{clients} prefixes"], computed[f"{clients} prefixes"]
    report = {
        "command": command(),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "dtype": precision,
        "versions": versions(),
        "settings": {**made, "model": model, "length": length, "requests": requests},
        "runs": runs,
        "times_peft": ours / rates[PEFT],
        "of_base_only": ours / rates[BASE],
        "times_peft_by_cpu": computed[PEFT] / our_cpu,
        "of_base_only_by_cpu": computed[BASE] / our_cpu,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    head = ("", "tok/s", "CPU per token", "first token p50", "p99", "next token p50", "p99")
    click.echo("".join(f"{cell:>26}" if place == 0 else f"{cell:>17}" for place, cell in enumerate(head)))
    for name, run in best.items():
        keys = ("first_token_p50", "first_token_p99", "next_token_p50", "next_token_p99")
        cells = [f"{run['tokens_per_second']:.1f}", f"{1000 * computed[name]:.1f} ms"]
        cells += (f"{run[key]:.3f} s" for key in keys)
        click.echo(f"{name:>26}" + "".join(f"{cell:>17}" for cell in cells))
    click.echo(f"\n{report['times_peft']:.1f} times PEFT, {report['of_base_only']:.2f} of base only")
    by_cpu = (report["times_peft_by_cpu"], report["of_base_only_by_cpu"])
    click.echo("by CPU time per token: {:.1f} and {:.2f}".format(*by_cpu))


if __name__ == "__main__":
    main()
