"""The daemon and its reservation: it freezes, serves on when it is there again, and stops where it was shut out."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.daemon import Daemon
from mxfsd.fencing import PrFencing
from mxfsd.pr.errors import Preempted
from mxfsd.pr.reservations import Standing

pytestmark = pytest.mark.error_logs


class Agent:
    """Answers ``check`` and ``reestablish`` with what is next in line."""

    def __init__(self, checks: list[Standing | Exception], again: list[Exception | None]) -> None:
        self.checks, self.again = checks, again

    def check(self) -> Standing:
        found = self.checks.pop(0) if self.checks else Standing.OK
        if isinstance(found, Exception):
            raise found
        return found

    def reestablish(self, _still_ours: Any) -> None:
        error = self.again.pop(0)
        if error is not None:
            raise error


class Node:
    """As much of a daemon as the guard uses; the methods under test are the daemon's own."""

    def __init__(self, agent: Agent) -> None:
        self.fencing, self.events = agent, list[str]()
        self.timeouts = SimpleNamespace(renewal_ms=1)
        self.serving, self.home, self.epoch, self.peers = True, object(), 1, dict[int, Any]()
        self.fuse = SimpleNamespace(freeze=lambda _epoch, _home: self.events.append("freeze"))
        self._frozen, self._leaving_home, self._still_ours = None, False, None

    def _resume_all(self) -> None:
        self.events.append("resume")

    def crash_lower(self) -> None:
        self.events.append("crash")

    def refused(self, _reason: str) -> None:
        self.events.append("refused")

    _reestablish: Any = Daemon._reestablish
    _thaw: Any = Daemon._thaw
    guard: Any = Daemon._guard
    is_fenced: Any = Daemon._is_fenced


async def until(node: Node, event: str) -> None:
    task = asyncio.get_running_loop().create_task(node.guard())
    async with asyncio.timeout(20):
        while event not in node.events:
            await asyncio.sleep(0.001)
    task.cancel()


async def test_a_lost_reservation_freezes_until_it_is_there_again() -> None:
    node = Node(Agent([Standing.OK, Standing.LOST], [None]))
    await until(node, "resume")
    assert node.events == ["freeze", "resume"]
    assert node.serving


async def test_it_takes_several_attempts() -> None:
    node = Node(
        Agent([Standing.LOST, IoFailure("x"), Standing.LOST, Standing.LOST], [IoFailure("y"), IoFailure("z"), None])
    )
    await until(node, "resume")
    assert node.events == ["freeze", "resume"]
    assert node.serving


async def test_somebody_else_has_made_it_again() -> None:
    node = Node(Agent([Standing.LOST, Standing.OK], [IoFailure("x")]))
    await until(node, "resume")
    assert node.events == ["freeze", "resume"]


@pytest.mark.parametrize(
    ("checks", "again"),
    [
        ([Standing.PREEMPTED], []),
        ([Preempted("disk", 1)], []),
        ([Standing.LOST], [Preempted("disk", 1)]),
    ],
)
async def test_a_node_that_was_shut_out_stops(checks: list[Any], again: list[Any]) -> None:
    node = Node(Agent(checks, again))
    await until(node, "refused")
    assert node.events[-2:] == ["crash", "refused"]
    assert "resume" not in node.events


@pytest.mark.parametrize(
    ("checks", "fenced"),
    [
        ([Standing.OK], False),
        ([Standing.LOST], False),
        ([Standing.PREEMPTED], True),
        ([IoFailure("x"), Standing.OK], False),
        ([IoFailure("x"), Preempted("disk", 1)], True),
    ],
)
async def test_whether_it_is_fenced_is_what_the_disk_says(checks: list[Any], fenced: bool) -> None:
    node = Node(Agent(checks, []))
    assert await node.is_fenced() is fenced
    assert not node.fencing.checks
    assert not node.events, "what to do about it is the guard's"


async def test_a_home_that_is_none_any_more_is_not_served_again() -> None:
    node = Node(Agent([Standing.LOST], [IoFailure("x")]))
    task = asyncio.get_running_loop().create_task(node.guard())
    async with asyncio.timeout(20):
        while "freeze" not in node.events:
            await asyncio.sleep(0.001)
        node.home = object()
        while node._frozen is not None:
            await asyncio.sleep(0.001)
    task.cancel()
    assert node.events == ["freeze"]
    assert not node.serving


def test_a_fence_and_the_guard_take_turns() -> None:
    """The commands of a path run one at a time."""
    busy = threading.Lock()

    class Slow:
        returned = frozenset[int]()

        def _one(self) -> Standing:
            assert busy.acquire(blocking=False), "two at once"
            time.sleep(0.005)
            busy.release()
            return Standing.OK

        def check(self) -> Standing:
            return self._one()

        def preempt(self, _key: int) -> None:
            self._one()

        def reestablish(self, _ask: Any) -> None:
            self._one()

        unregister = check

    slow: Any = Slow()
    agent = PrFencing(slow, "test")
    errors: list[Exception] = []

    def run(act: Any) -> None:
        try:
            for _ in range(5):
                act()
        except AssertionError as error:
            errors.append(error)

    victim = Victim(1, 1, 0xAB, Verdict.SILENT)
    acts = (agent.check, lambda: agent.fence(victim), lambda: agent.reestablish(lambda: True), agent.leave)
    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
