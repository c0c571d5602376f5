"""Membership as a home sees it, and the lease as its client sees it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mxfs_proto.errors import MisuseError
from mxfsd.core.membership import (
    ClientLease,
    DeclareDead,
    Freeze,
    Joined,
    LeaseEnded,
    Left,
    Membership,
    MemberState,
    Reason,
    Refused,
    SlotReport,
    SlotSays,
    StepDown,
    Suspect,
    Thaw,
    Trusted,
)

TIMES = SimpleNamespace(lease_ms=100, node_dead_ms=300)
CLAIMED = SlotSays.CLAIMED


def home(*nodes: int, must_fence: bool = False) -> Membership:
    member = Membership(1, TIMES, must_fence=must_fence)
    for node in nodes:
        assert member.on_connected(0, node, 5) == [Joined(node, 5)]
    return member


def slots(own_ms: int, **ages: int) -> list[SlotReport]:
    return [SlotReport(1, 1, CLAIMED, own_ms)] + [
        SlotReport(int(name[1:]), 5, CLAIMED, age_ms) for name, age_ms in ages.items()
    ]


def test_contact_suspicion_and_trust() -> None:
    member = home(2)
    assert member.tick(99) == []
    assert member.tick(100) == [Suspect(2)]
    assert member.state(2) is MemberState.SUSPECT
    assert member.on_contact(150, 2, 5) == [Trusted(2)]
    assert member.tick(200) == []
    assert (member.present(), member.incarnation(2)) == ([2], 5)


def test_stopped_heartbeat() -> None:
    member = home(2, 3)
    member.on_contact(250, 3, 5)
    assert member.on_slots(299, slots(0, n2=299, n3=1)) == [Suspect(2)]
    assert member.on_slots(300, slots(0, n2=300, n3=1)) == [DeclareDead(2, 5, Reason.SILENT_SLOT), LeaseEnded(2, 5)]
    assert member.state(2) is MemberState.EVICTED
    assert member.on_contact(310, 2, 5) == [Refused(2, 5)]
    assert member.on_connected(310, 2, 5) == [Refused(2, 5)]
    assert member.on_connected(320, 2, 6) == [Joined(2, 6)]
    assert member.on_connected(320, 2, 5) == [Refused(2, 5)]


def test_last_gasp_still_waits_for_the_lease() -> None:
    member = home(2)
    member.on_contact(50, 2, 5)
    gasp = [SlotReport(1, 1, CLAIMED, 0), SlotReport(2, 5, SlotSays.FAILED, 0)]
    assert member.on_slots(60, gasp) == [DeclareDead(2, 5, Reason.LAST_GASP)]
    assert member.on_contact(70, 2, 5) == [Refused(2, 5)]
    assert member.tick(149) == []
    assert member.tick(150) == [LeaseEnded(2, 5)]


def test_new_incarnation_waits_for_the_old_one() -> None:
    member = home(2)
    assert member.on_connected(50, 2, 6) == [DeclareDead(2, 5, Reason.REPLACED)]
    assert member.on_connected(60, 2, 6) == []
    assert member.on_contact(60, 2, 6) == [Refused(2, 6)]
    assert member.tick(100) == [LeaseEnded(2, 5), Joined(2, 6)]
    assert member.on_slots(110, [SlotReport(2, 7, CLAIMED, 0)]) == []
    assert member.on_slots(699, [SlotReport(2, 7, CLAIMED, 0)]) == [Suspect(2)]
    assert DeclareDead(2, 6, Reason.SILENT_SLOT) in member.on_slots(700, [SlotReport(2, 7, CLAIMED, 0)])


def test_a_daemon_that_starts_again_has_twice_as_long() -> None:
    """It is slow on a busy machine; its caches are dropped, so that its locks delay others, and harm nobody."""
    member = home(2)
    restarting = SlotReport(2, 5, SlotSays.RESTARTING, 0)
    member.on_slots(50, [SlotReport(1, 1, CLAIMED, 0), restarting])
    assert member.on_slots(599, [replace(restarting, age_ms=549)]) == [Suspect(2)]
    assert member.tick(600)[0] == DeclareDead(2, 5, Reason.UNREACHABLE)
    member = home(2)
    member.on_slots(50, [SlotReport(1, 1, CLAIMED, 0), restarting])
    member.on_slots(350, [SlotReport(2, 6, CLAIMED, 0)])
    assert member.on_connected(550, 2, 6, continues=5) == [Trusted(2)]
    assert member.on_slots(600, [SlotReport(2, 6, CLAIMED, 0)]) == []
    member.tick(650)
    assert DeclareDead(2, 6, Reason.UNREACHABLE) in member.tick(850), "it is up: as any other"


def test_a_restarted_daemon_goes_on_with_what_its_fuse_layer_holds() -> None:
    member = home(2)
    assert member.on_slots(50, [SlotReport(1, 1, CLAIMED, 0), SlotReport(2, 6, CLAIMED, 0)]) == []
    assert member.on_connected(60, 2, 6, continues=5) == []
    assert (member.state(2), member.incarnation(2)) == (MemberState.ACTIVE, 6)
    assert member.on_contact(70, 2, 5) == [Refused(2, 5)]
    assert member.on_contact(80, 2, 6) == []


def test_a_daemon_that_died_before_its_fuse_layer_knew_of_it_is_continued_too() -> None:
    member = home(2)
    assert member.on_connected(60, 2, 6, continues=5) == []
    assert member.on_connected(70, 2, 8, continues=5) == []
    assert member.on_connected(80, 2, 9, continues=8) == []
    assert member.on_connected(90, 2, 10, continues=4) == [Refused(2, 10)]


def test_a_new_home_takes_a_restarted_daemon_at_the_word_of_its_slot() -> None:
    member = home()
    member.expect(0, 2, 6)
    assert member.on_connected(60, 2, 7, continues=5) == []
    assert member.on_connected(70, 2, 9, continues=8) == [Refused(2, 9)]


def test_a_restarted_daemon_comes_too_late_or_continues_somebody_else() -> None:
    member = home(2)
    assert member.on_connected(10, 2, 7, continues=4) == [Refused(2, 7)]
    assert DeclareDead(2, 5, Reason.SILENT_SLOT) in member.on_slots(400, slots(0, n2=400))
    assert member.on_connected(410, 2, 6, continues=5) == [Refused(2, 6)]
    assert member.on_connected(420, 2, 6) == [Joined(2, 6)]


def test_nobody_continues_what_this_home_does_not_know() -> None:
    assert home().on_connected(10, 2, 7, continues=6) == [Refused(2, 7)]


def test_unreachable_node_is_declared_dead_while_its_slot_moves() -> None:
    member = home(2, 3)
    member.on_contact(290, 3, 5)
    assert member.on_slots(300, slots(0, n2=1, n3=1)) == [
        Suspect(2),
        DeclareDead(2, 5, Reason.UNREACHABLE),
        LeaseEnded(2, 5),
    ]


def test_whoever_loses_most_others_one_after_the_other_is_cut_off_too() -> None:
    member = home(2, 3)
    member.on_contact(150, 3, 5)
    assert member.on_slots(300, slots(0, n2=1, n3=1)) == [StepDown(), Suspect(2), Suspect(3)]
    assert member.present() == [2, 3]


def test_whoever_loses_most_others_is_the_one_cut_off() -> None:
    member = home(2, 3)
    assert member.on_slots(300, slots(0, n2=1, n3=1)) == [StepDown(), Suspect(2), Suspect(3)]
    assert member.present() == [2, 3]


def test_fence_comes_before_the_end_of_the_lease() -> None:
    member = home(2, must_fence=True)
    assert DeclareDead(2, 5, Reason.SILENT_SLOT) in member.on_slots(400, slots(0, n2=400))
    assert member.tick(1000) == []
    assert member.fenced(1001, 2) == [LeaseEnded(2, 5)]
    with pytest.raises(MisuseError):
        member.fenced(1002, 2)


def test_without_the_disk_nobody_is_declared_dead() -> None:
    member = home(2)
    assert member.on_slots(300, slots(100, n2=300)) == [Freeze(), Suspect(2)]
    assert member.frozen
    assert member.on_slots(900, slots(700, n2=900)) == []
    assert Thaw() in member.on_slots(1000, slots(0, n2=0))
    assert member.state(2) is MemberState.EVICTED  # unreachable all the time, and the disk is back
    member = home(2)
    assert member.on_disk(10, failed=True) == [Freeze()]
    member.on_contact(600, 2, 5)
    assert member.on_disk(610, failed=False) == [Thaw()]
    assert member.tick(650) == []


def test_a_node_that_is_heard_can_be_put_out_all_the_same() -> None:
    member = home(2)
    member.on_contact(50, 2, 5)
    assert member.put_out(2, Reason.LATE) == [DeclareDead(2, 5, Reason.LATE)]
    assert member.put_out(2, Reason.LATE) == []
    assert member.on_contact(60, 2, 5) == [Refused(2, 5)]
    assert member.tick(150) == [LeaseEnded(2, 5)]
    assert member.put_out(3, Reason.LATE) == []


def test_leaving_in_order() -> None:
    member = home(2)
    assert member.on_left(10, 2, 4) == []
    assert member.on_left(10, 2, 5) == [Left(2, 5)]
    assert member.on_left(10, 2, 5) == []
    assert member.tick(1000) == []
    assert member.on_connected(1000, 2, 6) == [Joined(2, 6)]


def test_new_home_expects_the_members_of_the_last_one() -> None:
    member = Membership(1, TIMES)
    member.expect(1000, 2, 5)
    assert member.on_connected(1010, 2, 5) == []
    assert member.tick(1100) == []
    assert member.tick(1110) == [Suspect(2)]


def test_misuse() -> None:
    member = home(2)
    with pytest.raises(MisuseError):
        member.on_connected(0, 1, 5)
    with pytest.raises(MisuseError):
        member.on_connected(0, 2, 0)
    assert member.state(3) is MemberState.ABSENT
    assert member.incarnation(3) == 0


def test_client_lease_runs_from_the_sending() -> None:
    lease = ClientLease(100, 10)
    assert lease.until_ms() == 0
    assert not lease.expired(0)
    assert lease.renewed(30, 20)
    assert lease.until_ms() == 120
    assert lease.renewed(40, 10)  # an older answer shortens nothing
    assert lease.until_ms() == 120
    assert not lease.expired(109)
    assert not lease.renewed(110, 105)  # lapsed: first everything must be dropped
    assert lease.expired(110)
    assert not lease.expired(111)
    assert not lease.renewed(200, 100)
    assert lease.renewed(201, 195)
