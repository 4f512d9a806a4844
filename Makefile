# Two commands do everything: `make reproduce` and `make test`. See README.md.
SHELL := /bin/bash
PYTHON ?= python3
# A variable that is set to nothing is not set.
override PROFILE := $(or $(PROFILE),demo)
override RUN := $(or $(RUN),$(PROFILE))
override SEED := $(or $(SEED),0)
override SEEDS := $(or $(SEEDS),$(SEED))
override OVERRIDES := $(or $(OVERRIDES),{})
SOURCES ?=
override SHARDS := $(or $(SHARDS),1)
override JOBS := $(or $(JOBS),2)
override CORES := $(or $(CORES),$(shell nproc 2>/dev/null || sysctl -n hw.ncpu))

KNOWN := PROFILE RUN SEED SEEDS OVERRIDES SOURCES SHARDS JOBS CORES PYTHON VENV WHAT GIVEN
STRANGE := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(filter-out $(KNOWN),$(name)))))
$(if $(STRANGE),$(error psycopref: there is no $(firstword $(STRANGE)); known are $(KNOWN)))

VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup reproduce test test-chains bench notebooks clean
.DEFAULT_GOAL := help

help:
	@echo "make setup       environment in .venv, versions as in constraints.txt"
	@echo "make reproduce   the whole study; PROFILE=demo (default), tiny, laptop or paper; RUN, SEED or SEEDS=0,1,2, OVERRIDES, SOURCES, SHARDS"
	@echo "make test        notebooks and tests, JOBS=2 at a time; make test-chains: chains of notebooks that CI runs too"
	@echo "make notebooks   copy the outputs of a finished run's chapters into nbs/, and its seeds into results/; RUN"
	@echo "make bench       measure what is claimed to be fast; WHAT=reward GIVEN=DTYPE=float32 does one of them, WHAT=faults counts bad input"
	@echo "make clean       remove results (outputs/, figures/), keep the environment and downloaded weights"

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5) and "make setup: Python 3.11.5 or newer is needed by what is pinned, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { echo "make setup: venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# What was typed goes through the environment, so that no shell reads it. Names stand in brackets: Snakemake would read
# 2025_02 as the number 202502, in quotes too.
CONFIG = profile="[\"$$GIVEN_PROFILE\"]" run="[\"$$GIVEN_RUN\"]" seeds="[\"$$GIVEN_SEEDS\"]" overrides="$$GIVEN_OVERRIDES" sources="$$GIVEN_SOURCES" shards="[\"$$GIVEN_SHARDS\"]"
SNAKEMAKE = snakemake --cores "$$GIVEN_CORES" --scheduler greedy --nolock --rerun-incomplete --config $(CONFIG)
LOG = outputs/$(RUN)/snakemake.log
KEPT = what is finished is kept, and the same command goes on from there

# Snakemake runs as a group of its own: an interrupt, however it comes, reaches all of it once, and we tell how to go on.
reproduce: export GIVEN_PROFILE := $(PROFILE)
reproduce: export GIVEN_RUN := $(RUN)
reproduce: export GIVEN_SEEDS := $(SEEDS)
reproduce: export GIVEN_OVERRIDES := $(OVERRIDES)
reproduce: export GIVEN_SOURCES := $(SOURCES)
reproduce: export GIVEN_SHARDS := $(SHARDS)
reproduce: export GIVEN_CORES := $(CORES)
reproduce: setup
	@what=profile; for name in "$$GIVEN_PROFILE" "$$GIVEN_RUN"; do case "$$name" in *[!A-Za-z0-9._-]* | [._-]*) echo "psycopref: $$what '$$name': use letters, digits, '.', '_' and '-' only" >&2; exit 1 ;; esac; what="run name"; done
	@case "$$GIVEN_CORES" in '' | 0* | *[!0-9]*) echo "psycopref: CORES=$$GIVEN_CORES: expected a whole number from 1 on" >&2; exit 1 ;; esac
	@mkdir -p outputs/$(RUN); set -m; trap 'asked=1; kill -INT -- -$$(jobs -p) 2>/dev/null' INT TERM HUP; \
	PSYCOPREF_LOG=$(LOG) $(SNAKEMAKE) 2>$(LOG) </dev/null & set +m; \
	while wait $$!; code=$$?; kill -0 $$! 2>/dev/null; do :; done; test $$code = 0 && exit; \
	test "$$asked" || grep -q '^Building DAG' $(LOG) || { tail -n 3 $(LOG) >&2; \
		if grep -q '^psycopref: ' $(LOG); then rm -f $(LOG); rmdir outputs/$(RUN) 2>/dev/null; exit $$code; fi; }; \
	echo "Stopped: $(KEPT). Log: $(LOG)" >&2; exit $$code
	@cp -p outputs/$(RUN)/13_report/overview.html outputs/$(RUN)/report.html; cp -p outputs/$(RUN)/13_report/browse.html outputs/$(RUN)/
	@psycopref summary $(RUN)
	@echo "Open outputs/$(RUN)/report.html, and outputs/$(RUN)/browse.html for the answers"

test: export OMP_NUM_THREADS = 1
test: setup
	nbdev_test --n_workers $(JOBS)
	pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-chains: export OMP_NUM_THREADS = 1
test-chains: setup
	pytest -n $(JOBS) --dist loadfile -m chain

WHAT ?= bench_machine bench_generation bench_reward bench_policy bench_duplicates bench_gateway

bench: setup
	@for name in $(patsubst bench_%,%,$(WHAT)); do SECONDS=0; python tests/bench/bench_$$name.py $(GIVEN) || exit 1; echo "$$name: $$SECONDS s"; done

notebooks: setup
	psycopref notebooks $(RUN)
	nbdev_clean

clean:
	find outputs figures -mindepth 1 -maxdepth 1 ! -name README.md ! -name results.png -exec rm -rf {} +
	rm -rf .snakemake
