"""`python -m prefixtune`: the command, where its script is not on the path."""

from prefixtune.cli import main

if __name__ == "__main__":
    main(prog_name="prefixtune")
