"""Shipped operations: what a node asks of the home, and what the home answers (payloads of OP_REQ and OP_REPLY frames).

Session, sequence and epoch are in the frame header (:mod:`mxfs_proto.frames`). Each operation is declared once, in
:data:`REQUESTS`: its fields in order, each with a type letter:

========  ================================================================
``Q I q`` u64, u32, i64, network byte order
``v``     bytes: u32 length in the fixed part, the bytes at the end
========  ================================================================

A lower object is named (inode u64, generation u32). Replies are declared in :data:`REPLIES` in the same way, with ``A``
for the 76 bytes of an :class:`Attr`. The last one (of RENAME two: old, new) of an operation that changes a directory is
the directory's own, after the change.
"""

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from struct import error as struct_error
from typing import Any, NamedTuple

from mxfs_proto.errors import PeerError


class Fid(NamedTuple):
    """A lower object: XFS inode number and generation. Stays valid across a change of home."""

    ino: int
    gen: int


class Attr(NamedTuple):
    """Attributes of a lower object, as stat(2); times in nanoseconds since the epoch, blocks of 512 bytes."""

    ino: int
    gen: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


_ATTR = Struct("!QIIIIIQqQqqq")
assert _ATTR.size == 76


def pack_attr(attr: Attr) -> bytes:
    """Encode attributes (76 bytes)."""
    return _ATTR.pack(*attr)


def unpack_attr(data: bytes) -> Attr:
    """Decode :func:`pack_attr`."""
    return Attr._make(_ATTR.unpack(data))


class Op(IntEnum):
    """Code of a shipped operation."""

    LOOKUP = 1
    GETATTR = 2
    SETATTR = 3
    READLINK = 4
    MKNOD = 5
    MKDIR = 6
    SYMLINK = 7
    LINK = 8
    UNLINK = 9
    RMDIR = 10
    RENAME = 11
    CREATE = 12
    READ = 13
    WRITE = 14
    FSYNC = 15
    READDIR = 16
    STATFS = 17
    SETXATTR = 18
    GETXATTR = 19
    LISTXATTR = 20
    REMOVEXATTR = 21
    REAP = 22
    SYNC = 23
    WRITES = 24
    LK_SET = 25
    LK_TEST = 26
    LK_ADOPT = 27
    LK_CANCEL = 28
    FALLOCATE = 29
    LSEEK = 30
    COPY = 31
    IOCTL = 32
    BTIME = 33
    TMPFILE = 34
    LINK_UNNAMED = 35


class OpFlag(IntEnum):
    """Flags of a request."""

    WANT_LOCK = 1
    """Grant the requester cached locks with the reply where nothing conflicts."""


class Valid(IntEnum):
    """Which fields of SETATTR are meant (the FATTR_* bits of <linux/fuse.h>)."""

    MODE = 1
    UID = 2
    GID = 4
    SIZE = 8
    ATIME = 16
    MTIME = 32
    KILL_PRIV = 1 << 30


class WriteFlag(IntEnum):
    """Flags of WRITE."""

    APPEND = 1
    KILL_PRIV = 2
    STABLE = 4
    """Durable before the reply: the writer does not keep the data."""
    BESIDE = 8
    """The kernel of the home, whose own FUSE layer this is, may write the file at the same time."""


