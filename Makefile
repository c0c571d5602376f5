# MXFS. On a fresh Debian 12, as root, `make demo` and `make test` install what is missing first.
# PYTHON= names another interpreter (3.11 or later) for the virtual environment.

VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint format unit sim lab locks pr test-vm soak cycles bench fuzz clean

help:            ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install:         ## Debian packages that are missing, and .venv with the commands in .venv/bin
	@scripts/packages
	@scripts/venv dev

demo: install    ## The main job in one minute: three nodes on this machine share one volume
	@$(VENV)/python -m mxfsd.lab.demo

test:            ## Everything that CI runs (needs root, FUSE, loop devices and QEMU; an hour)
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

locks: install   ## File locks at length: CALLS=50000 random calls, TRANSACTIONS=2000 of SQLite and MAILS=200 a node
	@MXFS_LOCK_CALLS=$(or $(CALLS),50000) MXFS_LOCK_TRANSACTIONS=$(or $(TRANSACTIONS),2000) MXFS_LOCK_MAILS=$(or $(MAILS),200) \
		$(VENV)/pytest -q tests/lab/test_file_locks.py

pr: install      ## Tests of persistent reservations on a real iSCSI target
	@$(VENV)/pytest -q tests/pr

test-vm:         ## Tests on virtual machines that share an iSCSI disk (some minutes); KERNEL=backports: with that kernel
	@scripts/packages vm
	@scripts/venv dev vm
	@case "$(KERNEL)" in ""|backports) ;; *) echo "make test-vm: KERNEL=$(KERNEL): backports, or nothing" >&2; exit 2;; esac
	@kernel=$$([ -z "$(KERNEL)" ] || scripts/backports-kernel) && \
	MXFS_TEST_VM=1 MXFS_VM_KERNEL=$$kernel $(VENV)/pytest -q -rA tests/vm

soak: install    ## Three nodes under load are killed, cut off and moved at random: SOAK_MINUTES=30, SOAK="--seed 7"
	@$(VENV)/python -m tests.soak $(SOAK)

cycles: install  ## Mount and unmount N=1000 times, and look for what is left behind
	@$(VENV)/python -m tests.soak.cycles -n $(or $(N),1000)

bench: install   ## The same work on native XFS, passthroughfs, an MXFS home and an MXFS node, side by side
	@scripts/venv dev bench
	@$(VENV)/python -m bench $(BENCH)

fuzz: install    ## The FUSE channel's parser, guided by coverage, for FUZZ=60 seconds
	@scripts/venv dev fuzz
	@$(VENV)/python -m tests.fuzz $(or $(FUZZ),60)

clean:           ## Remove what the targets above made
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build bench/out *.egg-info
