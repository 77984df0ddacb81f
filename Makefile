SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
HOLDFAST := .venv/bin/holdfast
KILLS ?= 60
SEED ?= 7
CANDLES ?=
TIME_CAP ?= 3600

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml requirements.lock scripts/setup.sh
	@scripts/setup.sh

setup: .venv/ready  ## make .venv with everything the repo needs (quick the second time)

run: .venv/ready  ## the main job: a live paper run, killed again and again, and at every step, ends as if never killed (CANDLES=FILE, KILLS=60, SEED=7)
	@$(HOLDFAST) torture examples/bot.py --kills $(KILLS) --steps --seed $(SEED) $(if $(CANDLES),--market $(CANDLES))

servers: .venv/ready  ## get what the tests start on loopback (Valkey, Redis, PostgreSQL, SecantusDB, Ceph, moto, …)
	@$(PY) scripts/servers.py install
	@cd tests && ../$(PY) -m servers.losing_disk

test: servers  ## set everything up and run all tests (under 10 minutes)
	@$(PY) -m pytest -n 4 --dist worksteal --durations=8

check: .venv/ready  ## ruff and mypy, strict
	@$(PY) -m ruff check src tests bench scripts examples
	@$(PY) -m ruff format --check src tests bench scripts examples
	@$(PY) -m mypy

bench: .venv/ready  ## speed, as ratios to a floor measured in the same run
	@$(PY) -m bench

bench-rivals: servers  ## the same row through other packages, and what each flushes; writes docs/rivals.md
	@$(PY) -m bench.rivals

mutants: .venv/ready  ## plant one-line defects, one at a time; the suite must catch each
	@$(PY) scripts/mutants.py

torture: servers  ## the long hunt over every storage: kills of bot and server, races, lost power; resumable (TIME_CAP=seconds, SEED)
	@$(PY) tests/long_hunt.py --seed $(SEED) --time-cap $(TIME_CAP) --resume build/torture

docs: .venv/ready  ## run every example in README and docs, and draw the picture in the README anew
	@$(PY) -m pytest tests/test_docs.py
	@$(PY) scripts/picture.py

lock: .venv/ready  ## write requirements.lock anew from requirements.in
	@$(PY) -m pip install --quiet pip-tools
	@.venv/bin/pip-compile --quiet --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --strip-extras --no-header -o requirements.lock requirements.in

.PHONY: help setup run servers test check bench bench-rivals mutants torture docs lock
