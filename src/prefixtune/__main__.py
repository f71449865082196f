"""`python -m prefixtune`: the command where its script is not on the path."""

from prefixtune.cli import main

main(prog_name="prefixtune")
