# make demo | make test need nothing done before them but python3 (with venv), make and a C++20
# compiler. Everything is installed into .venv; a second run only redoes what changed.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE $(shell find src csrc -type f \
  \( -name '*.py' -o -name '*.typed' -o -name '*.html' -o -name '*.js' -o -name '*.css' \
  -o -name '*.cpp' -o -name '*.h' \))
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h')

EXAMPLES := translation summarisation generation speech images

.PHONY: venv install build demo test test-kernels test-neon test-browser check bench bench-peers \
  pictures wheel docs clean examples $(EXAMPLES:%=example-%)

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

# The kernels alone, without torch, in build/kernels/$(1). $(2): more for cmake; $(3): what runs the
# tests; $(4): how many random calls.
define check-kernels
	@mkdir -p build/kernels
	$(BIN)/cmake -S . -B build/kernels/$(1) -G Ninja -DMANYHEADS_KERNEL_TESTS=ON $(2) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja > build/kernels/$(1).log
	$(BIN)/cmake --build build/kernels/$(1)
	$(3) build/kernels/$(1)/tests/kernels/check_kernels $(4)
endef

test-kernels: .venv/.requirements
	$(call check-kernels,plain,,,1000)
	$(call check-kernels,address,'-DMANYHEADS_SANITIZE=address;undefined',,300)
	$(call check-kernels,thread,-DMANYHEADS_SANITIZE=thread,,60)

# For 64-bit ARM, cross-compiled and emulated; nothing is installed here. tests/test_build.py looks
# for weak symbols in the other instruction sets' files.
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
test-neon: .venv/.requirements
	@for tool in $(NEON_CXX) $(firstword $(NEON_RUN)); do command -v $$tool > /dev/null || { \
	  echo "make test-neon needs $$tool, which is not on the PATH. On Debian or Ubuntu:" \
	    "apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	@mkdir -p build/kernels
	$(NEON_CXX) -std=c++20 -O0 -c csrc/isa_neon.cpp -o build/kernels/isa_neon.o
	! readelf --symbols --wide --demangle build/kernels/isa_neon.o | grep -E ' (WEAK|UNIQUE) |std::'
	$(call check-kernels,neon,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(NEON_CXX),$(NEON_RUN),400)

# The page of `mh.view` in a real browser; nothing is installed here.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-browser: install
	@test -n "$(CHROMIUM)" || { echo "make test-browser needs Chromium, which is not on the PATH." \
	  "On Debian or Ubuntu: apt-get install chromium; or make test-browser CHROMIUM=/path/to/it"; \
	  exit 1; }
	MANYHEADS_CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest -q tests/browser

pictures: install
	@test -n "$(CHROMIUM)" || { echo "make pictures needs Chromium: apt-get install chromium"; exit 1; }
	MANYHEADS_CHROMIUM="$(CHROMIUM)" $(BIN)/python docs/pictures.py

check: install test-kernels
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python benchmarks/attention.py --write

# Trains and measures; what the page says of examples that are not run stays.
examples: install
	$(BIN)/python examples/results.py

$(EXAMPLES:%=example-%): example-%: install
	$(BIN)/python examples/results.py $*

# Others' attention, each in an environment of its own, since they pin other things; `make bench`
# times those that are there. They take 2 GB.
PEERS := onnxruntime openvino zentorch
bench-peers: $(PEERS:%=build/peers/%/.installed)

build/peers/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv build/peers/$*
	build/peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

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
