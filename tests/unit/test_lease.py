"""Who may claim what: the decisions of SlotClaim, SlotReclaim, LeaseClaim, HandOver, Watch and Keeper."""

from collections.abc import Callable
from dataclasses import replace
from errno import EBUSY, EIO, ESTALE, EUCLEAN, EUSERS
from itertools import count
from typing import Any

import pytest

from mxfs_proto.errors import MisuseError
from mxfs_proto.ondisk import LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd.core.keeper import Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import (
    Action,
    Claim,
    Evidence,
    HandOver,
    HeldLease,
    HeldSlot,
    Joiner,
    LeaseClaim,
    Read,
    Refused,
    Sleep,
    SlotClaim,
    SlotReclaim,
    WriteLease,
    WriteSlot,
)
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch

T = Timeouts.named("default")
ME, OTHER = b"m" * 16, b"o" * 16
SLOTS = 4


class FakeDisk:
    """A disk without delays and the executor's loop; *hook* runs before each read, as another node would."""

    def __init__(self) -> None:
        self.now = 0
        self.slots: list[SlotRecord | None] = [SlotRecord(n) for n in range(1, SLOTS + 1)]
        self.lease: LeaseRecord | None = LeaseRecord(1)
        self.nonces = count(100)
        self.write_ms = 1
        self.hook: Callable[[], None] = lambda: None
        self.writes: list[SlotRecord | LeaseRecord] = []

    def put(self, slot: int, state: SlotState, uuid: bytes = OTHER, **fields: Any) -> SlotRecord:
        record = SlotRecord(slot, state, uuid, "o", 7, 10, 1, 0, 0, T.heartbeat_ms, T.lease_ms, T.node_dead_ms)
        record = replace(record, **fields)
        self.slots[slot - 1] = record
        return record

    def beat(self, *slots: int) -> None:
        for slot in slots:
            record = self.slots[slot - 1]
            assert record is not None
            self.slots[slot - 1] = replace(record, counter=record.counter + 1)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.now, self.now, self.lease, tuple(self.slots))

    def run(self, claim: Claim) -> Action:
        action = claim.begin()
        while True:
            if isinstance(action, Read):
                self.hook()
                action = claim.on_read(self.snapshot())
            elif isinstance(action, Sleep):
                self.now += action.ms
                action = claim.on_slept(self.now)
            elif isinstance(action, WriteSlot):
                self.now += self.write_ms
                self.slots[action.record.slot - 1] = action.record
                self.writes.append(action.record)
                action = claim.on_written(self.now)
            elif isinstance(action, WriteLease):
                self.now += self.write_ms
                if self.lease is None or action.record.order > self.lease.order:
                    self.lease = action.record
                self.writes.append(action.record)
                action = claim.on_written(self.now)
            else:
                return action

    def nonce(self) -> int:
        return next(self.nonces)

    def claim_slot(self, uuid: bytes = ME, last: int = 0) -> Action:
        return self.run(SlotClaim(Joiner(uuid, "me", 5, (), last), T, self.nonce))

    def claim_lease(self, me: SlotRecord, wait_ms: int = 0, **more: Any) -> Action:
        return self.run(LeaseClaim(me, T, self.nonce, wait_ms=wait_ms, **more))


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


def slot_of(action: Action) -> SlotRecord:
    assert isinstance(action, HeldSlot), action
    return action.record


def lease_of(action: Action) -> LeaseRecord:
    assert isinstance(action, HeldLease), action
    return action.record


def refused(action: Action) -> int:
    assert isinstance(action, Refused), action
    return action.code


# --- slots --------------------------------------------------------------------------------------------------------


def test_first_mount_takes_slot_one_quickly(disk: FakeDisk) -> None:
    slot = slot_of(disk.claim_slot())
    assert (slot.slot, slot.state, slot.incarnation, slot.pr_key) == (1, SlotState.CLAIMING, 1, 5)
    assert disk.now < 500


