"""Nodes die in every way, the others go on and nothing acknowledged is lost: thousands of seeded runs.

``FAILOVER_SEEDS=N`` runs N seeds instead of the usual number, ``FAILOVER_FIRST=N`` begins at another one.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
from failover import simulate
from failover_faults import KINDS
from simcheck import Broken

SEEDS = int(os.environ.get("FAILOVER_SEEDS", "17600"))
LOCK_SEEDS = int(os.environ.get("FAILOVER_LOCK_SEEDS", "1600"))
FIRST = int(os.environ.get("FAILOVER_FIRST", "0"))
WORKERS = 2
CHUNK = 100

NAMED = {
    12579: "a claim of the lease given up by a node that was paused in it: nobody else may take it",
    22599: "the same after the disk was away",
    1661: "the slot of a living member cannot be read while a new home looks who may hold locks",
    181: "the home lost power while it wrote its slot: its record stays unreadable",
    23827: "a restarted daemon gets another slot, as its own cannot be read, and says that it goes on",
    20612: "an fsync waits while the lower file system of its node goes down unflushed",
    222: "data kept for a new home is sent again in another order than it was written",
    17: "a resumption that was broken off goes on after the next one",
    676: "a reply comes over a later connection than its operation, and brings a grant of the time before",
    1129: "an append without outcome, whose intent others did not write over",
    12355: "a write that was unanswered when its node became the home",
    170: "an append that others overtook when the home died",
    239: "a write that is durable when it is answered, after one that is kept",
}
"""Seeds that found something while this simulator was made, in it or in the code."""


def shard(first: int, count: int, lockers: int = 0) -> tuple[Counter[str], list[str]]:
    """Run seeds in a process of its own; return what happened, and the messages of those that failed."""
    seen: Counter[str] = Counter()
    failures = []
    for seed in range(first, first + count):
        try:
            world = simulate(seed, lockers=lockers)
        except Broken as exc:
            failures.append(str(exc))
            continue
        seen.update(world.claims.counts)
        seen.update(world.ledger.counts)
        seen.update(kind.split("@")[0] for kind in world.faults)
        seen.update({world.agent: 1, "takeovers": world.takeovers - 1, "deaths": world.deaths})
        seen.update({"step downs": world.step_downs, "damaged": world.disk.tears, "ended": 1})
    return seen, failures


def shards(seeds: int) -> Iterator[tuple[int, int]]:
    for first in range(FIRST, FIRST + seeds, CHUNK):
        yield first, min(CHUNK, FIRST + seeds - first)


def run_all(seeds: int, lockers: int = 0) -> Counter[str]:
    """Run so many seeds; return what happened, all together."""
    seen: Counter[str] = Counter()
    failures: list[str] = []
    with ProcessPoolExecutor(WORKERS) as pool:
        for done in as_completed([pool.submit(shard, *each, lockers) for each in shards(seeds)]):
            happened, failed = done.result()
            seen.update(happened)
            failures += failed
    assert not failures, "\n".join([f"{len(failures)} seeds fail:", *failures[:10]])
    assert seen["ended"] == seeds
    return seen


@pytest.mark.timeout(900)
def test_file_locks_are_kept_and_end_with_their_node() -> None:
    """Two processes of each node lock two files: no two have what conflicts, and every wait ends."""
    seen = run_all(LOCK_SEEDS, lockers=2)
    print(dict(seen))
    assert seen["locked"] > 50 * LOCK_SEEDS and seen["decided alone"] > 25 * LOCK_SEEDS
    assert seen["refused"] > 5 * LOCK_SEEDS and seen["deadlocks"] > LOCK_SEEDS / 50
    assert seen["reclaimed"] > LOCK_SEEDS
    assert seen["takeovers"] > LOCK_SEEDS / 2


@pytest.mark.timeout(900)
def test_nothing_acknowledged_is_lost() -> None:
    seen = run_all(SEEDS)
    # A simulation in which nothing happens proves nothing.
    print(dict(seen))
    for kind in (*KINDS, "pr", "lease", "damaged"):
        assert seen[kind] > SEEDS / 150, kind
    assert seen["step downs"] > SEEDS / 500
    assert seen["takeovers"] > SEEDS / 2
    assert seen["done"] > 20 * SEEDS and seen["seen"] > 30 * SEEDS and seen["synced"] > 4 * SEEDS


@pytest.mark.parametrize("seed", NAMED, ids=[text.replace(" ", "-")[:60] for text in NAMED.values()])
def test_what_was_found_once(seed: int) -> None:
    simulate(seed)


def test_a_seed_is_one_story() -> None:
    first, second = simulate(4711), simulate(4711)
    assert (first.engine.steps, first.engine.now) == (second.engine.steps, second.engine.now)
    assert first.volume.meta == second.volume.meta
