"""Exactly once over a crash of the home: records of operations, and how one without outcome is settled (pure).

The home writes an **intent** before an operation changes anything and its **outcome** (the reply) behind it, each in
one transaction of XFS. Its log keeps their order: whatever a crash leaves is a beginning of it. So where an outcome is
missing, nothing that came after the operation is there either; and since the operation held EX locks until its outcome
was written, nobody has touched, or seen, what it changed. Comparing with what the intent says of before tells all.

Record, little endian: HEADER, then the body. Body of an intent: BEFORE, then the request as on the wire
(:func:`mxfs_proto.ops.pack_request`); of an outcome: the reply as on the wire, without grants. docs/ondisk.md.

Errors: MediaError (EUCLEAN) for bytes that are torn, of another version or volume, or make no sense.
"""

import hashlib
import stat
import struct
import zlib
from collections.abc import Sequence
from enum import Enum, IntEnum, IntFlag
from typing import Any, NamedTuple

from mxfs_proto import ioctls
from mxfs_proto.errors import MediaError, PeerError
from mxfs_proto.ops import NO_FID, Attr, Fid, Op, Request, WriteFlag, pack_request, unpack_request

MAGIC = b"MXop"
VERSION = 1
HEADER = struct.Struct("<4sHBBQQQII")
"""Magic, version, RecordKind, zero, volume id, session, sequence, bytes of the body, CRC-32 of all the rest."""
BEFORE = struct.Struct("<QIQIQI")
"""The fields of :class:`Before`."""
assert (HEADER.size, BEFORE.size) == (40, 36)
_SEALED = HEADER.size - 4

SHORT = 250
"""A record up to this size stays inside its inode, where it is replaced in one transaction."""
_VALUE_MAX = 1024
"""The value of an extended attribute up to this size is kept in the intent, of a longer one its SHA-256."""


class RecordKind(IntEnum):
    """What a record is."""

    INTENT = 1
    OUTCOME = 2


class Record(NamedTuple):
    """One record of the operation (session, seq)."""

    kind: RecordKind
    session: int
    seq: int
    body: bytes


class BeforeFlag(IntFlag):
    """Flags of :class:`Before`."""

    NONE = 0
    KEPT = 1
    """The object that loses its last name is open somewhere: it gets a name among the orphans."""
    DIGEST = 2
    """Instead of the attribute's value the request has its SHA-256."""
    PRESENT = 4
    """The attribute was there."""
    BESIDE = 8
    """WRITE, WRITES: programs of the home may have made the file longer at the same time (FUSE passthrough)."""
    PLACED = 16
    """With BESIDE: it is known where the data went."""


class Before(NamedTuple):
    """How things were before the operation, as far as that is needed to tell whether it was executed."""

    first: Fid = NO_FID
    """UNLINK, RMDIR, RENAME: what stands under the (old) name. With PLACED its first number is where the data ends."""
    second: Fid = NO_FID
    """RENAME: what stands under the new name."""
    number: int = 0
    """UNLINK, RENAME: links of the object that loses a name; WRITE, WRITES: size of the file in bytes, with PLACED
    where the data went, with BESIDE alone nothing."""
    flags: BeforeFlag = BeforeFlag.NONE


class Intent(NamedTuple):
    """What an intent's body says."""

    before: Before
    request: Request


MAKES = frozenset({Op.CREATE, Op.MKNOD, Op.MKDIR, Op.SYMLINK})
"""Operations that make an object under a name that was free."""
_TAKES_INTENT = (
    MAKES
    | {Op.LINK, Op.LINK_UNNAMED, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.SETATTR, Op.SETXATTR, Op.REMOVEXATTR}
    | {Op.FALLOCATE, Op.COPY}
)


def takes_intent(request: Request) -> bool:
    """Whether the operation must not be executed twice, so that it needs an intent.

    A WRITE to a place may be repeated until it was answered: nobody has seen it before. An appending one may not.
    """
    if request.op is Op.WRITE:
        return bool(request.values[3] & WriteFlag.APPEND)
    if request.op is Op.WRITES:
        return bool(request.values[2] & WriteFlag.APPEND)
    if request.op is Op.IOCTL:
        return request.values[2] in ioctls.SETS
    return request.op in _TAKES_INTENT


def pack_record(volume_id: int, record: Record) -> bytes:
    """Encode a record."""
    kind, session, seq, body = record
    head = HEADER.pack(MAGIC, VERSION, kind, 0, volume_id, session, seq, len(body), 0)[:_SEALED]
    return head + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little") + body


def unpack_record(volume_id: int, data: bytes) -> Record:
    """Decode a record. Raises MediaError."""
    if len(data) < HEADER.size:
        raise MediaError(f"operation record of {len(data)} bytes")
    magic, version, kind, zero, volume, session, seq, length, crc = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if magic != MAGIC:
        raise MediaError("not an operation record")
    if length != len(body) or zlib.crc32(body, zlib.crc32(data[:_SEALED])) != crc:
        raise MediaError("an operation record is torn")
    if version != VERSION or zero or kind not in (1, 2):
        raise MediaError(f"operation record of version {version}, kind {kind}")
    if volume != volume_id:
        raise MediaError(f"operation record of another volume ({volume:#x})")
    return Record(RecordKind(kind), session, seq, body)


