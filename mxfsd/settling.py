"""What a new home does before it serves: replies of the home before are restored, unfinished operations settled.

Called after the mount, which has replayed the XFS log. All of it may be repeated: a crash in the middle leaves the same
question, with the same answer, to the next home.
"""

import errno
import hashlib
from typing import NamedTuple

import structlog

from mxfs_proto.ops import Attr, Fid, Op, Valid, pack_reply
from mxfsd.core.outcomes import (
    MAKES,
    BeforeFlag,
    Intent,
    Now,
    Record,
    RecordKind,
    Step,
    reply_values,
    settle,
    unpack_intent,
)
from mxfsd.core.sessions import SessionTable
from mxfsd.io.lower import Lower
from mxfsd.oprecords import Key, OpRecords, Slot

log = structlog.get_logger(__name__)


class Recovered(NamedTuple):
    """What recover_sessions() did."""

    records: OpRecords
    """Where the home writes from now on."""
    restored: int
    """Replies restored from outcomes."""
    executed: int
    """Operations without outcome that had been executed, or were completed now: their replies were made."""
    forgotten: int
    """Operations without outcome that had not been executed, or were taken back: their clients send them again."""
    named_again: int
    """Files that had a name among the orphans though they have another one."""


def recover_sessions(lower: Lower, sessions: SessionTable, volume_id: int) -> Recovered:
    """Fill *sessions* from the volume and settle every operation without outcome, durably.

    Blocking. Raises OSError, MediaError (a record that is torn or foreign: then this home must not serve).
    """
    records = OpRecords(lower, volume_id)
    restored = executed = forgotten = 0
    found = records.load()
    for slot, record in found:
        if record.kind is RecordKind.OUTCOME:
            sessions.restore(record.session, record.seq, record.body)
            records.keep(Key(record.session, record.seq), slot)
            restored += 1
    for slot, record in found:
        if record.kind is RecordKind.INTENT:
            if _settle_one(lower, sessions, records, slot, record):
                executed += 1
            else:
                forgotten += 1
    named_again = _names_again(lower)
    records.reserve()
    if executed or forgotten or named_again:
        lower.syncfs()
    sessions.on_forget = records.release
    return Recovered(records, restored, executed, forgotten, named_again)


def _settle_one(lower: Lower, sessions: SessionTable, records: OpRecords, slot: Slot, record: Record) -> bool:
    """Settle one operation; whether it counts as executed."""
    intent = unpack_intent(record.body)
    now = _look(lower, intent)
    step = settle(intent, now)
    reply = b""
    if step is Step.KEEP:
        reply = b"".join(pack_reply(intent.request.op, [], reply_values(intent, now)))
    elif step is Step.REDO:
        try:
            reply = _redo(lower, intent)
        except (OSError, ValueError) as exc:
            if lower.is_shut_down():
                raise
            log.info("an operation that cannot be completed", op=intent.request.op.name, reason=str(exc))
    elif step is Step.UNDO:
        _undo(lower, intent, now)
    log.info("settled", op=intent.request.op.name, session=record.session, seq=record.seq, step=step.value)
    if not reply:
        records.clear(slot)
        return False
    records.outcome(Key(record.session, record.seq), slot, reply)
    sessions.restore(record.session, record.seq, reply)
    return True


def _name(intent: Intent) -> tuple[Fid, bytes] | None:
    """The (first) name that the operation is about."""
    values = intent.request.values
    if intent.request.op in (Op.LINK, Op.LINK_UNNAMED):
        return Fid(values[2], values[3]), values[4]
    if intent.request.op in MAKES or intent.request.op in (Op.UNLINK, Op.RMDIR, Op.RENAME):
        return Fid(values[0], values[1]), values[2]
    return None


def _look(lower: Lower, intent: Intent) -> Now:
    """How things are now."""
    op, values = intent.request.op, intent.request.values
    name = _name(intent)
    first = _peek(lower, *name) if name is not None else None
    second = _peek(lower, Fid(values[3], values[4]), values[5]) if op is Op.RENAME else None
    parents = [lower.getattr(name[0])] if name is not None else []
    if op is Op.RENAME:
        parents.append(lower.getattr(Fid(values[3], values[4])))
    inherits = first is not None and op in MAKES and lower.inherits_acl(Fid(values[0], values[1]))
    digest = None
    if op is Op.SETXATTR and intent.before.flags & BeforeFlag.DIGEST:
        try:
            digest = hashlib.sha256(lower.getxattr(Fid(values[0], values[1]), values[2])).digest()
        except OSError as exc:
            if exc.errno not in (errno.ENODATA, errno.ESTALE):
                raise
    size = 0
    if intent.before.flags & BeforeFlag.PLACED:
        try:
            size = lower.getattr(Fid(values[0], values[1])).size
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
    return Now(first, second, inherits, tuple(parents), digest, size)


def _peek(lower: Lower, parent: Fid, name: bytes) -> Attr | None:
    try:
        return lower.lookup(parent, name)
    except FileNotFoundError:
        return None


def _redo(lower: Lower, intent: Intent) -> bytes:
    """Do again what may be half done; return the reply."""
    op, values = intent.request.op, intent.request.values
    fid = Fid(values[0], values[1])
    if op is Op.SETATTR:
        attr = lower.setattr(fid, *values[2:])
        if _only_orphan(lower, fid, attr):
            attr = attr._replace(nlink=0)
        return b"".join(pack_reply(op, [], [attr]))
    if op is Op.COPY:
        done = lower.copy(fid, values[2], Fid(values[3], values[4]), *values[5:])
        return b"".join(pack_reply(op, [], [done]))
    if op is Op.IOCTL:
        return b"".join(pack_reply(op, [], [lower.ioctl(fid, values[2], values[3])]))
    if op is Op.FALLOCATE:
        lower.fallocate(fid, *values[2:])
    elif op is Op.SETXATTR:
        lower.setxattr(fid, values[2], values[3], 0)
    else:
        assert op is Op.REMOVEXATTR, op
        try:
            lower.removexattr(fid, values[2])
        except OSError as exc:
            if exc.errno != errno.ENODATA or not intent.before.flags & BeforeFlag.PRESENT:
                raise
    return b"".join(pack_reply(op, [], []))


def _only_orphan(lower: Lower, fid: Fid, attr: Attr) -> bool:
    """Whether the only name of the object is the one among the orphans."""
    return attr.nlink == 1 and lower.is_orphan(fid)


def _undo(lower: Lower, intent: Intent, now: Now) -> None:
    """Take back what is there of an operation that nobody has seen."""
    op, values = intent.request.op, intent.request.values
    if op in MAKES:
        assert now.first is not None
        parent = Fid(values[0], values[1])
        if op is Op.MKDIR:
            lower.rmdir(parent, values[2])
        else:
            lower.unlink(parent, values[2], None)
        lower.forget(now.first.ino)
    else:
        fid = Fid(values[0], values[1])
        try:
            attr = lower.getattr(fid)
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
            return
        if attr.size > intent.before.number:
            lower.setattr(fid, Valid.SIZE, 0, 0, 0, intent.before.number, 0, 0)


def _names_again(lower: Lower) -> int:
    """Take the names among the orphans from files that have another name too.

    A rename over an open file gives it a name among the orphans first; a crash right behind that leaves both.
    """
    count = 0
    for fid in lower.orphans():
        if lower.getattr(fid).nlink > 1:
            lower.reap(fid)
            count += 1
    return count
