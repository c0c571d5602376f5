"""File locks (flock, POSIX byte ranges, locks of an open file description) as they travel between nodes.

A range is [start, end], both in it; ``LAST`` stands for "to the end of the file, however long it becomes". An owner is
what the kernel's FUSE protocol calls lock_owner: a number that stands for a process's table of files, or, for flock and
for locks of an open file description, for that description. It means something on its own node only.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from mxfs_proto.errors import MisuseError, PeerError

RESOURCE_BIT: Final = 1 << 63
"""The lock master has a second resource of each inode, for its file locks: this bit and the inode's number, which has
56 bits in XFS (XFS_MAXINUMBER)."""
READ: Final = 0
WRITE: Final = 1
UNLOCK: Final = 2
"""Types of a lock: F_RDLCK, F_WRLCK and F_UNLCK of Linux."""
LAST: Final = (1 << 63) - 1
MAX_LOCKS: Final = 32_768
"""Ranges that one node may hold in a volume: so many always fit into one request."""


def resource_of(ino: int) -> int:
    """Return the resource that stands for the file locks of an inode."""
    return ino | RESOURCE_BIT


def is_resource(number: int) -> bool:
    """Whether a resource stands for the file locks of an inode."""
    return bool(number & RESOURCE_BIT)


def inode_of(resource: int) -> int:
    """Return the inode whose file locks a resource stands for."""
    return resource & ~RESOURCE_BIT


class Held(NamedTuple):
    """One range that an owner of some node has locked. 30 bytes on the wire."""

    owner: int
    start: int
    end: int
    pid: int
    type: int
    flock: bool


_HELD = struct.Struct("!QQQIBB")
assert _HELD.size == 30
_GROUP = struct.Struct("!QI")
MAX_GROUP_BYTES: Final = _GROUP.size + MAX_LOCKS * _HELD.size


def check(held: Held) -> None:
    """Refuse a lock that no kernel of ours sends. Raises PeerError."""
    if held.type > UNLOCK or not 0 <= held.start <= held.end <= LAST:
        raise PeerError(f"a file lock makes no sense: {held}")


def pack_held(locks: Iterable[Held]) -> bytes:
    """Encode ranges, one behind the other. Raises MisuseError (EINVAL)."""
    try:
        return b"".join([_HELD.pack(*lock) for lock in locks])
    except struct.error as err:
        raise MisuseError(f"a file lock does not fit: {err}") from err


def unpack_held(data: bytes | memoryview) -> list[Held]:
    """Decode :func:`pack_held`. Raises PeerError."""
    count, rest = divmod(len(data), _HELD.size)
    if rest or count > MAX_LOCKS:
        raise PeerError(f"file locks of {len(data)} bytes")
    locks = []
    for owner, start, end, pid, kind, flock in _HELD.iter_unpack(data):
        lock = Held(owner, start, end, pid, kind, bool(flock))
        check(lock)
        if kind == UNLOCK or flock > 1:
            raise PeerError(f"a file lock that is held makes no sense: {lock}")
        locks.append(lock)
    return locks


def pack_tables(tables: Sequence[tuple[int, Sequence[Held]]], limit: int) -> list[bytes]:
    """Encode the locks of inodes into payloads of RECLAIM_LOCKS, an inode whole in one, of *limit* bytes at most."""
    out: list[bytes] = []
    parts: list[bytes] = []
    size = 0
    for ino, locks in tables:
        part = _GROUP.pack(ino, len(locks)) + pack_held(locks)
        if len(part) > limit:
            raise MisuseError(f"{len(locks)} file locks of inode {ino} do not fit {limit} bytes")
        if size + len(part) > limit:
            out.append(b"".join(parts))
            parts, size = [], 0
        parts.append(part)
        size += len(part)
    if parts:
        out.append(b"".join(parts))
    return out


def unpack_tables(payload: bytes | bytearray | memoryview) -> list[tuple[int, list[Held]]]:
    """Decode one payload of :func:`pack_tables`. Raises PeerError."""
    view = memoryview(payload)
    tables = []
    at = 0
    while at < len(view):
        if at + _GROUP.size > len(view):
            raise PeerError("a list of file locks is cut short")
        ino, count = _GROUP.unpack_from(view, at)
        at += _GROUP.size
        end = at + count * _HELD.size
        if end > len(view) or is_resource(ino):
            raise PeerError(f"{count} file locks of inode {ino} in {len(view) - at} bytes")
        tables.append((ino, unpack_held(view[at:end])))
        at = end
    return tables
