# Targets: env, demo, test, test-layouts, test-faults, test-slurm, test-browser,
# test-transformer-engine, mutants (does each wrong line turn a test red?), check, benchmark,
# gpu-acceptance, gpu-wheels. They work from any folder (make -C, make -f) and set up .venv first.
# Choices: EXTRAS=dev,gpu (installed beside the library), TEST_PROCESSES=2 (also of mutants), ARGS="..."
# (for nemotron-train, pytest, mutants, such as "-k data", the benchmark or the acceptance); with gpu:
# GPU_ARCH=90, MAX_JOBS=8, GPU_STRICT=1,
# GPU_PACKAGES="..." (docs/gpu.md).

root := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
venv := $(root)/.venv
python := $(venv)/bin/python
stamp := $(venv)/.installed
scan := $(venv)/test_packages/mamba_ssm/.installed
engine := $(venv)/test_packages/transformer_engine/.installed

EXTRAS ?= dev
# What pip installs by itself. The GPU packages need torch first (launch/gpu_packages.sh).
comma := ,
empty :=
space := $(empty) $(empty)
extras_list := $(subst $(comma),$(space),$(EXTRAS))
bracketed = $(if $(strip $(1)),[$(subst $(space),$(comma),$(strip $(1)))])
pip_extras := $(filter-out gpu,$(extras_list))
TEST_PROCESSES ?= 2
ARGS ?=

# Settings of the user's own pip and Python that would send packages elsewhere, drop dependencies or
# fight constraints.txt. Where packages come from (index, proxy, certificates) stays the user's.
clean_env := env -u PYTHONPATH -u PYTHONHOME -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT \
	-u PIP_NO_DEPS -u PIP_PREFIX -u PIP_REQUIRE_VIRTUALENV -u PIP_ROOT -u PIP_TARGET -u PIP_USER \
	-u PIP_REQUIRE_HASHES -u PIP_IGNORE_INSTALLED

.DEFAULT_GOAL := help
.PHONY: help env env-gpu demo test test-layouts test-faults test-slurm test-browser \
	test-transformer-engine mutants check benchmark gpu-acceptance gpu-wheels

help:
	@sed -n 's/^# //;1,7p' '$(lastword $(MAKEFILE_LIST))'

env: $(stamp) $(if $(filter dev,$(extras_list)),$(scan)) $(if $(filter gpu,$(extras_list)),env-gpu)

# A package that cannot be installed is named in one line, and the others are installed. The choices
# reach the script because make exports variables of its command line.
env-gpu: $(stamp)
	@$(clean_env) '$(root)/launch/gpu_packages.sh' '$(python)'

# mamba_ssm's Triton kernels for the tests, which interpret them on a CPU: in a folder of their own,
# where nothing else finds them. If they cannot be had, one line says so and their tests are skipped.
$(scan): $(root)/constraints-gpu.txt | $(stamp)
	@rm -rf '$(@D)' && mkdir -p '$(@D)'
	@if said=$$($(clean_env) PIP_TARGET='$(@D)' PYTHONPATH='$(@D)' GPU_ARCH=90 GPU_STRICT=1 \
		GPU_PACKAGES=mamba-ssm '$(root)/launch/gpu_packages.sh' '$(python)' 2>&1); then \
		touch '$@'; \
	else \
		echo "mamba_ssm's kernels will not be tested: $$(echo "$$said" | tail -n 1)" >&2; \
	fi

# Transformer Engine's Python, and the source of its C++ half, which is read and never compiled.
$(engine): $(root)/constraints-gpu.txt | $(stamp)
	@rm -rf '$(@D)' && mkdir -p '$(@D)/source'
	@cd '$(root)' && $(clean_env) '$(python)' -m pip install --quiet --disable-pip-version-check \
		--no-deps --constraint constraints.txt --constraint constraints-gpu.txt --target '$(@D)' \
		transformer-engine einops ml-dtypes onnx onnx-ir onnxscript
	@cd '$(root)' && $(clean_env) '$(python)' -m pip download --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --no-binary :all: --constraint constraints-gpu.txt \
		--dest '$(@D)/source' transformer-engine-torch
	@cd '$(@D)/source' && tar --extract --gzip --strip-components=1 --file *.tar.gz
	@touch '$@'