def test_never_used_slots_come_before_left_ones(disk: FakeDisk) -> None:
    disk.put(1, SlotState.LEFT)
    assert slot_of(disk.claim_slot()).slot == 2


def test_left_slot_of_another_node_is_taken_at_once(disk: FakeDisk) -> None:
    for number in range(1, SLOTS + 1):
        disk.put(number, SlotState.ACTIVE if number != 3 else SlotState.LEFT)
    slot = slot_of(disk.claim_slot())
    assert (slot.slot, slot.incarnation, slot.counter) == (3, 8, 11)
    assert disk.now < 500


@pytest.mark.parametrize("state", [SlotState.LEFT, SlotState.FAILED])
def test_own_slot_is_found_again(disk: FakeDisk, state: SlotState) -> None:
    disk.put(3, state, ME)
    slot = slot_of(disk.claim_slot())
    assert (slot.slot, slot.incarnation) == (3, 8)
    assert disk.now < 500


def test_own_slot_after_a_crash_is_taken_after_two_beats(disk: FakeDisk) -> None:
    disk.put(3, SlotState.ACTIVE, ME)
    assert slot_of(disk.claim_slot()).slot == 3
    assert 2 * T.heartbeat_ms < disk.now < 5 * T.heartbeat_ms


def test_own_slot_that_beats_is_refused(disk: FakeDisk) -> None:
    """The node has the volume mounted, or another machine has a copy of its uuid."""
    disk.put(3, SlotState.ACTIVE, ME)
    disk.hook = lambda: disk.beat(3)
    assert refused(disk.claim_slot()) == EBUSY
    assert disk.writes == []


def test_incarnation_never_goes_back(disk: FakeDisk) -> None:
    disk.put(3, SlotState.LEFT, ME)
    assert slot_of(disk.claim_slot(last=41)).incarnation == 42


def test_dead_slot_is_taken_when_all_others_live(disk: FakeDisk) -> None:
    for number in range(1, SLOTS + 1):
        disk.put(number, SlotState.ACTIVE)
    disk.hook = lambda: disk.beat(1, 3, 4)
    assert slot_of(disk.claim_slot()).slot == 2
    assert disk.now >= T.node_dead_ms


def test_full_volume_is_refused(disk: FakeDisk) -> None:
    for number in range(1, SLOTS + 1):
        disk.put(number, SlotState.ACTIVE)
    disk.hook = lambda: disk.beat(*range(1, SLOTS + 1))
    assert refused(disk.claim_slot()) == EUSERS
    assert disk.writes == []


def test_failed_slot_of_another_node_is_not_taken_at_once(disk: FakeDisk) -> None:
    """Its node's FUSE layer may live: the home has to fence and free it first."""
    disk.put(1, SlotState.FAILED)
    assert slot_of(disk.claim_slot()).slot == 2


def test_unreadable_slot_is_taken_last_and_late(disk: FakeDisk) -> None:
    for number in range(2, SLOTS + 1):
        disk.put(number, SlotState.ACTIVE)
    disk.slots[0] = None
    disk.hook = lambda: disk.beat(*range(2, SLOTS + 1))
    slot = slot_of(disk.claim_slot())
    assert slot.slot == 1
    assert slot.incarnation > 1 << 19
    assert disk.now >= T.node_dead_ms


def test_other_timeouts_are_refused(disk: FakeDisk) -> None:
    disk.put(1, SlotState.ACTIVE, lease_ms=9999)
    disk.hook = lambda: disk.beat(1)
    assert refused(disk.claim_slot()) == EBUSY


def test_other_timeouts_of_a_dead_node_do_not_matter(disk: FakeDisk) -> None:
    disk.put(1, SlotState.ACTIVE, lease_ms=9999)
    assert slot_of(disk.claim_slot()).slot == 2


