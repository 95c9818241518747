# uncurl_jax: `make help` lists what can be made. Everything installs into virtual environments
# inside this directory, from the locks in requirements/.

PYTHON ?= python3
OUT ?= quickstart_out
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
LOCK_ARGS ?=

# Found once, when first needed; 3.11 or 3.12, or make stops with a sentence saying why not.
EXE = $(eval EXE := $$(shell requirements/find_python "$(PYTHON)"))$(or $(EXE),$(error no usable Python))
VERSION = $(eval VERSION := $$(shell $(EXE) -c 'import sys; print("%d%d" % sys.version_info[:2])'))$(VERSION)

# One stamp per Python version: another version makes the environment anew.
RUN_STAMP = .venv-run/uncurl_jax-py$(VERSION).stamp
TEST_STAMP = .venv-test/uncurl_jax-py$(VERSION).stamp
HF_STAMP = .venv-hf/uncurl_jax-py$(VERSION).stamp
T5X_STAMP = .venv-t5x/uncurl_jax-py$(VERSION).stamp
AOT_STAMP = .venv-aot/uncurl_jax-py$(VERSION).stamp

.DELETE_ON_ERROR:
.SECONDARY:
.SECONDEXPANSION:
.PHONY: help install quickstart test test-slow test-hf test-t5x test-aot browser lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train, prune and compare small models on this machine (minutes, CPU)"
	@echo "                  OUT=$(OUT)  QUICKSTART_ARGS=..."
	@echo "make install      .venv-run alone, what quickstart runs in"
	@echo "make test         the tests, without the slow ones      PYTEST_ARGS=..."
	@echo "make test-slow    the slow tests"
	@echo "make test-hf      compares imported models with transformers, which it installs (5.6 GB with torch)"
	@echo "make test-t5x     T5X_SRC=DIR, a checkout of T5X: the tests that need it (Python 3.11; docs/t5x.md)"
	@echo "make test-aot     compiles for TPU slices with libtpu, which it installs (200 MB; 15 minutes)"
	@echo "make browser      a Chromium for the tests of the report in one"
	@echo "make lint         ruff, pyright, import-linter"
	@echo "make lock         write requirements/py3*.txt again     LOCK_ARGS=--upgrade for new versions"
	@echo "make clean        remove the virtual environments and caches"
	@echo "PYTHON=...        Python 3.11 or 3.12; without it one of the two is looked for"

install: $$(RUN_STAMP)

quickstart: $$(RUN_STAMP)
	.venv-run/bin/uncurl quickstart --out "$(OUT)" $(QUICKSTART_ARGS)

test: $$(TEST_STAMP)
	.venv-test/bin/python -m pytest $(PYTEST_ARGS)

test-slow: $$(TEST_STAMP)
	.venv-test/bin/python -m pytest -m slow $(PYTEST_ARGS)

test-hf: $$(HF_STAMP)
	.venv-hf/bin/python -m pytest -m hf $(PYTEST_ARGS)

test-t5x: $$(T5X_STAMP)
	UNCURL_T5X_SRC="$(abspath $(or $(T5X_SRC),$(error give T5X_SRC, the directory of a checkout of T5X)))" \
	  .venv-t5x/bin/python -m pytest -m t5x $(PYTEST_ARGS)

test-aot: $$(AOT_STAMP)
	.venv-aot/bin/python -m pytest -m aot $(PYTEST_ARGS)

browser: $$(TEST_STAMP)
	.venv-test/bin/python -m playwright install $(if $(filter 0,$(shell id -u)),--with-deps) chromium

lint: $$(TEST_STAMP)
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv-test/bin/pyright --pythonpath .venv-test/bin/python
	.venv-test/bin/lint-imports

# $(1): directory, $(2): lock. --no-deps because a lock is complete and requirements/overrides.txt
# replaces a package; every file is checked against its hash.
define install_lock
rm -rf $(1)
$(EXE) -m venv $(1)
$(1)/bin/python -m pip install --quiet --no-deps --require-hashes -r $(2)
touch $@
endef

# The checkout itself, with the build backend of the lock; again when pyproject.toml changes.
define install_checkout
$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
touch $@
endef

.venv-run/locked-py%.stamp: requirements/py%.txt
	$(call install_lock,.venv-run,$<)

.venv-test/locked-py%.stamp: requirements/py%-dev.txt
	$(call install_lock,.venv-test,$<)

.venv-run/uncurl_jax-py%.stamp: .venv-run/locked-py%.stamp pyproject.toml
	$(call install_checkout,.venv-run)

.venv-test/uncurl_jax-py%.stamp: .venv-test/locked-py%.stamp pyproject.toml
	$(call install_checkout,.venv-test)

.venv-hf/locked-py%.stamp: requirements/py%-hf.txt
	$(call install_lock,.venv-hf,$<)

.venv-hf/uncurl_jax-py%.stamp: .venv-hf/locked-py%.stamp pyproject.toml
	$(call install_checkout,.venv-hf)

.venv-t5x/locked-py%.stamp: requirements/py%-dev.txt
	$(call install_lock,.venv-t5x,$<)

# The extra's packages that the lock lacks; what it has stays.
.venv-t5x/uncurl_jax-py%.stamp: .venv-t5x/locked-py%.stamp pyproject.toml
	.venv-t5x/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb")) \
	  ["project"]["optional-dependencies"]["t5x"], sep="\n")' > .venv-t5x/t5x.txt
	.venv-t5x/bin/python -m pip install --quiet -r .venv-t5x/t5x.txt
	$(call install_checkout,.venv-t5x)

# The locks hold no libtpu, which nothing else needs: it is the one that the locked jax asks for.
.venv-aot/locked-py%.stamp: requirements/py%-dev.txt
	$(call install_lock,.venv-aot,$<)

.venv-aot/uncurl_jax-py%.stamp: .venv-aot/locked-py%.stamp pyproject.toml
	.venv-aot/bin/python -m pip install --quiet --no-deps "$$(.venv-aot/bin/python -c \
	  'from importlib import metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if "libtpu" in r))')"
	$(call install_checkout,.venv-aot)

.venv-lock/bin/uv:
	$(EXE) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "uv>=0.13,<0.14"

COMPILE = .venv-lock/bin/uv pip compile --quiet --no-python-downloads --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
  --override requirements/overrides.txt $(LOCK_ARGS) pyproject.toml requirements/lock.in

# The locks of development hold the same versions as those of running. Versions that still fit
# stay, unless LOCK_ARGS=--upgrade.
lock: .venv-lock/bin/uv
	$(COMPILE) --python-version 3.11 -o requirements/py311.txt
	$(COMPILE) --python-version 3.12 -o requirements/py312.txt
	$(COMPILE) --python-version 3.11 --extra dev -c requirements/py311.txt -o requirements/py311-dev.txt
	$(COMPILE) --python-version 3.12 --extra dev -c requirements/py312.txt -o requirements/py312-dev.txt
	$(COMPILE) --python-version 3.11 --extra dev,reference -c requirements/py311-dev.txt -o requirements/py311-hf.txt
	$(COMPILE) --python-version 3.12 --extra dev,reference -c requirements/py312-dev.txt -o requirements/py312-hf.txt

clean:
	rm -rf .venv-run .venv-test .venv-hf .venv-aot .venv-lock .pytest_cache .ruff_cache .hypothesis build dist
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
