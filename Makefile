# Everything runs in its own virtual environment, which the first call sets up.
PYTHON ?= python3
VENV ?= .venv
# PyPI's torch for Linux brings gigabytes of CUDA, which tests and quickstart do not need; the CPU build from here is
# preferred where it can be reached. For a GPU: `make TORCH_INDEX=https://pypi.org/simple ...`.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OLDEST_TRANSFORMERS := 5.17.0

BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-compat test-slow lint clean

quickstart: $(VENV)/.ready  ## Train a small model with ALP-GRPO and draw what happened
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.ready  ## The fast tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready  ## The slow ones
	$(BIN)/python -m pytest -m slow

# Gradient checkpointing runs layer hooks again in transformers 5.17 and no longer does in 5.23: the method is tested on
# both ends of the supported range. The older one needs an older huggingface_hub, hence an environment of its own.
test-compat: $(VENV)-oldest/.ready  ## The method on the oldest transformers
	$(VENV)-oldest/bin/python -m pytest \
		tests/test_perturbation.py tests/test_families.py tests/test_loss.py tests/test_trainer.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is written last, so an interrupted set-up is taken up again. torch comes first and alone, since only it is
# looked for at TORCH_INDEX.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)"
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)-oldest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -v -E "^(transformers|huggingface_hub)==" constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)"
	$(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --editable ".[test]" \
		transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist src/*.egg-info .pytest_cache .ruff_cache