def test_lost_race_ends_in_another_slot(disk: FakeDisk) -> None:
    def rival() -> None:
        if len(disk.writes) == 1:
            disk.put(1, SlotState.CLAIMING)

    disk.hook = rival
    assert slot_of(disk.claim_slot()).slot != 1


def test_late_claim_is_given_up_even_if_it_would_win(disk: FakeDisk) -> None:
    disk.write_ms = T.claim_bound_ms + 1

    def fast_from_the_second_on() -> None:
        if disk.writes:
            disk.write_ms = 1

    disk.hook = fast_from_the_second_on
    slot = slot_of(disk.claim_slot())
    first = disk.writes[0]
    assert isinstance(first, SlotRecord)
    assert slot.slot != first.slot


def test_disk_that_is_always_too_slow(disk: FakeDisk) -> None:
    disk.write_ms = T.claim_bound_ms + 1
    assert refused(disk.claim_slot()) == EIO


def test_illegal_event_changes_nothing() -> None:
    claim = SlotClaim(Joiner(ME, "me"), T, lambda: 1)
    with pytest.raises(MisuseError):
        claim.on_written(5)
    assert isinstance(claim.begin(), Read)
    with pytest.raises(MisuseError):
        claim.on_slept(5)
    with pytest.raises(MisuseError):
        claim.begin()


def test_reclaim(disk: FakeDisk) -> None:
    held = slot_of(disk.claim_slot())
    again = slot_of(disk.run(SlotReclaim(held, T, disk.nonce)))
    assert (again.slot, again.incarnation) == (held.slot, held.incarnation)
    assert again.nonce != held.nonce
    disk.put(held.slot, SlotState.ACTIVE)
    assert refused(disk.run(SlotReclaim(again, T, disk.nonce))) == ESTALE


def test_reclaim_after_a_late_write_waits(disk: FakeDisk) -> None:
    """Our late write may cover a taker's record; the taker has until then to see it."""
    held = slot_of(disk.claim_slot())
    began = disk.now
    slot_of(disk.run(SlotReclaim(held, T, disk.nonce, late=True)))
    assert disk.now - began >= T.node_dead_ms


# --- the lease ----------------------------------------------------------------------------------------------------


def node(disk: FakeDisk, slot: int = 1) -> SlotRecord:
    return disk.put(slot, SlotState.ACTIVE, ME, incarnation=2, nonce=3)


def hold(disk: FakeDisk, slot: int = 2, state: LeaseState = LeaseState.HELD, **fields: Any) -> LeaseRecord:
    lease = LeaseRecord(20, 5, state, slot, OTHER, 7, 0, 3, 55)
    disk.lease = replace(lease, **fields)
    return disk.lease


def test_free_lease(disk: FakeDisk) -> None:
    lease = lease_of(disk.claim_lease(node(disk)))
    assert (lease.epoch, lease.state, lease.owner_slot, lease.owner_uuid) == (1, LeaseState.HELD, 1, ME)
    assert [w.sequence for w in disk.writes if isinstance(w, LeaseRecord)] == [2, 3]
    assert disk.now < 500


