"""When a home begins to serve: after the reclaims, and never by itself while it is being given away."""

from typing import Any

import pytest

from mxfsd.daemon import Daemon


class Role:
    """Stands for the home's role: notes that it was told to serve."""

    def __init__(self) -> None:
        self.begun = 0
        self.master = self
        self.service = self

    def grace_over(self, _now_ms: int) -> list[Any]:
        self.begun += 1
        return []

    def run(self, _effects: list[Any]) -> None: ...

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
    made.serving = False
    made.awaited = set()
    made.peers = {}
    made.epoch = 1
    made.grace_until_ms = 0
    made._leaving_home = False
    return made


def test_a_home_serves_when_nobody_is_awaited(daemon: Daemon) -> None:
    daemon._maybe_serve()
    assert daemon.serving
    assert daemon.home.begun == 1  # type: ignore[union-attr]


def test_a_home_waits_for_reclaims_within_the_grace_period(daemon: Daemon) -> None:
    daemon.awaited = {2}
    daemon.grace_until_ms = 1 << 62
    daemon._maybe_serve()
    assert not daemon.serving


def test_a_tick_during_a_move_does_not_make_the_home_serve_again(daemon: Daemon) -> None:
    # Seen: a tick between the freeze and the unmount resumed the FUSE layer, which kept the lower mount: the move was
    # called off, and the nodes waited.
    daemon._leaving_home = True
    daemon._maybe_serve()
    assert not daemon.serving