# Looks for a Python 3.12 that really runs: a pyenv shim exists even where its version is not
# selected, and Debian's python3.12 may lack venv. The existing .venv is kept if it is a 3.12.
$(stamp): $(root)/pyproject.toml $(root)/constraints.txt
	@runs() { "$$@" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' \
		>/dev/null 2>&1; }; \
	if ! runs '$(python)'; then \
		found=; \
		for candidate in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
				python3 python; do \
			if runs "$$candidate"; then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ] && command -v uv >/dev/null 2>&1; then \
			found=$$(uv python find 3.12 2>/dev/null || \
				{ uv python install 3.12 >&2 && uv python find 3.12; }); \
		fi; \
		if [ -z "$$found" ] || ! runs "$$found"; then \
			echo 'No Python 3.12 found (megatron-core needs it): install one, for example with' \
				'"pyenv install 3.12" or "uv python install 3.12", then run make again.' >&2; \
			exit 2; \
		fi; \
		rm -rf '$(venv)' && $(clean_env) "$$found" -m venv '$(venv)'; \
	fi
	@echo 'Installing into $(venv): a few minutes and about 5 GB the first time.'
	@cd '$(root)' && $(clean_env) '$(python)' -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.$(call bracketed,$(pip_extras))'
	@touch '$@'

demo: $(stamp)
	'$(venv)/bin/nemotron-train' pretrain $(ARGS)

test: $(stamp) $(scan)
	cd '$(root)' && '$(python)' -m pytest --quiet --numprocesses $(TEST_PROCESSES) $(ARGS)

test-layouts: $(stamp)
	cd '$(root)' && '$(python)' -m pytest --quiet -m layouts $(ARGS)

test-faults: $(stamp)
	cd '$(root)' && '$(python)' -m pytest --quiet -m 'faults or not faults' $(ARGS) tests/faults

# Needs root and the packages that launch/lab.sh names; installs nothing.
test-slurm: $(stamp)
	cd '$(root)' && '$(python)' -m pytest --quiet -m slurm $(ARGS) tests/slurm

# Real Transformer Engine on a pretended GPU, without its C++ half (docs/gpu.md). Five minutes.
test-transformer-engine: $(stamp) $(engine)
	cd '$(root)' && '$(python)' -m pytest --quiet -m transformer_engine $(ARGS) \
		tests/platform/transformer_engine

# Needs Chromium (Debian: chromium) and is skipped without it.
test-browser: $(stamp)
	cd '$(root)' && '$(python)' -m pytest --quiet -m browser $(ARGS) tests/report/html/test_browser.py

# Half an hour: applies each entry of tests/mutants/list to a copy and runs the tests it names.
mutants: $(stamp)
	cd '$(root)' && '$(python)' tests/mutants/run.py --jobs $(TEST_PROCESSES) $(ARGS)

check: $(stamp)
	cd '$(root)' && '$(python)' -m ruff check .
	cd '$(root)' && '$(python)' -m ruff format --check .
	cd '$(root)' && '$(python)' -m pyright
	cd '$(root)' && '$(python)' -m pytest --quiet tests/test_architecture.py

benchmark: $(stamp)
	cd '$(root)' && $(clean_env) '$(python)' -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.$(call bracketed,$(pip_extras) benchmark)'
	cd '$(root)' && '$(python)' benchmarks/cpu_step.py $(ARGS)

# The first eight minutes on a GPU (docs/gpu.md). ARGS=--pretend runs it on a machine without one.
gpu-acceptance: $(stamp)
	cd '$(root)' && '$(python)' -m benchmarks.gpu_acceptance $(ARGS)

# What a GPU machine without a network must be brought for it, in dist/gpu_wheels.
gpu-wheels: $(stamp)
	cd '$(root)' && '$(python)' -m benchmarks.gpu_acceptance.wheels collect $(ARGS)
