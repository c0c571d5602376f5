# MXFS. On a fresh Debian 12, as root, `make demo` and `make test` install what is missing first.
# PYTHON= names another interpreter (3.11 or later) for the virtual environment.

VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint format unit sim lab pr test-vm soak cycles bench clean

help:            ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install:         ## Debian packages that are missing, and .venv with the commands in .venv/bin
	@scripts/packages
	@scripts/venv dev

demo: install    ## The main job in one minute: three nodes on this machine share one volume
	@$(VENV)/python -m mxfsd.lab.demo

test:            ## Everything that CI runs (needs root, FUSE and loop devices)
	@.ci/run

lint: install    ## ruff and mypy
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

check: lint unit ## What needs neither root nor mounts, in a minute: lint and unit tests

format: install  ## Let ruff rewrite the sources
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

unit: install    ## Unit tests
	@$(VENV)/pytest -q tests/unit

sim: install     ## The simulator's seeded runs
	@$(VENV)/pytest -q tests/sim

lab: install     ## Tests on real mounts
	@$(VENV)/pytest -q tests/lab

pr: install      ## Tests of persistent reservations on a real iSCSI target
	@$(VENV)/pytest -q tests/pr

test-vm:         ## Tests on virtual machines that share an iSCSI disk (QEMU without hardware help: some minutes)
	@scripts/packages vm
	@scripts/venv dev vm
	@MXFS_TEST_VM=1 $(VENV)/pytest -q -rA tests/vm

soak: install    ## Three nodes under load are killed, cut off and moved at random: SOAK_MINUTES=30, SOAK="--seed 7"
	@$(VENV)/python -m tests.soak $(SOAK)

cycles: install  ## Mount and unmount N=1000 times, and look for what is left behind
	@$(VENV)/python -m tests.soak.cycles -n $(or $(N),1000)

bench: install   ## The same work on native XFS, passthroughfs, an MXFS home and an MXFS node, side by side
	@scripts/venv dev bench
	@$(VENV)/python -m bench $(BENCH)

clean:           ## Remove what the targets above made
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build bench/out *.egg-info
