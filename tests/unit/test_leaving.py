"""A node that leaves while the home comes to it: half a home would have to be fenced."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mxfsd.daemon import Daemon

FIELDS = {"slot": 2, "epoch": 5, "members": [1, 2], "evicted": []}


class Node:
    """As much of a daemon as it needs to take the home and to leave; both are the daemon's own."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.go_on = asyncio.Event()
        self.stopping = asyncio.get_running_loop().create_future()
        self._moving = asyncio.Lock()
        self.slot, self.evicted = 2, set[tuple[int, int]]()
        self.held = SimpleNamespace(record=None)
        self.timeouts = SimpleNamespace(lease_ms=1)
        self.home: Any = None
        self.client: Any = None
        self._lower: Any = None
        self._tasks: list[Any] = []
        self.peers: dict[int, Any] = {}
        self.finder = self.server = self.fuse = self.control = self.metrics = None
        self.heartbeat = SimpleNamespace(leave=self._leave)
        self.lockspace = SimpleNamespace(close=lambda: None)
        self.fencing = SimpleNamespace(leave=lambda: None, close=lambda: None)
        self.succession = SimpleNamespace(attempt=self._attempt)

    async def _attempt(self, **_how: Any) -> bool:
        self.events.append("begins")
        await self.go_on.wait()
        self.home = object()
        self.events.append("is home")
        return True

    async def _leave(self) -> None:
        self.events.append("home" if self.home is not None else "left")

    async def _leave_as_home(self) -> None:
        self.home = None
        self.events.append("gives it up")

    async def _caches_ended(self) -> None:
        pass

    def _release_device(self) -> None:
        pass

    take_home: Any = Daemon.take_home
    shut_down: Any = Daemon.shut_down


async def test_the_home_is_taken_before_it_is_given_up() -> None:
    node = Node()
    taking = asyncio.create_task(node.take_home(FIELDS))
    node._tasks = [taking]
    await asyncio.sleep(0)
    node.stopping.set_result("unmounted")
    leaving = asyncio.create_task(node.shut_down())
    await asyncio.sleep(0.01)
    assert node.events == ["begins"]
    node.go_on.set()
    await asyncio.wait_for(leaving, 5)
    assert node.events == ["begins", "is home", "gives it up", "left"]


@pytest.mark.parametrize("early", [False, True])
async def test_a_node_that_leaves_does_not_take_it(early: bool) -> None:
    node = Node()
    taking = asyncio.create_task(node.take_home(FIELDS))
    if early:
        node.stopping.set_result("unmounted")
        await node.shut_down()
    else:
        node.stopping.set_result("unmounted")
    await taking
    assert node.events == (["left"] if early else [])
