"""The soak for SOAK_MINUTES (3) from SOAK_SEED (22): see tests/soak; `make soak` takes any seed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from labkit import missing_capability

pytestmark = pytest.mark.needs_lab
MINUTES = float(os.environ.get("SOAK_MINUTES") or 3)
SEED = os.environ.get("SOAK_SEED") or "22"
MORE_S = 300
"""For an event under way, the last check, the end of the lab and xfs_repair."""


def run_to_its_end(argv: list[str], limit_s: float) -> int:
    """Run a program of the project in the foreground; one that hangs is interrupted, and takes its lab down."""
    process = subprocess.Popen([sys.executable, "-m", *argv], cwd=Path(__file__).parents[2])
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(120)
        raise


@pytest.mark.timeout(MINUTES * 60 + MORE_S + 150)
def test_soak() -> None:
    """Nothing acknowledged is lost, nobody sees an error, nothing is left behind; the output has the seed."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    assert run_to_its_end(["tests.soak", "--minutes", str(MINUTES), "--seed", SEED], MINUTES * 60 + MORE_S) == 0