_OBJ = ("Q", "I")
_LOCK = ("Q", "Q", "Q", "I", "I", "I")
REQUESTS: dict[Op, tuple[str, ...]] = {
    Op.LOOKUP: (*_OBJ, "v"),
    Op.GETATTR: _OBJ,
    Op.SETATTR: (*_OBJ, "I", "I", "I", "I", "Q", "q", "q"),  # valid, mode, uid, gid, size, atime, mtime
    Op.READLINK: _OBJ,
    Op.MKNOD: (*_OBJ, "v", "I", "Q"),  # name, mode, rdev
    Op.MKDIR: (*_OBJ, "v", "I"),  # name, mode
    Op.SYMLINK: (*_OBJ, "v", "v"),  # name, target
    Op.LINK: (*_OBJ, *_OBJ, "v"),  # object, new parent, name
    Op.UNLINK: (*_OBJ, "v", *_OBJ),  # name, victim (see NO_FID)
    Op.RMDIR: (*_OBJ, "v"),
    Op.RENAME: (*_OBJ, "v", *_OBJ, "v", "I", *_OBJ),  # old, name, new, name, flags, victim
    Op.CREATE: (*_OBJ, "v", "I", "I"),  # name, mode, open flags
    Op.READ: (*_OBJ, "Q", "I"),  # offset, size
    Op.WRITE: (*_OBJ, "Q", "I", "v"),  # offset, WriteFlag, data
    Op.FSYNC: (*_OBJ, "I"),  # datasync
    Op.READDIR: (*_OBJ, "v", "I"),  # name to go on behind, entries at most
    Op.STATFS: (),
    Op.SETXATTR: (*_OBJ, "v", "v", "I"),  # name, value, XATTR_CREATE / XATTR_REPLACE
    Op.GETXATTR: (*_OBJ, "v"),
    Op.LISTXATTR: _OBJ,
    Op.REMOVEXATTR: (*_OBJ, "v"),
    Op.REAP: _OBJ,
    Op.SYNC: (),
    Op.WRITES: (*_OBJ, "I", "v"),  # WriteFlag, pack_writes
    # inode; owner, start, end, pid, type, flock of a file lock (mxfs_proto.filelocks)
    Op.LK_SET: ("Q", *_LOCK, "Q"),  # id of the waiter, 0: does not wait
    Op.LK_TEST: ("Q", *_LOCK),
    Op.LK_ADOPT: ("Q", "v"),  # pack_held
    Op.LK_CANCEL: ("Q", "Q"),  # id of the waiter
    Op.FALLOCATE: (*_OBJ, "I", "Q", "Q", "I"),  # FALLOC_FL mode, offset, length, 1: takes set-id bits away
    Op.LSEEK: (*_OBJ, "Q", "I"),  # offset, SEEK_DATA or SEEK_HOLE
    Op.COPY: (*_OBJ, "Q", *_OBJ, "Q", "Q", "I"),  # from, offset, to, offset, length, 1: takes set-id bits away
    Op.IOCTL: (*_OBJ, "I", "v"),  # command, what it is given
    Op.BTIME: _OBJ,
    Op.TMPFILE: (*_OBJ, "I"),  # directory, mode
    Op.LINK_UNNAMED: (*_OBJ, *_OBJ, "v"),  # object, new parent, name
}

REPLIES: dict[Op, tuple[str, ...]] = {
    Op.LOOKUP: ("A",),
    Op.GETATTR: ("A",),
    Op.SETATTR: ("A",),
    Op.READLINK: ("v",),
    Op.MKNOD: ("A", "A"),
    Op.MKDIR: ("A", "A"),
    Op.SYMLINK: ("A", "A"),
    Op.LINK: ("A", "A"),
    Op.UNLINK: (*_OBJ, "Q", "I", "A"),  # the object, where it is kept as an orphan (else 0, 0); inode, links before
    Op.RMDIR: ("A",),
    # orphan; the inode that was renamed, the one replaced, links of that before
    Op.RENAME: (*_OBJ, "Q", "Q", "I", "v", "A", "A"),
    Op.CREATE: ("I", "A", "A"),  # 1: the file was there already
    Op.READ: ("v",),
    Op.WRITE: ("Q", "I"),  # offset it was placed at, bytes written
    Op.FSYNC: (),
    Op.READDIR: ("I", "v"),  # 1: that was all; pack_entries
    Op.STATFS: ("Q",) * 9,
    Op.SETXATTR: (),
    Op.GETXATTR: ("v",),
    Op.LISTXATTR: ("v",),  # names, each ended by a zero byte
    Op.REMOVEXATTR: (),
    Op.REAP: (),
    Op.SYNC: (),
    Op.WRITES: ("Q",),  # bytes written, of all together
    Op.LK_SET: ("I",),  # 1: it waits
    Op.LK_TEST: ("I", "Q", "Q", "I", "I"),  # type (UNLOCK: none is in the way), start, end, pid, node
    Op.LK_ADOPT: (),
    Op.LK_CANCEL: (),
    Op.FALLOCATE: (),
    Op.LSEEK: ("Q",),
    Op.COPY: ("Q",),  # bytes copied
    Op.IOCTL: ("v",),
    Op.BTIME: ("q",),  # nanoseconds since the epoch
    Op.TMPFILE: ("A",),
    Op.LINK_UNNAMED: ("A", "A"),
}

