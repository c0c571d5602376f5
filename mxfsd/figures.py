"""What a daemon counts of the operations and locks of its volume, for ``mxfs top`` and metrics (pure).

The counters live as long as the daemon and never go back, however often the home comes and goes. An operation costs one
increment in a histogram that is there; who wants to know adds up and computes.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from mxfs_proto.ops import Op

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histograms' buckets, each included; one more bucket has what took longer."""

TOTALS = ("executed", "grants", "waits", "log_forces")
"""What a home counts of all nodes together (``HomeRole.totals``)."""

_OPS = max(Op) + 1


class Histogram:
    """How long things took."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        """So many in each bucket, not in those below it too."""
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds


class NodeFigures:
    """What the home has done for one node."""

    __slots__ = ("basts", "bytes_read", "bytes_written", "name", "operations")

    def __init__(self, name: str) -> None:
        self.name = name
        self.operations: list[Histogram | None] = [None] * _OPS
        """By code; None where there was none yet."""
        self.bytes_read = 0
        self.bytes_written = 0
        self.basts = 0
        """Blocking ASTs sent to it, the repeated ones too."""

    def ended(self, op: Op, seconds: float) -> None:
        """An operation was answered, *seconds* after it had come."""
        histogram = self.operations[op]
        if histogram is None:
            histogram = self.operations[op] = Histogram()
        histogram.add(seconds)


class Figures:
    """The counters of one daemon."""

    def __init__(self) -> None:
        self._nodes: dict[int, NodeFigures] = {}
        self._ended = dict.fromkeys(TOTALS, 0)
        self.put_out = 0
        """Nodes put out while this one was the home."""

    def of(self, slot: int) -> NodeFigures:
        """The figures of the node in *slot*."""
        node = self._nodes.get(slot)
        if node is None:
            node = self._nodes[slot] = NodeFigures(f"slot {slot}")
        return node

    def joined(self, slot: int, name: str) -> None:
        """The node in *slot* is called so. One of another name begins at nothing, wherever that name was before."""
        node = self._nodes.get(slot)
        if node is not None and node.name == name:
            return
        for other in [number for number, found in self._nodes.items() if found.name == name]:
            del self._nodes[other]
        self._nodes[slot] = NodeFigures(name)

    def home_ended(self, totals: Mapping[str, int]) -> None:
        """This node is the home no more: keep what was counted then."""
        for name in TOTALS:
            self._ended[name] += totals[name]

    def totals(self, running: Mapping[str, int]) -> dict[str, int]:
        """All that was counted, with the totals of the home that this node is now (empty: it is none)."""
        return {name: self._ended[name] + running.get(name, 0) for name in TOTALS} | {"put_out": self.put_out}

    def nodes(self) -> list[dict[str, Any]]:
        """What was done for each node, as JSON objects."""
        return [
            {
                "slot": slot,
                "node": node.name,
                "bytes_read": node.bytes_read,
                "bytes_written": node.bytes_written,
                "basts": node.basts,
                "operations": {
                    Op(code).name: {"counts": list(histogram.counts), "sum_s": histogram.sum_s}
                    for code, histogram in enumerate(node.operations)
                    if histogram is not None
                },
            }
            for slot, node in sorted(self._nodes.items())
        ]


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Estimate the time that *share* (0..1) of what is in the buckets stayed below; None where there is nothing.

    It is taken to be spread evenly over each bucket. Beyond the last bound that bound is all that is known.
    """
    total = sum(counts)
    if not total:
        return None
    wanted = share * total
    below = 0
    for at, count in enumerate(counts):
        if count and below + count >= wanted:
            if at == len(BUCKETS_S):
                break
            low = BUCKETS_S[at - 1] if at else 0.0
            return low + (BUCKETS_S[at] - low) * (wanted - below) / count
        below += count
    return BUCKETS_S[-1]
