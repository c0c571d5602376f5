"""What a node does to become the home, step by step, and that each step waits for the one before.

The steps are carried out over a daemon that notes them; `core/takeover.py`, which orders them, has tests of its own.
"""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MxfsError
from mxfs_proto.ondisk import LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd.core.lease import HeldLease, HeldSlot
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot
from mxfsd.daemon import Daemon
from mxfsd.io.lockspace import ClaimRefused
from mxfsd.takeover import Succession

ME = SlotRecord(2, SlotState.ACTIVE, b"B" * 16, "n2", 5, 1, 9)
OWNER = SlotRecord(1, SlotState.RESTARTING, b"A" * 16, "n1", 3, 40, 8, pr_key=0xAB)
HELD = LeaseRecord(10, 4, LeaseState.HELD, 1, b"A" * 16, 3)
FREE = LeaseRecord(10, 4)
OURS = HeldLease(LeaseRecord(11, 5, LeaseState.HELD, 2, b"B" * 16, 5), 0)


class Steps:
    """As much of a daemon as becomes the home. ``fails`` raises, or hangs, in a step's place."""

    def __init__(self, lease: LeaseRecord, fails: dict[str, Callable[[], None]]) -> None:
        self.done: list[str] = []
        self.fails = fails
        self.slot = 2
        self.held = HeldSlot(ME, 0)
        self.timeouts = SimpleNamespace(node_dead_ms=20_000, grace_ms=4000)
        self.heartbeat = SimpleNamespace(report=None)
        self.fencing = SimpleNamespace(name="pr", fence=lambda victim: self.step(f"fence {victim.pr_key:#x}"))
        slots = (OWNER, ME)
        self.lockspace = SimpleNamespace(
            snapshot=lambda: Snapshot(0, 0, lease, slots),
            claim_lease=self.claim,
            read_slots=lambda: slots,
        )
        self.members = SimpleNamespace(expect=lambda slot, incarnation: self.step(f"expect {slot}"))
        self.fuse = None

    def step(self, name: str) -> None:
        fails = self.fails.get(name.split(" ")[0])
        if fails is not None:
            fails()
        self.done.append(name)

    def claim(self, _me: SlotRecord, _timeouts: Timeouts, **_more: Any) -> HeldLease:
        self.step("claim")
        return OURS

    async def mount_as_home(self, held: HeldLease) -> None:
        assert held is OURS
        self.step("mount")

    async def settle_operations(self) -> None:
        self.step("settle")

    def await_reclaims(self, nodes: frozenset[int]) -> None:
        self.step(f"await {sorted(nodes)}")

    def serve(self) -> None:
        self.step("serve")


def raising(error: MxfsError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


async def attempt(lease: LeaseRecord = HELD, **fails: Callable[[], None]) -> tuple[bool, list[str]]:
    daemon: Any = Steps(lease, fails)
    succession = Succession(daemon)
    became = await succession.attempt()
    succession.reclaimed(1)
    return became, daemon.done


async def test_fence_claim_mount_settle_and_only_then_reclaims_and_serving() -> None:
    steps = ["fence 0xab", "claim", "mount", "settle", "expect 1", "await [1]", "serve"]
    assert await attempt() == (True, steps)


async def test_a_lease_that_was_let_go_is_claimed_without_a_fence() -> None:
    became, done = await attempt(FREE)
    assert became and done[:2] == ["claim", "mount"]


async def test_without_a_confirmed_fence_nothing_is_claimed(log_guard: list[str]) -> None:
    assert await attempt(fence=raising(IoFailure("it may live"))) == (False, [])
    assert any("could not be fenced" in line for line in log_guard)
    log_guard.clear()


async def test_a_fence_that_does_not_come_to_an_end_is_no_fence(log_guard: list[str]) -> None:
    go = threading.Event()
    try:
        daemon: Any = Steps(HELD, {"fence": lambda: go.wait(20) and None})
        daemon.timeouts.node_dead_ms = 50
        became = await Succession(daemon).attempt()
        assert (became, daemon.done) == (False, [])
    finally:
        go.set()
    assert any("does not come to an end" in line for line in log_guard)
    log_guard.clear()


@pytest.mark.parametrize("error", [ClaimRefused("held"), IoFailure("no disk")], ids=["refused", "failed"])
async def test_without_the_lease_nothing_is_mounted(error: MxfsError) -> None:
    assert await attempt(claim=raising(error)) == (False, ["fence 0xab"])


@pytest.mark.parametrize("step", ["mount", "settle"])
async def test_what_fails_with_the_lease_in_hand_is_told_and_nobody_is_served(step: str) -> None:
    daemon: Any = Steps(HELD, {step: raising(IoFailure("no disk"))})
    with pytest.raises(IoFailure):
        await Succession(daemon).attempt()
    assert "serve" not in daemon.done and not any(name.startswith("await") for name in daemon.done)


async def test_who_is_awaited_has_the_grace_period_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000]
    monkeypatch.setattr("mxfsd.takeover.now_ms", lambda: clock[0])
    late: list[int] = []
    daemon: Any = Steps(HELD, {})
    daemon.members.late = late.append
    daemon.peers = {1: object()}
    succession = Succession(daemon)
    assert await succession.attempt()
    clock[0] += daemon.timeouts.grace_ms - 1
    succession.tick()
    assert late == []
    clock[0] += 1
    succession.tick()
    assert late == [1] and "serve" not in daemon.done


