"""Exactly once: which shipped operations of which session were executed, and what they were answered (pure).

A session is one incarnation of a client. It numbers its operations from 1; several may be under way, so numbers may
come in any order. Each request carries *ack*: the client has the replies of all numbers up to it and never asks for
them again. A reply is kept until then. Before a planned move of the home the replies are exported to a file on the
volume, from which the next home loads them (``.mxfs/replies``).

File, little endian: HEADER; for each session SESSION, then for each kept reply REPLY and the reply's bytes.

Errors: MisuseError for our own wrong calls, PeerError (EPROTO) for a client that breaks the rules or its limits,
MediaError (EUCLEAN) for a file that is torn, foreign or of another version. Nothing is changed then.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import Enum

from mxfs_proto.errors import MediaError, MisuseError, PeerError

MAGIC = b"MXFSrepl"
VERSION = 1
HEADER = struct.Struct("<8sHHIQQII")
"""Magic, version, zero, number of sessions, volume id, length of the body, CRC-32 of the body, CRC-32 of the 36 bytes
before."""
SESSION = struct.Struct("<QQI")
"""Session, highest acknowledged number, number of replies."""
REPLY = struct.Struct("<QI")
"""Number of the operation, length of its reply."""
assert (HEADER.size, SESSION.size, REPLY.size) == (40, 20, 12)
_SEALED = HEADER.size - 4

MAX_REPLIES = 4096
"""So many operations of a session may be under way or unacknowledged."""
MAX_BYTES = 64 << 20
"""So many bytes of unacknowledged replies a session may have."""
_U64 = 1 << 64


class Verdict(Enum):
    """What to do with a request for which no reply is kept."""

    NEW = "new"
    """Execute it, then call done() or abandon()."""
    IN_PROGRESS = "in progress"
    """It is being executed: its reply will be sent when it is done."""
    STALE = "stale"
    """The client said it has the reply: nothing is to be done."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation was executed: send this reply again."""

    reply: bytes


class _Session:
    __slots__ = ("acked", "replies", "size")

    def __init__(self) -> None:
        self.acked = 0
        self.replies: dict[int, bytes | None] = {}
        self.size = 0


class SessionTable:
    """The reply caches of all sessions of a volume."""

    def __init__(self, volume_id: int = 0, *, max_replies: int = MAX_REPLIES, max_bytes: int = MAX_BYTES) -> None:
        """Make an empty table; *volume_id* is written to exports and demanded of what is loaded."""
        self._volume_id = volume_id
        self._max_replies = max_replies
        self._max_bytes = max_bytes
        self._sessions: dict[int, _Session] = {}

    def begin(self, session: int, seq: int, ack: int) -> Verdict | Replay:
        """A request arrived. Raises PeerError for numbers that make no sense, or when a limit is exceeded.

        An operation that runs while its number is acknowledged is a late repetition of a repeatable one.
        """
        if not (0 <= ack < seq < _U64 and 0 <= session < _U64):
            raise PeerError(f"session {session:#x}: operation {seq} with ack {ack}")
        table = self._sessions.get(session)
        if table is None:
            table = _Session()
        trimmed = [number for number in table.replies if number <= ack] if ack > table.acked else []
        if seq > table.acked and seq not in table.replies:
            size = table.size - sum(len(table.replies[number] or b"") for number in trimmed)
            if len(table.replies) - len(trimmed) >= self._max_replies or size > self._max_bytes:
                raise PeerError(f"session {session:#x}: too many replies without ack")
        self._sessions[session] = table
        table.acked = max(table.acked, ack)
        for number in trimmed:
            table.size -= len(table.replies.pop(number) or b"")
        if seq <= table.acked:
            return Verdict.STALE
        if seq in table.replies:
            reply = table.replies[seq]
            return Verdict.IN_PROGRESS if reply is None else Replay(reply)
        table.replies[seq] = None
        return Verdict.NEW

    def done(self, session: int, seq: int, reply: bytes, *, repeatable: bool = False) -> None:
        """The operation was executed. *repeatable*: doing it again does no harm, so its reply is not kept.

        A session dropped or a number acknowledged meanwhile is no error. Raises MisuseError where the operation was
        not begun.
        """
        table = self._sessions.get(session)
        if table is None or seq <= table.acked:
            return
        if table.replies.get(seq, b"") is not None:
            raise MisuseError(f"session {session:#x}: operation {seq} is not under way")
        if repeatable:
            del table.replies[seq]
        else:
            table.replies[seq] = reply
            table.size += len(reply)

    def abandon(self, session: int, seq: int) -> None:
        """The operation was not executed and changed nothing; the client may send it again. Errors as for done()."""
        table = self._sessions.get(session)
        if table is None or seq <= table.acked:
            return
        if table.replies.get(seq, b"") is not None:
            raise MisuseError(f"session {session:#x}: operation {seq} is not under way")
        del table.replies[seq]

    def drop(self, session: int) -> None:
        """Forget a session: its client is gone for good."""
        self._sessions.pop(session, None)

    def sessions(self) -> list[int]:
        """Return the sessions known."""
        return list(self._sessions)

    def export(self) -> bytes:
        """Return the file of all replies kept. Raises MisuseError while an operation is being executed."""
        parts = []
        for session, table in self._sessions.items():
            parts.append(SESSION.pack(session, table.acked, len(table.replies)))
            for seq, reply in table.replies.items():
                if reply is None:
                    raise MisuseError(f"session {session:#x}: operation {seq} is under way")
                parts.append(REPLY.pack(seq, len(reply)))
                parts.append(reply)
        body = b"".join(parts)
        fields = (MAGIC, VERSION, 0, len(self._sessions), self._volume_id, len(body), zlib.crc32(body))
        head = HEADER.pack(*fields, 0)[:_SEALED]
        return head + zlib.crc32(head).to_bytes(4, "little") + body

    def load(self, data: bytes) -> None:
        """Take over what export() of another home wrote; sessions known here are replaced. Raises MediaError."""
        if len(data) < HEADER.size:
            raise MediaError(f"reply file of {len(data)} bytes")
        magic, version, zero, count, volume_id, length, body_crc, head_crc = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise MediaError("not a reply file")
        if zlib.crc32(data[:_SEALED]) != head_crc:
            raise MediaError("the header of the reply file is torn")
        if version != VERSION or zero != 0:
            raise MediaError(f"reply file of version {version}")
        if volume_id != self._volume_id:
            raise MediaError(f"reply file of another volume ({volume_id:#x})")
        body = data[HEADER.size :]
        if length != len(body) or zlib.crc32(body) != body_crc:
            raise MediaError("the reply file is torn")
        self._sessions.update(_parse(body, count))


def _parse(body: bytes, count: int) -> dict[int, _Session]:
    """Return the sessions of a body whose checksum is right. Raises MediaError if it makes no sense all the same."""
    sessions: dict[int, _Session] = {}
    at = 0
    try:
        for _ in range(count):
            session, acked, replies = SESSION.unpack_from(body, at)
            at += SESSION.size
            table = _Session()
            table.acked = acked
            for _ in range(replies):
                seq, length = REPLY.unpack_from(body, at)
                at += REPLY.size
                if length > len(body) - at or seq <= acked or seq in table.replies:
                    raise MediaError("a reply in the reply file makes no sense")
                table.replies[seq] = body[at : at + length]
                table.size += length
                at += length
            if session in sessions:
                raise MediaError("a session stands twice in the reply file")
            sessions[session] = table
    except struct.error as exc:
        raise MediaError(f"the reply file ends too soon: {exc}") from exc
    if at != len(body):
        raise MediaError("the reply file goes on after its last session")
    return sessions
