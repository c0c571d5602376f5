"""Claims of slots and of the home lease on a disk without COMPARE AND WRITE (pure).

The algorithm is sanlock's delta lease (Chockler and Malkhi, "Light-Weight Leases for Storage-Centric
Coordination"): read; if the record may be taken, write it with a random nonce; wait; read again; the claim holds
if the nonce is still there. It is safe if the read and the write of a claim together take less than the others'
wait, so a claimant whose own took longer than ``claim_bound_ms`` gives that claim up, even if it would have won.

A claim takes events (``on_read``, ``on_written``, ``on_slept``) with the executor's monotonic milliseconds in and
returns the next action. It knows no disk, clock or random number; nonces are handed in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from errno import EBUSY, EIO, ESTALE, EUCLEAN, EUSERS

from mxfs_proto.errors import MisuseError
from mxfs_proto.ondisk import Address, LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch

MAX_ABANDONED = 8
"""So many claims given up because the disk was too slow end the whole attempt."""
UNKNOWN_INCARNATIONS = 1 << 20
"""Added to the highest incarnation known when a slot's own one cannot be read any more."""

ENDED = frozenset({SlotState.FREE, SlotState.LEFT})
"""States whose slot anyone may take at once."""
GONE = ENDED | {SlotState.FAILED, SlotState.RESTARTING}
"""States whose node runs no daemon any more."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read the whole lockspace, then call ``on_read``."""


@dataclass(frozen=True, slots=True)
class WriteSlot:
    """Write this slot, then call ``on_written`` with the time at which the write returned."""

    record: SlotRecord


@dataclass(frozen=True, slots=True)
class WriteLease:
    """Write this lease copy (number ``sequence % 2``), then call ``on_written``; make it durable after that."""

    record: LeaseRecord


@dataclass(frozen=True, slots=True)
class Sleep:
    """Do nothing for so many milliseconds, then call ``on_slept``."""

    ms: int


@dataclass(frozen=True, slots=True)
class HeldSlot:
    """The claim holds: this slot is ours, and nobody can think otherwise until since_ms + node_dead_ms."""

    record: SlotRecord
    since_ms: int


