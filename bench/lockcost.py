"""What it costs to find a lock in a node's cache and to use it: no message, no system call, one Python process."""

import random
import statistics
import time

from mxfs_proto.modes import LockMode, covers
from mxfsd.core.lockcache import LockCache

HELD = 100_000
ROUNDS = 20
PER_ROUND = 5000


def lock_from_cache_us() -> float:
    """Return the median, in microseconds, of: look the mode up, pin the lock, unpin it, among 100,000 held locks."""
    cache = LockCache(implicit=False)
    for ino in range(1, HELD + 1):
        cache.adopt(0, ino, LockMode.PR, ino)
    order = random.Random(3).choices(range(1, HELD + 1), k=PER_ROUND)
    samples = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for ino in order:
            if not covers(cache.mode(ino), LockMode.PR):
                raise RuntimeError(f"inode {ino} is not held")
            cache.pin(ino)
            cache.unpin(0, ino)
        samples.append((time.perf_counter() - begun) / PER_ROUND * 1e6)
    return statistics.median(samples)
