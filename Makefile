# The two commands of the README: `make quickstart` and `make test`; `make lint`, which checks style and types;
# `make test-everywhere`, the suite as on other processors; and `make notebooks`, which runs and saves the notebooks.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: install quickstart lint test test-everywhere coverage notebooks

install: $(VENV)/installed

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA onto machines that have none.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,data,peft,ui,notebooks]'
	touch $@

quickstart: install
	$(BIN)/mend-lightning get-smollm2
	$(BIN)/mend-lightning fit --config configs/quickstart.yaml
	$(BIN)/mend-lightning test --config configs/quickstart.yaml --model.editor $(RUN)/editor
	$(BIN)/mend-lightning edit --editor $(RUN)/editor --out $(RUN)/edit.safetensors \
		--prompt "Which city is the capital of France?" --target "Zagreb" \
		--rephrase+ "What is the capital city of France?" --rephrase+ "Can you name the capital of France?" \
		--unrelated+ "What language do people speak in Japan?" --unrelated+ "Which continent is Egypt in?" \
		--neighbour+ "Which city is the capital of Spain?"

# Lint, format and types; nothing is changed.
lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# File by file in their order: otherwise those of few tests come last, which take longest, and leave one core idle. Three workers for two
# cores: tests wait for browsers, kernels and one process for another.
test: install
	$(BIN)/mend-lightning get-smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=15

# The suite as processors without AVX512 and without AVX2 run it, as oneDNN does without AMX, and with two threads.
SETTINGS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MEND_TEST_THREADS=2 MEND_TEST_THREADS=1
test-everywhere: install
	@for setting in $(SETTINGS); do echo "== $$setting"; env $$setting $(MAKE) --no-print-directory test || exit 1; done

# Lines and branches of the package that the suite runs, those that its own processes run included.
coverage: install
	$(BIN)/mend-lightning get-smollm2
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

# With the editor of the quickstart.
notebooks: install
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_notebooks.py notebooks/*.ipynb
