"""Intents and outcomes on the volume: a pool of hidden empty files, each with the one record of an operation as xattr.

A file's attribute that stays inside the inode is replaced in one transaction, which costs 3 µs; no names are added or
removed, and the record of an operation whose client has the reply is simply written over by that of another.
``trusted.`` attributes may use XFS's reserve, so a full volume can still unlink.

A record longer than :data:`mxfsd.core.outcomes.SHORT` goes into a block of its own, where a replacement takes several
transactions. So it is written under the other of two names, and then the former one is removed.

Not in here: forcing the log (``LogForcer`` in mxfsd/home.py). Errors: OSError.
"""

import errno
import os
from typing import NamedTuple

from mxfs_proto.errors import MediaError
from mxfs_proto.ops import Fid, Request
from mxfsd.core.outcomes import SHORT, Before, Record, RecordKind, pack_intent, pack_record, unpack_record
from mxfsd.io.lower import Lower

NAMES = ("trusted.mxfs.a", "trusted.mxfs.b")
SPARE = 256
"""So many files are made in advance, once in the life of a volume."""


class Key(NamedTuple):
    """A shipped operation."""

    session: int
    seq: int


class Slot:
    """One file of the pool."""

    __slots__ = ("fid", "name", "size")

    def __init__(self, fid: Fid) -> None:
        self.fid = fid
        self.name = -1
        """Which of NAMES holds the record; -1: there is none."""
        self.size = 0


class OpRecords:
    """The pool. One owner: the home's event loop, or the thread that settles before there is one."""

    def __init__(self, lower: Lower, volume_id: int) -> None:
        """Take the files that are there; call load() before any record is written."""
        self.lower = lower
        self._volume_id = volume_id
        self._free: list[Slot] = []
        self._kept: dict[Key, Slot] = {}
        self._made = 0

    def load(self) -> list[tuple[Slot, Record]]:
        """Read all records. Each slot belongs to the caller, who calls keep() or clear(). Raises MediaError too."""
        found = []
        slots = self.lower.op_slots()
        self._made = max(slots, default=-1) + 1
        for _number, fid in sorted(slots.items(), reverse=True):
            slot = Slot(fid)
            record = self._read(slot)
            if record is None:
                self._free.append(slot)
            else:
                found.append((slot, record))
        return found

    def _read(self, slot: Slot) -> Record | None:
        fd = self.lower.file_fd(slot.fid)
        rows = []
        for index, name in enumerate(NAMES):
            try:
                data = os.getxattr(fd, name)
            except OSError as exc:
                if exc.errno != errno.ENODATA:
                    raise
                continue
            rows.append((unpack_record(self._volume_id, data), index, len(data)))
        if len(rows) == 2:
            # A crash came between the new record and the removal of the former one: an outcome follows its own intent,
            # an intent the outcome of an operation that needs none any more.
            same = rows[0][0][1:3] == rows[1][0][1:3]
            newer = RecordKind.OUTCOME if same else RecordKind.INTENT
            rows.sort(key=lambda row: row[0].kind is newer)
            if [row[0].kind is newer for row in rows] != [False, True]:
                raise MediaError("two operation records in one place")
            os.removexattr(fd, NAMES[rows.pop(0)[1]])
        for record, index, size in rows:
            slot.name, slot.size = index, size
            return record
        return None

    def _write(self, slot: Slot, record: Record) -> None:
        data = pack_record(self._volume_id, record)
        fd = self.lower.file_fd(slot.fid)
        former = slot.name
        index = max(former, 0) if max(len(data), slot.size) <= SHORT else 1 - max(former, 0)
        os.setxattr(fd, NAMES[index], data)
        if former not in (-1, index):
            os.removexattr(fd, NAMES[former])
        slot.name, slot.size = index, len(data)

    def _take(self) -> Slot:
        if self._free:
            return self._free.pop()
        slot = Slot(self.lower.new_op_slot(self._made))
        self._made += 1
        return slot

    def reserve(self) -> None:
        """Make files in advance: a full volume has no room for more, and must be able to unlink."""
        try:
            while self._made < SPARE:
                self._free.append(Slot(self.lower.new_op_slot(self._made)))
                self._made += 1
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    # -- an operation ----------------------------------------------------------------------------------------------

    def intend(self, key: Key, request: Request, before: Before) -> Slot:
        """Write an operation's intent: from now on it counts as begun, until outcome()."""
        slot = self._take()
        try:
            self._write(slot, Record(RecordKind.INTENT, key.session, key.seq, pack_intent(request, before)))
        except BaseException:
            self._free.append(slot)
            raise
        return slot

    def intend_again(self, key: Key, slot: Slot, request: Request, before: Before) -> None:
        """More is known by now: write the intent again in its place."""
        self._write(slot, Record(RecordKind.INTENT, key.session, key.seq, pack_intent(request, before)))

    def outcome(self, key: Key, slot: Slot | None, reply: bytes) -> Slot:
        """Write the operation's reply, over its intent where it has one; kept until release()."""
        slot = slot or self._take()
        self._write(slot, Record(RecordKind.OUTCOME, key.session, key.seq, reply))
        self._kept[key] = slot
        return slot

    def release(self, session: int, seq: int) -> None:
        """The client has the reply, or is gone (nothing happens where no outcome is kept)."""
        slot = self._kept.pop(Key(session, seq), None)
        if slot is not None:
            self._free.append(slot)

    # -- settling --------------------------------------------------------------------------------------------------

    def keep(self, key: Key, slot: Slot) -> None:
        """The slot's record is the outcome of *key*."""
        self._kept[key] = slot

    def clear(self, slot: Slot) -> None:
        """Remove the slot's record."""
        if slot.name >= 0:
            os.removexattr(self.lower.file_fd(slot.fid), NAMES[slot.name])
            slot.name, slot.size = -1, 0
        self._free.append(slot)

    def __len__(self) -> int:
        """Outcomes kept."""
        return len(self._kept)
