"""The timeouts, and the worked timeline in docs/timeouts.md."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mxfs_proto.errors import MisuseError
from mxfsd.core.timeouts import Timeouts

DOC = Path(__file__).parents[2] / "docs" / "timeouts.md"
NAMES = ("fast", "default", "patient")


def test_default_values_are_those_of_the_seed() -> None:
    """Lease 5 s, renewal 2 s, dead 15 s, lock wait 30 s, BAST 10 s (DESIGN section 4)."""
    t = Timeouts.named("default")
    assert (t.lease_ms, t.renewal_ms, t.node_dead_ms, t.lock_wait_ms, t.bast_ms) == (5000, 2000, 15000, 30000, 10000)
    assert (t.min_hold_ms, t.ready_ms, t.claim_wait_ms) == (1, 30000, 300)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_caches_end_before_the_lease(name: str) -> None:
    """A kernel cache filled just before the last renewal failed is void before the lease is."""
    t = Timeouts.named(name)
    assert t.kernel_cache_ms + t.renewal_ms < t.lease_ms
    assert t.self_fence_ms + 2 * t.heartbeat_ms < t.node_dead_ms


def test_unknown_name() -> None:
    with pytest.raises(MisuseError, match="fast, default or patient"):
        Timeouts.named("slow")


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_cache_ms": 3000},
        {"heartbeat_ms": 0},
        {"self_fence_ms": 13000},
        {"self_fence_ms": 4999},
        {"claim_bound_ms": 250},
        {"renewal_ms": 2600},
        {"renewal_ms": 2300},  # no room for the margin of self-fencing
        {"watchdog_ms": 4999},
        {"watchdog_ms": 10001},
        {"node_dead_ms": 9999, "self_fence_ms": 5000},
        {"node_dead_ms": 30000},
    ],
)
def test_contradictions_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(MisuseError, match="rule"):
        replace(Timeouts.named("default"), **change)


def test_table_in_the_document() -> None:
    """Each row of the table says what the code says."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|", DOC.read_text(), re.MULTILINE)
    written = {row[0]: tuple(int(value) for value in row[1:]) for row in rows}
    sets = [Timeouts.named(name) for name in NAMES]
    assert written == {field.name: tuple(getattr(t, field.name) for t in sets) for field in fields(Timeouts)}


def test_timeline_in_the_document() -> None:
    """Every ``[expression] = number`` of the timeline is evaluated with the default values."""
    t = Timeouts.named("default")
    values = {field.name: getattr(t, field.name) for field in fields(t)}
    claims = re.findall(r"`([a-z_ 0-9+*-]+)` = (\d+)", DOC.read_text())
    assert len(claims) >= 8
    for expression, number in claims:
        total = sum(_term(term, values) for term in expression.replace("- ", "+ -1 * ").split("+"))
        assert total == int(number), expression


def _term(term: str, values: dict[str, int]) -> int:
    product = 1
    for factor in term.split("*"):
        name = factor.strip()
        product *= int(name) if name.lstrip("-").isdigit() else values[name]
    return product