@dataclass(frozen=True, slots=True)
class HeldLease:
    """The claim holds: this lease is ours until since_ms + lease_ms unless it is renewed."""

    record: LeaseRecord
    since_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The claim failed for good; *code* is an errno."""

    reason: str
    code: int


Action = Read | WriteSlot | WriteLease | Sleep | HeldSlot | HeldLease | Refused


class Phase(Enum):
    """Where a claim stands."""

    IDLE = auto()
    READING = auto()
    WRITING = auto()
    COPYING = auto()
    WAITING = auto()
    CONFIRMING = auto()
    BACKOFF = auto()
    ENDED = auto()


class Event(Enum):
    """What happens to a claim."""

    BEGIN = auto()
    READ = auto()
    WRITTEN = auto()
    SLEPT = auto()


_NEXT: dict[tuple[Phase, Event], frozenset[Phase]] = {
    (Phase.IDLE, Event.BEGIN): frozenset({Phase.READING}),
    (Phase.READING, Event.READ): frozenset({Phase.WRITING, Phase.BACKOFF, Phase.ENDED}),
    (Phase.WRITING, Event.WRITTEN): frozenset({Phase.COPYING, Phase.WAITING, Phase.BACKOFF, Phase.ENDED}),
    (Phase.COPYING, Event.WRITTEN): frozenset({Phase.WAITING, Phase.BACKOFF, Phase.ENDED}),
    (Phase.WAITING, Event.SLEPT): frozenset({Phase.CONFIRMING}),
    (Phase.CONFIRMING, Event.READ): frozenset({Phase.BACKOFF, Phase.ENDED}),
    (Phase.BACKOFF, Event.SLEPT): frozenset({Phase.READING}),
}

Nonces = Callable[[], int]
Write = WriteSlot | WriteLease


class Claim:
    """The part that slot and lease have in common. Any event that does not fit the phase raises MisuseError."""

    def __init__(self, timeouts: Timeouts, nonces: Nonces) -> None:
        self.timeouts = timeouts
        self.phase = Phase.IDLE
        self.watch = Watch(timeouts.lease_ms)
        self.nonces = nonces
        self.attempts = 0
        self.abandoned = 0
        self.began_ms: int | None = None
        self._intent: Write | None = None
        self._read_ms = 0
        self._written_ms = 0

    def begin(self) -> Action:
        """Return the first action."""
        self._enter(Event.BEGIN, Phase.READING)
        return Read()

    def on_read(self, snap: Snapshot) -> Action:
        """Take the lockspace as it was read."""
        self._check(Event.READ)
        self.watch.observe(snap)
        if self.began_ms is None:
            self.began_ms = snap.ended_ms
        if self.phase is Phase.CONFIRMING:
            return self._confirm(snap)
        choice = self.choose(snap)
        if isinstance(choice, Sleep):
            return self._enter(Event.READ, Phase.BACKOFF, choice)
        if isinstance(choice, Refused):
            return self._enter(Event.READ, Phase.ENDED, choice)
        self.attempts += 1
        self._intent = choice
        self._read_ms = snap.began_ms
        return self._enter(Event.READ, Phase.WRITING, choice)

    def on_written(self, now_ms: int) -> Action:
        """The write returned at *now_ms*."""
        self._check(Event.WRITTEN)
        if now_ms - self._read_ms > self.timeouts.claim_bound_ms:
            # The write may have landed on a claim that was confirmed meanwhile.
            self.abandoned += 1
            self.on_abandoned()
            if self.abandoned >= MAX_ABANDONED:
                reason = f"reading and writing a claim took over {self.timeouts.claim_bound_ms} ms each time"
                return self._enter(Event.WRITTEN, Phase.ENDED, Refused(f"disk too slow: {reason}", EIO))
            return self._enter(Event.WRITTEN, Phase.BACKOFF, self._jitter())
        if self.phase is Phase.WRITING and isinstance(self._intent, WriteLease):
            # The second copy: one late write by an earlier owner, which covers one copy, cannot hide this epoch.
            self._intent = WriteLease(renewed(self._intent.record))
            return self._enter(Event.WRITTEN, Phase.COPYING, self._intent)
        self._written_ms = now_ms
        return self._enter(Event.WRITTEN, Phase.WAITING, Sleep(self.timeouts.claim_wait_ms))

    def on_slept(self, now_ms: int) -> Action:
        """The sleep ended at *now_ms*."""
        self._check(Event.SLEPT)
        if self.phase is Phase.WAITING:
            left = self._written_ms + self.timeouts.claim_wait_ms - now_ms
            if left > 0:
                return Sleep(left)
            return self._enter(Event.SLEPT, Phase.CONFIRMING, Read())
        return self._enter(Event.SLEPT, Phase.READING, Read())

    def choose(self, snap: Snapshot) -> Write | Sleep | Refused:
        """Return what to write, or how long to wait, or why not."""
        raise NotImplementedError

    def holds(self, snap: Snapshot, intent: Write) -> bool:
        """Return whether the disk still shows *intent*."""
        raise NotImplementedError

    def on_abandoned(self) -> None:
        """A claim was given up after its write."""

    def _confirm(self, snap: Snapshot) -> Action:
        intent = self._intent
        if intent is None or not self.holds(snap, intent):
            return self._enter(Event.READ, Phase.BACKOFF, self._jitter())
        if snap.ended_ms - self._read_ms > self.timeouts.lease_ms:
            # We were stopped for so long that others may soon count us dead.
            self.on_abandoned()
            return self._enter(Event.READ, Phase.BACKOFF, self._jitter())
        if isinstance(intent, WriteSlot):
            return self._enter(Event.READ, Phase.ENDED, HeldSlot(intent.record, self._read_ms))
        return self._enter(Event.READ, Phase.ENDED, HeldLease(intent.record, self._read_ms))

    def _jitter(self) -> Sleep:
        """Competitors that met once shall not meet again."""
        return Sleep(1 + self.nonces() % self.timeouts.claim_bound_ms)

    def _check(self, event: Event) -> None:
        if (self.phase, event) not in _NEXT:
            raise MisuseError(f"claim: {event.name} in phase {self.phase.name}")

    def _enter(self, event: Event, phase: Phase, action: Action | None = None) -> Action:
        self._check(event)
        if phase not in _NEXT[self.phase, event]:
            raise MisuseError(f"claim: {event.name} leads from {self.phase.name} to {phase.name}")
        self.phase = phase
        return Read() if action is None else action


@dataclass(frozen=True, slots=True)
class Joiner:
    """Who claims a slot. ``node_uuid`` is 16 bytes and stays the same over restarts of the node.

    ``last_incarnation`` is the highest that this node ever had on the volume, kept in its state folder: a late write
    by an earlier owner can take the number on the disk back, and (node uuid, incarnation) must never come twice.
    """

    node_uuid: bytes
    name: str
    pr_key: int = 0
    addresses: tuple[Address, ...] = ()
    last_incarnation: int = 0


class SlotClaim(Claim):
    """Claims any slot: our own from before, else a free one, else one whose node is dead."""

    def __init__(self, joiner: Joiner, timeouts: Timeouts, nonces: Nonces) -> None:
        super().__init__(timeouts, nonces)
        self.joiner = joiner
        self._given_up: set[int] = set()

    def choose(self, snap: Snapshot) -> Write | Sleep | Refused:
        """See the class. A slot whose owner may live is never taken."""
        odd = self._other_timeouts(snap)
        if odd is not None:
            return odd
        own = self._own(snap)
        if own is not None:
            return own
        kept = self._of_the_home(snap)
        usable = [s for s in snap.slots if s is not None and s.slot not in self._given_up and s.slot != kept]
        # Slots that nobody ever had come first, so that a node that comes back finds its own.
        for state in (SlotState.FREE, SlotState.LEFT):
            free = [s.slot for s in usable if s.state is state]
            if free:
                index = self.nonces() % len(free) if self.attempts else 0
                return self._take(snap, free[index])
        dead = self.timeouts.node_dead_ms
        for number in range(1, len(snap.slots) + 1):
            if number != kept and self.watch.age_ms(number) >= dead:
                return self._take(snap, number)
        if snap.ended_ms - (self.began_ms or 0) > dead + 4 * self.timeouts.heartbeat_ms:
            return Refused(f"all {len(snap.slots)} slots of the volume are in use", EUSERS)
        return Sleep(self.timeouts.heartbeat_ms)

    def _of_the_home(self, snap: Snapshot) -> int:
        """The slot that the lease names while it is held, 0: none. Who takes the lease has to find the home's
        registration key there."""
        return snap.lease.owner_slot if snap.lease is not None and snap.lease.state is LeaseState.HELD else 0

    def _own(self, snap: Snapshot) -> Write | Sleep | Refused | None:
        mine = [
            s
            for s in snap.slots
            if s is not None
            and s.node_uuid == self.joiner.node_uuid
            and s.state is not SlotState.FREE
            and s.slot not in self._given_up
        ]
        ended = [s for s in mine if s.state in GONE]
        wait = False
        for record in mine:
            if record in ended or (ended and record.state is SlotState.CLAIMING):
                continue
            if self.watch.beats(record.slot):
                reason = f"this node (or one with its uuid) has the volume mounted already, as slot {record.slot}"
                return Refused(reason, EBUSY)
            # Two periods of the owner, and the time that a claim of the same node needs to begin beating.
            patience = 2 * max(self.timeouts.heartbeat_ms, record.heartbeat_ms)
            patience += self.timeouts.claim_wait_ms + self.timeouts.claim_bound_ms
            if self.watch.age_ms(record.slot) >= min(patience, self.timeouts.node_dead_ms):
                ended.append(record)
            else:
                wait = True
        if wait:
            return Sleep(max(1, self.timeouts.heartbeat_ms // 2))
        return self._take(snap, ended[0].slot) if ended else None

    def _other_timeouts(self, snap: Snapshot) -> Sleep | Refused | None:
        mine = (self.timeouts.heartbeat_ms, self.timeouts.lease_ms, self.timeouts.node_dead_ms)
        wait = False
        for record in snap.slots:
            if record is None or record.state not in (SlotState.JOINING, SlotState.ACTIVE):
                continue
            if (record.heartbeat_ms, record.lease_ms, record.node_dead_ms) == mine:
                continue
            if self.watch.beats(record.slot):
                reason = f"slot {record.slot} ({record.name}) runs with other timeouts; use the same ones"
                return Refused(reason, EBUSY)
            patience = min(3 * record.heartbeat_ms, self.timeouts.node_dead_ms)
            wait = wait or self.watch.age_ms(record.slot) < patience
        return Sleep(self.timeouts.heartbeat_ms) if wait else None

    def _take(self, snap: Snapshot, number: int) -> WriteSlot:
        old = snap.slot(number)
        if old is not None:
            incarnation, counter = old.incarnation + 1, old.counter + 1
        else:
            known = [s for s in snap.slots if s is not None]
            incarnation = max((s.incarnation for s in known), default=0) + UNKNOWN_INCARNATIONS
            counter = 1
        incarnation = max(incarnation, self.joiner.last_incarnation + 1)
        self._target = number
        return WriteSlot(
            SlotRecord(
                number,
                SlotState.CLAIMING,
                self.joiner.node_uuid,
                self.joiner.name,
                incarnation,
                counter,
                self.nonces(),
                self.joiner.pr_key,
                snap.lease.epoch if snap.lease is not None else 0,
                self.timeouts.heartbeat_ms,
                self.timeouts.lease_ms,
                self.timeouts.node_dead_ms,
                False,
                self.joiner.addresses,
            )
        )

    def on_abandoned(self) -> None:
        """Our record may cover a live node's: that slot is no longer ours to take until it counts as dead."""
        self._given_up.add(self._target)

    def holds(self, snap: Snapshot, intent: Write) -> bool:
        """See Claim."""
        if not isinstance(intent, WriteSlot):
            return False
        found = snap.slot(intent.record.slot)
        return found is not None and found.same_claim(intent.record)


