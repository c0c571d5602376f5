"""The lockspace on the disk: reads it, and executes the claims of ``mxfsd.core.lease``. Blocking; use threads.

One Lockspace may be used by one thread at a time.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from mxfs_proto.errors import MediaError, MxfsError
from mxfs_proto.ondisk import (
    DEFAULT_LOCKSPACE_BYTES,
    FIXED_RECORDS,
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
from mxfsd.io.clock import now_ms
from mxfsd.io.disk import Disk

_FIRST = LEASE_RECORDS[0]
_AREA_BYTES = (FIXED_RECORDS - _FIRST) * RECORD_BYTES


class ClaimRefused(MxfsError):
    """A slot or lease could not be had; ``errno`` says why (EBUSY, EUSERS, ESTALE, EIO, EUCLEAN)."""


def read_header(disk: Disk) -> HeaderRecord:
    """Find and return the header: the device's last record, else the copy at the default place.

    Raises MediaError (ForeignRecord if this is no MXFS volume at all) or IoFailure.
    """
    end = disk.size - disk.size % RECORD_BYTES
    first: MediaError | None = None
    for offset in (end - RECORD_BYTES, end - DEFAULT_LOCKSPACE_BYTES):
        if offset < 0:
            continue
        try:
            header = HeaderRecord.decode(disk.read(offset, RECORD_BYTES))
            if header.lockspace_offset + header.lockspace_bytes > end:
                raise ForeignRecord(f"the lockspace ends behind the end of {disk.path}: was the device shrunk?")
        except MediaError as error:
            # Whichever copy says more than "nothing here" explains best.
            if first is None or isinstance(first, ForeignRecord):
                first = error
        else:
            return header
    if first is None or isinstance(first, ForeignRecord):
        raise ForeignRecord(f"{disk.path} is no MXFS volume (no lockspace at its end)")
    raise first


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
        clock: Callable[[], int] = now_ms,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Use an open disk; *clock* gives milliseconds, *sleep* takes seconds. Raises MediaError, IoFailure."""
        self.disk = disk
        self.clock = clock
        self.sleep = sleep
        self.header = read_header(disk)
        self.volume = self.header.volume
        self.volume_id = volume_id(self.volume)
        self._base = self.header.lockspace_offset
        self._raw: list[bytes] = [b""] * SLOT_COUNT
        self._slots: list[SlotRecord | None] = [None] * SLOT_COUNT
        self.bad: dict[int, MediaError] = {}
        self.label = self.header.label
        self._dirty = False
        if check_xfs:
            xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES))
            if xfs.uuid != self.volume or xfs.size > self._base:
                raise ForeignRecord(
                    f"{disk.path}: the lockspace belongs to volume {format_uuid(self.volume)}, "
                    f"but the XFS is {format_uuid(xfs.uuid)} of {xfs.size} bytes"
                )
            self.label = xfs.label

    @classmethod
    def open(cls, path: str, *, readonly: bool = False, check_xfs: bool = True) -> Self:
        """Open the lockspace of the device *path*. Raises MediaError, IoFailure."""
        disk = Disk(path, readonly=readonly)
        try:
            return cls(disk, check_xfs=check_xfs)
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
        held = self._run(SlotClaim(joiner, timeouts, _nonce))
        if not isinstance(held, HeldSlot):
            raise ClaimRefused(f"unexpected end of a slot claim: {held}")
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


def format_lockspace(disk: Disk, header: HeaderRecord) -> None:
    """Write an empty lockspace, the headers last. Raises IoFailure."""
    base = header.lockspace_offset
    records: list[tuple[int, bytes]] = [
        (LEASE_RECORDS[n], LeaseRecord(sequence=n).encode(header.volume)) for n in (0, 1)
    ]
    records += [(slot_record(n), SlotRecord(n).encode(header.volume)) for n in range(1, SLOT_COUNT + 1)]
    for number, data in records:
        disk.write(base + number * RECORD_BYTES, data)
    disk.sync()
    disk.write(base, header.encode(0))
    disk.write(base + header.lockspace_bytes - RECORD_BYTES, header.encode(1))
    disk.sync()
