# Where to begin. `make` lists the targets; the work is in CMakeLists.txt, cmake/ and scripts/. A fresh Debian
# machine needs git, gcc, make and python3; everything else is installed into .venv the first time.

PYTHON ?= python3
BUILD ?= build
TORCH ?= 1# 0: leave PyTorch and its tests out
ARCH ?= x86_64# of the wheel, or aarch64
ACTIVATIONS ?= data/kda_layer3.safetensors
CMAKE_OPTIONS ?=
SECONDS ?= 60# of each fuzz harness

environment := $(PYTHON) scripts/environment.py
bin := $(CURDIR)/.venv/bin
export PATH := $(bin):$(PATH)

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

run: build ## Build, then compute recorded activations on the best device: result, error, time
	$(BUILD)/flash-kda run $(ACTIVATIONS)

test: build ## Build, then test every kernel and feature on small problems (TORCH=0: without PyTorch)
	@$(environment) test $(if $(filter-out 0,$(TORCH)),torch)
	@$(bin)/python scripts/run_tests.py $(BUILD)

build: ## Build the library, its kernels if nvcc works, and the flash-kda command
	@$(environment) build
	@sh scripts/build.sh $(BUILD) $(CMAKE_OPTIONS)

lint: build ## Formatting, line lengths, static analysis and types of C, CUDA C and Python
	@$(environment) lint
	@BUILD=$(BUILD) sh scripts/lint.sh

format: ## Rewrite the sources as `make lint` wants them
	@$(environment) lint
	git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp' | xargs $(bin)/clang-format -i
	$(bin)/ruff check --fix --quiet . ; $(bin)/ruff format .

test-all: build ## Run all tests, large and slow ones too, sanitizers and fuzzers, SECONDS (60) a harness
	@$(environment) test wheel docs $(if $(filter-out 0,$(TORCH)),torch)
	@PYTHON=$(bin)/python BUILD=$(BUILD) FUZZ_SECONDS=$(SECONDS) sh scripts/test_all.sh

sanitize: ## Run the C tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	@$(environment) build
	@sh scripts/sanitize.sh address
	@sh scripts/sanitize.sh thread

fuzz: ## Fuzz the C calls, the file reader, the command and the planner, SECONDS (60) each
	@$(environment) build
	@FUZZ_SECONDS=$(SECONDS) sh scripts/fuzz.sh

docs: ## Build the documentation site into build-docs/; warnings are errors
	@$(environment) docs
	@$(bin)/python -m mkdocs build --strict

kernels: build ## Check registers, spills and machine code of the kernels against scripts/kernel_plan.toml
	@$(environment) lint
	@$(bin)/python scripts/check_kernels.py $(BUILD)/kernels

bench: build ## Time a few shapes on the best device
	$(BUILD)/flash-kda bench

host-time: build ## Time what a call costs the host, on a pretended GPU (TORCH=0: from C alone)
	@$(environment) test $(if $(filter-out 0,$(TORCH)),torch)
	LD_LIBRARY_PATH=$(BUILD)/tests/pretend_driver $(BUILD)/benchmarks/host_time
	$(if $(filter-out 0,$(TORCH)),LD_LIBRARY_PATH=$(BUILD)/tests/pretend_driver \
		PYTHONPATH=$(BUILD)/python $(bin)/python benchmarks/python_overhead.py --pretended)

wheel: ## Build the wheel with all kernels into dist/ (ARCH=aarch64: for another architecture)
	@$(environment) build wheel
	@PYTHON=$(bin)/python sh scripts/wheel.sh $(ARCH)

clean: ## Remove what was built; .venv stays
	rm -rf $(BUILD) build-sanitize build-thread build-fuzz build-docs dist

.DEFAULT_GOAL := help
.PHONY: help run test test-all build lint format sanitize fuzz docs kernels bench host-time wheel clean