def test_held_lease_of_a_live_node(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(2, SlotState.ACTIVE)
    hold(disk)
    disk.hook = lambda: disk.beat(2)
    assert refused(disk.claim_lease(me, wait_ms=60_000)) == EBUSY
    assert disk.writes == []


def test_renewed_lease_whose_slot_stands_still(disk: FakeDisk) -> None:
    """Both counters must stand still."""
    me = node(disk)
    disk.put(2, SlotState.ACTIVE)
    hold(disk)

    def renew() -> None:
        assert disk.lease is not None
        disk.lease = replace(disk.lease, sequence=disk.lease.sequence + 1)

    disk.hook = renew
    assert refused(disk.claim_lease(me, wait_ms=60_000)) == EBUSY


@pytest.mark.parametrize("state", [SlotState.LEFT, SlotState.FAILED, SlotState.FREE])
def test_owner_that_is_gone(disk: FakeDisk, state: SlotState) -> None:
    me = node(disk)
    disk.put(2, state)
    hold(disk)
    assert lease_of(disk.claim_lease(me)).epoch == 6


def test_owner_that_restarted(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(2, SlotState.CLAIMING, incarnation=8)
    hold(disk)
    assert lease_of(disk.claim_lease(me)).epoch == 6


def test_claim_over_the_owners_slot_proves_nothing(disk: FakeDisk) -> None:
    """A claimant that was too late may have written over a live home's slot."""
    me = node(disk)
    disk.put(2, SlotState.CLAIMING, b"x" * 16, incarnation=8)
    hold(disk)
    assert refused(disk.claim_lease(me)) == EBUSY


def test_dead_owner(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(2, SlotState.ACTIVE)
    hold(disk)
    assert refused(disk.claim_lease(me, wait_ms=5000)) == EBUSY
    assert lease_of(disk.claim_lease(me, wait_ms=30_000)).epoch == 6
    assert disk.now >= T.node_dead_ms


def test_evidence_spares_the_watch(disk: FakeDisk) -> None:
    me = node(disk)
    owner = disk.put(2, SlotState.ACTIVE)
    lease = hold(disk)
    evidence = Evidence(2, owner.incarnation, owner.counter, lease.sequence)
    disk.beat(2)
    assert refused(disk.claim_lease(me, evidence=evidence)) == EBUSY
    evidence = replace(evidence, counter=owner.counter + 1)
    assert lease_of(disk.claim_lease(me, evidence=evidence)).epoch == 6
    assert disk.now < 500


def test_moving_lease(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(2, SlotState.ACTIVE)
    disk.put(3, SlotState.ACTIVE)
    hold(disk, state=LeaseState.MOVING, target_slot=3)
    assert refused(disk.claim_lease(me)) == EBUSY
    hold(disk, state=LeaseState.MOVING, target_slot=1)
    assert lease_of(disk.claim_lease(me)).epoch == 6


def test_moving_lease_whose_target_left(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(3, SlotState.LEFT)
    hold(disk, state=LeaseState.MOVING, target_slot=3)
    assert lease_of(disk.claim_lease(me)).epoch == 6


def test_lease_that_was_ours(disk: FakeDisk) -> None:
    me = node(disk)
    lease = lease_of(disk.claim_lease(me))
    assert refused(disk.claim_lease(me)) == EBUSY
    assert lease_of(disk.claim_lease(me, held=lease)).epoch == lease.epoch + 1


def test_claim_of_a_node_that_lost_its_slot(disk: FakeDisk) -> None:
    me = node(disk)
    disk.put(1, SlotState.ACTIVE)
    assert refused(disk.claim_lease(me)) == ESTALE


def test_unreadable_lease(disk: FakeDisk) -> None:
    me = node(disk)
    disk.lease = None
    assert refused(disk.claim_lease(me)) == EUCLEAN


def test_a_lease_that_another_claimed_meanwhile_is_not_ours(disk: FakeDisk) -> None:
    """Both wrote; the one who finds the other's record behind its own, after the wait, has lost."""
    me = node(disk)
    disk.put(2, SlotState.ACTIVE)

    def rival() -> None:
        disk.beat(2)
        if disk.writes and disk.lease is not None and disk.lease.owner_slot == 1:
            last = disk.lease
            disk.lease = replace(last, sequence=last.sequence + 9, epoch=last.epoch + 1, owner_slot=2, owner_uuid=OTHER)
            disk.lease = replace(disk.lease, incarnation=7)

    disk.hook = rival
    assert refused(disk.claim_lease(me)) == EBUSY
    assert disk.lease is not None and disk.lease.owner_slot == 2


def test_late_lease_claim_is_given_up_and_made_again(disk: FakeDisk) -> None:
    """The record on the disk is ours then, but it counts only after every covered lease has ended."""
    me = node(disk)
    disk.write_ms = T.claim_bound_ms + 1

    def fast_from_the_second_on() -> None:
        if disk.writes:
            disk.write_ms = 1

    disk.hook = fast_from_the_second_on
    assert lease_of(disk.claim_lease(me)).epoch == 2
    assert disk.now >= T.lease_ms


@pytest.mark.parametrize(("target", "state"), [(0, LeaseState.FREE), (3, LeaseState.MOVING)])
def test_hand_over(disk: FakeDisk, target: int, state: LeaseState) -> None:
    lease = lease_of(disk.claim_lease(node(disk)))
    given = lease_of(disk.run(HandOver(lease, disk.now + 1000, target, T)))
    assert (given.state, given.target_slot, given.epoch) == (state, target, lease.epoch)
    assert disk.lease == given
    assert refused(disk.run(HandOver(replace(lease, nonce=1), disk.now + 1000, target, T))) == ESTALE


def test_hand_over_too_late(disk: FakeDisk) -> None:
    lease = lease_of(disk.claim_lease(node(disk)))
    assert refused(disk.run(HandOver(lease, disk.now - 1, 0, T))) == ESTALE
    assert disk.lease == lease


# --- watching -----------------------------------------------------------------------------------------------------


def snap(began: int, ended: int, counter: int | None) -> Snapshot:
    slot = None if counter is None else SlotRecord(1, SlotState.ACTIVE, OTHER, counter=counter)
    return Snapshot(began, ended, LeaseRecord(), (slot,))


def test_age_counts_from_the_end_of_one_read_to_the_start_of_another() -> None:
    watch = Watch(5000)
    watch.observe(snap(0, 100, 1))
    assert watch.age_ms(1) == 0
    watch.observe(snap(1000, 1300, 1))
    assert watch.age_ms(1) == 900
    assert watch.beats(1) == 0
    watch.observe(snap(2000, 2100, 2))
    assert (watch.age_ms(1), watch.beats(1)) == (0, 1)


def test_unreadable_is_unchanged() -> None:
    watch = Watch(5000)
    watch.observe(snap(0, 0, 1))
    watch.observe(snap(1000, 1000, None))
    watch.observe(snap(2000, 2000, 1))
    assert watch.age_ms(1) == 2000


def test_own_gap_starts_all_ages_anew() -> None:
    """After an outage of the disk nobody is dead yet."""
    watch = Watch(5000)
    watch.observe(snap(0, 0, 1))
    watch.observe(snap(20_000, 20_000, 1))
    assert watch.age_ms(1) == 0
    watch.observe(snap(21_000, 21_000, 1))
    assert watch.age_ms(1) == 1000


def test_a_read_that_hung_starts_all_ages_anew() -> None:
    """It began before the outage and ended after it: what it shows did not move because nobody could write."""
    watch = Watch(5000)
    watch.observe(snap(0, 0, 1))
    watch.observe(snap(1000, 20_000, 1))
    watch.observe(snap(20_250, 20_260, 1))
    assert watch.age_ms(1) == 250


# --- keeping ------------------------------------------------------------------------------------------------------


def keep(disk: FakeDisk) -> Keeper:
    claimed = disk.claim_slot()
    assert isinstance(claimed, HeldSlot)
    return Keeper(claimed, T)


def test_beat(disk: FakeDisk) -> None:
    keeper = keep(disk)
    keeper.set_state(SlotState.ACTIVE)
    before = keeper.record
    (duty,) = keeper.on_read(disk.snapshot())
    assert isinstance(duty, WriteSlot)
    assert (duty.record.counter, duty.record.state) == (before.counter + 1, SlotState.ACTIVE)
    assert keeper.on_written(duty, disk.now, disk.now + 5) is None
    assert keeper.slot_until_ms == disk.now + T.self_fence_ms


def test_taken_slot(disk: FakeDisk) -> None:
    keeper = keep(disk)
    disk.put(keeper.record.slot, SlotState.CLAIMING)
    (duty,) = keeper.on_read(disk.snapshot())
    assert isinstance(duty, SlotLost)


def test_stall_before_and_in_a_write(disk: FakeDisk) -> None:
    keeper = keep(disk)
    began = disk.now
    (duty,) = keeper.on_read(disk.snapshot())
    assert isinstance(duty, WriteSlot)
    late = keeper.on_written(duty, began, began + T.self_fence_ms + 1)
    assert isinstance(late, Stalled)
    assert late.late
    disk.slots[duty.record.slot - 1] = duty.record
    disk.now = began + T.self_fence_ms + 1
    (again,) = keeper.on_read(disk.snapshot())
    assert isinstance(again, Stalled)
    assert not again.late


def test_home_renews_and_expires(disk: FakeDisk) -> None:
    keeper = keep(disk)
    held = disk.claim_lease(keeper.record)
    assert isinstance(held, HeldLease)
    assert keeper.hold(held, disk.now) is None
    disk.now = held.since_ms + T.renewal_ms
    renewal, beat = keeper.on_read(disk.snapshot())
    assert isinstance(renewal, WriteLease)
    assert isinstance(beat, WriteSlot)
    assert renewal.record.sequence == held.record.sequence + 1
    assert beat.record.is_home
    assert keeper.on_written(renewal, disk.now, disk.now + 1) is None
    assert keeper.lease_until_ms == disk.now + T.lease_ms
    fence_at = disk.now + T.lease_ms - T.fence_margin_ms
    assert keeper.fence_at_ms == fence_at
    assert keeper.expire(fence_at - 1) is None
    lost = keeper.expire(fence_at)
    assert isinstance(lost, LeaseLost)
    assert keeper.lease is None


def test_home_sees_that_the_lease_was_taken(disk: FakeDisk) -> None:
    keeper = keep(disk)
    held = disk.claim_lease(keeper.record)
    assert isinstance(held, HeldLease)
    keeper.hold(held, disk.now)
    hold(disk, slot=3)
    lost, beat = keeper.on_read(disk.snapshot())
    assert isinstance(lost, LeaseLost)
    assert isinstance(beat, WriteSlot)
    assert not beat.record.is_home


def test_lease_ends_with_the_slot(disk: FakeDisk) -> None:
    """Others take the lease at once when the owner's slot has another owner."""
    keeper = keep(disk)
    held = disk.claim_lease(keeper.record)
    assert isinstance(held, HeldLease)
    late = HeldLease(held.record, keeper.slot_until_ms)
    assert isinstance(keeper.hold(late, keeper.slot_until_ms + 1), LeaseLost)


def test_all_nodes_lose_the_disk_and_nobody_is_dead(disk: FakeDisk) -> None:
    """The home shuts itself down; when the disk is back, no counter counts as dead, and it gets its lease again."""
    keeper = keep(disk)
    held = disk.claim_lease(keeper.record)
    assert isinstance(held, HeldLease)
    keeper.hold(held, disk.now)
    other = Watch(T.lease_ms)
    other.observe(disk.snapshot())
    disk.now += 2 * T.node_dead_ms  # no read ends in all this time
    assert isinstance(keeper.expire(disk.now), LeaseLost)
    for _ in range(T.node_dead_ms // T.heartbeat_ms - 1):
        other.observe(disk.snapshot())
        assert other.age_ms(0) < T.node_dead_ms
        assert other.age_ms(keeper.record.slot) < T.node_dead_ms
        disk.now += T.heartbeat_ms
    again = disk.claim_lease(keeper.record, wait_ms=2 * T.lease_ms)
    assert isinstance(again, HeldLease)
    assert again.record.epoch == held.record.epoch + 1
