"""Mounting and unmounting again and again leaves nothing behind: see tests/soak/cycles.py."""

import os

import pytest
from labkit import missing_capability
from test_soak import run_to_its_end

pytestmark = pytest.mark.needs_lab
CYCLES = int(os.environ.get("CYCLES") or 200)
CYCLE_S = 1.5
"""Measured: 0.4 s where three nodes take turns at once, 1.2 s on a node alone; a busy machine needs more."""


@pytest.mark.timeout(CYCLES * CYCLE_S + 200)
def test_mounting_and_unmounting() -> None:
    """No process, descriptor, mount, loop device, namespace, file or memory more than after the first ten."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    assert run_to_its_end(["tests.soak.cycles", "-n", str(CYCLES)], CYCLES * CYCLE_S + 60) == 0
