"""Many clients, each with a prefix of its own: the server, the same load without prefixes, PEFT, and vLLM.

Run: make bench-serve, or python bench/serve.py [--clients 32] [--requests 96] [--rate 50] [--new-tokens 32]
Writes bench/results/serve.json and prints the table. Arrivals are Poisson; a client asks for the next answer
when it has the last one. PEFT is one model with an adapter per client, switched request by request, in this
process and without HTTP; the server is `prefixtune serve` in a process of its own, and pays for HTTP. vLLM is
measured where `make test-vllm` has made its environment: an export of the same prefixes, over HTTP too.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from machine import command, describe_machine, versions
from servers import export_for_vllm, start_server, start_vllm, stop

RESULTS = Path(__file__).parent / "results" / "serve.json"
PEFT, BASE = "PEFT, adapters switched", "base only"
VLLM, VLLM_BASE = "vLLM, {} prefixes", "vLLM, base only"


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
    *,
    clients: int,
    requests: int,
    rate: float,
    new_tokens: int,
    vocabulary: int,
    seed: int,
    without: int | None = None,
) -> Load:
    """Prompts of 8 to 256 tokens, log-normal around 48, as people's messages are; `without` is in none."""
    draw, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        arrivals.append(now)
    lengths = [min(256, max(8, round(math.exp(draw.gauss(math.log(48), 0.7))))) for _ in arrivals]
    prompts = [[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths]
    return Load(
        arrivals=arrivals,
        clients=[number % clients for number in range(requests)],
        prompts=[[5 if token == without else token for token in prompt] for prompt in prompts],
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
    """Of the process, and of those that it started."""
    times = [process.cpu_times()]
    if process.pid != os.getpid():  # our own children are the servers
        times += [child.cpu_times() for child in process.children(recursive=True)]
    return sum(each.user + each.system for each in times)


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


def report_of(runs: dict[str, list[dict[str, float]]], ours: str) -> dict[str, Any]:
    """The best round of each, and how ours compares."""
    best = {name: max(found, key=lambda run: run["tokens_per_second"]) for name, found in runs.items()}
    rates = {name: run["tokens_per_second"] for name, run in best.items()}
    computed = {name: min(run["cpu_per_token"] for run in found) for name, found in runs.items()}
    return {
        "best": {name: {**run, "cpu_per_token": computed[name]} for name, run in best.items()},
        "times_peft": rates[ours] / rates[PEFT],
        "of_base_only": rates[ours] / rates[BASE],
        "times_peft_by_cpu": computed[PEFT] / computed[ours],
        "of_base_only_by_cpu": computed[BASE] / computed[ours],
        "times_others": {name: rates[ours] / rate for name, rate in rates.items() if name != ours},
    }


def tell(what: str) -> None:
    click.echo(what, err=True)


def print_table(report: dict[str, Any]) -> None:
    head = ("", "tok/s", "CPU per token", "first token p50", "p99", "next token p50", "p99")
    click.echo("".join(f"{cell:>26}" if place == 0 else f"{cell:>17}" for place, cell in enumerate(head)))
    for name, run in report["best"].items():
        keys = ("first_token_p50", "first_token_p99", "next_token_p50", "next_token_p99")
        cells = [f"{run['tokens_per_second']:.1f}", f"{1000 * run['cpu_per_token']:.1f} ms"]
        cells += (f"{run[key]:.3f} s" for key in keys)
        click.echo(f"{name:>26}" + "".join(f"{cell:>17}" for cell in cells))
    click.echo(f"\n{report['times_peft']:.1f} times PEFT, {report['of_base_only']:.2f} of base only")
    by_cpu = (report["times_peft_by_cpu"], report["of_base_only_by_cpu"])
    click.echo("by CPU time per token: {:.1f} and {:.2f}".format(*by_cpu))


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
@click.option("--rounds", default=2, show_default=True, help="of all contestants, in turns")
@click.option(
    "--vllm",
    "vllm_environment",
    type=click.Path(path_type=Path),
    help="an environment with vLLM and prefixtune-vllm  [default: without]",
)
@click.option("--reserved-token", help="of vLLM's export  [default: <empty_output> for demo]")
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
    vllm_environment: Path | None,
    reserved_token: str | None,
    output: Path,
) -> None:
    import torch

    from prefixtune.load import load_base

    ours = f"{clients} prefixes"
    runs: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = load_base(model, dtype=dtype).model
        precision = str(base.dtype).removeprefix("torch.")
        write_prefixes(base, place / "prefixes", clients=clients, length=length)
        made = {"clients": clients, "rate": rate, "new_tokens": new_tokens, "seed": 0}
        made["vocabulary"] = base.config.vocab_size
        if vllm_environment is None:
            tell("vLLM is left out: --vllm names its environment (make test-vllm makes one)")
        else:
            tell(f"exporting {clients} prefixes for vLLM, each with its canary …")
            made["without"] = export_for_vllm(
                model,
                sorted((place / "prefixes").iterdir()),
                precision,
                place / "export",
                reserved_token=reserved_token or ("<empty_output>" if model == "demo" else None),
            )
        load, few = (make_load(requests=count, **made) for count in (requests, peft_requests))
        peft = peft_model(base, clients=clients, length=length)
        contestants: dict[str, tuple[psutil.Process, Callable[[], list[Timed]]]] = {
            PEFT: (psutil.Process(), lambda: ask_peft(peft, few))
        }

        def enter(process: subprocess.Popen[bytes], url: str, *names: str) -> None:
            """Two contestants, without prefixes and with, on a server that is warmed up."""
            stack.callback(stop, process)
            warm = make_load(requests=clients, **made | {"new_tokens": 4})
            for name, with_prefix in zip(names, (False, True), strict=True):
                asyncio.run(ask_server(url, warm, with_prefix=with_prefix))
                asked = partial(ask_server, url, load, with_prefix=with_prefix)
                contestants[name] = (psutil.Process(process.pid), lambda asked=asked: asyncio.run(asked()))

        tell("starting the server …")
        started = start_server(model, place / "prefixes", precision, clients, log=place / "log")
        enter(*started, BASE, ours)
        if vllm_environment is not None:
            tell("starting vLLM, which compiles and asks each canary …")
            started = start_vllm(vllm_environment, place / "export", clients, log=place / "log-vllm")
            enter(*started, VLLM_BASE, VLLM.format(clients))
        for _ in range(rounds):
            for name, (computes, ask) in contestants.items():
                before = cpu_seconds(computes)
                answers = ask()
                found = figures(answers, cpu=cpu_seconds(computes) - before)
                runs.setdefault(name, []).append(found)
                tell(f"{name}: {found['tokens_per_second']:.1f} tokens/s in {found['seconds']:.0f} s")
    report = report_of(runs, ours)
    about = {
        "command": command(),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "dtype": precision,
        "versions": versions(),
        "settings": {**made, "model": model, "length": length, "requests": requests},
        "runs": runs,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({**about, **report}, indent=2) + "\n", encoding="utf-8")
    print_table(report)


if __name__ == "__main__":
    main()
