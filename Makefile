SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml requirements.lock scripts/setup.sh
	@scripts/setup.sh

setup: .venv/ready  ## make .venv with everything the repo needs (quick the second time)

test: .venv/ready  ## set everything up and run all tests (under 10 minutes)
	@$(PY) -m pytest -n 2 --dist worksteal --durations=8

check: .venv/ready  ## ruff and mypy, strict, over src, tests and bench
	@$(PY) -m ruff check src tests bench
	@$(PY) -m ruff format --check src tests bench
	@$(PY) -m mypy

.PHONY: help setup test check
