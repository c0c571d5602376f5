"""The lease of a node runs out, or its daemon dies: nothing counts as dropped before the kernel has dropped it."""

import asyncio
import errno
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_fuse.main import Server
from mxfs_fuse.nodes import Node
from mxfs_proto.ops import Fid
from mxfsd.io.cachelist import CacheList, is_dropped
from mxfsd.io.clock import now_ms


class Lapse:
    """A FUSE layer's server over locks whose drops end when the test says so."""

    def __init__(self) -> None:
        self.swept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.alone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.attributes: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked: list[tuple[str, list[int]]] = []
        self.gate = "open"
        self.idle, self.busy, self.unreadable = (Node(Fid(ino, 1)) for ino in (1, 2, 3))
        self.busy.came(1, 0, 4096)
        locks = SimpleNamespace(
            may_be_readable=lambda node: node is not self.unreadable,
            drop_pages_of_many=self._many,
            drop_pages_of=self._one,
            drop_attributes=lambda _inos: self.attributes,
            cache=SimpleNamespace(drop_all=lambda: None),
        )
        self.state = SimpleNamespace(
            nodes={node.fid.ino: node for node in (self.idle, self.busy, self.unreadable)},
            locks=locks,
            kernel=None,
            gate=None,
            close_gate=lambda: setattr(self, "gate", "closed"),
            open_gate=lambda: setattr(self, "gate", "open"),
            lease_until_ms=0,
            lease_margin_ms=0,
            losses=0,
        )
        server: Any = Server.__new__(Server)
        server.state, server._listed = self.state, CacheList()
        server._lapsed = server._frozen = False
        server._drops, server._reopen_ms = [], 0
        self.server = server

    async def _many(self, nodes: list[Node]) -> None:
        self.asked.append(("many", [node.fid.ino for node in nodes]))
        await asyncio.shield(self.swept)

    async def _one(self, node: Node) -> None:
        self.asked.append(("one", [node.fid.ino]))
        await asyncio.shield(self.alone)

    @property
    def dropped(self) -> bool:
        return is_dropped(self.server._listed.fd)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def lapse() -> Any:
    made = Lapse()
    yield made
    made.server._listed.close()


@pytest.fixture(autouse=True)
def no_warning(log_guard: list[str]) -> Iterator[None]:
    yield
    log_guard.clear()


async def test_what_was_readable_is_dropped_when_the_lease_ends_and_said_only_then(lapse: Lapse) -> None:
    lapse.server._lease_ends()
    await turns()
    assert sorted(lapse.asked) == [("many", [1]), ("one", [2])]
    assert lapse.gate == "closed" and not lapse.dropped
    lapse.swept.set_result(None)
    await turns()
    assert not lapse.dropped, "a file with an upcall under way is not dropped yet"
    lapse.alone.set_result(None)
    await turns()
    assert lapse.dropped and lapse.gate == "closed"
    lapse.state.lease_until_ms = now_ms() + 60_000
    lapse.server._maybe_reopen()
    assert lapse.gate == "open" and not lapse.dropped


async def test_what_was_read_before_is_not_current_under_a_lock_that_is_held_again(lapse: Lapse) -> None:
    """A listing, or an open that waits: each looks whether locks were lost since it began."""
    lapse.server._lease_ends()
    assert lapse.state.losses == 1


async def test_a_drop_that_failed_is_none(lapse: Lapse) -> None:
    lapse.server._lease_ends()
    lapse.alone.set_result(None)
    lapse.swept.set_exception(OSError(errno.ENOMEM, "no memory"))
    await turns()
    assert not lapse.dropped


async def test_when_the_daemon_dies_attributes_and_entries_must_have_gone_too(lapse: Lapse) -> None:
    lapse.server._drop_kernel_caches()
    lapse.swept.set_result(None)
    lapse.alone.set_result(None)
    await turns()
    assert sorted(lapse.asked) == [("many", [1]), ("one", [2])]
    assert not lapse.dropped
    lapse.attributes.set_result(None)
    await turns()
    assert lapse.dropped
