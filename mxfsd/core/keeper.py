"""What a node does at each heartbeat to keep its slot and, as home, the lease (pure).

The keeper trusts nothing that it wrote too late: its slot is its own until ``self_fence_ms`` and the lease until
``lease_ms`` after the *start* of the last beat that was written in time; a home stops a margin before that. Others wait
``node_dead_ms``, counted from what they read, so that a late node has stopped before anybody takes what it had.
"""

from dataclasses import dataclass, replace

from mxfs_proto.ondisk import Address, LeaseRecord, SlotRecord, SlotState
from mxfsd.core.lease import HeldLease, HeldSlot, WriteLease, WriteSlot, renewed, same_lease
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot


@dataclass(frozen=True, slots=True)
class SlotLost:
    """Somebody else has our slot: this node is out and must stop at once."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """We are not home any more and must not act as home for another moment."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """Nothing of ours reached the disk for too long: claim the slot again (SlotReclaim) before anything else.

    *late*: the last write did reach it, but too late; it may cover a taker's claim.
    """

    ms: int
    late: bool


Duty = WriteSlot | WriteLease | SlotLost | LeaseLost | Stalled


class Keeper:
    """Keeps one claimed slot, and a home lease while ``hold`` was called."""

    def __init__(self, held: HeldSlot, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self.record = held.record
        self.lease: LeaseRecord | None = None
        self._state = SlotState.JOINING
        self._addresses = held.record.addresses
        self._slot_ms = held.since_ms
        self._lease_ms = 0

    @property
    def slot_until_ms(self) -> int:
        """Until when the slot is ours without another beat."""
        return self._slot_ms + self.timeouts.self_fence_ms

    @property
    def lease_until_ms(self) -> int | None:
        """Until when the lease is ours without another renewal; None when we are not home.

        Never longer than the slot is ours: others take the lease of a node whose slot was taken at once.
        """
        if self.lease is None:
            return None
        return min(self._lease_ms + self.timeouts.lease_ms, self.slot_until_ms)

    @property
    def fence_at_ms(self) -> int | None:
        """When a home that could not renew shuts its XFS down, a margin before the lease ends; None: not home."""
        until = self.lease_until_ms
        return None if until is None else until - self.timeouts.fence_margin_ms

    def overdue(self, now_ms: int) -> bool:
        """Whether a lower mount must not be up any more: the lease is gone, or ends within the margin."""
        at = self.fence_at_ms
        return at is None or now_ms >= at

    def set_state(self, state: SlotState) -> None:
        """Show *state* from the next beat on."""
        self._state = state

    def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """Show *addresses* from the next beat on."""
        self._addresses = addresses

    def hold(self, held: HeldLease, now_ms: int) -> LeaseLost | None:
        """Renew this lease from the next beat on; return LeaseLost if it is too late for that."""
        self.lease, self._lease_ms = held.record, held.since_ms
        return self.expire(now_ms)

    def let_go(self) -> LeaseRecord | None:
        """Renew no more; return the lease as it was written last."""
        lease, self.lease = self.lease, None
        return lease

    def resume(self, held: HeldSlot) -> None:
        """The slot was claimed again after a stall."""
        self.record, self._slot_ms = held.record, held.since_ms

    def on_read(self, snap: Snapshot) -> list[Duty]:
        """Return what to do, in this order, after a read of the lockspace."""
        duties: list[Duty] = []
        if self.lease is not None:
            duties += self._renew(self.lease, snap)
        found = snap.slot(self.record.slot)
        if found is not None and not found.same_claim(self.record):
            self.lease = None
            return [SlotLost(f"slot {found.slot} was taken by {found.name or 'an unnamed node'}")]
        if snap.ended_ms > self.slot_until_ms:
            lost = self.expire(snap.ended_ms)
            duties = [duty for duty in duties if isinstance(duty, LeaseLost)]
            if lost is not None:
                duties.append(lost)
            duties.append(Stalled(snap.ended_ms - self._slot_ms, False))
            return duties
        duties.append(WriteSlot(self._next(snap)))
        return duties

    def on_written(self, duty: WriteSlot | WriteLease, began_ms: int, now_ms: int) -> Duty | None:
        """Take note of a write that returned at *now_ms* in a beat whose read began at *began_ms*."""
        if isinstance(duty, WriteLease):
            if self.lease is None:
                return None
            lost = self.expire(now_ms)
            if lost is None:
                self.lease, self._lease_ms = duty.record, began_ms
            return lost
        self.record = duty.record
        if now_ms > self.slot_until_ms:
            return Stalled(now_ms - self._slot_ms, True)
        self._slot_ms = began_ms
        return None

    def expire(self, now_ms: int) -> LeaseLost | None:
        """Return LeaseLost, once, if a home must stop at *now_ms* (``fence_at_ms``); for while an I/O hangs."""
        if self.lease is None or not self.overdue(now_ms):
            return None
        return self._lost(f"expired: nothing was renewed for {now_ms - min(self._lease_ms, self._slot_ms)} ms")

    def last(self, state: SlotState) -> SlotRecord:
        """Return the last record of this claim, LEFT or FAILED."""
        self.record = replace(self.record, counter=self.record.counter + 1, state=state, is_home=False)
        return self.record

    def _next(self, snap: Snapshot) -> SlotRecord:
        return replace(
            self.record,
            counter=self.record.counter + 1,
            state=self._state,
            addresses=self._addresses,
            is_home=self.lease is not None,
            epoch_seen=self.record.epoch_seen if snap.lease is None else snap.lease.epoch,
        )

    def _renew(self, lease: LeaseRecord, snap: Snapshot) -> list[Duty]:
        found = snap.lease
        if found is not None and not same_lease(found, lease):
            return [self._lost(f"taken by slot {found.owner_slot}, epoch {found.epoch}")]
        lost = self.expire(snap.ended_ms)
        if lost is not None:
            return [lost]
        # Half a heartbeat early: beats come at times that are only almost regular.
        due = self._lease_ms + self.timeouts.renewal_ms - self.timeouts.heartbeat_ms // 2
        if snap.began_ms < due:
            return []
        # Counted on from the copy that was read, so that the write goes over the other one: if ours was hidden by a
        # late write of an earlier owner, the one that was read is the only good one.
        return [WriteLease(renewed(lease if found is None else found))]

    def _lost(self, reason: str) -> LeaseLost:
        self.lease = None
        return LeaseLost(reason)
