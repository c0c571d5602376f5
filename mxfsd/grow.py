"""Moves the lockspace of a volume that no node has to the end of its device, which has grown (``mxfs grow``).

docs/ondisk.md, "A lockspace moves", has the order of the writes and why each of them may be the last one. Blocking.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mxfs_proto.errors import IoFailure, MxfsError
from mxfs_proto.ondisk import (
    LEASE_RECORDS,
    RECORD_BYTES,
    HeaderRecord,
    LeaseRecord,
    LeaseState,
    MovedRecord,
    SlotState,
    slot_record,
)
from mxfsd.core.lease import ENDED
from mxfsd.core.watch import Snapshot
from mxfsd.hold import Hold
from mxfsd.io.clock import now_ms
from mxfsd.io.disk import Disk
from mxfsd.io.headers import end_of
from mxfsd.io.lockspace import Lockspace
from mxfsd.lockcheck import InUse, Say, find_damage, watch_nodes

_MIB = 1 << 20


class CannotGrow(MxfsError):
    """Why the volume is not grown, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Grown:
    """What was done. Sizes in bytes; *xfs_before* is that of the header before, *xfs_after* what XFS may grow to."""

    volume: bytes
    lockspace_offset: int
    xfs_before: int
    xfs_after: int


def plan(header: HeaderRecord, end: int, device: str) -> HeaderRecord:
    """Return the header of the lockspace at *end* of the device. Raises CannotGrow where there is too little room."""
    before = header.lockspace_offset + header.lockspace_bytes
    offset = end - header.lockspace_bytes
    if end <= before:
        raise CannotGrow(
            f"{device} has not grown, it has {end} bytes as before: enlarge it, then have this host see its new size"
        )
    if offset < before:
        raise CannotGrow(
            f"{device} has grown by {end - before} bytes only: the lockspace needs {header.lockspace_bytes} new ones"
        )
    return replace(header, device_bytes=end, lockspace_offset=offset, xfs_bytes=offset - offset % _MIB)


def copy_records(disk: Disk, old: Lockspace, new: HeaderRecord, holder: int) -> None:
    """Step 1: all records but the headers, then a pending header. *holder*: our slot, free there. Raises IoFailure."""
    base, volume = new.lockspace_offset, new.volume
    snap = old.snapshot()
    if snap.lease is None or None in snap.slots:
        raise IoFailure("the lockspace cannot be read just now")
    first = snap.lease.sequence + snap.lease.sequence % 2 + 2
    for number in (0, 1):
        lease = LeaseRecord(sequence=first + number, epoch=snap.lease.epoch)
        disk.write(base + LEASE_RECORDS[number] * RECORD_BYTES, lease.encode(volume))
    for slot in snap.slots:
        assert slot is not None
        if slot.slot == holder:
            slot = replace(slot, state=SlotState.FREE, counter=slot.counter + 1, pr_key=0, is_home=False, addresses=())
        disk.write(base + slot_record(slot.slot) * RECORD_BYTES, slot.encode(volume))
    disk.sync()
    disk.write(base, new.encode(0, pending=True))
    disk.sync()


def check_alone(snap: Snapshot, holder: int) -> None:
    """Raise InUse where another slot than ours is claimed: a node is just mounting."""
    for slot in snap.slots:
        if slot is not None and slot.slot != holder and slot.state not in ENDED:
            raise InUse(f"node {slot.name!r} (slot {slot.slot}) is just mounting the volume: unmount it there first")


def decide(disk: Disk, old: HeaderRecord, new: HeaderRecord, in_time: Callable[[], None]) -> None:
    """Steps 2 and 3: from here on the new lockspace counts. *in_time* raises where we may not write any more."""
    moved = MovedRecord(old.volume, old.lockspace_offset, new.lockspace_offset, new.lockspace_bytes)
    disk.write(old.lockspace_offset + old.lockspace_bytes - RECORD_BYTES, moved.encode(1))
    disk.sync()
    in_time()
    disk.write(old.lockspace_offset, moved.encode(0))
    disk.sync()


def move(disk: Disk, old: Lockspace, new: HeaderRecord, holder: int, in_time: Callable[[], None]) -> None:
    """Steps 1 to 3, in their order. *holder*: our slot, which holds the old lockspace. Raises InUse, IoFailure."""
    copy_records(disk, old, new, holder)
    check_alone(old.snapshot(), holder)
    decide(disk, old.header, new, in_time)


def settle(disk: Disk, header: HeaderRecord) -> None:
    """Steps 4 and 5: the header in both places. Raises IoFailure."""
    disk.write(header.lockspace_offset + header.lockspace_bytes - RECORD_BYTES, header.encode(1))
    disk.sync()
    disk.write(header.lockspace_offset, header.encode(0))
    disk.sync()


def grow(device: str, say: Say, pr_device: str | None = None) -> Grown:
    """Move the lockspace, or end a move that was interrupted. Raises MxfsError; what counts then is one of the two.

    *pr_device*: where the persistent reservations are, if not at the device.
    """
    space = Lockspace.open(device)
    try:
        before = space.header.xfs_bytes
        _check(space, device, say)
        if not space.arriving:
            before = min(before, space.xfs_bytes)
            header = plan(space.header, end_of(space.disk), device)
            _move(space, device, header, pr_device)
            say(f"the lockspace is at {header.lockspace_offset} now")
        else:
            say("going on with a move of the lockspace that was interrupted")
    finally:
        space.close()
    try:
        header = _finish(device, say, pr_device)
    except MxfsError as error:
        raise CannotGrow(
            f"the lockspace has moved, and the volume can be mounted, but XFS does not grow yet ({error}): "
            "run mxfs grow again when no node has it"
        ) from error
    return Grown(header.volume, header.lockspace_offset, before, header.xfs_bytes)


def _check(space: Lockspace, device: str, say: Say) -> None:
    """Nobody has the volume, nobody died with it, and every record can be read. Raises MxfsError."""
    stale = watch_nodes(space, say)
    lease = space.snapshot().lease
    if stale or (lease is not None and lease.state is not LeaseState.FREE):
        who = f"node {stale[0].node!r} (slot {stale[0].slot})" if stale else "the home"
        raise CannotGrow(f"{who} died and left the volume as it was: mount it on one node, unmount it, then try again")
    damages = [damage for damage in find_damage(space) if not damage.unfinished]
    if damages:
        raise CannotGrow(f"{damages[0].name} is damaged ({damages[0].reason}): see mxfs fsck {device}")


def _move(space: Lockspace, device: str, new: HeaderRecord, pr_device: str | None) -> None:
    with Hold(device, "grow", pr_device) as hold, Disk(device) as disk:

        def in_time() -> None:
            if hold.lost or now_ms() >= hold.fence_at_ms:
                raise IoFailure(f"the volume could not be held ({hold.lost or 'the disk is too slow'}): try again")

        move(disk, space, new, hold.slot, in_time)


def _finish(device: str, say: Say, pr_device: str | None) -> HeaderRecord:
    space = Lockspace.open(device)
    try:
        header, moved = space.header, space.found.moved
        if space.settled:
            return header
    finally:
        space.close()
    if moved is not None:
        # Whoever claimed a slot there in the last moment finds out, and gives up; XFS must not grow under its beats.
        old = Lockspace.open(device, readonly=True, at=moved.old_offset)
        try:
            watch_nodes(old, say)
        finally:
            old.close()
    with Hold(device, "grow", pr_device), Disk(device) as disk:
        settle(disk, header)
    return header