_REQUEST = Struct("!HHIIQ")  # op, flags, uid, gid, lowest sequence whose reply the client still may need
_REPLY = Struct("!IH")  # errno (0: done), number of grants
_GRANT = Struct("!QBQ")  # inode, LockMode, grant sequence
MAX_DATA = 1 << 20
"""Bytes of data in one READ or WRITE at most."""
_COPIED = 64 << 10
"""What is read or written of more bytes is not copied out of the frame: its pages would cost more than its bytes."""
NO_FID = Fid(0, 0)
"""No object. As the victim of UNLINK and RENAME: the requester does not know which object loses its name, or has it
open; otherwise the victim is the object that it knows by that name and promises not to have open."""


class _Layout:
    """Packs and unpacks one field list: a fixed part (lengths for ``v``), then the byte fields in order.

    *views*: byte fields of more than _COPIED bytes are given as views of what came.
    """

    __slots__ = ("_attrs", "_struct", "_vars", "_views")

    def __init__(self, fields: Sequence[str], views: bool) -> None:
        self._views = views
        self._attrs = tuple(i for i, field in enumerate(fields) if field == "A")
        codes = []
        for field in fields:
            codes.append({"v": "I", "A": f"{_ATTR.size}s"}.get(field, field))
        self._struct = Struct("!" + "".join(codes))
        self._vars = tuple(i for i, field in enumerate(fields) if field == "v")

    def pack(self, values: Sequence[Any]) -> list[bytes]:
        row = list(values)
        for i in self._attrs:
            row[i] = _ATTR.pack(*row[i])
        tail = []
        for i in self._vars:
            tail.append(row[i])
            row[i] = len(row[i])
        return [self._struct.pack(*row), *tail]

    def unpack(self, data: memoryview) -> list[Any]:
        try:
            row = list(self._struct.unpack_from(data))
        except struct_error:
            raise PeerError(f"operation of {len(data)} bytes is cut short") from None
        at = self._struct.size
        for i in self._attrs:
            row[i] = Attr._make(_ATTR.unpack(row[i]))
        for i in self._vars:
            end = at + row[i]
            if end > len(data):
                raise PeerError(f"operation field of {row[i]} bytes exceeds the {len(data) - at} that came")
            row[i] = data[at:end] if self._views and row[i] > _COPIED else bytes(data[at:end])
            at = end
        if at != len(data):
            raise PeerError(f"{len(data) - at} bytes too many after an operation")
        return row


_MOVES_DATA = frozenset({Op.READ, Op.WRITE, Op.WRITES})
_REQUEST_LAYOUTS = {op: _Layout(fields, op in _MOVES_DATA) for op, fields in REQUESTS.items()}
_REPLY_LAYOUTS = {op: _Layout(fields, op in _MOVES_DATA) for op, fields in REPLIES.items()}
_OPS = {int(op): op for op in Op}


class Grant(NamedTuple):
    """A cached lock that came with a reply."""

    ino: int
    mode: int
    seq: int


class Request(NamedTuple):
    """A decoded request: ``values`` in the order of :data:`REQUESTS`."""

    op: Op
    flags: int
    uid: int
    gid: int
    ack: int
    values: list[Any]


def pack_request(op: Op, flags: int, uid: int, gid: int, ack: int, values: Sequence[Any]) -> list[bytes]:
    """Return the payload of an OP_REQ frame in parts (the last may be large: it is not copied)."""
    head = _REQUEST.pack(op, flags, uid, gid, ack)
    parts = _REQUEST_LAYOUTS[op].pack(values)
    parts[0] = head + parts[0]
    return parts


