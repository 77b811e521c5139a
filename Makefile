# make demo   what the product does, in under three minutes: bucket -> regions -> captions -> report
# make test   the default tests, or TESTS=tests/...        make check   style, types, import contracts
# make faults every fault that a run must survive, one after the other; FAULTS="--short" for a few
#
# Needs python3.11 or python3.12 and nothing else. PYTHON=/path/to/python chooses another one.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3 python,$(shell $(p) -c \
	'import sys; print("$(p)" if (3, 11) <= sys.version_info[:2] < (3, 13) else "")' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The small DAM that comes with the package; it was trained on synthetic pictures only.
MODEL ?= meddam_core/models/meddam-tiny
PACKAGES := meddam_core qa_library ray_jobs

export HF_HUB_OFFLINE = 1
export NO_ALBUMENTATIONS_UPDATE = 1
export TOKENIZERS_PARALLELISM = false
export RAY_USAGE_STATS_ENABLED = 0
export RAY_AUTH_MODE ?= disabled

.PHONY: install demo test faults check format clean

install: $(STAMP)

# torch first, by its exact pin: any range would let another package choose its build, with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps deepspeed-mii==0.3.3
	@touch $@

demo: $(STAMP)
	$(BIN)/meddam demo --model $(MODEL) $(DEMO)

# Files of tests are dealt to two processes, each with a Ray session and an S3 server of its own.
test: $(STAMP)
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
endif

faults: $(STAMP)
	$(BIN)/python -m tests.faults.suite $(FAULTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