def pack_intent(request: Request, before: Before) -> bytes:
    """Encode the body of an intent, without data that settling does not need."""
    values = list(request.values)
    flags = before.flags
    if request.op in (Op.SYMLINK, Op.WRITES):
        values[3] = b""
    elif request.op is Op.WRITE:
        values[4] = b""
    elif request.op is Op.SETXATTR and len(values[3]) > _VALUE_MAX:
        values[3] = hashlib.sha256(values[3]).digest()
        flags |= BeforeFlag.DIGEST
    head = BEFORE.pack(*before.first, *before.second, before.number, flags)
    return head + b"".join(pack_request(request.op, request.flags, request.uid, request.gid, request.ack, values))


def unpack_intent(body: bytes) -> Intent:
    """Decode the body of an intent. Raises MediaError."""
    if len(body) < BEFORE.size:
        raise MediaError(f"intent of {len(body)} bytes")
    first, first_gen, second, second_gen, number, flags = BEFORE.unpack_from(body)
    try:
        request = unpack_request(body[BEFORE.size :])
    except PeerError as exc:
        raise MediaError(f"an intent makes no sense: {exc}") from exc
    if flags & ~sum(BeforeFlag) or not takes_intent(request):
        raise MediaError(f"an intent makes no sense: {request.op.name}, flags {flags:#x}")
    return Intent(Before(Fid(first, first_gen), Fid(second, second_gen), number, BeforeFlag(flags)), request)


# -- settling ----------------------------------------------------------------------------------------------------------


class Now(NamedTuple):
    """How things are after the crash."""

    first: Attr | None = None
    """What stands under the operation's (first) name: of LINK the new one."""
    second: Attr | None = None
    """RENAME: what stands under the new name."""
    inherits: bool = False
    """The directory has a default ACL."""
    parents: tuple[Attr, ...] = ()
    """The directory, of RENAME the old and the new one."""
    digest: bytes | None = None
    """SETXATTR with DIGEST: SHA-256 of the attribute's value now; None where it is not set."""
    size: int = 0
    """WRITE, WRITES with PLACED: size of the file in bytes."""


class Step(Enum):
    """What is to be done about an operation without outcome."""

    KEEP = "keep"
    """It was executed: its reply is made and kept."""
    REDO = "redo"
    """It can be repeated without harm: do so, and keep the reply (where that fails: as FORGET)."""
    UNDO = "undo"
    """Take back what is there of it; its client sends it again."""
    FORGET = "forget"
    """It was not executed; its client sends it again."""


def settle(intent: Intent, now: Now) -> Step:
    """Decide about an operation without outcome.

    The object under a name that was free is the operation's own: nobody else could use the name since. An object is
    made in one transaction and inherits ACLs in others, so where there are any a new object may be unfinished: it is
    removed (nobody saw it; only what is empty and has one name). Appended data may be there in part: the size before
    is the truth.
    """
    op = intent.request.op
    before = intent.before
    if op in MAKES:
        if now.first is None:
            return Step.FORGET
        return Step.UNDO if now.inherits and _empty(now.first) else Step.KEEP
    if op in (Op.LINK, Op.LINK_UNNAMED):
        return Step.FORGET if now.first is None else Step.KEEP
    if op in (Op.UNLINK, Op.RMDIR):
        return Step.FORGET if _fid(now.first) == before.first else Step.KEEP
    if op is Op.RENAME:
        # Two names of one object: the system call does nothing, and both stay.
        return Step.KEEP if _fid(now.first) != before.first == _fid(now.second) else Step.FORGET
    if op is Op.SETXATTR and before.flags & BeforeFlag.DIGEST:
        return Step.KEEP if now.digest == intent.request.values[3] else Step.FORGET
    if op in (Op.WRITE, Op.WRITES):
        return _settle_append(before, now)
    return Step.REDO


def _settle_append(before: Before, now: Now) -> Step:
    """Beside other writers the log has the place before it has a size that reaches there. What stands behind the data
    is somebody else's, durable perhaps: then the file stays as it is, and the data is appended once more."""
    if before.flags & BeforeFlag.BESIDE and not before.flags & BeforeFlag.PLACED:
        return Step.FORGET
    if before.flags & BeforeFlag.PLACED and now.size > before.first.ino:
        return Step.FORGET
    return Step.UNDO


def _empty(attr: Attr) -> bool:
    if stat.S_ISDIR(attr.mode):
        return attr.nlink == 2
    return attr.nlink == 1 and (attr.size == 0 or not stat.S_ISREG(attr.mode))


def _fid(attr: Attr | None) -> Fid:
    return NO_FID if attr is None else Fid(attr.ino, attr.gen)


def reply_values(intent: Intent, now: Now) -> Sequence[Any]:
    """The values of the reply of an operation that was executed (Step.KEEP): what would have been answered."""
    op = intent.request.op
    before = intent.before
    kept = before.second if op is Op.RENAME else before.first
    if not before.flags & BeforeFlag.KEPT:
        kept = NO_FID
    if op is Op.CREATE:
        return [0, now.first, *now.parents]
    if op in MAKES or op in (Op.LINK, Op.LINK_UNNAMED):
        return [now.first, *now.parents]
    if op is Op.UNLINK:
        return [*kept, before.first.ino, before.number, *now.parents]
    if op is Op.RENAME:
        return [*kept, before.first.ino, before.second.ino, before.number, b"", *now.parents]
    return [*now.parents]
