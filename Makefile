# make demo | make test need nothing done before them but python3 (with venv), make and a C++20
# compiler. Everything is installed into .venv; a second run only redoes what changed.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE $(shell find src csrc -type f \
  \( -name '*.py' -o -name '*.typed' -o -name '*.cpp' -o -name '*.h' \))
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: venv install build demo test check bench wheel docs clean

venv: .venv/.requirements
install: .venv/.installed

.venv/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "manyheads needs Python 3.10 or newer, got %d.%d; try make PYTHON=python3.12" \
	  % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed: .venv/.requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  --no-deps --force-reinstall .
	@touch $@

# For work on the kernels: an in-place library beside the Python sources, rebuilt in seconds. Use it
# with PYTHONPATH=src.
build: .venv/.requirements
	@test -f build/native/build.ninja || $(BIN)/cmake -S . -B build/native -G Ninja \
	  -DMANYHEADS_IN_PLACE=ON -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/native

demo: install
	$(BIN)/manyheads demo

test: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python benchmarks/attention.py

wheel: .venv/.requirements
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist \
	  --exclude libtorch_cpu.so --exclude libtorch.so --exclude libc10.so build/wheel/*.whl
	@ls -l dist

docs: .venv/.requirements
	$(BIN)/mkdocs build --strict --site-dir build/docs

clean:
	rm -rf build dist src/manyheads/libmanyheads.so .venv/.installed
