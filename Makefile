# The commands of this project. `make demo` and `make test` need nothing prepared but python3 (with venv and headers), make and g++.

PYTHON ?= python3
# An index with CPU builds of torch, if you have one: without it pip takes the default build, which brings several GB of CUDA.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: help demo test test-beside-others build-core-quick core-asan core-tsan test-alone soak test-all test-core test-core-quick test-aarch64 fuzz model wheel lint bench docs install clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: install  ## an expert-parallel MoE layer over real processes, every token compared
	$(BIN)/commfuse demo

test: install lint  ## linters, types and tests, two files at a time; then those that look at times, and the core's
	@$(MAKE) --no-print-directory -j 2 test-beside-others build-core-quick
	$(BIN)/python -m pytest -n 2 -m alone
	@$(MAKE) --no-print-directory test-core-quick

test-beside-others: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone"

build-core-quick: install  # beside the tests, with what they leave of the machine
	@mkdir -p build
	@nice -n 19 $(MAKE) --no-print-directory JOBS=1 core-asan core-tsan > build/core-quick.log 2>&1 || { cat build/core-quick.log; exit 1; }

core-asan: install
	$(call build-core,asan,$(ASAN))

core-tsan: install
	$(call build-core,tsan,$(TSAN),--target test_channel test_repeat)

test-alone: install  ## faults, deaths and deadlines: what needs the machine for itself
	$(BIN)/python -m pytest -m alone

test-all: install lint test-core  ## also the long tests: more random cases of the same kinds
	$(BIN)/python -m pytest --long -n 2 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest --long -m alone

SECONDS ?= 600
soak: install  ## random operators on 4 processes, SECONDS=600: every output compared, memory must stay flat
	$(BIN)/commfuse check --soak $(SECONDS)

test-core: install  ## the C++ core's own tests: plain, with address and undefined-behaviour sanitizers, with the thread sanitizer
	$(call build-core,plain)
	$(CTEST)/core-plain -LE fuzz
	$(call build-core,asan,$(ASAN))
	$(CTEST)/core-asan -j 2
	$(call build-core,tsan,$(TSAN))
	$(CTEST)/core-tsan -LE fuzz

test-core-quick: core-asan core-tsan  ## of these, what finds most: all under the first two sanitizers, threads as ranks under the third
	$(CTEST)/core-asan -j 2
	$(CTEST)/core-tsan -R '^(channel|repeat)$$'

test-aarch64: install  ## the core's own tests, cross-compiled for aarch64 and run under qemu
	@sh tools/check-aarch64.sh
	$(call build-core,aarch64,-DCMAKE_TOOLCHAIN_FILE=tools/aarch64.cmake)
	$(CTEST)/core-aarch64 -E fuzz_door  # it maps terabytes of addresses, of which qemu visits every page

# $(call build-core,name,options of cmake,options of the build)
define build-core
	$(BIN)/cmake -S . -B build/core-$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCOMMFUSE_TESTS=ON $(2)
	$(BIN)/cmake --build build/core-$(1) $(addprefix --parallel ,$(JOBS)) $(3)
endef
CTEST := $(BIN)/ctest --output-on-failure --test-dir build
comma := ,
ASAN := -DCOMMFUSE_SANITIZE=address$(comma)undefined
TSAN := -DCOMMFUSE_SANITIZE=thread

FUZZ_SECONDS ?= 60
fuzz: install  ## random bytes for what reads other processes' bytes: four targets, FUZZ_SECONDS=60 each
	$(call build-core,asan,$(ASAN))
	set -e; cd build/core-asan; for target in door keys publication terms; do \
	    ./fuzz_$$target --seconds $(FUZZ_SECONDS) --last fuzz_$$target.last ../../csrc/fuzz/inputs/$$target \
	        || { echo "The input is in build/core-asan/fuzz_$$target.last" >&2; exit 1; }; \
	done

model: install  ## every order of events of the windows' protocol, for 2 and 3 ranks, and its mutations
	$(BIN)/python -m model

wheel: install  ## dist/: a manylinux wheel for this machine, tried in a fresh environment, and the sdist
	sh tools/wheel.sh $(BIN) $(TORCH_INDEX)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## every case side by side with gloo, MPI (into .venv, with the extra) and the memory's own limit
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --disable-pip-version-check -q --no-build-isolation -e '.[bench]'
	$(BIN)/commfuse bench

docs: install  ## write the generated parts of docs/ anew
	$(BIN)/python -m commfuse.spec.docs
	$(BIN)/python -m tests.misuse.page

install: $(VENV)/ready  ## .venv with the pinned versions and this package

$(VENV)/ready: requirements-test.txt pyproject.toml $(SOURCES)
	@sh tools/check-machine.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --disable-pip-version-check -q --index-url $(TORCH_INDEX) torch==2.13.0)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-test.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
