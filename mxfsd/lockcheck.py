"""Checks of a lockspace that no node uses: is anybody there, which records are damaged, which can be put right.

A record is put right only where nothing is lost by it: the copy of the lease that does not count, and the slot of a
node that is dead and not named by the lease. Everything else is named and left alone. Blocking.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mxfs_proto.errors import IoFailure, MediaError
from mxfs_proto.ondisk import (
    LEASE_RECORDS,
    RECORD_BYTES,
    SLOT_COUNT,
    ForeignRecord,
    HeaderRecord,
    LeaseRecord,
    SlotRecord,
    SlotState,
    TornRecord,
    slot_record,
)
from mxfsd.core.lease import ENDED, UNKNOWN_INCARNATIONS
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch
from mxfsd.io.lockspace import Lockspace

WATCHED = frozenset({SlotState.CLAIMING, SlotState.JOINING, SlotState.ACTIVE, SlotState.RESTARTING})
"""States of a node that may be there: its counter moves, or it is dead."""
_QUIET_MS = 2000
_SAY_EVERY_MS = 5000
_GAP_MS = 2000

Say = Callable[[str], None]


class InUse(IoFailure):
    """A node has the volume, or is just joining."""


@dataclass(slots=True)
class Damage:
    """A record that cannot be used. *number* is its place in the lockspace, -1 for the header copy at the very end."""

    name: str
    number: int
    reason: str
    advice: str = ""
    """What to do about it where it is not put right here."""
    repair: bytes | None = None
    """The record to write instead, where nothing is lost by that."""
    found: bytes = b""
    """The bytes of the record when it was looked at."""
    repaired: bool = False
    unfinished: bool = False
    """A move of the lockspace was interrupted, nothing is lost."""


@dataclass(frozen=True, slots=True)
class Stale:
    """A slot that is claimed, by a node that is not there any more."""

    slot: int
    node: str
    state: str
    is_home: bool


# -- is anybody there? -------------------------------------------------------------------------------------------------


def recorded_dead_ms(snap: Snapshot) -> int:
    """Return the longest ``node_dead_ms`` in the slots; where none says one, that of the most patient set."""
    known = [slot.node_dead_ms for slot in snap.slots if slot is not None and slot.node_dead_ms]
    return max(known, default=Timeouts.named("patient").node_dead_ms)


def watch_nodes(lockspace: Lockspace, say: Say) -> list[Stale]:
    """Return the slots whose nodes are dead, having watched for ``recorded_dead_ms`` whatever may move.

    At once where no slot is claimed and every record can be read. *say* is told what is waited for. Raises InUse.
    """
    first = lockspace.snapshot()
    raw = _unreadable(lockspace)
    limit_ms = recorded_dead_ms(first)
    watch = Watch(_GAP_MS)
    watch.observe(first)
    claimed = {slot.slot: slot for slot in first.slots if slot is not None and slot.state in WATCHED}
    snap, said_ms = first, first.ended_ms - _SAY_EVERY_MS + _QUIET_MS
    while any(watch.age_ms(number) < limit_ms for number in claimed) or (
        raw and snap.began_ms - first.ended_ms < limit_ms
    ):
        if snap.ended_ms - said_ms >= _SAY_EVERY_MS:
            said_ms = snap.ended_ms
            who = ", ".join([f"slot {slot.slot} ({slot.name})" for slot in claimed.values()] + [_name(n) for n in raw])
            passed = snap.ended_ms - first.ended_ms
            say(f"watching whether {who} moves: {passed / 1000:.0f} of {limit_ms / 1000:.0f} s")
        lockspace.sleep(min(100, limit_ms // 16) / 1000)
        snap = lockspace.snapshot()
        watch.observe(snap)
        _check_still(first, snap)
        for number, data in raw.items():
            if lockspace.read_record(number) != data:
                raise InUse(f"somebody writes to {_name(number)}: unmount the volume on every node first")
    return [
        Stale(slot.slot, slot.name, slot.state.name, slot.is_home)
        for slot in snap.slots
        if slot is not None and slot.state not in ENDED
    ]


def _check_still(first: Snapshot, snap: Snapshot) -> None:
    """Raise InUse where a slot or the lease is not what it was."""
    for before, now in zip(first.slots, snap.slots, strict=True):
        if now is None or now == before:
            continue
        if now.state in ENDED:
            raise InUse(f"slot {now.slot} was just given up: unmount the volume on every node, then try again")
        raise InUse(f"in use by node {now.name!r} (slot {now.slot}): unmount it there first")
    if first.lease is not None and snap.lease is not None and first.lease != snap.lease:
        raise InUse(f"in use by the home in slot {snap.lease.owner_slot}: unmount it there first")


def _unreadable(lockspace: Lockspace) -> dict[int, bytes]:
    """The bytes of the slots that cannot be read (``snapshot`` came before), by record number."""
    numbers = [slot_record(slot) for slot in lockspace.bad if slot]
    return {number: lockspace.read_record(number) for number in numbers}


def _name(number: int) -> str:
    if number in LEASE_RECORDS:
        return f"lease copy {LEASE_RECORDS.index(number) + 1}"
    return f"slot {number - slot_record(1) + 1}"


# -- which records are damaged? ----------------------------------------------------------------------------------------


def find_damage(lockspace: Lockspace) -> list[Damage]:
    """Return the damaged records, each with what would put it right, if anything may. Raises IoFailure.

    The nodes of claimed slots are dead: ``watch_nodes`` came before.
    """
    copies = [_lease(lockspace, index) for index in range(len(LEASE_RECORDS))]
    found = [*_headers(lockspace), *_leases(lockspace, copies)]
    good = [copy for copy in copies if isinstance(copy, LeaseRecord)]
    lease = max(good, key=lambda copy: copy.order, default=None)
    slots = [_slot(lockspace, number) for number in range(1, SLOT_COUNT + 1)]
    known = max((slot.incarnation for slot in slots if isinstance(slot, SlotRecord)), default=0)
    for number, slot in enumerate(slots, 1):
        if isinstance(slot, SlotRecord):
            continue
        data, error = slot
        damage = Damage(f"slot {number}", slot_record(number), str(error), found=data)
        owners = {lease.owner_slot, lease.target_slot} if lease is not None else set()
        if not isinstance(error, TornRecord | ForeignRecord):
            damage.advice = "it is no record that a broken write leaves: nodes do without this slot"
        elif lease is None:
            damage.advice = "no copy of the lease says whether it is the home's"
        elif number in owners:
            damage.advice = "it is the home's: mount the volume on one node, which takes over from that home"
        else:
            # (node uuid, incarnation) must never come twice, and what this slot had come to is lost.
            free = SlotRecord(number, SlotState.FREE, incarnation=known + UNKNOWN_INCARNATIONS, counter=1)
            damage.repair = free.encode(lockspace.volume)
        found.append(damage)
    return found


def _headers(lockspace: Lockspace) -> Iterator[Damage]:
    """The volume has one good copy, or it would not be open. Only mkfs.mxfs and mxfs grow write headers, not this."""
    places = ((0, lockspace.header.lockspace_offset), (-1, _last(lockspace)))
    for copy, (number, offset) in enumerate(places, 1):
        data = lockspace.disk.read(offset, RECORD_BYTES)
        reason = ""
        try:
            if HeaderRecord.decode(data) != lockspace.header:
                reason = "differs from the other copy"
        except MediaError as error:
            reason = str(error)
        if reason and lockspace.unfinished(data):
            advice = "mxfs grow was interrupted: run it again; the volume works meanwhile"
            yield Damage(f"header copy {copy}", number, "the lockspace is being moved", advice, unfinished=True)
        elif reason:
            advice = "the other copy is good and the volume works with it; save the data and make the volume anew"
            yield Damage(f"header copy {copy}", number, reason, advice, found=data)


def _last(lockspace: Lockspace) -> int:
    header = lockspace.header
    return header.lockspace_offset + header.lockspace_bytes - RECORD_BYTES


Unreadable = tuple[bytes, MediaError]


def _lease(lockspace: Lockspace, index: int) -> LeaseRecord | Unreadable:
    data = lockspace.read_record(LEASE_RECORDS[index])
    try:
        record = LeaseRecord.decode(data, lockspace.volume)
        if record.sequence % 2 != index:
            return data, ForeignRecord(f"lease number {record.sequence} found in the place of the other copy")
    except MediaError as error:
        return data, error
    return record


def _slot(lockspace: Lockspace, number: int) -> SlotRecord | Unreadable:
    data = lockspace.read_record(slot_record(number))
    try:
        return SlotRecord.decode(data, lockspace.volume, number)
    except MediaError as error:
        return data, error


def _leases(lockspace: Lockspace, copies: list[LeaseRecord | Unreadable]) -> Iterator[Damage]:
    for index, copy in enumerate(copies):
        if isinstance(copy, LeaseRecord):
            continue
        data, error = copy
        damage = Damage(f"lease copy {index + 1}", LEASE_RECORDS[index], str(error), found=data)
        other = copies[1 - index]
        if not isinstance(other, LeaseRecord):
            damage.advice = (
                "no copy is left, so no node can become the home: mount the XFS by hand on one host alone, "
                "save the data, and make the volume anew"
            )
        elif not isinstance(error, TornRecord | ForeignRecord) or _misplaced(data, lockspace.volume):
            damage.advice = "it is no record that a broken write leaves, and is not written over"
        else:
            damage.repair = _behind(other).encode(lockspace.volume)
        yield damage


def _misplaced(data: bytes, volume: bytes) -> bool:
    """Whether a node would read that record, and perhaps believe it: what counts must not change."""
    try:
        LeaseRecord.decode(data, volume)
    except MediaError:
        return False
    return True


def _behind(good: LeaseRecord) -> LeaseRecord:
    """The same lease for the other copy, numbered so that the good copy goes on to count."""
    if good.sequence == 0:
        return replace(good, sequence=1)  # as mkfs.mxfs left the two
    return replace(good, sequence=good.sequence - 1, renewals=max(0, good.renewals - 1))


# -- put right what can be ---------------------------------------------------------------------------------------------


def repair(lockspace: Lockspace, damages: list[Damage]) -> None:
    """Write the records that may be written, durably, and read them back. Raises InUse, IoFailure."""
    for damage in damages:
        if damage.repair is None:
            continue
        # Read once more: a node that came meanwhile may have claimed it.
        if lockspace.read_record(damage.number) != damage.found:
            raise InUse(f"somebody has just written to {damage.name}: unmount the volume on every node first")
        lockspace.write_record(damage.number, damage.repair)
        lockspace.disk.sync()
        if lockspace.read_record(damage.number) != damage.repair:
            raise IoFailure(f"{damage.name} was written and reads back differently: the disk loses writes")
        damage.repaired = True