# -- the mount -------------------------------------------------------------------------------------------------------


class Mounting:
    """A daemon with the lease in hand, whose heartbeat process and mount note what they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.done: list[str] = []
        self.fails = fails
        self.sessions = SimpleNamespace()
        daemon: Any = Daemon.__new__(Daemon)
        daemon.heartbeat = SimpleNamespace(set_home=self.set_home, arm=self.arm)
        daemon.held, daemon.timeouts = HeldSlot(ME, 0), Timeouts.named("fast")
        daemon.device, daemon.fencing, daemon.lockspace = "/dev/sdx", None, None
        daemon.options = SimpleNamespace(read_only=False)
        monkeypatch.setattr("mxfsd.daemon.grow_lower", lambda _fd, _lockspace: self._step("grow"))
        daemon.ending = False
        monkeypatch.setattr(daemon, "_release_device", lambda: None, raising=False)
        monkeypatch.setattr(daemon, "_mount", self.mount, raising=False)
        self.lower = SimpleNamespace(root=None, mount_fd=7, close=lambda: self.done.append("close"))
        self.daemon = daemon

    def _step(self, name: str) -> None:
        if name == self.fails:
            raise IoFailure(name)
        self.done.append(name)

    async def set_home(self, held: HeldLease) -> int:
        assert held is OURS
        self._step("renew")
        return 2000

    async def arm(self, mount_fd: int) -> None:
        assert mount_fd == 7
        self._step("guard")

    def mount(self) -> Any:
        self._step("mount")
        return self.lower


async def test_the_lease_is_renewed_before_the_mount_and_the_mount_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mounting(monkeypatch)
    await made.daemon.mount_as_home(OURS)
    assert made.done == ["renew", "mount", "guard", "grow"]
    assert (made.daemon.epoch, made.daemon.home_slot, made.daemon.serving) == (5, 2, False)


@pytest.mark.parametrize(
    ("fails", "done"), [("renew", []), ("mount", ["renew"]), ("guard", ["renew", "mount", "close"])]
)
async def test_a_mount_that_nobody_guards_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fails: str, done: list[str]
) -> None:
    made = Mounting(monkeypatch, fails)
    with pytest.raises(IoFailure, match=fails):
        await made.daemon.mount_as_home(OURS)
    assert made.done == done
    assert getattr(made.daemon, "_lower", None) is None


@pytest.mark.parametrize("read_only", [False, True])
async def test_operations_of_the_home_before_are_settled_before_there_is_a_role(
    monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """The role answers from the sessions that were found: an operation sent again must not be executed twice."""
    made = Mounting(monkeypatch)
    daemon = made.daemon
    daemon.options.read_only = read_only
    daemon.lockspace = SimpleNamespace(volume_id=5)
    daemon._lower, daemon.epoch, daemon.figures = made.lower, 5, None

    def recover(lower: Any, sessions: Any, volume: int) -> Any:
        assert lower is made.lower and volume == 5
        assert sessions is made.sessions
        made.done.append("recover")
        return SimpleNamespace(records="records")

    def role(*given: Any) -> str:
        made.done.append("role")
        assert given[4:6] == (made.sessions, read_only)
        assert given[9] == (None if read_only else "records")
        return "role"

    monkeypatch.setattr("mxfsd.daemon.SessionTable", lambda: made.sessions)
    monkeypatch.setattr("mxfsd.daemon.recover_sessions", recover)
    monkeypatch.setattr("mxfsd.daemon.HomeRole", role)
    await daemon.settle_operations()
    assert made.done == (["role"] if read_only else ["recover", "role"])
    assert daemon.home == "role"
