"""Which lockspace of a device counts: found through its headers, also after the device has grown.

One record decides: record 0 of a lockspace is its header, or says where the lockspace has moved to. Whoever finds a
header in another place (the last record of the device, as this host sees its size) looks at record 0 too. So hosts that
see a device in different sizes, as after its growth, never believe in different lockspaces.
"""

from dataclasses import dataclass

from mxfs_proto.errors import MediaError
from mxfs_proto.ondisk import (
    DEFAULT_LOCKSPACE_BYTES,
    MAGIC,
    RECORD_BYTES,
    DeviceTooSmall,
    ForeignRecord,
    HeaderRecord,
    MovedRecord,
    TornRecord,
)
from mxfs_proto.xfs_sb import NotXfs, XfsSuper
from mxfsd.io.disk import Disk

SCAN_BYTES = 64 << 20
"""How far behind the end of the XFS a lockspace is looked for: mkfs.xfs may leave some of its room unused."""
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """The header that counts. *moved* led to it; *pending*: the move was not finished."""

    header: HeaderRecord
    pending: bool = False
    moved: MovedRecord | None = None


def end_of(disk: Disk) -> int:
    """Return where the last record of the device ends."""
    return disk.size - disk.size % RECORD_BYTES


def find(disk: Disk) -> Found:
    """Return the header that counts. Raises MediaError (ForeignRecord: this is no MXFS volume at all), IoFailure."""
    end = end_of(disk)
    first: MediaError | None = None
    for offset in (end - RECORD_BYTES, end - DEFAULT_LOCKSPACE_BYTES):
        if offset < 0:
            continue
        try:
            return _at(disk, offset, end)
        except DeviceTooSmall:
            raise
        except MediaError as error:
            # Whichever copy says more than "nothing here" explains best.
            if first is None or isinstance(first, ForeignRecord):
                first = error
    found = _behind_xfs(disk, end)
    if found is not None:
        return found
    if first is None or isinstance(first, ForeignRecord):
        raise ForeignRecord(f"{disk.path} is no MXFS volume (no lockspace at its end)")
    raise first


def _at(disk: Disk, offset: int, end: int) -> Found:
    """Return what a record leads to that may be a header, or say where it went. Raises MediaError."""
    data = disk.read(offset, RECORD_BYTES)
    moved = moved_of(data)
    if moved is not None:
        # Written before record 0 was: that one decides.
        first = disk.read(moved.old_offset, RECORD_BYTES)
        decided = moved_of(first)
        if decided is not None:
            return _follow(disk, decided, end)
        return Found(_fits(disk, HeaderRecord.decode(first), end))
    header = _fits(disk, HeaderRecord.decode(data), end)
    if offset != header.lockspace_offset:
        decided = moved_of(disk.read(header.lockspace_offset, RECORD_BYTES))
        if decided is not None and decided.volume == header.volume:
            return _follow(disk, decided, end)
    return Found(header)


def moved_of(data: bytes) -> MovedRecord | None:
    """Return the record if it says that a lockspace has moved."""
    try:
        return MovedRecord.decode(data)
    except MediaError:
        return None


def _fits(disk: Disk, header: HeaderRecord, end: int) -> HeaderRecord:
    if header.lockspace_offset + header.lockspace_bytes > end:
        raise ForeignRecord(f"the lockspace ends behind the end of {disk.path}: was the device shrunk?")
    return header


def _follow(disk: Disk, moved: MovedRecord, end: int) -> Found:
    """Return the header that *moved* leads to, over further moves. Each leads further back, so this ends."""
    new_end = moved.new_offset + moved.new_bytes
    if new_end > end:
        raise _too_small(disk, new_end)
    data = disk.read(moved.new_offset, RECORD_BYTES)
    again = moved_of(data)
    if again is not None and again.old_offset == moved.new_offset:
        return _follow(disk, again, end)
    for raw in (data, disk.read(new_end - RECORD_BYTES, RECORD_BYTES)):
        for pending in (False, True):
            try:
                header = HeaderRecord.decode(raw, pending=pending)
            except MediaError:
                continue
            if (header.volume, header.lockspace_offset) == (moved.volume, moved.new_offset):
                return Found(header, pending, moved)
    raise TornRecord(f"the lockspace has moved to {moved.new_offset}, and no copy of its header is good there")


def _too_small(disk: Disk, needed: int) -> DeviceTooSmall:
    return DeviceTooSmall(
        f"the volume needs {needed} bytes, this host sees {disk.size} bytes of {disk.path}: rescan it here"
    )


def _behind_xfs(disk: Disk, end: int) -> Found | None:
    """Look for record 0 behind the XFS: the device is longer than when its lockspace was put at the end of it."""
    try:
        xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES)) if end else None
    except NotXfs:
        return None
    if xfs is None:
        return None
    if xfs.size > disk.size:
        raise _too_small(disk, xfs.size)
    start = -(-xfs.size // RECORD_BYTES) * RECORD_BYTES
    stop = min(start + SCAN_BYTES, end)
    for at in range(start, stop, _STEP):
        block = disk.read(at, min(_STEP, stop - at))
        for place in range(0, len(block), RECORD_BYTES):
            if block.startswith(MAGIC, place):
                found = _record_0(disk, at + place, block[place : place + RECORD_BYTES], xfs.uuid, end)
                if found is not None:
                    return found
    return None


def _record_0(disk: Disk, offset: int, data: bytes, volume: bytes, end: int) -> Found | None:
    moved = moved_of(data)
    if moved is not None:
        return _follow(disk, moved, end) if (moved.volume, moved.old_offset) == (volume, offset) else None
    try:
        header = _fits(disk, HeaderRecord.decode(data), end)
    except MediaError:
        return None
    return Found(header) if (header.volume, header.lockspace_offset) == (volume, offset) else None
