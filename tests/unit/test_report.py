"""What a daemon says of itself: a status of a home and of a node, with and without what was counted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twodaemons import Cluster, cluster

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op
from mxfsd.core.dlm import LockMaster
from mxfsd.figures import BUCKETS_S, TOTALS
from mxfsd.io.clock import now_ms
from mxfsd.operators import Operators
from mxfsd.report import status_report


class Role:
    """A home with a real lock master and counters that are known."""

    def __init__(self) -> None:
        self.master = LockMaster(1, SimpleNamespace(lock_wait_ms=3000, bast_ms=1000, min_hold_ms=1))
        self.master.request(0, 2, 5, 300, LockMode.PR, LockFlag.NONE)
        self.master.request(0, 2, 6, 301, LockMode.PR, LockFlag.NONE)
        self.service = SimpleNamespace(unstable_files=lambda: {2: 3})
        self.running = 2

    def lock_counts(self) -> dict[str, int]:
        return {}

    def operation_counts(self) -> dict[str, int]:
        return {"shipped": 4}

    def totals(self) -> dict[str, int]:
        return dict.fromkeys(TOTALS, 4)


async def ask(daemon: Any, **fields: Any) -> dict[str, Any]:
    reply = await Operators(daemon).handlers()["status"](fields)
    return json.loads(json.dumps(reply))  # type: ignore[no-any-return]


@pytest.fixture
async def two(tmp_path: Path) -> Any:
    async with cluster(tmp_path) as made:
        for daemon in (made.home, made.node):
            daemon.fuse.pid = 7  # type: ignore[union-attr]
        yield made


async def test_figures_come_when_asked_for(two: Cluster) -> None:
    two.home.home = Role()  # type: ignore[assignment]
    two.home.figures.joined(2, "n2")
    two.home.figures.of(2).ended(Op.READ, 0.002)
    assert "figures" not in await ask(two.home)
    reply = await ask(two.home, figures=True)
    assert reply["figures"]["buckets_s"] == list(BUCKETS_S)
    assert reply["figures"]["here"] == {"running": 2, "connected": 0}
    (node,) = reply["figures"]["nodes"]
    assert (node["slot"], node["node"], node["held"], node["waiting"], node["unstable_files"]) == (2, "n2", 0, 2, 3)
    assert sum(node["operations"]["READ"]["counts"]) == 1
    assert reply["totals"] == {**dict.fromkeys(TOTALS, 4), "put_out": 0}


async def test_a_node_that_was_the_home_keeps_its_counters_and_knows_no_locks(two: Cluster) -> None:
    two.node.figures.joined(2, "n2")
    two.node.figures.home_ended(dict.fromkeys(TOTALS, 3))
    reply = await ask(two.node, figures=True)
    (node,) = reply["figures"]["nodes"]
    assert ("held" in node, reply["figures"]["here"], reply["ops"]) == (False, {}, {})
    assert reply["totals"]["grants"] == 3


async def test_who_greets_is_counted_under_its_name_and_who_is_put_out_is_counted(two: Cluster) -> None:
    from mxfsd.clientrole import ClientRole

    two.node.client = ClientRole(two.node)
    await two.node.client.connect()
    assert [(row["slot"], row["node"]) for row in two.home.figures.nodes()] == [(2, "n2")]
    two.node.client.close()  # it would look for another home
    for how, count in (("left", 0), ("evicted", 1)):
        two.home._node_out(2, 1, how)
        assert two.home.figures.totals({})["put_out"] == count


async def test_the_age_of_the_lease_grows_while_no_report_comes(two: Cluster) -> None:
    daemon: Any = two.node
    assert status_report(daemon)["lease"] == {"age_ms": None, "left_ms": 0}
    report = SimpleNamespace(slots={}, lease=SimpleNamespace(age_ms=200))
    daemon.heartbeat = SimpleNamespace(report=report, last_report_ms=now_ms() - 5000)
    daemon.client_lease_until_ms = now_ms() + 900
    lease = status_report(daemon)["lease"]
    daemon.heartbeat = None
    assert 5200 <= lease["age_ms"] < 8000
    assert 0 < lease["left_ms"] <= 900


async def test_takeovers_are_counted_with_the_time_of_the_last(two: Cluster) -> None:
    succession = two.node.succession
    two.node.serve = lambda: None  # type: ignore[method-assign]
    succession.began_ms = now_ms() - 70
    succession._serve()
    succession.began_ms = now_ms() + 1000  # a later attempt, which came to nothing
    found = status_report(two.node)
    assert found["takeovers"] == {"free": 1, "fenced": 0}
    assert 70 <= found["takeover_ms"] < 5000
    succession._victim = object()  # type: ignore[assignment]
    succession._serve()
    assert status_report(two.node)["takeovers"] == {"free": 1, "fenced": 1}
