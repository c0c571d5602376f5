"""When a home begins to serve: after the reclaims, and never by itself while it is being given away."""

from typing import Any

import pytest

from mxfs_proto.ondisk import SlotRecord
from mxfsd.core.lease import HeldSlot
from mxfsd.core.takeover import Verdict
from mxfsd.daemon import Daemon
from mxfsd.takeover import Succession


class Role:
    """Stands for the home's role: notes that it was told to serve."""

    def __init__(self) -> None:
        self.begun = 0
        self.master = self
        self.service = self

    def grace_over(self) -> None:
        self.begun += 1

    def run(self, _effects: list[Any]) -> None: ...

    def forget_sessions(self) -> None: ...

    def reap_all(self) -> None: ...


class Fuse:
    """A FUSE layer that has not connected yet: nothing is sent to it."""

    class attached:  # noqa: N801
        @staticmethod
        def is_set() -> bool:
            return False


@pytest.fixture
def daemon() -> Daemon:
    made = Daemon.__new__(Daemon)
    made.home = Role()  # type: ignore[assignment]
    made.fuse = Fuse()  # type: ignore[assignment]
    made.finder = None
    made.serving = False
    made.peers = {}
    made.epoch = 1
    made.succession = Succession(made)
    return made


def awaiting(daemon: Daemon, *slots: int) -> None:
    machine = daemon.succession._machine
    machine.suspect()
    machine.judged(Verdict.NONE)
    machine.claimed(1)
    machine.mounted()
    daemon.succession._later(machine.settled(slots))


def test_a_home_serves_when_nobody_is_awaited(daemon: Daemon) -> None:
    awaiting(daemon)
    assert daemon.serving
    assert daemon.home.begun == 1  # type: ignore[union-attr]


def test_a_home_waits_for_every_reclaim_or_the_end_of_who_does_not_come(daemon: Daemon) -> None:
    awaiting(daemon, 2, 3)
    daemon.succession.reclaimed(2)
    assert not daemon.serving
    daemon.succession.out(3)
    assert daemon.serving
    assert daemon.home.begun == 1  # type: ignore[union-attr]


def test_news_during_a_move_do_not_make_the_home_serve_again(daemon: Daemon) -> None:
    # Seen: a tick between the freeze and the unmount resumed the FUSE layer, which kept the lower mount: the move was
    # called off, and the nodes waited.
    awaiting(daemon)
    daemon.serving = False
    daemon.succession.reclaimed(2)
    daemon.succession.out(3)
    assert not daemon.serving


class Late:
    """Notes who was late."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    def late(self, slot: int) -> None:
        self.slots.append(slot)


def test_who_does_not_say_what_it_holds_is_put_out_when_the_grace_period_is_over(daemon: Daemon) -> None:
    members: Any = Late()
    daemon.members = members
    daemon.held = HeldSlot(SlotRecord(1), 0)
    awaiting(daemon, 2, 3)
    daemon.succession._grace_until_ms = 1 << 62
    daemon.succession.tick()
    assert members.slots == []
    daemon.succession._grace_until_ms = 0
    daemon.succession.reclaimed(3)
    daemon.succession.tick()
    assert members.slots == []  # it is not connected: perhaps nobody can be heard here
    peers: Any = {2: None}
    daemon.peers = peers
    daemon.succession.tick()
    assert members.slots == [2] and not daemon.serving
