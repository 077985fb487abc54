# The commands of this project. `make demo` and `make test` need nothing prepared but python3 (with venv and headers), make and g++.

PYTHON ?= python3
# An index with CPU builds of torch, if you have one: without it pip takes the default build, which brings several GB of CUDA.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: help demo test test-all test-core lint docs install clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: install  ## an expert-parallel MoE layer over real processes, every token compared
	$(BIN)/commfuse demo

test: install lint  ## linters, types and all tests
	$(BIN)/python -m pytest

test-all: install lint  ## also the long tests: more random cases of the same kinds
	$(BIN)/python -m pytest --long

test-core: install  ## the C++ core's own tests: plain, with address and undefined-behaviour sanitizers, with the thread sanitizer
	set -e; for sanitize in "" address,undefined thread; do \
	    build=build/core-$${sanitize:-plain}; \
	    $(BIN)/cmake -S . -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCOMMFUSE_TESTS=ON -DCOMMFUSE_SANITIZE=$$sanitize; \
	    $(BIN)/cmake --build $$build; \
	    $(BIN)/ctest --test-dir $$build --output-on-failure; \
	done

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## write the generated parts of docs/ anew
	$(BIN)/python -m commfuse.spec.docs

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
