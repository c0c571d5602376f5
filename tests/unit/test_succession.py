"""Who holds the lease, as a node that wants to be home judges it, and the agents that fence."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MisuseError
from mxfs_proto.ondisk import LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd import admission
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.fencing import LeaseFencing, PrFencing, choose
from mxfsd.io.heartbeat_client import BeatReport, LeaseView, SlotView
from mxfsd.options import parse
from mxfsd.takeover import Succession, judge

DEAD_MS = 4000
A, B, C = b"A" * 16, b"B" * 16, b"C" * 16
ME = SlotRecord(2, SlotState.ACTIVE, B, "n2", 5, 1, 9)
OWNER = SlotRecord(1, SlotState.ACTIVE, A, "n1", 3, 40, 8, pr_key=0xAB)
HELD = LeaseRecord(10, 4, LeaseState.HELD, 1, A, 3)


def report(slot_age: int, lease_age: int, sequence: int = 10, epoch: int = 4) -> BeatReport:
    slot = SlotView(1, A, "n1", 3, SlotState.ACTIVE, 40, 8, slot_age, True, 4, 0xAB, ())
    lease = LeaseView(epoch, LeaseState.HELD, 1, A, 3, 0, 0, sequence, lease_age)
    return BeatReport(1, 0, 2, {1: slot}, lease, None, {})


def verdict(lease: LeaseRecord, owner: SlotRecord | None, seen: BeatReport | None) -> tuple[Verdict, Victim | None]:
    return judge(lease, owner, ME, seen, DEAD_MS)


def test_a_lease_that_was_let_go_needs_no_fence() -> None:
    assert verdict(LeaseRecord(1), None, None) == (Verdict.NONE, None)
    assert verdict(replace(HELD, state=LeaseState.MOVING, target_slot=2), OWNER, None) == (Verdict.NONE, None)


@pytest.mark.parametrize(
    "seen",
    [
        None,
        report(DEAD_MS - 1, DEAD_MS),
        report(DEAD_MS, DEAD_MS - 1),
        report(DEAD_MS, DEAD_MS, sequence=9),
        report(DEAD_MS, DEAD_MS, epoch=3),
    ],
    ids=["never seen", "slot moved", "lease moved", "lease renewed since", "lease of another since"],
)
def test_a_home_that_may_live_is_alive(seen: BeatReport | None) -> None:
    assert verdict(HELD, OWNER, seen) == (Verdict.ALIVE, None)


def test_a_home_whose_counters_stand_still_is_silent() -> None:
    assert verdict(HELD, OWNER, report(DEAD_MS, DEAD_MS)) == (Verdict.SILENT, Victim(1, 3, 0xAB, Verdict.SILENT))


def test_the_key_of_a_home_whose_slot_cannot_be_read_is_what_it_said_last() -> None:
    assert verdict(HELD, None, report(DEAD_MS, DEAD_MS)) == (Verdict.SILENT, Victim(1, 3, 0xAB, Verdict.SILENT))
    later = replace(HELD, incarnation=4)
    assert verdict(later, None, report(DEAD_MS, DEAD_MS)) == (Verdict.SILENT, Victim(1, 4, 0, Verdict.SILENT))


@pytest.mark.parametrize("state", [SlotState.FAILED, SlotState.RESTARTING, SlotState.LEFT])
def test_a_home_that_said_so_has_failed(state: SlotState) -> None:
    found = verdict(HELD, replace(OWNER, state=state), report(0, 0))
    assert found == (Verdict.FAILED, Victim(1, 3, 0xAB, Verdict.FAILED))


def test_a_home_that_started_anew_has_failed() -> None:
    found = verdict(HELD, replace(OWNER, incarnation=4, state=SlotState.CLAIMING), report(0, 0))
    assert found == (Verdict.FAILED, Victim(1, 3, 0, Verdict.FAILED))


def test_a_stranger_in_the_slot_of_the_home_proves_nothing() -> None:
    stranger = replace(OWNER, node_uuid=C, incarnation=4, state=SlotState.CLAIMING)
    assert verdict(HELD, stranger, report(0, 100)) == (Verdict.ALIVE, None)
    silent = (Verdict.SILENT, Victim(1, 3, 0, Verdict.SILENT))
    assert verdict(HELD, stranger, report(0, DEAD_MS)) == silent


# -- agents -----------------------------------------------------------------------------------------------------------


def test_deadlines_fence_only_who_has_stopped() -> None:
    agent = LeaseFencing("a loop device")
    agent.fence(Victim(1, 3, 0, Verdict.SILENT))
    agent.fence(Victim(1, 3, 0, Verdict.FAILED))
    with pytest.raises(IoFailure):
        agent.fence(Victim(1, 3, 0, Verdict.ALIVE))
    assert "deadlines" in agent.warning and "a loop device" in agent.warning


class Disk:
    """Stands in for the reservations of a disk."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def preempt(self, key: int) -> None:
        self.calls.append(("preempt", key))


def test_reservations_preempt_the_key_of_the_slot() -> None:
    disk: Any = Disk()
    agent = PrFencing(disk, "sg")
    agent.fence(Victim(1, 3, 0xAB, Verdict.FAILED))
    assert disk.calls == [("preempt", 0xAB)]
    with pytest.raises(IoFailure, match="slot 1 has no registration key"):
        agent.fence(Victim(1, 3, 0, Verdict.SILENT))
    assert 0 < agent.key < 1 << 64 and agent.key != PrFencing(disk, "sg").key


def test_fencing_pr_without_reservations_is_refused(tmp_path: Any) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    with pytest.raises(MisuseError, match="fencing=pr: .*disk is a file.*; mount with fencing=lease"):
        choose(str(disk), parse("fencing=pr"))
    assert choose(str(disk), parse("fencing=auto")).name == "lease"
    assert choose(str(disk), parse("fencing=lease")).name == "lease"
    with pytest.raises(MisuseError, match="prdev="):
        choose(str(disk), parse(f"fencing=lease,prdev={disk}"))


def test_a_device_in_use_does_not_lose_its_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_args: Any, **_kwargs: Any) -> int:
        raise OSError(16, "busy")

    monkeypatch.setattr(admission.os, "open", busy)
    assert not admission.unused("/dev/sdx")


class Home:
    """As much of a daemon as knows whom it has to hear."""

    def __init__(self, seen: BeatReport) -> None:
        self.slot = 2
        self.heartbeat = SimpleNamespace(report=seen)
        self.fuse = None
        self.expected: dict[int, int] = {}
        self.members = SimpleNamespace(expect=self.expected.__setitem__)


def test_a_node_whose_slot_cannot_be_read_just_now_is_heard_all_the_same() -> None:
    daemon: Any = Home(report(0, 0))
    found = [None, ME, replace(OWNER, slot=3, incarnation=9, state=SlotState.RESTARTING), SlotRecord(4)]
    assert Succession(daemon)._who(found) == {1, 3}
    assert daemon.expected == {1: 3, 3: 9}


@pytest.mark.parametrize(("attached", "continues"), [(True, 0), (False, 3)], ids=["there", "on its way"])
def test_our_own_fuse_layer_is_heard_too(attached: bool, continues: int) -> None:
    """What its kernel caches is under locks of the home before."""
    daemon: Any = Home(report(0, 0))
    daemon.fuse = SimpleNamespace(attached=SimpleNamespace(is_set=lambda: attached), continues=continues)
    assert Succession(daemon)._who([OWNER, ME]) == {1, 2}
    daemon.fuse = SimpleNamespace(attached=SimpleNamespace(is_set=lambda: False), continues=0)
    assert Succession(daemon)._who([OWNER, ME]) == {1}
