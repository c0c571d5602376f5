"""The clock of all liveness decisions on this node."""

import time


def now_ms() -> int:
    """Return milliseconds since boot, time suspended included: a node that slept must not trust its lease."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
