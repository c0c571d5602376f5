"""Makes an MXFS volume of an XFS that ends before its device does (``mxfs adopt``): a lockspace is written behind it.

The XFS itself is read only. Blocking. What is written, and in which order: ``format_lockspace``.
"""

from collections.abc import Iterator
from dataclasses import replace

from mxfs_proto.errors import MediaError, MxfsError
from mxfs_proto.ondisk import (
    DEFAULT_LOCKSPACE_BYTES,
    LEASE_RECORDS,
    MAGIC,
    RECORD_BYTES,
    SLOT_COUNT,
    DeviceTooSmall,
    ForeignRecord,
    HeaderRecord,
    Kind,
    OtherVersion,
    TornRecord,
    WrongVolume,
    slot_record,
    unseal,
)
from mxfs_proto.xfs_sb import XfsSuper
from mxfsd.io.disk import Disk
from mxfsd.io.headers import SCAN_BYTES, end_of
from mxfsd.io.lockspace import Lockspace, empty_records, format_lockspace, new_header, write_headers

_MIB = 1 << 20


class CannotAdopt(MxfsError):
    """Why the XFS does not become a volume, and what to do about it. Nothing was changed."""


def plan(disk: Disk, xfs: XfsSuper, lockspace_bytes: int = DEFAULT_LOCKSPACE_BYTES) -> HeaderRecord:
    """Return the header of a lockspace at the end of the device. Raises CannotAdopt where there is too little room."""
    header = new_header(disk, xfs, lockspace_bytes)
    if header.lockspace_offset < xfs.size:
        missing = -((header.lockspace_offset - xfs.size) // _MIB)
        raise CannotAdopt(
            f"{disk.path}: the XFS leaves {disk.size - xfs.size} bytes behind it and the lockspace needs "
            f"{lockspace_bytes}: enlarge the device by {missing} MiB or more, and do not grow the XFS"
        )
    # XFS gets the rest at the first mount, as after mxfs grow: a lockspace far behind it would be found by nobody who
    # sees the device in another size.
    room = header.lockspace_offset - header.lockspace_offset % _MIB
    return replace(header, xfs_bytes=max(xfs.size, room))


def unfinished(disk: Disk) -> HeaderRecord | None:
    """Return the header that an interrupted run left in one of its two places. Raises CannotAdopt: it is a volume."""
    try:
        space = Lockspace(disk)
    except (OtherVersion, DeviceTooSmall) as error:
        raise CannotAdopt(f"{disk.path}: {error}") from None
    except MediaError:
        return None
    if space.settled or space.found.moved is not None or not _is_new(space):
        raise CannotAdopt(f"{disk.path} is an MXFS volume already: mount -t mxfs")
    return space.header


def _is_new(space: Lockspace) -> bool:
    """Whether no node was ever there."""
    numbers = (*LEASE_RECORDS, *(slot_record(slot) for slot in range(1, SLOT_COUNT + 1)))
    return [(number, space.read_record(number)) for number in numbers] == empty_records(space.volume)


def remains(disk: Disk, header: HeaderRecord, xfs_bytes: int) -> str:
    """Return what is behind the XFS of another volume's lockspace, or of nobody knows whose. Raises CannotAdopt.

    That is where a lockspace of this XFS was used and both copies of its header are lost: nodes may have it still.
    """
    other = ""
    empty = {data for _, data in empty_records(header.volume)}
    for data in _records(disk, xfs_bytes, header.lockspace_offset):
        try:
            unseal(data, Kind.SLOT, header.volume)
        except (WrongVolume, TornRecord) as error:
            other = str(error)  # over zeros, as an interrupted run writes, a record is whole with its first sector
            continue
        except MediaError:
            pass  # of another kind
        if data not in empty:
            raise CannotAdopt(
                f"{disk.path} was an MXFS volume, and no copy of its lockspace's header is good: where no node has it, "
                "overwrite what is behind the XFS and try again"
            )
    return other


def _records(disk: Disk, xfs_bytes: int, offset: int) -> Iterator[bytes]:
    """Yield what looks like records in the places where a lockspace may be: right behind the XFS, and at the end."""
    start = -(-xfs_bytes // RECORD_BYTES) * RECORD_BYTES
    at, end = start, end_of(disk)
    while at < end:
        block = disk.read(at, min(_MIB, end - at))
        for place in range(0, len(block), RECORD_BYTES):
            if block.startswith(MAGIC, place):
                yield block[place : place + RECORD_BYTES]
        at += len(block)
        if at >= start + SCAN_BYTES:
            at = max(at, offset)


def adopt(disk: Disk, header: HeaderRecord, *, finish: bool) -> None:
    """Write the lockspace, or with *finish* only the headers. Raises IoFailure: run it again."""
    if finish:
        write_headers(disk, header)
    else:
        format_lockspace(disk, header)
    if not (space := Lockspace(disk)).settled or space.header != header:
        raise ForeignRecord(f"{disk.path} does not give back what was written to it")
