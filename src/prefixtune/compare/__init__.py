"""Compares methods on a user's model and rows: quality, memory, time, size and forgetting, over seeds.

Reading order: `settings` (how each method trains), `plan` (what is compared), `rows` and `prepare` (what all
see), `peers` (methods that are not ours), `cell` (one method, one seed), `child` (its process), `run` (all of
them), `results` (means). Importing it imports no torch; the children do.
"""

from prefixtune.compare.machine import describe_machine, shown_command, versions
from prefixtune.compare.plan import Cell, CompareConfig, Plan, plan_of, read_file
from prefixtune.compare.run import DATA, RESULTS, compare
from prefixtune.compare.settings import KINDS, METHODS, Method, PeerConfig

__all__ = [
    "DATA",
    "KINDS",
    "METHODS",
    "RESULTS",
    "Cell",
    "CompareConfig",
    "Method",
    "PeerConfig",
    "Plan",
    "compare",
    "describe_machine",
    "plan_of",
    "read_file",
    "shown_command",
    "versions",
]
