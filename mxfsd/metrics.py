"""What a daemon says of itself as Prometheus metrics (docs/metrics.md lists them, which a test compares).

Made from what ``mxfs status`` and ``mxfs top`` are told, in a thread: nothing here touches the daemon.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("volume",)
_OF_NODE = ("volume", "node")


class StatusCollector(Collector):
    """The metrics of one status reply that has its ``figures``."""

    def __init__(self, view: dict[str, Any]) -> None:
        self._view = view
        self._volume = str(view["volume"])

    def collect(self) -> Iterator[Metric]:
        """Yield every family that this node has."""
        yield from self._node()
        yield from self._counted()
        yield from self._operations()
        if self._view["role"] == "home":
            yield from self._home()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"mxfs_{name}", text, labels=_LABELS)
        family.add_metric([self._volume], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"mxfs_{name}", text, labels=_LABELS)
        family.add_metric([self._volume], value)
        return family

    def _node(self) -> Iterator[Metric]:
        """What every node knows: its own part, the lease, the slots."""
        view = self._view
        info = InfoMetricFamily("mxfs", "The volume and this node.", labels=_LABELS)
        info.add_metric([self._volume], {name: str(view[name]) for name in ("node", "label", "device", "fencing")})
        yield info
        yield self._gauge("home", "Whether this node is the home.", view["role"] == "home")
        yield self._gauge("serving", "Whether operations are served, as far as this node knows.", view["serving"])
        yield self._gauge("epoch", "One more at each change of home.", view["epoch"])
        states = GaugeMetricFamily("mxfs_nodes", "Slots in use, by what they say.", labels=("volume", "state"))
        for state in sorted({node["state"] for node in view["nodes"]}):
            states.add_metric([self._volume, state], sum(node["state"] == state for node in view["nodes"]))
        yield states
        ages = GaugeMetricFamily(
            "mxfs_slot_age_seconds", "Time since the slot's counter moved.", labels=("volume", "node", "slot")
        )
        for node in view["nodes"]:
            ages.add_metric([self._volume, node["name"], str(node["slot"])], node["age_ms"] / 1000)
        yield ages
        lease = view["lease"]
        if lease["age_ms"] is not None:
            yield self._gauge("lease_age_seconds", "Time since the home's lease was renewed.", lease["age_ms"] / 1000)
        text = "Time for which what this node caches, or as the home does, is good without another lease."
        yield self._gauge("lease_remaining_seconds", text, lease["left_ms"] / 1000)

    def _counted(self) -> Iterator[Metric]:
        """What this daemon has done since it started, as the home mostly."""
        view = self._view
        takeovers = CounterMetricFamily(
            "mxfs_takeovers", "How often this node became the home, after what.", labels=("volume", "cause")
        )
        for cause, count in view["takeovers"].items():
            takeovers.add_metric([self._volume, cause], count)
        yield takeovers
        if sum(view["takeovers"].values()):
            yield self._gauge(
                "last_takeover_duration_seconds", "How long the last of them took.", view["takeover_ms"] / 1000
            )
        totals = view["totals"]
        yield self._counter("nodes_put_out", "Nodes fenced and put out by this one as the home.", totals["put_out"])
        yield self._counter("lock_grants", "Lock requests and operations granted.", totals["grants"])
        yield self._counter("lock_waits", "Lock requests and operations that were queued.", totals["waits"])
        yield self._counter("log_forces", "Forces of the XFS log, each for a group of changes.", totals["log_forces"])

    def _operations(self) -> Iterator[Metric]:
        """What this daemon has done for each node as the home."""
        figures = self._view["figures"]
        times = HistogramMetricFamily(
            "mxfs_operation_duration_seconds",
            "Shipped operations, from their coming to their answer.",
            labels=("volume", "node", "op"),
        )
        bounds = [*map(str, figures["buckets_s"]), "+Inf"]
        counters = {
            "bytes_read": CounterMetricFamily("mxfs_read_bytes", "Bytes read for the node.", labels=_OF_NODE),
            "bytes_written": CounterMetricFamily("mxfs_written_bytes", "Bytes written for the node.", labels=_OF_NODE),
            "basts": CounterMetricFamily("mxfs_basts", "Blocking ASTs sent to the node.", labels=_OF_NODE),
        }
        for node in figures["nodes"]:
            for op, histogram in node["operations"].items():
                buckets = zip(bounds, accumulate(histogram["counts"]), strict=True)
                times.add_metric([self._volume, node["node"], op], list(buckets), histogram["sum_s"])
            for name, family in counters.items():
                family.add_metric([self._volume, node["node"]], node[name])
        yield times
        yield from counters.values()

    def _home(self) -> Iterator[Metric]:
        """What only the home of just now knows."""
        view, figures = self._view, self._view["figures"]
        gauges = {
            "held": GaugeMetricFamily("mxfs_locks_held", "Cached locks that the node has.", labels=_OF_NODE),
            "waiting": GaugeMetricFamily("mxfs_locks_waiting", "Requests and operations that wait.", labels=_OF_NODE),
            "unstable_files": GaugeMetricFamily(
                "mxfs_unstable_files", "Files with data of the node that is not durable yet.", labels=_OF_NODE
            ),
        }
        for node in figures["nodes"]:
            for name, family in gauges.items():
                family.add_metric([self._volume, node["node"]], node[name])
        yield from gauges.values()
        yield self._gauge("lock_resources", "Resources that the lock master has a record of.", view["locks"]["cached"])
        yield self._gauge("operations_running", "Shipped operations under way.", figures["here"]["running"])
        yield self._gauge("connected_nodes", "Other nodes connected to this home.", figures["here"]["connected"])


def exposition(view: dict[str, Any]) -> bytes:
    """Return the metrics of a status reply in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(view))
    return generate_latest(registry)
