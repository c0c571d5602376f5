"""What an operator asks of a daemon: home move, evict and sync, each as it succeeds and as it is refused."""

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MisuseError
from mxfs_proto.ondisk import SlotState
from mxfsd.io.heartbeat_client import SlotView
from mxfsd.operators import Operators


def view(slot: int, name: str, state: SlotState = SlotState.ACTIVE, incarnation: int = 1) -> SlotView:
    return SlotView(slot, bytes([slot]) * 16, name, incarnation, state, 1, 1, 0, False, 1, 0, ())


class Daemon:
    """Node n1 in slot 1, which sees itself, n2 (the home), n3, and n4, which has left."""

    def __init__(self) -> None:
        slots = {1: view(1, "n1"), 2: view(2, "n2"), 3: view(3, "n3"), 4: view(4, "n4", SlotState.LEFT)}
        self.heartbeat = SimpleNamespace(report=SimpleNamespace(slots=slots))
        self.timeouts = SimpleNamespace(lock_wait_ms=3000)
        self.slot, self.home_slot, self.epoch, self.serving = 1, 2, 7, True
        self.held_by = ""
        self.home: Any = None
        self.members: Any = None
        self.client: Any = SimpleNamespace(ask_move=self._asked("move"), ask_evict=self._asked("evict"))
        self.asked: list[tuple[Any, ...]] = []
        self.fuse = SimpleNamespace(sync=self._sync)
        self.sync_error: OSError | None = None

    def _asked(self, what: str) -> Any:
        return lambda *words: self.asked.append((what, *words))

    def become_home(self, *, moves: bool = True) -> None:
        """From now on this node is the home."""
        self.home_slot, self.client, self.home = 1, None, object()
        self.members = SimpleNamespace(evict=self._asked("evict"))

        async def move_home(slot: int) -> bool:
            self.asked.append(("move", slot))
            return moves

        self.move_home = move_home

    def arrive(self, slot: int) -> None:
        """The home is in another slot now."""
        self.home_slot, self.epoch = slot, self.epoch + 1

    def clear(self, slot: int) -> None:
        """The slot's node is out."""
        self.heartbeat.report.slots[slot] = view(slot, "", SlotState.FREE)

    async def _sync(self) -> None:
        self.asked.append(("sync",))
        if self.sync_error is not None:
            raise self.sync_error


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


async def ask(daemon: Daemon, command: str, **fields: Any) -> dict[str, Any]:
    return await Operators(daemon).handlers()[command](fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["n3", "3"])
@pytest.mark.parametrize("at_home", [False, True])
async def test_a_move_ends_when_the_home_has_arrived(daemon: Daemon, wanted: str, at_home: bool) -> None:
    if at_home:
        daemon.become_home()
    asking = asyncio.create_task(ask(daemon, "home-move", node=wanted))
    while not daemon.asked:
        await asyncio.sleep(0)
    daemon.serving = False
    daemon.arrive(3)
    await asyncio.sleep(0.05)
    assert not asking.done()
    daemon.serving = True
    assert await asking == {"home": "n3", "epoch": 8}
    assert daemon.asked == [("move", 3)]


async def test_a_move_to_where_it_is(daemon: Daemon) -> None:
    assert await ask(daemon, "home-move", node="n2") == {"home": "n2", "epoch": 7}
    assert daemon.asked == []


@pytest.mark.parametrize("wanted", ["n9", "n4", "4", ""])
async def test_a_move_to_nobody(daemon: Daemon, wanted: str) -> None:
    with pytest.raises(MisuseError, match=f"no active node '{wanted}' in this volume: see mxfs status"):
        await ask(daemon, "home-move", node=wanted)


async def test_a_move_that_is_called_off(daemon: Daemon) -> None:
    daemon.become_home(moves=False)
    daemon.held_by = "pid 7 (tail) holds files"
    with pytest.raises(IoFailure, match=r"called off: pid 7 \(tail\) holds files") as caught:
        await ask(daemon, "home-move", node="n3")
    assert caught.value.errno == errno.EBUSY


async def test_a_move_that_does_not_arrive(daemon: Daemon) -> None:
    daemon.timeouts.lock_wait_ms = 20
    with pytest.raises(IoFailure, match="the home did not arrive at n3: see the log") as caught:
        await ask(daemon, "home-move", node="n3")
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("at_home", [False, True])
async def test_an_evict_ends_when_the_slot_is_taken(daemon: Daemon, at_home: bool) -> None:
    if at_home:
        daemon.become_home()
    asking = asyncio.create_task(ask(daemon, "evict", node="n3"))
    while not daemon.asked:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert not asking.done()
    daemon.clear(3)
    assert await asking == {"node": "n3", "slot": 3, "incarnation": 1}
    assert daemon.asked == [("evict", 3, 1)]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("n9", "no node that takes part 'n9' in this volume"),
        ("n4", "no node that takes part 'n4'"),
        ("n1", "n1 is the node you are on: unmount the volume instead"),
        ("n2", "n2 is the home: move it first"),
    ],
)
async def test_evicts_that_are_refused(daemon: Daemon, wanted: str, says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        await ask(daemon, "evict", node=wanted)
    assert daemon.asked == []


async def test_an_evict_without_a_home(daemon: Daemon, log_guard: list[str]) -> None:
    """As this node takes the volume over, it is neither a client nor does it serve."""
    daemon.become_home()
    daemon.serving = False
    with pytest.raises(IoFailure, match="there is no home just now that could do it: try again") as caught:
        await ask(daemon, "evict", node="n3")
    assert caught.value.errno == errno.EAGAIN
    assert daemon.asked == []
    log_guard.clear()


async def test_an_evict_that_is_not_confirmed(daemon: Daemon) -> None:
    daemon.timeouts.lock_wait_ms = 20
    with pytest.raises(IoFailure, match="n3 could not be fenced yet: see the home's log") as caught:
        await ask(daemon, "evict", node="n3")
    assert caught.value.errno == errno.ETIMEDOUT


async def test_sync(daemon: Daemon) -> None:
    assert await ask(daemon, "sync") == {}
    daemon.sync_error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(IoFailure, match="not everything written here is durable: No space left") as caught:
        await ask(daemon, "sync")
    assert caught.value.errno == errno.ENOSPC
