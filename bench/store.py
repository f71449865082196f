"""Many prefixes on disk, few in memory: what starting costs, and the first use of one that is not in memory.

Run: python bench/store.py [--prefixes 2000] [--kept 200] [--uses 500] [--length 20]
Writes bench/results/store.json and prints it. The folders are copies of one prefix, and the system is told to
drop what it holds of their files before they are read (on Linux), so that a first use comes from the disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import click

from machine import command, describe_machine, versions
from serve import percentile

RESULTS = Path(__file__).parent / "results" / "store.json"


def copy_prefixes(source: Path, folder: Path, *, count: int) -> None:
    """As many folders as asked for, written to the disk."""
    for number in range(count):
        shutil.copytree(source, folder / f"p{number}")
    os.sync()


def forget_files(folder: Path) -> None:
    """Ask the system to drop what it holds of these files in memory; only Linux can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(base: Any, tokenizer: Any, folder: Path, *, kept: int, uses: int) -> dict[str, float]:
    """Seconds of a service's start with and without the prefixes, of a look at the folders, and of uses."""
    from prefixtune.serve.config import ServeConfig
    from prefixtune.serve.log import Log
    from prefixtune.serve.service import Service

    config = ServeConfig(watch=0)

    def start(place: Path | None) -> Service:
        return Service(base, tokenizer, name="bench", config=config, prefix_dir=place, log=Log(StringIO()))

    start(None)  # what is measured once per model, like its geometry, belongs to its load
    without = seconds_of(lambda: start(None))
    begin = time.perf_counter()
    service = start(folder)
    with_prefixes = time.perf_counter() - begin
    store = service.store
    names = store.names()
    random.Random(0).shuffle(names)
    size = store.get(names[0]).kv.nbytes
    store._budget = kept * size
    for name in names[1:kept]:
        store.get(name)
    cold, computing = [], []
    for name in names[kept : kept + uses]:
        forget_files(folder / name)
        before = time.thread_time()
        cold.append(seconds_of(lambda name=name: service.find(f"bench:{name}")))
        computing.append(time.thread_time() - before)
    assert store.misses == kept + len(cold)
    assert store.count_in_memory == min(kept, len(names))
    last = names[min(len(names), kept + uses) - 1]
    return {
        "prefixes": len(names),
        "megabytes_each": size / 1e6,
        "in_memory": store.count_in_memory,
        "start_without_prefixes": without,
        "start": with_prefixes,
        "look_at_all_folders": seconds_of(store.refresh),
        "first_uses": len(cold),
        "first_use_p50": percentile(cold, 0.5),
        "first_use_p99": percentile(cold, 0.99),
        "first_use_cpu_p99": percentile(computing, 0.99),  # on a busy machine, what is left to say
        "use_in_memory": seconds_of(lambda: service.find(f"bench:{last}")),
    }


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--prefixes", default=2000, show_default=True)
@click.option("--kept", default=200, show_default=True, help="prefixes that memory has room for")
@click.option("--uses", default=500, show_default=True, help="first uses of prefixes that are not in memory")
@click.option("--length", default=20, show_default=True, help="virtual tokens of each prefix")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def main(model: str, dtype: str, prefixes: int, kept: int, uses: int, length: int, output: Path) -> None:
    from prefixtune.load import load_base
    from serve import write_prefixes

    if prefixes < kept + uses:
        raise click.UsageError("--prefixes must be at least --kept and --uses together")
    loaded = load_base(model, dtype=dtype)
    with tempfile.TemporaryDirectory() as place:
        write_prefixes(loaded.model, Path(place) / "one", clients=1, length=length)
        copy_prefixes(Path(place) / "one" / "c0", Path(place) / "all", count=prefixes)
        found = measure(loaded.model, loaded.tokenizer, Path(place) / "all", kept=kept, uses=uses)
    report = {
        "command": command(),
        "machine": describe_machine(),
        "load_average": os.getloadavg(),
        "dtype": dtype,
        "versions": versions(),
        **found,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, value in found.items():
        click.echo(f"{name:>24}  {value:.4g}")


if __name__ == "__main__":
    main()
