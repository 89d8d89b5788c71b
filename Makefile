# Two commands need nothing but a Python 3.10-3.13 and this file: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One torch thread a test process: two processes share a two-core machine, and CPU results do not depend on the split.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# Without a GPU the Triton kernels run in Triton's interpreter, which a process has to choose before it imports them.
INTERPRETED := tests/kernels/contrastive/test_triton_engine.py tests/kernels/log_mel/test_gpu_engines.py tests/kernels/test_toeplitz_attention_triton.py tests/kernels/test_layer_norm_gelu_triton.py tests/kernels/test_residual_layer_norm_triton.py tests/kernels/test_waveform_triton.py tests/kernels/test_waveform_convolution_triton.py tests/kernels/test_feed_forward_triton.py tests/kernels/test_shared_attention_triton.py tests/kernels/test_scaled_adam_triton.py tests/kernels/test_swoosh_triton.py tests/kernels/test_bias_norm_triton.py tests/kernels/test_gated_convolution_triton.py tests/kernels/test_resampling_triton.py

.PHONY: demo test test-slow lint format bench gpu-kit clean

demo: $(INSTALLED)
	$(BIN)/fastclap-train demo --run-dir runs/demo --resume

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --durations=15 -m "not slow" tests
	$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --durations=5 -m "not slow" $(INTERPRETED)

test-slow: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ends with a summary of a screen; TABLES=1 prints pytest-benchmark's own tables before it.
bench: $(INSTALLED)
	@mkdir -p runs
	$(BIN)/python -m pytest -q --disable-warnings --benchmark-only $(if $(TABLES),,--benchmark-quiet) --benchmark-json=runs/bench.json bench

# What a machine with a GPU and no package index needs to run bench.gpu: .gpu-kit/run.sh, see bench/gpu_kit.py.
gpu-kit: $(INSTALLED)
	$(BIN)/python -m bench.gpu_kit $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(OPEN_CLIP),--open-clip $(OPEN_CLIP)) $(if $(ICEFALL),--icefall $(ICEFALL)) $(if $(WITHOUT),--without $(WITHOUT)) $(if $(LIMIT),--limit $(LIMIT))

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .gpu-kit build dist .pytest_cache .mypy_cache .ruff_cache
