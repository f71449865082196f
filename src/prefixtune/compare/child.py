"""The process of one cell, or of the rows: python -m prefixtune.compare.child TASK.json, started by `run`.

Ends when its stdin closes, so that it does not outlive whoever started it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from prefixtune.compare.plan import Plan, plan_of
from prefixtune.compare.rows import Rows, write_json
from prefixtune.errors import PrefixTuneError
from prefixtune.memory import keep_few_kernels

__all__ = ["main"]


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plan = plan_of(**task["plan"])
    keep_few_kernels()
    result = Path(task["result"])
    try:
        if task["cell"] is None:
            from prefixtune.compare.prepare import make_rows

            key = plan.data_key()  # of the files as they are before they are read
            make_rows(plan).write(result, key=key)
            return
        found = _run(plan, task)
    except Exception as error:
        traceback.print_exc()
        write_json(Path(task["failure"]), _described(error))
        raise SystemExit(1) from None
    seconds = time.time() - psutil.Process().create_time()  # with the start of the interpreter
    write_json(result, {**task["about"], **found, "wall_seconds": seconds})


def _run(plan: Plan, task: dict[str, Any]) -> dict[str, Any]:
    import transformers

    from prefixtune.compare.cell import run_cell

    transformers.logging.set_verbosity_error()
    cell = next(cell for cell in plan.cells if cell.name == task["cell"])
    rows = Rows.read(Path(task["rows"]))
    assert rows is not None
    folder = Path(task["folder"])
    if folder.exists():
        shutil.rmtree(folder)  # of an earlier run, whose neutral text would be taken for this one's
    folder.mkdir(parents=True)
    return run_cell(plan, cell, rows, folder)


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, PrefixTuneError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    text = " ".join(str(error).split())[:500]
    return {"kind": type(error).__name__, "message": f"{type(error).__name__}: {text}", "hint": None}


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
