# `make demo` and `make test` need nothing but Python 3.11, git and make.
PYTHON3 ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done

.PHONY: setup demo test test-all lint bench peers chaos growth soak train clean

setup: $(STAMP)

# The constraints file is the lock: exact versions of everything, so that every machine installs the same.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo "Drawn scenes, questions in English and Chinese, with their true answers"
	@$(PYTHON) jobs/vqa.py --config configs/demo.yaml

test: $(STAMP)
	$(PYTHON) -m pytest -n 2 -m "not slow"

# What `make test` leaves out: what is rare and slow.
test-all: $(STAMP)
	$(PYTHON) -m pytest -n 2 -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(PYTHON) -m benchmarks

# What `benchmarks/throughput.py` compares with, each in an environment of its own; what is not there is left out.
peers: .peers/vllm/.setup-done .peers/openvino/.setup-done

# Beside a CPU build of torch neither torchaudio nor torchcodec can load, and vLLM imports them where they are.
.peers/%/.setup-done: benchmarks/peers/%.txt
	$(PYTHON3) -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.peers/$*/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec
	@touch $@

chaos: $(STAMP)
	CHAOS_ROUNDS=50 SUSPENDED_ROUNDS=20 $(PYTHON) -m pytest -s --timeout 7200 tests/chaos/test_chaos.py tests/chaos/test_suspended.py tests/jobs/test_two_jobs.py

# Nodes that join a job's cluster and go away again.
growth: $(STAMP)
	GROWTH=1 $(PYTHON) -m pytest -s --timeout 3600 tests/jobs/test_growth.py

soak: $(STAMP)
	SOAK_ROWS=20000 $(PYTHON) -m pytest -s --timeout 7200 tests/chaos/test_soak.py

# Hours on two cores; goes on where it stopped.
train: $(STAMP)
	$(PYTHON) jobs/train.py --config configs/train-small.yaml

clean:
	rm -rf $(VENV) .peers demo .mypy_cache .ruff_cache .pytest_cache
