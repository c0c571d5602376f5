"""The lockspace on the disk: reads it, and executes the claims of ``mxfsd.core.lease``. Blocking; use threads.

One Lockspace may be used by one thread at a time.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from mxfs_proto.errors import MediaError, MxfsError
from mxfs_proto.ondisk import (
    FIXED_RECORDS,
    KEY_BYTES,
    LEASE_RECORDS,
    RECORD_BYTES,
    SLOT_COUNT,
    SLOT_RECORD,
    ForeignRecord,
    HeaderRecord,
    LeaseRecord,
    SlotRecord,
    SlotState,
    TornRecord,
    format_uuid,
    slot_record,
    volume_id,
)
from mxfs_proto.xfs_sb import XfsSuper
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
    WriteSlot,
)
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot
from mxfsd.io import headers
from mxfsd.io.clock import now_ms
from mxfsd.io.disk import MAX_IO, Disk

_FIRST = LEASE_RECORDS[0]
_AREA_BYTES = (FIXED_RECORDS - _FIRST) * RECORD_BYTES


class ClaimRefused(MxfsError):
    """A slot or lease could not be had; ``errno`` says why (EBUSY, EUSERS, ESTALE, EIO, EUCLEAN)."""


def read_header(disk: Disk) -> HeaderRecord:
    """Find and return the header that counts (``mxfsd/io/headers.py``).

    Raises MediaError (ForeignRecord if this is no MXFS volume at all) or IoFailure.
    """
    return headers.find(disk).header


class Lockspace:
    """The lockspace of one volume.

    *check_xfs* compares the header with the XFS superblock, so that a lockspace which outlived its file system
    (plain mkfs.xfs over it) is never used.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        check_xfs: bool = True,
        at: int | None = None,
        clock: Callable[[], int] = now_ms,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Use an open disk; *clock* gives milliseconds, *sleep* takes seconds. Raises MediaError, IoFailure.

        *at*: the records of the lockspace there, which has moved, instead of those that count.
        """
        self.disk = disk
        self.clock = clock
        self.sleep = sleep
        self.found = headers.find(disk)
        self.header = self.found.header
        self.volume = self.header.volume
        self.volume_id = volume_id(self.volume)
        self._base = self.header.lockspace_offset if at is None else at
        self._raw: list[bytes] = [b""] * SLOT_COUNT
        self._slots: list[SlotRecord | None] = [None] * SLOT_COUNT
        self.bad: dict[int, MediaError] = {}
        self.label = self.header.label
        self.xfs_bytes = self.header.xfs_bytes
        """Size of the XFS by its superblock, by the header where that was not looked at."""
        self._dirty = False
        if check_xfs:
            xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES))
            if xfs.uuid != self.volume or xfs.size > self._base:
                raise ForeignRecord(
                    f"{disk.path}: the lockspace belongs to volume {format_uuid(self.volume)}, "
                    f"but the XFS is {format_uuid(xfs.uuid)} of {xfs.size} bytes"
                )
            self.label = xfs.label
            self.xfs_bytes = xfs.size

    @classmethod
    def open(cls, path: str, *, readonly: bool = False, check_xfs: bool = True, at: int | None = None) -> Self:
        """Open the lockspace of the device *path*. Raises MediaError, IoFailure."""
        disk = Disk(path, readonly=readonly)
        try:
            return cls(disk, check_xfs=check_xfs, at=at)
        except BaseException:
            disk.close()
            raise

    def close(self) -> None:
        """Close the device."""
        self.disk.close()

    # --- reading ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Read lease and slots at once. ``bad`` then says which slots (lease: 0) are unreadable and why."""
        began = self.clock()
        data = self.disk.read(self._base + _FIRST * RECORD_BYTES, _AREA_BYTES)
        ended = self.clock()
        lease = self._decode_lease(data)
        skip = (SLOT_RECORD - _FIRST) * RECORD_BYTES
        for index in range(SLOT_COUNT):
            raw = data[skip + index * RECORD_BYTES : skip + (index + 1) * RECORD_BYTES]
            # Most slots did not change since the last beat.
            if raw == self._raw[index]:
                continue
            self._raw[index] = raw
            try:
                self._slots[index] = SlotRecord.decode(raw, self.volume, index + 1)
                self.bad.pop(index + 1, None)
            except MediaError as error:
                self._slots[index] = None
                self.bad[index + 1] = error
        return Snapshot(began, ended, lease, tuple(self._slots))

    def _decode_lease(self, data: bytes) -> LeaseRecord | None:
        copies = []
        self.bad.pop(0, None)
        for number in LEASE_RECORDS:
            at = (number - _FIRST) * RECORD_BYTES
            try:
                copies.append(LeaseRecord.decode(data[at : at + RECORD_BYTES], self.volume))
            except MediaError as error:
                self.bad[0] = error
        if copies:
            self.bad.pop(0, None)
        return max(copies, key=lambda record: record.order, default=None)

    def read_lease(self) -> LeaseRecord:
        """Return the home lease. Raises TornRecord if both copies are unreadable, IoFailure."""
        snap = self.snapshot()
        if snap.lease is None:
            raise TornRecord(f"both copies of the home lease are unreadable: {self.bad.get(0)}")
        return snap.lease

    def read_slots(self) -> tuple[SlotRecord | None, ...]:
        """Return the slots 1..64 in order, None where a record is unreadable (see ``bad``). Raises IoFailure."""
        return self.snapshot().slots

    def read_record(self, number: int) -> bytes:
        """Return the bytes of record *number* as they are, good or not. Raises IoFailure."""
        return self.disk.read(self._base + number * RECORD_BYTES, RECORD_BYTES)

    @property
    def settled(self) -> bool:
        """Whether both copies of the header are there and good: no move of the lockspace is left unfinished."""
        last = self.header.lockspace_offset + self.header.lockspace_bytes - RECORD_BYTES
        try:
            copies = [HeaderRecord.decode(self.disk.read(at, RECORD_BYTES)) for at in (self._base, last)]
        except MediaError:
            return False
        return copies == [self.header] * 2

    @property
    def arriving(self) -> bool:
        """Whether this is the new place of a lockspace whose move was decided, and not finished."""
        return self._is_header(self.read_record(0), pending=True) or (self.found.moved is not None and not self.settled)

    def unfinished(self, data: bytes) -> bool:
        """Whether *data*, which is no header where one should be, is explained by an unfinished move."""
        moved = headers.moved_of(data)
        announced = moved is not None and moved.old_offset == self._base
        return announced or self.arriving

    def _is_header(self, data: bytes, *, pending: bool = False) -> bool:
        try:
            return HeaderRecord.decode(data, pending=pending) == self.header
        except MediaError:
            return False

    def check_place(self) -> None:
        """Raise ClaimRefused where this lockspace has moved since it was opened: others do not look here any more."""
        data = self.read_record(0)
        if self._is_header(data) or self._is_header(data, pending=True):
            return
        # It has moved, and XFS may be here by now; or this copy of the header is damaged.
        try:
            counts = headers.find(self.disk).header.lockspace_offset
        except MediaError:
            counts = -1
        if counts != self._base:
            raise ClaimRefused("the lockspace has just been moved (mxfs grow): mount again", errno.ESTALE)

    # --- writing ------------------------------------------------------------------------------------------

    def write_slot(self, record: SlotRecord) -> None:
        """Write a slot that is ours. Raises IoFailure."""
        self.write_record(slot_record(record.slot), record.encode(self.volume))

    def write_lease(self, record: LeaseRecord) -> None:
        """Write the copy of the lease that the sequence number selects. Raises IoFailure."""
        self.write_record(LEASE_RECORDS[record.sequence % 2], record.encode(self.volume))

    def write_record(self, number: int, data: bytes) -> None:
        """Write an encoded record to its place. Raises IoFailure."""
        self.disk.write(self._base + number * RECORD_BYTES, data)

    # --- claims -------------------------------------------------------------------------------------------

    def claim_slot(self, joiner: Joiner, timeouts: Timeouts) -> HeldSlot:
        """Claim a slot; the record is in state CLAIMING until the heartbeat process takes over.

        Takes about claim_wait_ms; longer only if slots have to be watched. Raises ClaimRefused, IoFailure.
        """
        self.check_place()
        held = self._run(SlotClaim(joiner, timeouts, _nonce))
        if not isinstance(held, HeldSlot):
            raise ClaimRefused(f"unexpected end of a slot claim: {held}")
        # Whoever moves the lockspace has looked for claims before; the few that it cannot have seen end here, or where
        # the lease is claimed or a home is reached, neither of which can be before the move.
        self.check_place()
        return held

    def claim_lease(
        self,
        me: SlotRecord,
        timeouts: Timeouts,
        *,
        wait_ms: int = 0,
        held: LeaseRecord | None = None,
        evidence: Evidence | None = None,
    ) -> HeldLease:
        """Claim the home lease for slot *me*, see LeaseClaim. Raises ClaimRefused (EBUSY: held), IoFailure.

        A lease of a node that may still have the lower XFS mounted must only be claimed after that node was fenced.
        """
        claim = LeaseClaim(me, timeouts, _nonce, wait_ms=wait_ms, held=held, evidence=evidence)
        result = self._run(claim)
        if not isinstance(result, HeldLease):
            raise ClaimRefused(f"unexpected end of a lease claim: {result}")
        self.check_place()
        return result

    def reclaim_slot(self, record: SlotRecord, timeouts: Timeouts, *, late: bool = False) -> HeldSlot:
        """Claim a slot of ours again after a stall, see SlotReclaim. Raises ClaimRefused (ESTALE), IoFailure."""
        held = self._run(SlotReclaim(record, timeouts, _nonce, late=late))
        if not isinstance(held, HeldSlot):
            raise ClaimRefused(f"unexpected end of a slot claim: {held}")
        return held

    def give_lease(self, lease: LeaseRecord, until_ms: int, target: int, timeouts: Timeouts) -> LeaseRecord:
        """Free the lease (*target* 0) or move it to slot *target*; the lower XFS must be unmounted before.

        The heartbeat process must have let the lease go first; *until_ms* is what it said. Raises ClaimRefused
        (ESTALE: it was not ours any more), IoFailure.
        """
        result = self._run(HandOver(lease, until_ms, target, timeouts))
        if not isinstance(result, HeldLease):
            raise ClaimRefused(f"unexpected end of a hand-over: {result}")
        return result.record

    def clear_slot(self, record: SlotRecord, timeouts: Timeouts) -> None:
        """Free the slot of a node that was fenced; *record* is what it wrote last. Raises ClaimRefused, IoFailure."""
        held = self.reclaim_slot(record, timeouts)
        free = replace(held.record, state=SlotState.FREE, counter=held.record.counter + 1, is_home=False, addresses=())
        self.write_slot(free)
        self.disk.sync()

    def release_slot(self, record: SlotRecord, state: SlotState = SlotState.LEFT) -> bool:
        """Give up our own slot without a heartbeat process (a mount that failed). Return whether it was ours."""
        found = self.snapshot().slot(record.slot)
        if found is None or not found.same_claim(record):
            return False
        self.write_slot(replace(found, state=state, counter=found.counter + 1, is_home=False))
        self.disk.sync()
        return True

    def _run(self, claim: Claim) -> Action:
        """Execute a claim. Writes are made durable after their time was taken: others see them at once."""
        action = claim.begin()
        while True:
            if isinstance(action, Read):
                action = claim.on_read(self.snapshot())
            elif isinstance(action, Sleep):
                if self._dirty:
                    began = self.clock()
                    self.disk.sync()
                    self._dirty = False
                    action = Sleep(max(0, action.ms - (self.clock() - began)))
                self.sleep(action.ms / 1000)
                action = claim.on_slept(self.clock())
            elif isinstance(action, HeldSlot | HeldLease):
                if self._dirty:
                    self.disk.sync()
                    self._dirty = False
                return action
            elif isinstance(action, Refused):
                raise ClaimRefused(action.reason, action.code)
            else:
                if isinstance(action, WriteSlot):
                    self.write_slot(action.record)
                else:
                    self.write_lease(action.record)
                self._dirty = True
                action = claim.on_written(self.clock())