def unpack_request(payload: bytes | memoryview) -> Request:
    """Decode the payload of an OP_REQ frame; PeerError where it is not one."""
    view = memoryview(payload)
    if len(view) < _REQUEST.size:
        raise PeerError(f"operation of {len(view)} bytes is cut short")
    code, flags, uid, gid, ack = _REQUEST.unpack_from(view)
    op = _OPS.get(code)
    if op is None:
        raise PeerError(f"unknown operation {code}")
    return Request(op, flags, uid, gid, ack, _REQUEST_LAYOUTS[op].unpack(view[_REQUEST.size :]))


def pack_reply(op: Op, grants: Sequence[Grant], values: Sequence[Any]) -> list[bytes]:
    """Return the payload of a successful OP_REPLY in parts."""
    parts = _REPLY_LAYOUTS[op].pack(values)
    head = _REPLY.pack(0, len(grants)) + b"".join([_GRANT.pack(*grant) for grant in grants])
    parts[0] = head + parts[0]
    return parts


def pack_error(errno: int, grants: Sequence[Grant] = ()) -> list[bytes]:
    """Return the payload of a failed OP_REPLY; *errno* is not 0."""
    return [_REPLY.pack(errno, len(grants)) + b"".join([_GRANT.pack(*grant) for grant in grants])]


def unpack_reply(op: Op, payload: bytes | memoryview) -> tuple[int, list[Grant], list[Any]]:
    """Decode an OP_REPLY to *op*: (errno, grants, values); values are empty where errno is not 0."""
    view = memoryview(payload)
    if len(view) < _REPLY.size:
        raise PeerError(f"reply of {len(view)} bytes is cut short")
    errno, count = _REPLY.unpack_from(view)
    at = _REPLY.size
    if at + count * _GRANT.size > len(view):
        raise PeerError(f"reply of {len(view)} bytes cannot hold {count} grants")
    grants = [Grant._make(_GRANT.unpack_from(view, at + i * _GRANT.size)) for i in range(count)]
    at += count * _GRANT.size
    if errno:
        if at != len(view):
            raise PeerError(f"{len(view) - at} bytes too many after an error reply")
        return errno, grants, []
    return 0, grants, _REPLY_LAYOUTS[op].unpack(view[at:])


class Entry(NamedTuple):
    """A directory entry with the attributes of its object."""

    name: bytes
    attr: Attr


_PIECE = Struct("!QI")
PIECE_BYTES = _PIECE.size


def pack_writes(pieces: Sequence[tuple[int, bytes]]) -> bytes:
    """Encode the data of WRITES: each u64 offset, u32 length, the bytes. They are written in this order."""
    out = []
    for offset, data in pieces:
        out.append(_PIECE.pack(offset, len(data)))
        out.append(data)
    return b"".join(out)


def unpack_writes(blob: bytes) -> list[tuple[int, memoryview]]:
    """Decode :func:`pack_writes`; PeerError where the bytes do not end with a piece."""
    view = memoryview(blob)
    pieces = []
    at = 0
    while at < len(view):
        if at + _PIECE.size > len(view):
            raise PeerError("a batch of writes is cut short")
        offset, size = _PIECE.unpack_from(view, at)
        at += _PIECE.size
        if at + size > len(view):
            raise PeerError(f"a write of {size} bytes exceeds the {len(view) - at} that came")
        pieces.append((offset, view[at : at + size]))
        at += size
    return pieces


_NAME = Struct("!B")


def pack_entries(entries: Sequence[Entry]) -> bytes:
    """Encode entries for READDIR: each u8 name length, name, attributes (76 bytes)."""
    out = []
    for name, attr in entries:
        out.append(_NAME.pack(len(name)))
        out.append(name)
        out.append(_ATTR.pack(*attr))
    return b"".join(out)


def unpack_entries(data: bytes) -> list[Entry]:
    """Decode :func:`pack_entries`; PeerError where the bytes do not end with an entry."""
    entries = []
    at, end = 0, len(data)
    while at < end:
        size = data[at]
        after = at + 1 + size + _ATTR.size
        if after > end:
            raise PeerError("directory listing is cut short")
        entries.append(Entry(data[at + 1 : at + 1 + size], Attr._make(_ATTR.unpack_from(data, at + 1 + size))))
        at = after
    return entries