class SlotReclaim(Claim):
    """Claims a slot again that shows our claim still, after a stall (nothing of ours was written for self_fence_ms).

    The home uses it too, to get hold of the slot of a node that it has fenced before it frees the slot. *late*: the
    last write came too late, so that what the disk shows may be our record over a taker's.
    """

    def __init__(self, held: SlotRecord, timeouts: Timeouts, nonces: Nonces, *, late: bool = False) -> None:
        super().__init__(timeouts, nonces)
        self._claims = [held]
        self._late = late

    def choose(self, snap: Snapshot) -> Write | Sleep | Refused:
        """Take it if the record is from our claim still, else refuse with ESTALE."""
        held = self._claims[-1]
        found = snap.slot(held.slot)
        if found is not None and not any(found.same_claim(claim) for claim in self._claims):
            return Refused(f"slot {held.slot} was taken by {found.name or 'another node'}", ESTALE)
        if self._late and self.watch.age_ms(held.slot) < self.timeouts.node_dead_ms:
            # Our late write may cover a taker's claim: leave it time to see that and to stop.
            return Sleep(self.timeouts.heartbeat_ms)
        record = replace(held, counter=held.counter + 1, nonce=self.nonces())
        # A write of ours that was given up may still be what the disk shows.
        self._claims.append(record)
        return WriteSlot(record)

    def on_abandoned(self) -> None:
        """See *late*."""
        self._late = True

    def holds(self, snap: Snapshot, intent: Write) -> bool:
        """See Claim."""
        if not isinstance(intent, WriteSlot):
            return False
        found = snap.slot(intent.record.slot)
        return found is not None and found.same_claim(intent.record)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Seen by our own heartbeat process: these counters did not move for node_dead_ms. Spares a second watch."""

    slot: int
    incarnation: int
    counter: int
    lease_sequence: int

    def fits(self, snap: Snapshot) -> bool:
        """Return whether the counters still stand where they were seen. A slot that cannot be read is unchanged."""
        slot, lease = snap.slot(self.slot), snap.lease
        if lease is None or (lease.owner_slot, lease.sequence) != (self.slot, self.lease_sequence):
            return False
        return slot is None or (slot.incarnation, slot.counter) == (self.incarnation, self.counter)


class LeaseClaim(Claim):
    """Claims the home lease for the node in slot *me*; the epoch becomes one more.

    *wait_ms* is how long to go on when somebody else holds it (0: ask once). *held* is a lease that we were told is
    ours before. Who takes a lease from a dead node must have fenced that node first: this class cannot see that.
    """

    def __init__(
        self,
        me: SlotRecord,
        timeouts: Timeouts,
        nonces: Nonces,
        *,
        wait_ms: int = 0,
        held: LeaseRecord | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__(timeouts, nonces)
        self.me = me
        self.wait_ms = wait_ms
        self.held = held
        self.evidence = evidence
        self._tried: list[LeaseRecord] = []

    def choose(self, snap: Snapshot) -> Write | Sleep | Refused:
        """See the class."""
        mine = snap.slot(self.me.slot)
        if mine is not None and (mine.node_uuid, mine.incarnation) != (self.me.node_uuid, self.me.incarnation):
            return Refused(f"slot {self.me.slot} is not ours any more", ESTALE)
        lease = snap.lease
        if lease is None:
            return Refused("both copies of the home lease are unreadable", EUCLEAN)
        if not self._takeable(snap, lease):
            given_up = any(same_lease(lease, tried) for tried in self._tried)
            if not given_up and snap.ended_ms - (self.began_ms or 0) >= self.wait_ms:
                reason = f"the home lease is held by slot {lease.owner_slot} (epoch {lease.epoch})"
                return Refused(reason, EBUSY)
            return Sleep(self.timeouts.heartbeat_ms)
        record = LeaseRecord(
            lease.sequence + 1,
            lease.epoch + 1,
            LeaseState.HELD,
            self.me.slot,
            self.me.node_uuid,
            self.me.incarnation,
            0,
            0,
            self.nonces(),
        )
        self._tried.append(record)
        return WriteLease(record)

    def holds(self, snap: Snapshot, intent: Write) -> bool:
        """See Claim."""
        return isinstance(intent, WriteLease) and snap.lease is not None and same_lease(snap.lease, intent.record)

    def _takeable(self, snap: Snapshot, lease: LeaseRecord) -> bool:
        dead = self.timeouts.node_dead_ms
        age = self.watch.age_ms(0)
        still = age >= dead
        held = self.held
        if lease.state is LeaseState.FREE or (held is not None and same_lease(lease, held)):
            return True
        if lease.state is LeaseState.MOVING:
            # Whoever wrote MOVING has unmounted: nobody is home.
            target = snap.slot(lease.target_slot) if lease.target_slot else None
            back = (lease.owner_uuid, lease.incarnation) == (self.me.node_uuid, self.me.incarnation)
            gone = target is not None and target.state in GONE
            return lease.target_slot == self.me.slot or back or gone or still
        owner = snap.slot(lease.owner_slot)
        if still and (owner is None or self.watch.age_ms(lease.owner_slot) >= dead):
            return True
        if owner is None:
            return self.evidence is not None and self.evidence.fits(snap)
        if (owner.node_uuid, owner.incarnation) == (lease.owner_uuid, lease.incarnation):
            ours = (owner.node_uuid, owner.incarnation) == (self.me.node_uuid, self.me.incarnation)
            fits = self.evidence is not None and self.evidence.fits(snap)
            # Ours, but not one that was confirmed: a claim that we gave up, whose late writes may cover the lease of
            # a live home. That one sees it at its next renewal, and its lease ends in any case.
            over = age >= self.timeouts.lease_ms + self.timeouts.claim_wait_ms
            return owner.state in GONE or fits or (ours and over)
        if owner.state is SlotState.CLAIMING and owner.node_uuid != lease.owner_uuid:
            # Perhaps a claim that came too late and covers a live home's slot: only the lease's own counter tells.
            return still
        return True


class HandOver(Claim):
    """Gives a held lease away, to slot *target* or (0) to whoever asks first, after a clean unmount.

    Ends with HeldLease (what was written: nobody is home now) or Refused with ESTALE. One copy is written: if that
    write comes late after all, it covers one copy of a successor's claim, and the other one counts.
    """

    def __init__(self, lease: LeaseRecord, until_ms: int, target: int, timeouts: Timeouts) -> None:
        super().__init__(timeouts, lambda: 0)
        self.lease = lease
        self.until_ms = until_ms
        self.target = target

    def choose(self, snap: Snapshot) -> Write | Sleep | Refused:
        """See the class."""
        found = snap.lease
        if found is None or not same_lease(found, self.lease) or snap.ended_ms > self.until_ms:
            return Refused("the home lease is not ours any more", ESTALE)
        return WriteLease(moving(found, self.target) if self.target else released(found))

    def on_written(self, now_ms: int) -> Action:
        """See the class."""
        self._check(Event.WRITTEN)
        intent = self._intent
        if not isinstance(intent, WriteLease) or now_ms > self.until_ms:
            reason = "the home lease ran out while it was given away"
            return self._enter(Event.WRITTEN, Phase.ENDED, Refused(reason, ESTALE))
        return self._enter(Event.WRITTEN, Phase.ENDED, HeldLease(intent.record, self._read_ms))


def same_lease(one: LeaseRecord, other: LeaseRecord) -> bool:
    """Return whether both are from one claim of the lease."""
    return (one.epoch, one.nonce, one.owner_uuid, one.incarnation) == (
        other.epoch,
        other.nonce,
        other.owner_uuid,
        other.incarnation,
    )


def renewed(lease: LeaseRecord) -> LeaseRecord:
    """Return the record of the next renewal."""
    return replace(lease, sequence=lease.sequence + 1, renewals=lease.renewals + 1)


def released(lease: LeaseRecord) -> LeaseRecord:
    """Return the record that gives the lease up: nobody is home, XFS was unmounted cleanly."""
    return LeaseRecord(lease.sequence + 1, lease.epoch)


def moving(lease: LeaseRecord, target: int) -> LeaseRecord:
    """Return the record that hands the lease to the node in slot *target*, after a clean unmount."""
    return replace(renewed(lease), state=LeaseState.MOVING, target_slot=target)