def _nonce() -> int:
    return int.from_bytes(os.urandom(8), "little") or 1


def new_header(disk: Disk, xfs: XfsSuper, lockspace_bytes: int) -> HeaderRecord:
    """Return the header of a new lockspace at the end of the device, with a key of its own."""
    return HeaderRecord(
        xfs.uuid,
        os.urandom(KEY_BYTES),
        xfs.label,
        disk.size,
        headers.end_of(disk) - lockspace_bytes,
        lockspace_bytes,
        xfs.size,
        int(time.time()),
    )


def empty_records(volume: bytes) -> list[tuple[int, bytes]]:
    """Return the records of a lockspace that no node was in yet, without the headers, by their numbers."""
    leases = [(LEASE_RECORDS[n], LeaseRecord(sequence=n).encode(volume)) for n in (0, 1)]
    return leases + [(slot_record(n), SlotRecord(n).encode(volume)) for n in range(1, SLOT_COUNT + 1)]


def format_lockspace(disk: Disk, header: HeaderRecord) -> None:
    """Write an empty lockspace, the headers last: zeros where nothing is, too. Raises IoFailure.

    What describes a device is often at its end (GPT, RAID), and would be found there again.
    """
    base = header.lockspace_offset
    for at in range(0, header.lockspace_bytes, MAX_IO):
        disk.write(base + at, bytes(min(MAX_IO, header.lockspace_bytes - at)))
    disk.sync()
    for number, data in empty_records(header.volume):
        disk.write(base + number * RECORD_BYTES, data)
    disk.sync()
    write_headers(disk, header)


def write_headers(disk: Disk, header: HeaderRecord) -> None:
    """Write both copies: from the first one on the lockspace counts. Raises IoFailure.

    Record 0 comes first: it is found where the device has grown before the other one was written.
    """
    for copy, number in enumerate((0, header.lockspace_bytes // RECORD_BYTES - 1)):
        disk.write(header.lockspace_offset + number * RECORD_BYTES, header.encode(copy))
        disk.sync()
