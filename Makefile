# What a person types. Each target first brings the machine up to date with packaging/bootstrap.sh, which
# takes a fraction of a second when nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-fuzz test-vm bench check image lock clean

BIN := .venv/bin
BOOTSTRAP := packaging/bootstrap.sh

# $(call need_root,what for): jails are made of namespaces and cgroups, which only root may make.
need_root = [ "$$(id -u)" = 0 ] || { \
	echo "make $@ must run as root: it $(1). Type: sudo make $@" >&2; exit 1; }

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: ## install what is missing: system packages if root, and .venv
	@$(BOOTSTRAP)

demo: ## the main job once, on this machine: deploy, chat, lose an edge, go on (root)
	@$(call need_root,installs etcd with apt and jails each agent in its own namespaces and cgroups)
	@$(BOOTSTRAP)
	@$(BIN)/python examples/demo.py

test: ## all tests, against a real etcd and real jails (root); ARGS="-k text" picks some
	@$(call need_root,installs etcd and container tools with apt and tests real jails)
	@$(BOOTSTRAP) --test
	@$(BIN)/pytest $(ARGS)

test-faults: ## 300 faults while clients work, then a verdict: 10 min; ARGS="--seed 7 --faults 50" (root)
	@$(call need_root,tests real jails)
	@$(BOOTSTRAP) --test
	@$(BIN)/pytest -q -m faults tests
	@$(BIN)/python -m tests.faults.run $(ARGS)

test-fuzz: ## jails for ten minutes: random system calls, random lives and deaths, 2,000 cycles (root)
	@$(call need_root,tests real jails)
	@$(BOOTSTRAP) --test
	@$(BIN)/pytest -m fuzz tests/jail $(ARGS)

test-vm: ## jails under cgroup v2 and the systemd service, in a booted Debian box (root, Debian 12; slow without KVM)
	@$(call need_root,installs qemu and mmdebstrap with apt and makes a disk)
	@$(BOOTSTRAP) --vm
	@packaging/vm/run.sh .cache/vm $(ARGS)

BENCH_EXTRA = $(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["optional-dependencies"]["bench"], sep="\n")'

# What pip has no build of for this Python, a benchmark goes without, and says so.
bench: ## measures, beside peers, into bench/out/; NAME=escape picks one (root)
	@$(call need_root,measures real jails)
	@$(BOOTSTRAP) --bench
	@$(BIN)/python -c 'import matplotlib, sandlock' 2>/dev/null || $(BENCH_EXTRA) | \
		xargs -d '\n' -n 1 $(BIN)/python -m pip install -qq --disable-pip-version-check || true
	@$(BIN)/python -m bench.run $(NAME)

check: ## format, lint, types, import rules, unit tests: a minute and a half, no root
	@$(BOOTSTRAP)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/pytest -q tests/unit

image: ## the coordinator's container image, from a base made here; BASE=name takes another (root)
	@$(call need_root,installs container tools with apt and builds the image in a chroot)
	@$(BOOTSTRAP) --image
	@packaging/coordinator/build.sh $(if $(BASE),--base $(BASE))

lock: ## renew requirements.lock with the newest versions that pyproject.toml allows
	@$(BOOTSTRAP)
	@packaging/lock.sh

clean: ## remove all that the targets above made in this directory
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .hypothesis packaging/coordinator/wheels bench/out
	rm -f protos/v1/*_pb2*.py protos/v1/*_pb2*.pyi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
